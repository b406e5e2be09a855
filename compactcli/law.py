"""The law that every edit is held to, in float64.

A network with channels removed equals the same network with those channels zeroed in every consumer,
and left out of the statistics of layer normalisations; a network with a layer replaced equals it with
the layer's dense form put back. Refitting weights comes later and is measured separately.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from . import surgery
from .channels import Axis
from .errors import CompactError
from .graph import BATCH, copied, named_failure, outputs, run_fake
from .recipe import Edit, Keep, Replace, Share
from .surgery import LAYERS, LayerKind, targets

TOLERANCE = 1e-9  # relative, in float64
NOISE_FACTOR = 50  # where the network amplifies rounding: this many times what 1e-15 of input does
LARGEST_NOISE = 1e-4  # beyond which nothing passes for rounding


def apply_checked_(model: nn.Module, edits: Sequence[Edit], consumed: frozenset[Axis], input_shape: Sequence[int]) -> float:
    """Change `model` in place under the law; the largest relative difference seen.

    `consumed` are the axes where removed channels are read (`Channels.consumed`).
    Raises CompactError where the law is broken or the smaller network does not run in eval and in
    train mode. The model is then in an undefined state: write nothing.
    """
    image = _probe(input_shape)
    worst = 0.0
    for replacing, group in groupby(edits, key=lambda edit: isinstance(edit, Replace | Share)):
        stage = list(group)
        if replacing:
            surgery.apply_(model, stage)
            with _dense(model, [edit for edit in stage if isinstance(edit, Replace)]):
                expected = run_double(model, image)
        else:
            expected = run_double(model, image, _masks(model, stage, consumed), _statistics(model, stage))
            surgery.apply_(model, stage)
        run_fake(model, input_shape, train=True)
        with named_failure("in eval mode"):
            worst = max(worst, _compare(model, image, expected, "the smaller network differs from the masked one"))
    return worst


def apply_same_(model: nn.Module, edits: Sequence[Edit], input_shape: Sequence[int]) -> None:
    """Change `model` in place by edits that leave its function as it is.

    Raises CompactError where they do not, by more than rounding in float64. The model is then in an undefined state.
    """
    with same_function(model, input_shape, "the network in plain layers"):
        surgery.apply_(model, edits)


@contextmanager
def same_function(model: nn.Module, input_shape: Sequence[int], what: str) -> Iterator[None]:
    """What is done to `model` meanwhile makes `what` of it, and leaves its function as it is.

    Raises CompactError where it does not, by more than rounding in float64. The model is then in an undefined state.
    """
    image = _probe(input_shape)
    expected = run_double(model, image)
    yield
    _compare(model, image, expected, f"{what} differs from the original")


def _probe(input_shape: Sequence[int]) -> Tensor:
    return torch.randn(BATCH, *input_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _compare(model: nn.Module, image: Tensor, expected: list[Tensor], complaint: str) -> float:
    actual = run_double(model, image)
    error = difference(actual, expected)
    if error > TOLERANCE:
        noise = difference(run_double(model, image * (1 + 1e-15)), actual)
        if not error <= min(NOISE_FACTOR * noise, LARGEST_NOISE):  # nor where it is no number
            raise CompactError(f"{complaint} by {error:.1e}; nothing was written, please report this")
    return error


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest expected value of the same output."""
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape:
            raise CompactError(f"the smaller network's output has shape {tuple(a.shape)}, the original's {tuple(b.shape)}")
        if not (a.isfinite().all() and b.isfinite().all()):
            return float("inf")  # NaN compares as equal to nothing, so it would pass for no difference
        if b.numel():
            a, b = a.double(), b.double()  # which may be of bits
            worst = max(worst, float((a - b).abs().max()) / (float(b.abs().max()) or 1.0))
    return worst


