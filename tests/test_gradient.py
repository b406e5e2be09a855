"""The gradients of a step: recorded and replayed as computed plainly."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from networks import Code, named
from test_search import images as coloured
from test_search import network as colours
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compactcli import distributed, gradient, methods
from compactcli.compress import Search, Target, compress
from compactcli.errors import CompactError, UsageError
from compactcli.finetune import finetune
from compactcli.gradient import WARM_UP, Plain, Recorded
from compactcli.optim import Settings

SETTINGS = Settings(precision="float32")
SHAPE = (3, 16, 16)


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the operations of a block, which are done again on the very same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, _tensors(result)))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, results in self.operations:
                again = _tensors(func(*args, **kwargs))
                for old, new in zip(results, again, strict=True):
                    if old.data_ptr() != new.data_ptr():  # else a view, or in place
                        old.copy_(new)


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


class Stream:
    def __init__(self, device: torch.device) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass


def on_cpu(monkeypatch: pytest.MonkeyPatch, networks: Sequence[nn.Module] = ()) -> list[Tape]:
    """Let torch.cuda's graphs be tapes; the list of those that were recorded. Recording changes none of the networks."""
    recorded = []

    @contextmanager
    def graph(tape: Tape, stream: Stream) -> Iterator[None]:
        tensors = [tensor for one in networks for tensor in [*one.parameters(), *one.buffers()]]
        before = [tensor.detach().clone() for tensor in tensors]
        with tape:
            yield
        with torch.no_grad():
            for tensor, own in zip(tensors, before, strict=True):
                tensor.copy_(own)
        recorded.append(tape)

    @contextmanager
    def stream(one: Stream) -> Iterator[None]:
        yield

    for name, own in {"Stream": Stream, "CUDAGraph": Tape, "graph": graph, "stream": stream}.items():
        monkeypatch.setattr(torch.cuda, name, own)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    return recorded


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return named("cifar:resnet8", width=4, num_classes=5)


def batch(number: int, images: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(images, *SHAPE, generator=generator), torch.randint(0, 5, (images,), generator=generator)


def trained(
    model: nn.Module,
    made: Callable[[nn.Module], gradient.Gradient],
    sizes: list[int],
    *,
    after: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Take a step for each batch of so many images; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    compute, losses = made(model), []
    for step, images in enumerate(sizes):
        optimizer.zero_grad()
        losses.append(float(compute(*batch(step, images), images)))
        optimizer.step()
        after(step)
    return losses


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_teacher_sees_the_images_that_the_network_sees(precision: str) -> None:
    """Though each of them overwrites what it is given: from its own copy a network has nothing to learn."""
    overwrites = Code(lambda s, x: x.sub_(0.5).mul_(2.0))
    model = nn.Sequential(overwrites, nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 16 * 16, 5))
    images, labels = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 5
    settings = Settings(precision=precision, distill_weight=1.0)
    assert abs(float(Plain(model, copy.deepcopy(model), settings)(images, labels, 8))) < 1e-6


def recorded(model: nn.Module, teacher: nn.Module | None = None, settings: Settings = SETTINGS) -> Recorded:
    return Recorded(Plain(model, teacher, settings), model, 8, torch.device("cpu"))


def plain(model: nn.Module, teacher: nn.Module | None = None, settings: Settings = SETTINGS) -> Plain:
    return Plain(model, teacher, settings)


@pytest.mark.parametrize("sizes", [[8] * 8, [8, 8, 8, 8, 3, 8, 8, 3, 8], [3, 8, 8, 8, 3, 8, 8, 3]], ids=["even", "rest", "first"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_replayed_steps_are_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], *, guided: bool, accumulate: int
) -> None:
    """Batches of other sizes among them leave the gradients where the graph writes them."""
    models, teacher = [network(), network()], network(1).eval() if guided else None
    tapes = on_cpu(monkeypatch, models[1:])
    settings = Settings(precision="float32", accumulate=accumulate)
    expected = trained(models[0].train(), partial(plain, teacher=teacher, settings=settings), sizes)
    found = trained(models[1].train(), partial(recorded, teacher=teacher, settings=settings), sizes)
    assert len(tapes) == 1
    assert found == expected
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(models[1].state_dict()[name], tensor), name


def test_parameters_that_were_moved_are_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [network(), network()]
    tapes = on_cpu(monkeypatch, models[1:])

    def move(model: nn.Module, step: int) -> None:
        if step == WARM_UP + 1:
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()

    expected, found = (
        trained(model.train(), made, [8] * 8, after=partial(move, model))
        for model, made in zip(models, (plain, recorded), strict=True)
    )
    assert len(tapes) == 2
    assert found == expected


@pytest.mark.parametrize("name", methods.names())
def test_searched_and_trained_with_recorded_steps_is_the_same_network(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whatever the methods' hooks, a bound on gradients and averages do around the passes; with a rest in each epoch."""
    chosen = Settings(epochs=3, batch_size=25, lr=0.02, precision="float32", clip_grad=0.5, ema=0.5)
    made = []
    for replayed in (False, True):
        networks: list[nn.Module] = []
        if replayed:
            tapes = on_cpu(monkeypatch, networks)

            def of(network: nn.Module, teacher: nn.Module | None, settings: Settings, *, own: Any = networks) -> Recorded:
                own[:] = [network]
                return Recorded(Plain(network, teacher, settings), network, settings.batch_size, torch.device("cpu"))

            monkeypatch.setattr(gradient, "of", of)
        one, teacher = colours(), colours()
        compress(one, name, methods.get(name)(), Target(0.6, nearest=True), search=Search(coloured(), chosen, teacher))
        finetune(one, coloured(), chosen, teacher=teacher, keep="last")
        made.append(one.module.state_dict())
    assert len(tapes) == 2  # one of the search, one of fine-tuning
    assert made[0].keys() == made[1].keys()
    for key, tensor in made[0].items():
        assert torch.equal(made[1][key], tensor), key


def test_what_asks_for_values_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.inner(x)
            return scores if float(scores.detach().sum()) else -scores

    on_cpu(monkeypatch)
    with pytest.raises(CompactError, match=r"--cuda-graphs: .*capturing\); leave it out$"):
        trained(Asks(), recorded, [8] * (WARM_UP + 1))


@pytest.mark.parametrize("values", [{}, {"device": "cuda", "compile": True}])
def test_it_is_for_a_gpu_alone(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--cuda-graphs"):
        Settings(cuda_graphs=True, **values)


def test_it_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "running", lambda: True)
    with pytest.raises(UsageError, match="--cuda-graphs: it is for one process"):
        Settings(device="cuda", cuda_graphs=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_replayed_steps_are_the_plain_ones_on_cuda(precision: Any) -> None:
    """To rounding: cuDNN adds up in any order."""
    settings = Settings(device="cuda", precision=precision, batch_size=8, cuda_graphs=True)
    found = []
    for made in (Plain, lambda model, teacher, own: gradient.of(model, teacher, own)):
        model, teacher = network().cuda().train(), network(1).cuda().eval()
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
        compute: Any = made(model, teacher, settings)
        for step, images in enumerate([8, 8, 8, 8, 3, 8, 8, 3, 8]):
            optimizer.zero_grad()
            inputs, labels = batch(step, images)
            losses.append(float(compute(inputs.cuda(), labels.cuda(), images)))
            optimizer.step()
        found.append((losses, model.state_dict()))
    (expected, weights), (losses, own) = found
    exact = {"rtol": 1e-4, "atol": 1e-4} if precision == "float32" else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(losses, expected, **exact)
    torch.testing.assert_close(own, weights, **exact)
