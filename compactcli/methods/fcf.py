"""FCF: filters and the choice of filters, learnt together (Li et al., CVPR 2019).

Every filter has a scalar v that it is multiplied with. Of a layer's scalars exactly k shall be one and the others zero: they are
trained with the weights, while ADMM draws them to where the box {0 <= v <= 1, sum v = k} meets the sphere through its corners
(section 3). The filters whose scalars end at zero are then removed.

Here a scalar stands behind the batch normalisation, which would undo one that stands before it. From weights or images alone the
same ADMM minimises, of each layer's filters, what those that read them can not make good.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence

from ..budget import Budget, Family, Floats, Of
from ..channels import Axis, Channels, Ids, edits
from ..dials import Dial, by_layer, solve
from ..errors import CompactError
from ..layers import Layer
from ..lpbox import Admm, Penalty
from ..recipe import Edit
from . import Method, Progress
from ._absorb import absorbed
from ._errors import norm_of
from ._reconstruct import FEW, Alone, choose, problem, small
from ._squeeze import edit, saved_time
from ._widths import Widths, filters, numbered, per_set, removable, squeezable

if TYPE_CHECKING:
    from ..moments import Moments

CLIPPED = (0.1, 0.9)  # least and most that a layer keeps of its filters where they are ranked over all layers
STEADY = 0.6  # a penalty above 2/3 by the learning rate makes steps of the scalars and of the dual variables swing up
TIES = 1e-3  # what draws the first to go of a layer's filters, of those that the loss knows no difference between
ALIKE = 1.1  # without images errors up to this many times the least are taken for as good
NEVER = 1e9  # the error of a setting that is not to be taken, beside which all others are nothing
SETTLED = 0.5  # share of the search at which the penalty is as strong as it gets, where its growth is not given


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
    alpha: Annotated[float, "search: share of the penalty in the gradient of the scalars, that of the loss has the rest"] = 0.99
    rate: Annotated[float, "search: learning rate of the scalars, the same in every step"] = 0.1
    rho: Annotated[float, "search: the penalty's strength at the start"] = 0.01
    growth: Annotated[float, "search: what it is multiplied with in each step; 0: so that it is full at half of the search"] = 0.0
    most: Annotated[float, "search: the penalty's full strength"] = 6.0
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


class Gate(nn.Module):
    """A parameter whose positions along an axis are multiplied with the scalars of the filters that they belong to."""

    of: Tensor

    def __init__(self, scalars: nn.Parameter, of: Tensor, axis: int) -> None:
        """`of` (positions,): the number of each position's scalar; their count for none."""
        super().__init__()
        self.scalars, self.axis = scalars, axis
        self.straight = torch.equal(of, torch.arange(len(scalars)))  # each position has the scalar of its place
        self.register_buffer("of", of, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        every = self.scalars if self.straight else torch.cat((self.scalars, self.scalars.new_ones(1)))[self.of]
        return weight * every.view([-1 if axis == self.axis else 1 for axis in range(weight.ndim)])

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight itself: all scalars are one at the start."""
        return weight


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
        self.scalars: dict[int, nn.Parameter] = {}  # family -> v, while it is searched; the values that the search ended with
        self.gated: dict[str, list[str]] = {}  # module -> its parameters in their order
        self.admm: Admm | None = None
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
            self._attach_(model, channels, budget)
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
                    widths = [width for width in widths if not _tied(model, budget.families[width[0]])]
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
                time = float(budget.time(plain, budget.ranks())) - sum(saved.values())
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

    def _attach_(self, model: nn.Module, channels: Channels, budget: Budget) -> None:
        """A scalar for each filter that may go, on what comes out of the batch normalisations behind it, or of the filter."""
        if all(kept == len(order) for (_, order, _), kept in zip(self.widths, self.kept.values(), strict=True)):
            raise CompactError("there is nothing here that a search could choose; leave out --epochs")
        # By the names as they are now: a gate renames the parameter that it stands on.
        gates = {family: self._gates(model, budget, family) for family, _, _ in self.widths}
        for family, order, _ in self.widths:
            sets = budget.families[family].sets
            self.scalars[family] = nn.Parameter(torch.ones(len(order)))
            for tensor, axis in gates[family]:
                module, _, name = tensor.rpartition(".")
                owner = model.get_submodule(module)
                self.gated.setdefault(module, list(owner._parameters))
                gate = Gate(self.scalars[family], numbered(channels, channels.axes[tensor, axis], sets), axis)
                parametrize.register_parametrization(owner, name, gate)
        self.sizes = torch.tensor([len(own) for own in self.scalars.values()])
        orders = [torch.from_numpy(_ranks(order, budget.families[family].sets)) for family, order, _ in self.widths]
        self.ties = pad_sequence([TIES * (1 - ranks / len(ranks)) for ranks in orders], batch_first=True)
        counts = torch.tensor([self.kept[family] for family in self.scalars])
        penalty = Penalty(self.options.rho, self.options.growth or 1.0, self.options.most)
        self.admm = Admm(counts, self.sizes, int(self.sizes.max()), penalty)

    def _gates(self, model: nn.Module, budget: Budget, family: int) -> list[Axis]:
        """What the scalars of a family stand on."""
        if family not in self.sides:
            return _gates(model, budget, budget.families[family])
        layer, side = self.sides[family]
        if side == 1:
            return [(layer.weight, layer.in_axis)]
        if norm_of(model, layer) is not None:
            return [(f"{layer.norm}.{name}", 0) for name in ("weight", "bias")]
        biased = getattr(model.get_submodule(layer.name), "bias", None) is not None
        return [(layer.weight, layer.out_axis), *([(f"{layer.name}.bias", 0)] if biased else [])]

    def regularise(self, model: nn.Module, progress: Progress) -> None:
        """A plain gradient step of the scalars, as ADMM takes them: of the penalty, and for the rest of the loss (3.4).

        Their rate is their own: a schedule that ends at nothing would leave them between zero and one.
        """
        if self.admm is None:
            return
        options = self.options
        if not options.growth:
            self.admm.rho = options.rho * (options.most / options.rho) ** min(progress.share / SETTLED, 1.0)
        self.admm.rho = min(self.admm.rho, STEADY / (options.alpha * options.rate))
        matrix = self._matrix()
        self.admm.to_(matrix.device)
        drawn = self.admm.gradient(matrix) + self.ties.to(matrix.device)
        for v, row, size in zip(self.scalars.values(), drawn, self.sizes.tolist(), strict=True):
            assert v.grad is not None
            v.data -= options.rate * (options.alpha * row[:size] + (1 - options.alpha) * v.grad)
            v.grad = None  # the optimizer leaves them alone

    def project(self, model: nn.Module, progress: Progress) -> None:
        """Raise the dual variables."""
        if self.admm is not None:
            self.admm.step(self._matrix())

    def _matrix(self) -> Tensor:
        """All scalars (families, widest), filled up with zeros."""
        return pad_sequence([v.detach() for v in self.scalars.values()], batch_first=True)

    def end(self, model: nn.Module) -> str | None:
        """Plain parameters again, times their scalars; how far those came."""
        if self.admm is None:
            return None
        for module, names in self.gated.items():
            owner = model.get_submodule(module)
            for name in names:
                if parametrize.is_parametrized(owner, name):
                    parametrize.remove_parametrizations(owner, name)
            for name in names:  # in the order that they had
                owner._parameters[name] = owner._parameters.pop(name)
        values = torch.cat([v.detach() for v in self.scalars.values()])
        far = float(torch.minimum(values.abs(), (values - 1).abs()).max())
        self.admm, self.gated = None, {}
        return f"fcf: {sum(self.kept.values())} of {len(values)} filters stay; no scalar is farther than {far:.3f} from 0 or 1"

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.admm is None else self.admm.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self.admm is not None:
            self.admm.load_state_dict(state)

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
        ranked = np.argsort(_ranks(order, own.sets))
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


def _ranks(order: Ids, sets: Ids) -> Ids:
    """For each of the sets its place in the order in which to give them up."""
    place = {number: rank for rank, number in enumerate(order.tolist())}
    return np.array([place[number] for number in sets.tolist()])


def _best(ways: Sequence[Way], target: float, alike: float) -> Way:
    """Of the ways that meet the target, or come nearest to it, the fastest of those of at most `alike` times the least error."""
    least_cost = max(target, min(way.cost for way in ways))
    fitting = [way for way in ways if way.cost <= least_cost]
    least = min(way.error for way in fitting)
    return min((way for way in fitting if way.error <= alike * least), key=lambda way: way.time)


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


def _gates(model: nn.Module, budget: Budget, family: Family) -> list[Axis]:
    """What scalars stand on: all parameters of batch normalisations on the family's channels.

    Where others read what a layer makes, or there is no such, the layer's own. Grouped layers that read channels and make
    them again are among them, for what these make of zeros need not be zero.
    """
    parameters, axes = dict(model.named_parameters()), [axis for axis, _ in family.axes]
    inside = {tensor: tensor.rpartition(".")[0] for tensor, _ in axes}
    norms = [
        (tensor, axis)
        for tensor, axis in axes
        if tensor in parameters and isinstance(model.get_submodule(inside[tensor]), _BatchNorm)
    ]
    again = [layer for layer in budget.readers(family) if layer.groups > 1]  # transposed
    bare = [layer for layer in [*budget.makers(family), *again] if not (layer.normed and norms)]
    weights = {(layer.weight, layer.out_axis) for layer in bare}
    biases = {(tensor, 0) for tensor, _ in axes if tensor in parameters and parameters[tensor].ndim == 1}
    biases = {(tensor, 0) for tensor, _ in biases if inside[tensor] in {layer.name for layer in bare}}
    return [*norms, *(axis for axis in axes if axis in weights | biases)]


def _tied(model: nn.Module, family: Family) -> bool:
    """Whether a parameter that the family lies on is another's as well."""
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    own = dict(model.named_parameters())
    return any(holders[id(own[tensor])] > 1 for (tensor, _), _ in family.axes if tensor in own)
