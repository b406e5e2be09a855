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
from ..errors import UsageError
from ..kernels import layers
from ..layers import Layer
from ..recipe import Edit, Replace
from . import Method, Progress
from ._combinations import Curves, Form, fit
from ._errors import Metric, Metrics
from ._layers import eligible, meet
from ._linear_layers import Linear, Sparse, edit, thinned

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
        found = eligible(model, budget.layers)
        forms = [self._forms(_weight(model, layer), metrics.of(layer), budget.round_to or 1) for layer in found]
        result: list[Edit] = []
        for layer, form in self._chosen(model, budget, found, forms, refitted=moments is not None):
            weight = _weight(model, layer)
            if form.variant == "sparse" and trains:
                self.wanted[layer.name] = form.size
                form = Form("sparse", form.primary, (len(weight) - form.primary) * form.primary)
            module = model.get_submodule(layer.name)
            assert isinstance(module, nn.Conv2d)
            result.append(edit(layer.name, module, form, fit(weight, metrics.of(layer), form)))
        return result

    def _forms(self, weight: Tensor, metric: Metric, step: int) -> list[tuple[Form, float]]:
        """(form, error) of all that a layer may be stored as beside plain."""
        options, outputs = self.options, len(weight)
        curves = Curves(weight, metric)
        every = list(range(step, min(outputs - 1, weight.shape[1]) + 1, step))
        if not every:
            return []
        if options.share:
            some = every = [_nearest(int(options.share * outputs), step, every[-1])]
        else:
            some = sorted({_nearest(share * outputs, step, every[-1]) for share in SHARES})
        result: list[tuple[Form, float]] = []
        if options.variant in ("auto", "full"):
            result += [(Form("full", p), curves.full(p)) for p in every]
        for p in some if options.variant in ("auto", "lowrank", "rankratio") else ():
            errors = curves.lowrank(p)
            shared = _nearest(int(options.rank_share * p), step, outputs)
            tied = {"lowrank": options.rank, "rankratio": shared}.get(options.variant, 0)
            ranks = [min(tied, len(errors) - 1)] if tied else range(step, len(errors), step)
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
            if isinstance(layer := made.get(name), Linear):
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
            result.append(thinned(name, layer, wanted))
        return result

    def attach(self, model: nn.Module, edits: Sequence[Edit]) -> None:
        """The layers that are trained; sparse ones that are searched remember, in the model's state, what is left out."""
        self.own = [each.module for each in edits if isinstance(each, Replace)] or None
        for name in self.wanted:
            layer = model.get_submodule(name)
            assert isinstance(layer, Sparse)
            layer.live = torch.ones_like(layer.values, dtype=torch.bool)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"threshold.{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.thresholds.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.thresholds = {name.removeprefix("threshold."): float(value) for name, value in state.items()}


def _nearest(count: float, step: int, most: int) -> int:
    """The multiple of a step that is nearest, at least one of it, up to a most that is one."""
    return min(most, max(1, round(count / step)) * step)


def correlation(primary: Tensor) -> Tensor:
    """The sum of |Pearson correlation| over pairs of different filters (p, ...) (3.2)."""
    filters = primary.flatten(1).float()
    unit = F.normalize(filters - filters.mean(1, keepdim=True), dim=1)
    return (unit @ unit.T).fill_diagonal_(0).abs().sum()


def _weight(model: nn.Module, layer: Layer) -> Tensor:
    """The kernel (o, i*k*k) float64."""
    return model.get_parameter(layer.weight).detach().flatten(1).double()
