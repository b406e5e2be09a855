"""Times of networks and layers, by a clock of their own and by the machine's."""

import itertools
import math

import networks
import pytest
import torch
from networks import AWKWARD, SHAPE, named
from torch import Tensor, nn

from compactcli import latency, measure
from compactcli.errors import CompactError


class Clock:
    """Time that only networks spend."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def network(self, name: str, *milliseconds: float) -> nn.Module:
        """Takes so long in turn, and again from the first; an input in channels_last takes half."""
        turns = itertools.cycle(milliseconds)

        def forward(owner: nn.Module, image: Tensor) -> Tensor:
            fast = image.shape[1] > 1 and image.is_contiguous(memory_format=torch.channels_last)
            self.now += next(turns) / 1e3 / (2 if fast else 1)
            self.calls.append(name)
            return image

        return networks.Code(forward)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock.now)
    return clock


def test_networks_are_timed_in_turn(clock):
    """Round after round, each once: a machine that slows down slows all alike."""
    pair = [clock.network("a", 1), clock.network("b", 20)]
    first, second = latency.of(pair, SHAPE, repeats=4, seconds=0, memory_formats=["contiguous"])
    warm = latency.WARM_UP
    assert clock.calls == ["a"] * warm + ["b"] * warm + ["a", "b"] * 4
    assert (first.runs, second.runs) == (4, 4)
    assert first.median_ms == pytest.approx(1)
    assert second.median_ms == pytest.approx(20)


def test_memory_formats_are_timed_in_turn_and_the_faster_is_chosen(clock):
    (found,) = latency.of([clock.network("a", 4)], SHAPE, repeats=3, seconds=0)
    assert len(clock.calls) == 2 * (latency.WARM_UP + 3)
    assert (found.memory_format, found.median_ms) == ("channels_last", pytest.approx(2))
    (gray,) = latency.of([clock.network("a", 4)], (1, 8, 8), repeats=3, seconds=0)
    assert gray.memory_format == "contiguous"  # where there is no difference


def test_median_spread_and_throughput(clock):
    (found,) = latency.of([clock.network("a", 1, 2, 3, 4, 100)], SHAPE, batch=6, seconds=0, memory_formats=["contiguous"])
    assert found.median_ms == pytest.approx(3)
    assert found.iqr_ms == pytest.approx(2)
    assert found.images_per_second == pytest.approx(2000)
    assert (found.batch, found.runs, found.peak_memory_bytes) == (6, 5, None)


def test_there_are_more_rounds_until_the_time_is_up(clock):
    (found,) = latency.of([clock.network("a", 10)], SHAPE, repeats=2, seconds=0.995, memory_formats=["contiguous"])
    assert found.runs == 100


def test_one_run_has_no_spread():
    with pytest.raises(CompactError, match="repeats is 1; it must be 2 or more"):
        latency.of([nn.Identity()], SHAPE, repeats=1)


def test_a_network_that_is_clearly_larger_is_slower():
    small = networks.conv(3, 2, 1)
    large = nn.Sequential(networks.conv(3, 64), networks.conv(64, 64), networks.conv(64, 64))
    for pair in ([small, large], [large, small]):
        found = dict(zip(map(id, pair), latency.of(pair, (3, 64, 64), seconds=0.1), strict=True))
        assert 0 < found[id(small)].median_ms < found[id(large)].median_ms


def test_timing_leaves_networks_as_they_were():
    """Their mode, their weights, where these lie; buffers are not counted up, and nothing needs a gradient."""
    model = named("cifar:resnet8", width=4).train()
    model.linear.eval()
    modes = [module.training for module in model.modules()]
    before = {name: (t.clone(), t.stride(), t.data_ptr()) for name, t in model.state_dict().items()}
    latency.of([model, model], (3, 32, 32), batch=2, seconds=0)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert (tensor.stride(), tensor.data_ptr()) == before[name][1:]


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_what_is_timed_is_the_network(memory_format):
    """The copy gives the same scores, in eval mode, and shares what needs no change."""
    model = named("cifar:resnet8", width=4).train()
    timed = latency._laid_out(model, torch.device("cpu"), memory_format)
    image = torch.rand(2, 3, 32, 32)
    assert not any(module.training for module in timed.modules())
    assert timed.layer2[0].conv1.weight.is_contiguous(memory_format=latency.FORMATS[memory_format])
    assert timed.linear.weight.data_ptr() == model.linear.weight.data_ptr()
    assert type(timed.conv1.weight) is nn.Parameter
    assert torch.allclose(timed(image), model.eval()(image), atol=1e-5)


@pytest.mark.parametrize("name", AWKWARD)
def test_every_kind_of_network_can_be_timed(name):
    model = AWKWARD[name]()
    assert latency.of([model], SHAPE, batch=3, repeats=2, seconds=0)[0].median_ms > 0


def test_threads_are_set_and_put_back():
    seen = []
    before = torch.get_num_threads()
    probe = networks.Code(lambda owner, image: seen.append(torch.get_num_threads()) or image)
    (found,) = latency.of([probe], SHAPE, threads=before + 1, repeats=2, seconds=0)
    assert (set(seen), found.threads, torch.get_num_threads()) == ({before + 1}, before + 1, before)
    assert latency.of([probe], SHAPE, repeats=2, seconds=0)[0].threads == before


@pytest.mark.parametrize("when", [1, latency.WARM_UP + 1])
def test_threads_are_put_back_when_a_network_fails(when):
    calls = itertools.count(1)

    def forward(owner: nn.Module, image: Tensor) -> Tensor:
        if next(calls) == when:
            raise ZeroDivisionError
        return image

    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        latency.of([networks.Code(forward)], SHAPE, threads=before + 1, seconds=0, memory_formats=["contiguous"])
    assert torch.get_num_threads() == before


def test_a_batch_that_does_not_run_is_named():
    """One image fits the number in the code, four do not."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1), networks.Code(lambda owner, image: image.reshape(1, 128)))
    assert latency.of([model], SHAPE, repeats=2, seconds=0)[0].batch == 1
    with pytest.raises(CompactError, match=r"does not run on cpu in batches of 4: shape .* invalid.*; try a smaller batch"):
        latency.of([model], SHAPE, batch=4, seconds=0)
    with pytest.raises(CompactError, match=r"does not run on cpu in batches of 1000000000000: .*; try a smaller batch"):
        latency.of([model], SHAPE, batch=10**12, seconds=0)


def test_the_processor_has_a_name():
    assert latency.processor("cpu").strip()


def test_peak_memory_is_what_a_run_adds_to_a_networks_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10_000)  # every network's
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10_700)
    shared = nn.Linear(8, 8, bias=False)
    timed = latency._Run(nn.Sequential(shared, nn.ReLU(), shared), SHAPE, 2, "cpu", "contiguous")
    assert timed._peak_memory() == 700 + 4 * 64 + 4 * 2 * math.prod(SHAPE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_peak_memory_on_cuda_is_a_networks_own():
    """Weights and activations of one network; the other's, which lie there too, are not in it."""
    small, large = networks.conv(3, 2, 1), nn.Sequential(networks.conv(3, 512), networks.conv(512, 512))
    first, second = latency.of([small, large], SHAPE, device="cuda", seconds=0)
    weights = 4 * measure.params(large)
    assert first.peak_memory_bytes < weights <= second.peak_memory_bytes
    assert {parameter.device.type for parameter in large.parameters()} == {"cpu"}
