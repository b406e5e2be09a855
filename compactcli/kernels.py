"""Convolutions that store their kernel as fewer numbers and make it from them: what all of them share.

Such a layer trains as it is. `folded` puts plain convolutions in their places, so that a network costs to run what it
cost before; what several layers make their kernels from lies once, at the network's root.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import CompactError
from .graph import copied

SHARED = "compactcli_shared"  # the child of the root that holds what layers share
VECTOR = 16  # channels that the kernels of a CPU compute at once: fewer take as long

Dense = Literal["never", "narrow", "always"]  # which layers that are run as several become the one that each is equal to


class Shared(nn.ModuleDict):
    """What layers share, by name. As the last layer of an `nn.Sequential` it hands on what it gets."""

    def forward(self, value: Any) -> Any:
        return value


class Indexed(nn.Module):
    """A layer with buffers that say which of something its numbers are."""

    def check(self) -> None:
        """Raise CompactError where what was loaded names what there is not."""


def check_places(name: str, places: Tensor, size: int) -> None:
    """Raise CompactError unless these are different positions, of `size` that there are."""
    known = places.dtype in (torch.int32, torch.int64) and len(set(places.tolist())) == len(places)
    if not known or (len(places) and not 0 <= int(places.min()) <= int(places.max()) < size):
        raise CompactError(f"{name} does not hold {len(places)} different places of {size}")


class KernelLayer(Indexed):
    """A convolution of the geometry and with the bias of `like`, whose kernel is made anew at every call.

    A kind of its own has the numbers that it is made from, and `kernel`.
    """

    def __init__(self, like: nn.Conv2d) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = like.in_channels, like.out_channels, like.groups
        self.shape: tuple[int, ...] = tuple(like.weight.shape)  # of the kernel: (o, i / groups, k, k)
        self.stride, self.padding, self.dilation = like.stride, like.padding, like.dilation
        self.padding_mode = like.padding_mode
        self._edges = tuple(like._reversed_padding_repeated_twice)
        self.bias = like.bias

    @property
    def outputs(self) -> int:
        """Filters."""
        return self.shape[0]

    @property
    def reads(self) -> int:
        """Inputs of one filter: i / groups * k * k."""
        return int(torch.Size(self.shape[1:]).numel())

    @property
    def used(self) -> int | Fraction:
        """Numbers of one filter that are not zero whatever the layer learns."""
        return self.reads

    @property
    def executed(self) -> int | Fraction:
        """Multiply-accumulates for one output, as the layer is run."""
        return self.reads

    @property
    def narrow(self) -> bool:
        """Whether a group of what the layer is run as leaves vectors of a CPU (`VECTOR`) in part empty."""
        return False

    @property
    def synthesis_macs(self) -> int:
        """Multiply-accumulates that making the kernel takes, once."""
        raise NotImplementedError

    @property
    def synthesis_sums(self) -> int:
        """The sums that those go into, each of one product at least: one addition less than multiplications."""
        raise NotImplementedError

    def kernel(self) -> Tensor:
        """The kernel (o, i / groups, k, k)."""
        raise NotImplementedError

    def bind(self, shared: Mapping[str, nn.Module]) -> None:
        """Take what this layer shares with others; called when it comes into a network."""

    def forward(self, image: Tensor) -> Tensor:
        return self.applied(image, self.kernel(), self.groups)

    def applied(self, image: Tensor, kernel: Tensor, groups: int, *, bias: bool = True) -> Tensor:
        """A kernel in this layer's geometry on an image, and its bias."""
        padding = self.padding
        if self.padding_mode != "zeros":
            image, padding = F.pad(image, self._edges, mode=self.padding_mode), (0, 0)
        return F.conv2d(image, kernel, self.bias if bias else None, self.stride, padding, self.dilation, groups)

    def folded(self, *, hollow: bool = False) -> nn.Module:
        """The plain layers that this one is run as; if `hollow`, only their shapes are right."""
        return self.hollow() if hollow else self.dense()

    def dense(self) -> nn.Conv2d:
        """The plain convolution that this layer is equal to. Its bias is the same tensor."""
        with torch.no_grad():
            return self.plain(self.kernel().contiguous(), self.groups)

    def hollow(self) -> nn.Conv2d:
        """The same without making the kernel: only its shape is right."""
        some = next(self.parameters())
        return self.plain(torch.empty(self.shape, dtype=some.dtype, device=some.device), self.groups)

    def plain(self, kernel: Tensor, groups: int) -> nn.Conv2d:
        """A plain convolution of this geometry, with this layer's bias."""
        like: Any = {name: getattr(self, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        like |= {"kernel_size": self.shape[2:], "groups": groups, "bias": False, "device": "meta"}
        layer = nn.Conv2d(kernel.shape[1] * groups, kernel.shape[0], **like)
        layer.weight, layer.bias = nn.Parameter(kernel), self.bias
        return layer.train(self.training)

    @property
    def shares(self) -> tuple[str, ...]:
        """The names of what it shares with others."""
        return ()

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.shape))}, {sum(each.numel() for each in self.parameters())} numbers"


def layers(model: nn.Module) -> dict[str, KernelLayer]:
    """Module path -> layer, of all that make their kernels."""
    return {name: module for name, module in model.named_modules() if isinstance(module, KernelLayer)}


def share_(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put what layers share at the network's root, for those that already do as well.

    Raises CompactError for a name that no module can have, and if it does not suit a layer.
    """
    if not name.isidentifier():
        raise CompactError(f"the recipe shares a layer under the name {name[:40]!r}, which is none")
    if not isinstance(getattr(model, SHARED, None), Shared):
        model.add_module(SHARED, Shared())
    getattr(model, SHARED)[name] = layer
    for each in layers(model).values():
        if name in each.shares:
            each.bind(shared(model))


def shared(model: nn.Module) -> Mapping[str, nn.Module]:
    """What lies at the network's root for layers to share, by name."""
    found = getattr(model, SHARED, None)
    return dict(found.items()) if isinstance(found, Shared) else {}


def drop_unused_(model: nn.Module) -> None:
    """Remove from the network's root what no layer shares any more."""
    used = {name for layer in layers(model).values() for name in layer.shares}
    for name in set(shared(model)) - used:
        del getattr(model, SHARED)[name]
    if hasattr(model, SHARED) and not used:
        delattr(model, SHARED)


def fold_(model: nn.Module, *, hollow: bool = False, dense: Dense = "never") -> None:
    """Put the plain layers that they are run as in the places of compact ones; only of the right shapes if `hollow`."""
    for name, layer in layers(model).items():
        whole = dense == "always" or (dense == "narrow" and layer.narrow)
        model.set_submodule(name, layer.dense() if whole else layer.folded(hollow=hollow))
    drop_unused_(model)


def folded(model: nn.Module, *, dense: Dense = "never") -> nn.Module:
    """The network as it is run: itself, or a copy with plain layers for compact ones, and every other tensor shared."""
    if not layers(model):
        return model
    result = copied(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    fold_(result, dense=dense)
    return result


def synthesis_macs(model: nn.Module) -> int:
    """Multiply-accumulates that making all kernels takes, once."""
    return sum(layer.synthesis_macs for layer in layers(model).values())
