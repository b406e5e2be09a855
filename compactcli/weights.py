"""The tensors of a file and the places in a network that they go to: by name, by shape, once each."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .errors import CompactError, shape_text, short
from .kernels import Indexed
from .peel import NUMBERS, shared_prefix, without_path

COUNTER = "num_batches_tracked"  # of batches, which may be absent


def state(module: nn.Module) -> dict[str, Tensor]:
    """The state_dict with tensors that several names share under the first of them."""
    unique = {*dict(module.named_parameters()), *dict(module.named_buffers())}
    return {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items() if name in unique}


def load_(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors in the module's places, without copying where they are of its types and none is there twice.

    Counters of batches may be absent.
    """
    own = state(module)
    every = module.state_dict()
    tensors = check_fit(own, tensors, module)
    tensors |= {  # averages of weights are of these as well
        name: tensor.nan_to_num().long()
        for name, tensor in tensors.items()
        if name.endswith(COUNTER) and tensor.is_floating_point()
    }
    counters = {name: torch.zeros_like(t, device="cpu") for name, t in own.items() if name.endswith(COUNTER)}
    values = OrderedDict({**counters, **tensors})
    values._metadata = every._metadata  # type: ignore[attr-defined]  # the version of each module's format, which some ask for
    for name, tensor in own.items():
        if values[name].is_floating_point() != tensor.is_floating_point():
            raise CompactError(f"{short(name)} is {values[name].dtype}, the architecture's {tensor.dtype}")
    places: set[int] = set()
    for name, value in values.items():
        values[name] = value.to(own[name].dtype) if value.is_floating_point() else value
        # Numbers that a file holds once, under two names or for many places, are many in the network.
        if values[name].numel() and (values[name].data_ptr() in places or 0 in values[name].stride()):
            values[name] = values[name].clone(memory_format=torch.contiguous_format)
        places.add(values[name].data_ptr())
    aliases = _aliases(module)
    module.load_state_dict(values, strict=False, assign=True)
    for alias, name in aliases.items():  # what was one tensor is one again
        path, _, last = alias.rpartition(".")
        owner = module.get_submodule(path)
        if last in owner._parameters:
            owner._parameters[last] = module.get_parameter(name)
        else:
            owner._buffers[last] = module.get_buffer(name)
    for name, layer in module.named_modules():
        if isinstance(layer, Indexed):
            try:
                layer.check()
            except CompactError as problem:
                raise CompactError(f"{short(name)}.{problem}") from None


def as_named(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by the names that the network has: with what was taken off these names where its own begin so too,
    and without the numbers of the training run, if they are not its own.
    """
    own = module.state_dict()
    found = {name: tensor for name, tensor in tensors.items() if name not in NUMBERS or name in own}
    prefix = shared_prefix(own)
    if not own.keys().isdisjoint(found.keys() - NUMBERS):
        return found
    if prefix:
        return {name if name in NUMBERS else prefix + name: tensor for name, tensor in found.items()}
    bare = without_path(found)
    return found if own.keys().isdisjoint(bare) else dict(bare)


def check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The tensors that go into the module's `own` places. Raises CompactError where names or shapes are others."""
    every = module.state_dict()
    tensors = {name: tensor for name, tensor in tensors.items() if name in own or name not in every}
    missing = [name for name in own if name not in tensors and not name.endswith(COUNTER)]
    unexpected = [name for name in tensors if name not in own]
    wrong = [name for name in own if name in tensors and tensors[name].shape != own[name].shape]
    if missing or unexpected or wrong:
        raise CompactError(_mismatch(missing, unexpected, wrong, own, tensors))
    return tensors


def _mismatch(
    missing: Sequence[str],
    unexpected: Sequence[str],
    wrong: Sequence[str],
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
) -> str:
    if wrong:
        name = wrong[0]
        what = f"{short(name)} is {shape_text(given[name].shape)}, the architecture's {shape_text(own[name].shape)}"
    else:
        what = f"{short(missing[0])} is missing" if missing else f"{short(unexpected[0])} is not in the architecture"
    more = len(missing) + len(unexpected) + len(wrong) - 1
    return f"the weights do not fit the architecture: {what}" + (f", and {more} more differ" if more else "")


def _aliases(module: nn.Module) -> dict[str, str]:
    """Further names of a tensor -> its first."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    for name, tensor in named:
        first.setdefault(id(tensor), name)
    return {name: first[id(tensor)] for name, tensor in named if first[id(tensor)] != name}
