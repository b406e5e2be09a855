"""LinearConv: filters that are combinations of a few stored ones (Kahatapitiya & Rodrigo, WACV 2021).

Of a convolution's o filters p are primary and stored; the other s = o - p are A times those, with A (s x p) stored whole
(`full`), as a product U V of rank r (`lowrank`; `rankratio` with r a share of p), or with most of its entries zero
(`sparse`) (section 3). The kernel is made once: a layer that is run costs what it did before.

The paper trains from scratch. From a checkpoint the filters are chosen by pivoted QR and the coefficients by least squares,
in the metric of what an error does to the network's outputs, each in turn while it helps; how many, and which variant, by
error per parameter over all layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..allocate import Choice
from ..budget import Budget, Of
from ..channels import Channels
from ..errors import CompactError, UsageError
from ..kernels import KernelLayer, check_places, layers
from ..layers import Layer
from ..recipe import Edit, Replace
from ..surgery import LAYERS, LayerKind, Regression
from . import Method, Progress
from ._combinations import Combination, Curves, Form, Variant, fit
from ._errors import Metric, Metrics
from ._layers import dense, eligible, like, meet

if TYPE_CHECKING:
    from ..moments import Moments

SHARES = np.linspace(0.06, 0.96, 16)  # of primary filters, tried where each takes a decomposition to tell the error
KEPT = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)  # of the coefficients


@dataclass(frozen=True)
class Options:
    """How linearconv chooses, and trains."""

    variant: Annotated[
        Literal["auto", "full", "lowrank", "rankratio", "sparse"],
        "how coefficients are stored; auto: in each layer as loses least for its parameters",
    ] = "auto"
    share: Annotated[float, "share of a layer's filters that are primary (the paper: 0.5); 0: by error per parameter"] = 0.0
    rank: Annotated[int, "lowrank: rank of the coefficients (the paper: 10); 0: by error per parameter"] = 0
    rank_share: Annotated[float, "rankratio: rank of the coefficients as a share of the primary filters"] = 0.5
    kept: Annotated[float, "sparse: share of the coefficients that are stored; 0: by error per parameter"] = 0.0
    correlation: Annotated[float, "training: weight of the sum of |correlation| over pairs of primary filters"] = 0.01
    every: Annotated[int, "training: steps from one with that loss to the next"] = 10
    l1: Annotated[float, "search: weight of the sum of |coefficient| of sparse layers, in the same steps"] = 0.01
    gain: Annotated[
        float, "search: largest move of the threshold of sparse layers (the paper: 1e-5); 0: to the wanted zeros by half of it"
    ] = 0.0
    moves: Annotated[int, "search: steps from one move of that threshold to the next (the paper: 500)"] = 50

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("share", 0 <= self.share < 1, "from 0 to below 1"),
            ("rank", self.rank >= 0, "0 or more"),
            ("rank_share", self.rank_share > 0, "above 0"),
            ("kept", 0 <= self.kept <= 1, "from 0 to 1"),
            ("correlation", self.correlation >= 0, "0 or more"),
            ("every", self.every >= 1, "1 or more"),
            ("l1", self.l1 >= 0, "0 or more"),
            ("gain", self.gain >= 0, "0 or more"),
            ("moves", self.moves >= 1, "1 or more"),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name):g}: it is {wanted}")


class LinearConv(Method):
    """Primary filters and coefficients in as many layers as the ratio needs."""

    Options = Options
    of: ClassVar[tuple[Of, ...]] = ("params",)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.wanted: dict[str, int] = {}  # sparse layer that is searched -> how many coefficients shall stay
        self.thresholds: dict[str, float] = {}
        self.own: list[str] | None = None  # the layers that this step made, and that are there still; None: all that there are

    def start(
        self,
        model: nn.Module,
        channels: Channels,
        budget: Budget,
        moments: Mapping[str, "Moments"] | None = None,
        *,
        trains: bool = False,
    ) -> list[Edit]:
        """The layers to replace, so that the budget is met. Where it trains, sparse ones begin with all coefficients.

        Raises UsageError for an option of another variant than is asked for.
        """
        plain, variant = Options(), self.options.variant
        for name, of in (("rank", "lowrank"), ("rank_share", "rankratio"), ("kept", "sparse")):
            if getattr(self.options, name) != getattr(plain, name) and variant != of and (variant != "auto" or of != "sparse"):
                raise UsageError(f"--set {name}: it is for variant={of}, and this is {variant}")
        metrics = Metrics(model, channels, budget, moments)
        found = [layer for layer in budget.layers if eligible(model, layer)]
        forms = [self._forms(_weight(model, layer), metrics.of(layer), budget.round_to or 1) for layer in found]
        result: list[Edit] = []
        for layer, form in self._chosen(model, budget, found, forms, refitted=moments is not None):
            weight = _weight(model, layer)
            if form.variant == "sparse" and trains:
                self.wanted[layer.name] = form.size
                form = Form("sparse", form.primary, (len(weight) - form.primary) * form.primary)
            module = model.get_submodule(layer.name)
            assert isinstance(module, nn.Conv2d)
            result.append(_edit(layer.name, module, form, fit(weight, metrics.of(layer), form)))
        return result

    def _forms(self, weight: Tensor, metric: Metric, step: int) -> list[tuple[Form, float]]:
        """(form, error) of all that a layer may be stored as beside plain."""
        options, outputs = self.options, len(weight)
        curves = Curves(weight, metric)
        most = min(outputs - 1, weight.shape[1])
        if options.share:
            some = every = [min(most, max(1, int(options.share * outputs)))]
        else:
            every = list(range(step, most + 1, step))
            some = sorted({min(most, max(1, round(share * outputs / step) * step)) for share in SHARES})
        result: list[tuple[Form, float]] = []
        if options.variant in ("auto", "full"):
            result += [(Form("full", p), curves.full(p)) for p in every]
        for p in some if options.variant in ("auto", "lowrank", "rankratio") else ():
            errors = curves.lowrank(p)
            tied = {"lowrank": options.rank, "rankratio": max(1, int(options.rank_share * p))}.get(options.variant, 0)
            ranks = [min(tied, len(errors) - 1)] if tied else range(1, len(errors))
            result += [(Form("lowrank", p, min(tied, outputs) or r), float(errors[r])) for r in ranks]
        for p in some if options.variant in ("auto", "sparse") else ():
            shares = [options.kept] if options.kept else KEPT
            counts = np.unique(np.array([max(1, int(share * (outputs - p) * p)) for share in shares]))
            result += [(Form("sparse", p, n), e) for n, e in zip(counts.tolist(), curves.sparse(p, counts), strict=True)]
        return result

    def _chosen(
        self,
        model: nn.Module,
        budget: Budget,
        found: Sequence[Layer],
        forms: Sequence[list[tuple[Form, float]]],
        *,
        refitted: bool,
    ) -> list[tuple[Layer, Form]]:
        """The layers that change, and how."""
        choices = []
        for layer, own in zip(found, forms, strict=True):
            size = int(np.prod(layer.shape))
            costs = [form.cost(layer.shape[0], size // layer.shape[0]) for form, _ in own]
            choices.append(Choice(np.array([size, *costs], dtype=float), np.array([0.0, *(error for _, error in own)])))
        chosen = meet(budget, choices, "linearconv", refitted=found if refitted else ())
        self.losses = {
            layer.name: float(each.errors[form]) for layer, each, form in zip(found, choices, chosen, strict=True) if form
        }
        return [(layer, own[form - 1][0]) for layer, own, form in zip(found, forms, chosen, strict=True) if form]

    def regularise(self, model: nn.Module, progress: Progress) -> None:
        """Every tenth step draws primary filters apart, and coefficients of sparse layers that are searched to zero (3.2)."""
        if (progress.step + 1) % self.options.every:
            return
        loss = torch.zeros(())
        made = layers(model)
        for name in made if self.own is None else self.own:
            if isinstance(layer := made.get(name), _Linear):
                loss = loss.to(layer.primary.device) + self.options.correlation * correlation(layer.primary)
                if name in self.wanted and isinstance(layer, Sparse):
                    loss = loss + self.options.l1 * layer.values.abs().sum()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]

    def project(self, model: nn.Module, progress: Progress) -> None:
        """Move the thresholds under which coefficients are left out (3.3)."""
        if (progress.step + 1) % self.options.moves:
            return
        for name, wanted in self.wanted.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, Sparse)
            size = layer.values.detach().abs()
            zeros = 1 - wanted / len(size)  # the share that shall be left out
            if self.options.gain:
                now = float((size <= self.thresholds.get(name, 0.0)).float().mean())
                move = (2 / (1 + 10 ** (10 * (now - zeros))) - 1) * self.options.gain
                self.thresholds[name] = self.thresholds.get(name, 0.0) + move
            else:
                count = int(zeros * len(size) * min(1.0, 2 * progress.share))
                self.thresholds[name] = float(size.kthvalue(count).values) if count else 0.0
            assert layer.live is not None
            layer.live.copy_(size > self.thresholds[name])  # in place: a recorded step reads it where it is

    def finish(self, model: nn.Module, channels: Channels, budget: Budget, moments: Mapping[str, "Moments"] | None) -> list[Edit]:
        """Sparse layers without the coefficients that the search left out, and as many as the budget allows."""
        result: list[Edit] = []
        for name, wanted in self.wanted.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, Sparse)
            result.append(_thinned(name, layer, wanted))
        return result

    def attach(self, model: nn.Module, edits: Sequence[Edit]) -> None:
        """The layers that are trained; sparse ones that are searched remember, in the model's state, what is left out."""
        self.own = [edit.module for edit in edits if isinstance(edit, Replace)] or None
        for name in self.wanted:
            layer = model.get_submodule(name)
            assert isinstance(layer, Sparse)
            layer.live = torch.ones_like(layer.values, dtype=torch.bool)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"threshold.{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.thresholds.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.thresholds = {name.removeprefix("threshold."): float(value) for name, value in state.items()}