def run_double(
    model: nn.Module, image: Tensor, masks: Mapping[Axis, Tensor] | None = None, statistics: Mapping[str, Tensor] | None = None
) -> list[Tensor]:
    """The outputs in eval mode and float64, with the masked positions of weights taken as zero, and layer normalisations
    of the modules in `statistics` taken over these channels alone.

    One module at a time is cast as it is entered and put back as it is left: no copy of the model. What is random in eval mode
    too is drawn alike in every call.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), _drawn_alike(), _double(model, masks or {}), _normalising(model, statistics):
            return outputs(model(image.clone()))  # which the network may write into
    except RuntimeError:  # a module reads the tensors of another, or names a dtype: all must be cast at once
        with torch.no_grad(), _drawn_alike(), _AllDouble():
            copy = _doubled(model, masks or {})
            with _normalising(copy, statistics):
                return outputs(copy(image.clone()))
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _drawn_alike() -> Iterator[None]:
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        yield


@contextmanager
def _double(model: nn.Module, masks: Mapping[Axis, Tensor]) -> Iterator[None]:
    saved: list[list[tuple[Tensor, Tensor]]] = []
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    masked = {(id(tensors[name]), axis): gone for (name, axis), gone in masks.items()}

    def enter(module: nn.Module, _args: Any) -> None:
        own: list[tuple[Tensor, Tensor]] = []
        saved.append(own)
        for tensor in _own_tensors(module):
            own.append((tensor, tensor.data))
            tensor.data = tensor.data.to(torch.float64, copy=True)
            for axis in range(tensor.ndim):
                gone = masked.get((id(tensor), axis))
                if gone is not None:
                    tensor.data.index_fill_(axis, gone, 0)

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        for tensor, data in reversed(saved.pop()):
            tensor.data = data

    with ExitStack() as hooks:
        for module in model.modules():
            hooks.enter_context(module.register_forward_pre_hook(enter))
            hooks.enter_context(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for own in reversed(saved):  # left behind by an exception in a forward
                for tensor, data in reversed(own):
                    tensor.data = data


def _doubled(model: nn.Module, masks: Mapping[Axis, Tensor]) -> nn.Module:
    """A float64 copy with the masked positions zeroed."""
    result = copied(model).double()
    tensors = {**dict(result.named_parameters()), **dict(result.named_buffers())}
    for (name, axis), gone in masks.items():
        tensors[name].index_fill_(axis, gone, 0)
    return result


def _normalising(model: nn.Module, statistics: Mapping[str, Tensor] | None) -> AbstractContextManager[Any]:
    return _Normalising(model, statistics) if statistics else nullcontext()


class _Normalising(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Layer normalisations take their statistics over some of the channels; the others come out as zero."""

    def __init__(self, model: nn.Module, statistics: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = {id(model.get_submodule(path).weight): kept for path, kept in statistics.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        at = {torch.ops.aten.native_layer_norm.default: 2, torch.ops.aten.native_group_norm.default: 1}.get(func)
        kept = None if at is None else self.kept.get(id(args[at]))
        if at is None or kept is None:
            return func(*args, **kwargs or {})
        axis, given = (args[0].ndim - 1, list(args)) if at == 2 else (1, list(args))
        whole = torch.zeros_like(args[0])
        given[0] = args[0].index_select(axis, kept)
        given[at : at + 2] = [None if vector is None else vector[kept] for vector in args[at : at + 2]]
        if at == 2:
            given[1] = [len(kept)]
        else:
            given[4] = len(kept)
        normalised, *moments = func(*given)
        return whole.index_copy_(axis, kept, normalised), *moments


class _AllDouble(TorchFunctionMode):
    """Whatever is computed is in float64: what code casts to another floating dtype as well, and tensors that it makes."""

    def __enter__(self) -> Self:
        self.usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *problem: Any) -> None:
        torch.set_default_dtype(self.usual)
        super().__exit__(*problem)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        return func(*tree_map(_to_double, args), **tree_map(_to_double, kwargs or {}))


def _to_double(value: Any) -> Any:
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [
        tensor for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)] if tensor.is_floating_point()
    ]


class _Dense(nn.Module):
    """Stands in for a compressed layer: makes its dense form afresh for each call."""

    def __init__(self, layer: nn.Module, kind: LayerKind) -> None:
        super().__init__()
        self._layer = (layer, kind)  # in a tuple: not registered, so not cast by `_double`

    def forward(self, image: Tensor) -> Tensor:
        layer, kind = self._layer
        result: Tensor = kind.dense(deepcopy(layer).double())(image)
        return result


@contextmanager
def _dense(model: nn.Module, replaced: Sequence[Replace]) -> Iterator[None]:
    layers = {edit.module: model.get_submodule(edit.module) for edit in replaced}
    for edit in replaced:
        model.set_submodule(edit.module, _Dense(layers[edit.module], LAYERS[edit.layer]))
    try:
        yield
    finally:
        for path, layer in layers.items():
            model.set_submodule(path, layer)


def _masks(model: nn.Module, edits: Sequence[Edit], consumed: frozenset[Axis]) -> dict[Axis, Tensor]:
    """What each consuming weight must not read: the complement of what is kept of its input axis."""
    masks = {}
    for edit in edits:
        if isinstance(edit, Keep):
            parent = model.get_submodule(edit.module.rpartition(".")[0])
            for owner, name, axis in targets(model, edit):
                key = (edit.module if owner is parent else f"{edit.module}.{name}", axis)
                if key in consumed:
                    gone = torch.ones(getattr(owner, name).shape[axis], dtype=torch.bool)
                    gone[list(edit.index)] = False
                    masks[key] = gone.nonzero().flatten()
    return masks


def _statistics(model: nn.Module, edits: Sequence[Edit]) -> dict[str, Tensor]:
    """The channels that are kept of modules whose statistics are taken over all of them."""
    found, modules = {}, dict(model.named_modules())
    for edit in edits:
        if isinstance(edit, Keep):
            module = modules.get(edit.module)
            if isinstance(module, nn.LayerNorm) or (isinstance(module, nn.GroupNorm) and module.num_groups == 1):
                found[edit.module] = torch.tensor(edit.index)
    return found
