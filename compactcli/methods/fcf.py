"""FCF: filters and the choice of filters, learnt together (Li et al., CVPR 2019).

Every filter has a scalar v that it is multiplied with. Of a layer's scalars exactly k shall be one and the others zero: they are
trained with the weights, while ADMM draws them to where the box {0 <= v <= 1, sum v = k} meets the sphere through its corners
(section 3). The filters whose scalars end at zero are then removed.

Here a scalar stands behind the batch normalisation, which would undo one that stands before it. From weights or images alone the
same ADMM minimises, of each layer's filters, what those that read them can not make good.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..budget import Budget, Family, Floats, Of
from ..channels import Channels, Ids, edits
from ..dials import Dial, by_layer, solve
from ..errors import CompactError
from ..layers import Layer
from ..recipe import Edit
from . import Method, Progress
from ._absorb import absorbed
from ._errors import norm_of
from ._fcf_search import Search, ranks, tied
from ._reconstruct import FEW, Alone, choose, problem, small
from ._squeeze import edit, saved_time
from ._widths import Widths, filters, per_set, removable, squeezable

if TYPE_CHECKING:
    from ..moments import Moments

CLIPPED = (0.1, 0.9)  # least and most that a layer keeps of its filters where they are ranked over all layers
ALIKE = 1.1  # without images errors up to this many times the least are taken for as good
NEVER = 1e9  # the error of a setting that is not to be taken, beside which all others are nothing


@dataclass(frozen=True)
class Options:
    """How fcf chooses."""

    select: Annotated[
        Literal["error", "identical", "global"],
        "how many filters each layer keeps: by error per cost, the same share everywhere, or ranked over all layers by mean |w|",
    ] = "error"
    residual: Annotated[
        Literal["auto", "leave", "prune", "squeeze"],
        "channels that shortcuts share: leave them; prune them from all layers that make them; squeeze: let each layer leave "
        "out some, where that is faster; auto: with images leave or squeeze, by error; without, of those "
        "with the least errors the fastest",
    ] = "auto"
    floor: Annotated[float, "smallest share of its filters that a layer keeps"] = 0.05
    soft: Annotated[bool, "prune channels, too, that layer normalisations take their statistics over"] = False
    alpha: Annotated[float, "search: share of the penalty in the gradient of the scalars, that of the loss has the rest"] = 0.99
    rate: Annotated[float, "search: learning rate of the scalars, the same in every step"] = 0.1
    rho: Annotated[float, "search: the penalty's strength at the start"] = 0.01
    growth: Annotated[float, "search: what it is multiplied with in each step; 0: so that it is full at half of the search"] = 0.0
    most: Annotated[float, "search: the penalty's full strength; no more than 0.6 / (alpha rate) is used"] = 6.0
    preset: Annotated[Literal["none", "cifar", "imagenet"], "search: the paper's constants, for what is not set otherwise"] = (
        "none"
    )

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("floor", 0 < self.floor <= 1, "a share above 0, up to 1"),
            ("alpha", 0 < self.alpha <= 1, "above 0, up to 1"),
            ("rate", self.rate > 0, "above 0"),
            ("rho", self.rho > 0, "above 0"),
            ("growth", self.growth == 0 or self.growth > 1, "0, or above 1"),
            ("most", self.most >= self.rho, "as much as rho or more"),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name):g}: it is {wanted}")


PRESETS = {
    "cifar": {"alpha": 0.99, "rho": 0.01, "growth": 1.01, "most": 6.0, "select": "identical"},
    "imagenet": {"alpha": 0.65, "rho": 0.001, "growth": 1.005, "most": 6.0, "select": "identical"},
}


@dataclass(frozen=True)
class Way:
    """What goes, how many stay, and what that means: the summed error, what the budget counts, the time by the estimate."""

    widths: Widths
    kept: dict[int, int]
    error: float
    cost: float
    time: float


class FCF(Method):
    """As many filters as the ratio allows, chosen while they are trained."""

    Options = Options
    presets = PRESETS
    of: ClassVar[tuple[Of, ...]] = ("macs", "params", "latency")

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.widths: Widths = []
        self.sides: dict[int, tuple[Layer, int]] = {}  # family -> the layer that alone leaves it out, 0: of filters, 1: of inputs
        self.kept: dict[int, int] = {}  # family -> how many of its sets stay
        self.search: Search | None = None
        self.scalars: dict[int, nn.Parameter] = {}  # family -> v, while it is searched; the values that the search ended with
        self.better: dict[str, Tensor] = {}  # what `mended` tells

    def start(
        self,
        model: nn.Module,
        channels: Channels,
        budget: Budget,
        moments: Mapping[str, "Moments"] | None = None,
        *,
        trains: bool = False,
    ) -> list[Edit]:
        """How many filters of each layer stay; for a search, their scalars.

        Raises CompactError for a target that is out of reach.
        """
        self._choose_(model, channels, budget, moments, trains=trains)
        self.losses = by_layer(budget, self._dials(budget), list(self.kept.values()))
        if trains:
            if all(kept == len(order) for (_, order, _), kept in zip(self.widths, self.kept.values(), strict=True)):
                raise CompactError("there is nothing here that a search could choose; leave out --epochs")
            self.search = Search(model, channels, budget, self.widths, self.kept, self.sides, self.options)
            self.scalars = self.search.scalars
        return []

    def _choose_(
        self, model: nn.Module, channels: Channels, budget: Budget, moments: Mapping[str, "Moments"] | None, *, trains: bool
    ) -> None:
        """What may go, and how many stay: of the ways to treat shared channels that fit, the best."""
        every = removable(model, channels, budget, moments, shared=self.options.residual in ("auto", "prune"))
        own = [width for width in every if len(_producers(budget, budget.families[width[0]])) == 1]
        ways = {"leave": own, "prune": every, "squeeze": own}
        if self.options.residual in ("auto", "squeeze"):
            for layer, side, order, errors in squeezable(model, channels, budget, moments):
                axis = (layer.weight, (layer.out_axis, layer.in_axis)[side])
                sets = channels.axes[axis]
                family = budget.alone(axis, sets[np.isin(sets, order)])
                self.sides[family] = (layer, side)
                pays = _pays(model, layer, side, len(order))
                ways["squeeze"] = [*ways["squeeze"], (family, order, np.where(pays, errors, NEVER))]
        found: list[Way] = []
        problems: list[CompactError] = []
        for tried in self._tried(images=moments is not None):
            for name in tried if not found else ():
                widths = ways[name]
                if trains:
                    widths = [width for width in widths if not tied(model, budget.families[width[0]])]
                try:
                    found.append(self._settled(model, channels, budget, widths, refitted=moments is not None))
                except CompactError as problem:
                    problems.append(problem)
        if not found:
            raise min(problems, key=str)  # they differ in the least ratio that they name
        best = _best(found, budget.target, ALIKE if moments is None else 1.0)
        self.widths, self.kept = best.widths, best.kept

    def _tried(self, *, images: bool) -> tuple[tuple[str, ...], ...]:
        """The ways to treat channels that shortcuts share: those to choose from, and others for where none of these fits.

        What goes from a shortcut is gone for all blocks behind, and refits make less of it good than errors of one layer after
        another tell: with images only where it must.
        """
        if self.options.residual != "auto":
            return ((self.options.residual,),)
        return (("leave", "squeeze"), ("prune",)) if images else (("leave", "prune", "squeeze"),)

    def _settled(self, model: nn.Module, channels: Channels, budget: Budget, widths: Widths, *, refitted: bool) -> "Way":
        """One way to meet the budget: no layer that leaves out what others make or read takes longer than it would with it."""
        while True:
            self.widths = widths
            kept = self._counts(model, channels, budget, refitted=refitted)
            along = self._along(budget, kept)
            plain = self._along(budget, {family: number for family, number in kept.items() if family not in self.sides})
            sizes, full = budget.sizes(along), budget.sizes(plain)
            squeezed = [n for n in range(len(budget.layers)) if (sizes[n] < full[n]).any()]
            saved = {n: saved_time(model, budget.layers[n], sizes[n], full[n]) for n in squeezed}
            slow = {budget.layers[n].name for n, time in saved.items() if time <= 0}
            if not slow:
                error = sum(float(errors[kept[family]]) for family, _, errors in widths)
                time = float(budget.time(plain, budget.ranks())) - budget.taken(sum(saved.values()))
                return Way(widths, kept, error, float(budget.cost(along, budget.ranks())), time)
            widths = [width for width in widths if width[0] not in self.sides or self.sides[width[0]][0].name not in slow]

    def _counts(self, model: nn.Module, channels: Channels, budget: Budget, *, refitted: bool) -> dict[int, int]:
        """How many sets of each family stay."""
        if self.options.select == "error":
            settings = solve(budget, self._dials(budget), refitted=refitted)
            return {family: kept for (family, _, _), kept in zip(self.widths, settings, strict=True)}
        if not self.widths:
            raise CompactError("there are no filters here that could go; `compactcli analyze` says why")
        rank = self._identical(budget) if self.options.select == "identical" else self._global(model, channels, budget)
        every = [rank(share) for share in np.linspace(0, 1, 1025)]
        costs = budget.cost(np.stack([self._along(budget, kept) for kept in every]), np.tile(budget.ranks(), (len(every), 1)))
        fitting = np.flatnonzero(costs <= budget.target)
        if not len(fitting) and not budget.nearest:
            raise budget.out_of_reach(float(costs.min()))
        return every[int(fitting[-1]) if len(fitting) else 0]

    def _dials(self, budget: Budget) -> list[Dial]:
        """How many of its filters each layer keeps."""
        return [
            Dial(errors, budget.step(len(order), family=family), self._least(len(order)), family=family)
            for family, order, errors in self.widths
        ]

    def _least(self, full: int) -> int:
        """The smallest number of its filters that a layer keeps."""
        return max(1, int(np.ceil(self.options.floor * full)))

    def _whole(self, budget: Budget, wanted: int, full: int) -> int:
        """A number of filters that a layer may keep: no more than wanted, where that is not too few."""
        step = budget.round_to or 1
        least = -(-self._least(full) // step) * step
        return full if wanted >= full else min(max(wanted // step * step, least), full)

    def _identical(self, budget: Budget) -> Callable[[float], dict[int, int]]:
        """Share -> how many stay of each family, where each layer keeps that share of its filters."""
        return lambda share: {
            family: self._whole(budget, int(len(order) * share + 1e-9), len(order)) for family, order, _ in self.widths
        }

    def _global(self, model: nn.Module, channels: Channels, budget: Budget) -> Callable[[float], dict[int, int]]:
        """Share of all filters -> how many stay of each family, of filters ranked by the mean of |w| over all layers."""
        means = {family: _means(model, channels, budget, budget.families[family]) for family, _, _ in self.widths}
        pooled = np.sort(np.concatenate(list(means.values())))

        def kept(share: float) -> dict[int, int]:
            threshold = pooled[min(int((1 - share) * len(pooled)), len(pooled) - 1)]
            shares = {family: np.clip((own >= threshold).mean(), *CLIPPED) for family, own in means.items()}
            return {
                family: self._whole(budget, round(len(means[family]) * float(own)), len(means[family]))
                for family, own in shares.items()
            }

        return kept

    def _along(self, budget: Budget, kept: Mapping[int, int]) -> Floats:
        """The positions left on every axis."""
        along = budget.along()
        for family, number in kept.items():
            along -= (len(budget.families[family].sets) - number) * budget.per_set[family]
        return along

    def regularise(self, model: nn.Module, progress: Progress) -> None:
        if self.search is not None:
            self.search.descend(progress)

    def project(self, model: nn.Module, progress: Progress) -> None:
        if self.search is not None:
            self.search.ascend()

    def end(self, model: nn.Module) -> str | None:
        """Plain parameters again, times their scalars; how far those came."""
        told = None if self.search is None else self.search.end(model)
        self.search = None
        return told

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.search is None else self.search.admm.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self.search is not None:
            self.search.admm.load_state_dict(state)

    def finish(self, model: nn.Module, channels: Channels, budget: Budget, moments: Mapping[str, "Moments"] | None) -> list[Edit]:
        """Remove the filters whose scalars ended lowest; without a search, those that the others make good best."""
        removed: list[int] = []
        squeezed: dict[str, list[Tensor | None]] = {}  # layer -> of its filters and inputs those that it keeps (n,) bool
        for family, order, _ in self.widths:
            sets, keep = budget.families[family].sets, self.kept[family]
            if family in self.scalars:
                gone = torch.ones(len(sets), dtype=torch.bool)
                gone[self.scalars[family].detach().topk(keep).indices] = False
            else:
                gone = self._unread(model, channels, budget, family, order, moments)
            if family not in self.sides:
                removed += sets[gone.numpy()].tolist()
            elif gone.any():
                layer, side = self.sides[family]
                left = ~np.isin(channels.axes[budget.families[family].axes[0][0]], sets[gone.numpy()])
                squeezed.setdefault(layer.name, [None, None])[side] = torch.from_numpy(left)
        if moments is None:
            self.better = absorbed(model, channels, budget, removed, squeezed)
            self._quieten_(model, channels, budget, removed, squeezed)
        return [*edits(channels, removed, model), *self._squeeze_layers(model, channels, budget, removed, squeezed)]

    def mended(self) -> Mapping[str, Tensor]:
        return self.better

    def _quieten_(
        self,
        model: nn.Module,
        channels: Channels,
        budget: Budget,
        removed: Sequence[int],
        squeezed: Mapping[str, Sequence[Tensor | None]],
    ) -> None:
        """Filters that a layer leaves out make zeros, which batch normalisations then take for their means."""
        for layer in budget.layers:
            kept, norm = squeezed.get(layer.name, (None,))[0], norm_of(model, layer)
            if kept is not None and norm is not None and norm.running_mean is not None:
                name = f"{layer.norm}.running_mean"
                stays = torch.from_numpy(~np.isin(channels.axes[layer.weight, layer.out_axis], removed))
                mean = self.better.get(name, norm.running_mean.detach()[stays])
                self.better[name] = torch.where(kept[stays], mean, 0.0)

    def _squeeze_layers(
        self,
        model: nn.Module,
        channels: Channels,
        budget: Budget,
        removed: Sequence[int],
        squeezed: Mapping[str, Sequence[Tensor | None]],
    ) -> list[Edit]:
        """The layers that leave out some of what is still there when the sets are removed."""
        result: list[Edit] = []
        for layer in budget.layers:
            if layer.name in squeezed:
                axes = [channels.axes[layer.weight, axis] for axis in (layer.out_axis, layer.in_axis)]
                present = [torch.from_numpy(~np.isin(sets, removed)) for sets in axes]
                kept = [there if own is None else own for own, there in zip(squeezed[layer.name], present, strict=True)]
                result.append(edit(model, layer, present, kept))
        return result

    def _unread(
        self,
        model: nn.Module,
        channels: Channels,
        budget: Budget,
        family: int,
        order: Ids,
        moments: Mapping[str, "Moments"] | None,
    ) -> Tensor:
        """Which sets of a family (n,) bool those that read it can do without."""
        own = budget.families[family]
        ranked = np.argsort(ranks(order, own.sets))
        readers = [layer for layer in budget.readers(own) if layer.groups == 1]
        if family in self.sides and self.sides[family][1] == 0:
            layer = self.sides[family][0]
            costs = moments.get(layer.name) if moments is not None else None
            among = np.isin(channels.axes[layer.weight, layer.out_axis], own.sets)
            return choose([] if costs is None else [Alone(filters(model, layer, costs, among))], ranked, self.kept[family])
        known = [layer for layer in readers if moments is not None and layer.name in moments and small(layer)]
        problems = []
        if moments is not None and len(known) == len(readers):
            coarse = len(readers) > FEW
            problems = [problem(model, channels, own.sets, layer, moments[layer.name], coarse=coarse) for layer in known]
        return choose(problems, ranked, self.kept[family])


def _best(ways: Sequence[Way], target: float, alike: float) -> Way:
    """Of the ways that meet the target, or come nearest to it, the fastest of those of at most `alike` times the least error."""
    least_cost = max(target, min(way.cost for way in ways))
    fitting = [way for way in ways if way.cost <= least_cost]
    most = alike * max(min(way.error for way in fitting), 0.0)  # rounding makes nothing of it less than nothing
    return min((way for way in fitting if way.error <= most), key=lambda way: way.time)


def _pays(model: nn.Module, layer: Layer, side: int, count: int) -> NDArray[np.bool_]:
    """For every number of `count` filters or inputs, from none to all, whether a layer with all others is faster for it."""
    full = np.array([layer.shape[layer.out_axis], layer.shape[layer.in_axis]], dtype=float)
    one = np.eye(2)[side]
    saved = [saved_time(model, layer, full - left * one, full) > 0 for left in range(count, 0, -1)]
    return np.array([*saved, True])


def _producers(budget: Budget, family: Family) -> list[Layer]:
    """The layers that make a family's channels, not each of its own."""
    return [layer for layer in budget.makers(family) if layer.groups == 1]


def _means(model: nn.Module, channels: Channels, budget: Budget, family: Family) -> Floats:
    """Mean |w| of the filters that make each set of a family; of the kernels that read it, where none do."""
    total = np.zeros((2, len(family.sets)))
    made = [(layer, layer.out_axis) for layer in budget.makers(family)]
    for layer, axis in made or [(layer, layer.in_axis) for layer in budget.readers(family) if layer.groups == 1]:
        weight = model.get_parameter(layer.weight).detach().transpose(0, axis).flatten(1).abs().double()
        positions = channels.axes[layer.weight, axis]
        for place, values in enumerate((weight.sum(1).numpy(), np.full(len(weight), float(weight.shape[1])))):
            total[place] += per_set(values, positions, family.sets)
    means: Floats = total[0] / total[1]
    return means