def correlation(primary: Tensor) -> Tensor:
    """The sum of |Pearson correlation| over pairs of different filters (p, ...) (3.2)."""
    filters = primary.flatten(1).float()
    unit = F.normalize(filters - filters.mean(1, keepdim=True), dim=1)
    return (unit @ unit.T).fill_diagonal_(0).abs().sum()


class _Linear(KernelLayer):
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


class Full(_Linear):
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


class LowRank(_Linear):
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


class Sparse(_Linear):
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


def _edit(name: str, module: nn.Conv2d, form: Form, found: Combination) -> Replace:
    """Put the combination in the place of a convolution."""
    tensors = {key: value.contiguous() for key, value in _tensors(found, form, module.weight.shape, module.weight.dtype).items()}
    if module.bias is not None:
        tensors["bias"] = module.bias.detach()
    size = {"full": {}, "lowrank": {"rank": form.size}, "sparse": {"kept": form.size}}[form.variant]
    return Replace(name, f"linearconv.{form.variant}", {"primary": form.primary, **size}, tensors)


def _thinned(name: str, layer: Sparse, wanted: int) -> Replace:
    """A searched layer with so many of its coefficients, the largest of those that are left."""
    values = layer.values.detach() if layer.live is None else layer.values.detach() * layer.live
    kept = values.abs().argsort(descending=True, stable=True)[:wanted].sort().values
    at = layer.bits().nonzero().flatten()[kept]
    mask = torch.zeros(layer.secondary * len(layer.primary), dtype=torch.bool).index_fill(0, at, True)
    tensors = {**layer.state_dict(), "values": values[kept], "mask": _packed(mask)}
    tensors.pop("live", None)
    return Replace(name, "linearconv.sparse", {"primary": len(layer.primary), "kept": len(kept)}, tensors)


def _weight(model: nn.Module, layer: Layer) -> Tensor:
    """The kernel (o, i*k*k) float64."""
    return model.get_parameter(layer.weight).detach().flatten(1).double()


def _refit(layer: nn.Module, regression: Regression) -> None:
    """Choose filters and coefficients anew."""
    assert isinstance(layer, _Linear)
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
