"""The layers of LinearConv: stored filters, and others that are combinations of them.

Kahatapitiya & Rodrigo, WACV 2021, section 3.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CompactError
from ..kernels import KernelLayer, check_places
from ..recipe import Replace
from ..surgery import LAYERS, LayerKind, Regression
from ._combinations import Combination, Form, Variant, fit
from ._errors import Metric
from ._layers import dense, like


class Linear(KernelLayer):
    """Filters `primary` (p, i / groups, k, k) and combinations of them, put in order by `place` (o,)."""

    variant: ClassVar[Variant]
    place: Tensor

    def __init__(self, like: nn.Conv2d, primary: int) -> None:
        super().__init__(like)
        if not 1 <= primary < self.outputs:
            raise CompactError(f"the recipe asks for {primary} primary filters of a layer with {self.outputs}")
        self.primary = nn.Parameter(like.weight.new_empty(primary, *self.shape[1:]))
        self.register_buffer("place", torch.arange(self.outputs, dtype=torch.int32, device=like.weight.device))

    def check(self) -> None:
        check_places("place", self.place, self.outputs)

    @property
    def secondary(self) -> int:
        """How many filters are combinations."""
        return self.outputs - len(self.primary)

    @property
    def synthesis_sums(self) -> int:
        return self.secondary * self.reads

    def combined(self, filters: Tensor) -> Tensor:
        """The combinations (s, i*k*k) of the primary filters (p, i*k*k)."""
        raise NotImplementedError

    def kernel(self) -> Tensor:
        filters = self.primary.flatten(1)
        return torch.cat([filters, self.combined(filters)]).index_select(0, self.place).view(self.shape)


class Full(Linear):
    """All coefficients (s, p)."""

    variant = "full"

    def __init__(self, like: nn.Conv2d, primary: int) -> None:
        super().__init__(like, primary)
        self.coefficients = nn.Parameter(like.weight.new_empty(self.secondary, primary))

    @property
    def synthesis_macs(self) -> int:
        return self.coefficients.numel() * self.reads

    def combined(self, filters: Tensor) -> Tensor:
        return self.coefficients @ filters


class LowRank(Linear):
    """The coefficients as a product `outer` (s, r) `inner` (r, p)."""

    variant = "lowrank"

    def __init__(self, like: nn.Conv2d, primary: int, rank: int) -> None:
        super().__init__(like, primary)
        if not 1 <= rank <= self.outputs:
            raise CompactError(f"the recipe asks for coefficients of rank {rank} in a layer with {self.outputs} filters")
        self.outer = nn.Parameter(like.weight.new_empty(self.secondary, rank))
        self.inner = nn.Parameter(like.weight.new_empty(rank, primary))

    @property
    def synthesis_macs(self) -> int:
        return (self.outer.numel() + self.inner.numel()) * self.reads

    @property
    def synthesis_sums(self) -> int:
        return (self.secondary + len(self.inner)) * self.reads

    def combined(self, filters: Tensor) -> Tensor:
        return self.outer @ (self.inner @ filters)


class Sparse(Linear):
    """Those of the coefficients (s, p) whose bit in `mask` is set.

    `live` are those that a search has not left out; None outside of one.
    """

    variant = "sparse"
    mask: Tensor
    live: Tensor | None

    def __init__(self, like: nn.Conv2d, primary: int, kept: int) -> None:
        super().__init__(like, primary)
        size = self.secondary * primary
        if not 0 <= kept <= size:
            raise CompactError(f"the recipe keeps {kept} coefficients of {size}")
        self.values = nn.Parameter(like.weight.new_empty(kept))
        self.register_buffer("mask", torch.zeros(-(-size // 8), dtype=torch.uint8, device=like.weight.device))
        self.register_buffer("live", None)

    @property
    def synthesis_macs(self) -> int:
        return self.values.numel() * self.reads

    @property
    def synthesis_sums(self) -> int:
        return min(self.secondary, self.values.numel()) * self.reads

    def check(self) -> None:
        super().check()
        if self.mask.dtype != torch.uint8 or int(self.bits().sum()) != len(self.values):
            raise CompactError(f"mask does not have {len(self.values)} bits set")

    def bits(self) -> Tensor:
        """1 where there is a coefficient, of all in a row (s * p,) uint8."""
        each = (self.mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=self.mask.device)) & 1
        return each.flatten()[: self.secondary * len(self.primary)]

    def combined(self, filters: Tensor) -> Tensor:
        values, bits = self.values if self.live is None else self.values * self.live, self.bits()
        place = bits.cumsum(0, dtype=torch.int64) * bits  # from 1; 0 where there is none
        coefficients = torch.cat([values.new_zeros(1), values])[place]
        return coefficients.view(self.secondary, -1) @ filters


def _packed(mask: Tensor) -> Tensor:
    """Bits (n,) as bytes, the first in the lowest place."""
    bits = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _tensors(found: Combination, form: Form, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of the layer that stores a combination, but for its bias."""
    place = torch.cat([found.chosen, found.others]).argsort()
    tensors = {"primary": found.primary.reshape(-1, *shape[1:]).to(dtype), "place": place.to(torch.int32)}
    coefficients = found.coefficients
    if form.variant == "full":
        return tensors | {"coefficients": coefficients.to(dtype)}
    if form.variant == "lowrank":
        U, S, V = torch.linalg.svd(coefficients, full_matrices=False)
        half = S[: form.size].sqrt()
        outer, inner = U[:, : form.size] * half, half[:, None] * V[: form.size]
        short = form.size - len(half)  # a rank may be asked for that there is not
        return tensors | {"outer": F.pad(outer, (0, short)).to(dtype), "inner": F.pad(inner, (0, 0, 0, short)).to(dtype)}
    kept = coefficients.abs().flatten().argsort(descending=True, stable=True)[: form.size].sort().values
    mask = torch.zeros(coefficients.numel(), dtype=torch.bool).index_fill(0, kept, True)
    return tensors | {"values": coefficients.flatten()[kept].to(dtype), "mask": _packed(mask)}


