"""Apply edits to a network in place: cut channels, put layers in the place of others, set the numbers that code holds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from . import kernels
from .errors import CompactError
from .kernels import KernelLayer
from .recipe import SETTABLE, Edit, Keep, Replace, Set, Share


@dataclass(frozen=True)
class Regression:
    """What images say that a layer's weight should be, and what an error in it costs."""

    weight: Tensor  # (o, i*k*k) float64: the least-squares solution
    inputs: Tensor  # (i*k*k, i*k*k) float64: second moments of what the kernel is applied to
    scale: Tensor  # (o,) float64: how strongly each output counts


@dataclass(frozen=True)
class LayerKind:
    """How a compressed layer is built in the place of an old one, its plain equal, and how images refit it.

    What others share is built in the place of nothing: `build` gets the network.
    """

    build: Callable[[nn.Module, Mapping[str, int]], nn.Module]  # raises CompactError where it does not fit
    dense: Callable[[nn.Module], nn.Module]
    refit: Callable[[nn.Module, Regression], None] | None = None  # in place; None: the layer stays as it is


LAYERS: dict[str, LayerKind] = {}  # "method.kind" -> how; each method's file adds its own


def apply_(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Change `model` in place. Works on the meta device as well, where only shapes change.

    Raises CompactError for an edit that does not fit the network: from an honest file it cannot.
    """
    done: dict[tuple[int, int], tuple[int, ...]] = {}
    holders = _holders(model)
    for edit in edits:
        match edit:
            case Keep():
                _keep_(model, edit, done, holders)
            case Set():
                _set_(model, edit)
            case Replace():
                _replace_(model, edit)
                holders = _holders(model)
            case Share():
                kernels.share_(model, edit.name, _built(model, edit))
                holders = _holders(model)
    kernels.drop_unused_(model)


def targets(model: nn.Module, edit: Keep) -> list[tuple[nn.Module, str, int]]:
    """(owner, tensor name, tensor axis) of everything that one side of a layer carries."""
    try:
        module = model.get_submodule(edit.module)
    except AttributeError:
        owner, name = _owner(model, edit.module)
        return [(owner, name, edit.axis)]
    if isinstance(module, _ConvNd | nn.Linear) and module._parameters.get("weight") is not None:
        transposed = isinstance(module, _ConvTransposeNd)
        weight: list[tuple[nn.Module, str, int]] = [(module, "weight", 1 - edit.axis if transposed else edit.axis)]
        if isinstance(module, _ConvNd) and transposed and module.groups > 1 and edit.axis == 0:
            weight = []  # its outputs go with the inputs of their group
        return weight + ([(module, "bias", 0)] if edit.axis == 0 and module.bias is not None else [])
    if isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm | nn.PReLU) and edit.axis == 0:
        names = ("weight", "bias", "running_mean", "running_var")
        return [(module, name, 0) for name in names if getattr(module, name, None) is not None]
    raise CompactError(f"the recipe cuts axis {edit.axis} of {edit.module!r}, a {type(module).__name__}, which has no such axis")


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    try:
        owner = model.get_submodule(parent)
    except AttributeError:
        owner = None
    if owner is None or {**owner._parameters, **owner._buffers}.get(name) is None:
        raise CompactError(f"the recipe edits {path!r}, which the architecture does not have")
    return owner, name


def _tensor(owner: nn.Module, name: str) -> Tensor:
    tensor = getattr(owner, name)
    assert isinstance(tensor, Tensor)
    return tensor


def _holders(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Tensor (by its id) -> the modules that hold it."""
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            found.setdefault(id(tensor), []).append(module)
    return found


def _keep_(
    model: nn.Module, edit: Keep, done: dict[tuple[int, int], tuple[int, ...]], holders: Mapping[int, list[nn.Module]]
) -> None:
    """Cut the tensors of one side of a layer. One that several layers share is `done` with the first of them."""
    for owner, name, axis in targets(model, edit):
        tensor = _tensor(owner, name)
        if done.get((id(tensor), axis)) == edit.index and tensor.shape[axis] == len(edit.index):
            continue
        if axis >= tensor.ndim or not edit.index or max(edit.index) >= tensor.shape[axis]:
            raise CompactError(
                f"the recipe keeps channels of {edit.module!r} that its {name} {tuple(tensor.shape)} does not have"
            )
        kept = tensor.detach().index_select(axis, torch.tensor(edit.index, device=tensor.device))
        tensor.data = kept  # the same tensor, for whoever else holds it
        tensor.grad = None
        done[id(tensor), axis] = edit.index
        for module in holders[id(tensor)]:
            _refresh_(module)


def _set_(model: nn.Module, edit: Set) -> None:
    module = _submodule(model, edit.module)
    old = getattr(module, edit.attribute, None)
    least = 1 if edit.attribute in ("groups", "num_groups") else 0
    if edit.attribute not in SETTABLE or not isinstance(old, int) or not least <= edit.value <= old:
        raise CompactError(f"the recipe sets {edit.attribute} of {edit.module!r} to {edit.value}; it is {old!r}")
    setattr(module, edit.attribute, edit.value)
    _refresh_(module)


def _replace_(model: nn.Module, edit: Replace) -> None:
    layer = _built(_submodule(model, edit.module), edit)
    if isinstance(layer, KernelLayer):
        layer.bind(kernels.shared(model))
    model.set_submodule(edit.module, layer)


def _built(place: nn.Module, edit: Replace | Share) -> nn.Module:
    kind = LAYERS.get(edit.layer)
    if kind is None:
        raise CompactError(f"the recipe has a layer of unknown kind {edit.layer!r}; it needs a newer compactcli")
    layer = kind.build(place, edit.options)
    if edit.tensors:
        layer.load_state_dict(dict(edit.tensors), assign=True)
    return layer


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise CompactError(f"the recipe edits {path!r}, which the architecture does not have") from None


def _refresh_(module: nn.Module) -> None:
    """Let the numbers that a layer keeps about itself follow its tensors."""
    if isinstance(module, _ConvNd):
        first, second = module.weight.shape[0], module.weight.shape[1] * module.groups
        transposed = isinstance(module, _ConvTransposeNd)
        module.in_channels, module.out_channels = (first, second) if transposed else (second, first)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _NormBase):
        for tensor in (module.running_mean, module.weight):
            if tensor is not None:
                module.num_features = len(tensor)
    elif isinstance(module, nn.GroupNorm):
        if module.weight is not None:
            module.num_channels = len(module.weight)
    elif isinstance(module, nn.LayerNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