def edit(name: str, module: nn.Conv2d, form: Form, found: Combination) -> Replace:
    """Put the combination in the place of a convolution."""
    tensors = {key: value.contiguous() for key, value in _tensors(found, form, module.weight.shape, module.weight.dtype).items()}
    if module.bias is not None:
        tensors["bias"] = module.bias.detach()
    size = {"full": {}, "lowrank": {"rank": form.size}, "sparse": {"kept": form.size}}[form.variant]
    return Replace(name, f"linearconv.{form.variant}", {"primary": form.primary, **size}, tensors)


def thinned(name: str, layer: Sparse, wanted: int) -> Replace:
    """A searched layer with so many of its coefficients, the largest of those that are left."""
    values = layer.values.detach() if layer.live is None else layer.values.detach() * layer.live
    kept = values.abs().argsort(descending=True, stable=True)[:wanted].sort().values
    at = layer.bits().nonzero().flatten()[kept]
    mask = torch.zeros(layer.secondary * len(layer.primary), dtype=torch.bool).index_fill(0, at, True)
    tensors = {**layer.state_dict(), "values": values[kept], "mask": _packed(mask)}
    tensors.pop("live", None)
    return Replace(name, "linearconv.sparse", {"primary": len(layer.primary), "kept": len(kept)}, tensors)


def _refit(layer: nn.Module, regression: Regression) -> None:
    """Choose filters and coefficients anew."""
    assert isinstance(layer, Linear)
    size = {"rank": getattr(layer, "inner", ()), "kept": getattr(layer, "values", ())}
    form = Form(layer.variant, len(layer.primary), max(map(len, size.values())))
    found = fit(regression.weight, Metric(torch.diag(regression.scale.square()), regression.inputs), form)
    state = layer.state_dict()
    for name, value in _tensors(found, form, layer.shape, layer.primary.dtype).items():
        state[name].copy_(value)


def _kind(layer: type[Full] | type[LowRank] | type[Sparse]) -> LayerKind:
    def build(old: nn.Module, options: Mapping[str, int]) -> nn.Module:
        try:
            return layer(like(old), **options)
        except TypeError:
            raise CompactError(f"the recipe has options of linearconv that there are not: {', '.join(options)}") from None

    return LayerKind(build, dense, _refit)


LAYERS["linearconv.full"] = _kind(Full)
LAYERS["linearconv.lowrank"] = _kind(LowRank)
LAYERS["linearconv.sparse"] = _kind(Sparse)
