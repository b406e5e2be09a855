"""The search of hinge: proximal gradient on the groups of matrices while the network trains, until enough of them are nothing.

Li et al., CVPR 2020 (Hinge), section 3.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..budget import Budget, Floats
from ..proximal import OPERATORS, STEPS, TINY
from . import Progress
from ._hinge_groups import Groups, factors, paces

if TYPE_CHECKING:
    from .hinge import Options

PULL = 2.0  # how much faster than the way to zero asks for, for the gradient pulls back
DONE_BY = 0.5  # share of the search by which what is too much shall be gone; the rest is there to get over it
MOMENTUM = 0.9  # of the running ratio of gradients
MOST = 9 / 5  # that ratio, and the inverse of the least
EXPONENT = 1.35  # of that ratio in the learning rate

Constants = dict[str, float | str | bool]

# Of the paper's runs on CIFAR, from the authors' scripts (there --lr 0.1 --schedule constant, batches of 64).
# Lengths are per matrix: theirs are of all matrices together but in the two plain ResNets. Other than there, what reads a channel
# is in its group as well, the threshold is a share of the mean norm at the start, survivors are chosen by squared norms per cost,
# and a block's two matrices need not keep as many groups as each other.
_RESNET = {"mode": "decompose", "adjust": True, "anneal": 2.0}
_OWN: dict[str, Any] = {
    "resnet20": _RESNET | {"anneal_first": 20.0, "anneal_second": 15.0},
    "resnet20-cifar100": _RESNET | {"anneal_first": 30.0, "anneal_second": 25.0},
    "resnet56": _RESNET | {"anneal_first": 10.0, "anneal_second": 5.0, "factor": 4e-4, "regularizer": "l1/2"},
    "resnet164": {"mode": "prune", "adjust": True, "threshold": 1e-3},
    "resnext20": {"mode": "prune", "anneal": 2.0, "anneal_first": 75 / 6, "anneal_second": 60 / 6},
    "resnext164": {"mode": "prune"},
    "densenet": {"mode": "decompose", "threshold": 1e-3},
    "vgg16": {"anneal": 2.0, "anneal_first": 400 / 12, "anneal_second": 200 / 12, "threshold": 5e-2, "balance": "none"},
    "wrn": {"adjust": True, "anneal": 2.0, "anneal_first": 400 / 6, "anneal_second": 350 / 6}
    | {"factor": 4e-4, "init": "p-identity", "balance": "none"},
}
_ALL: dict[str, Any] = {
    "regularizer": "l1",
    "factor": 2e-4,
    "others": 0.01,
    "floor": 0.2,
    "stop": 0.1,
    "pace": False,
    "by": "norm",
    "balance": "norm",
}
PRESETS: dict[str, Constants] = {name: {**_ALL, **own} for name, own in _OWN.items()}


def _price(budget: Budget, group: Groups) -> float:
    """What one group costs in the whole network."""
    along, ranks = np.tile(budget.along(), (2, 1)), np.tile(budget.ranks(), (2, 1))
    if group.family is not None:
        along[0] -= budget.per_set[group.family]
    else:
        ranks[:, group.layer] = group.count - 1, group.count
    less, all_of_them = budget.cost(along, ranks)
    return float(all_of_them - less)


def _units(
    norms: Sequence[Tensor], errors: Sequence[Floats | None], prices: Sequence[float], kept: Sequence[int] | None
) -> list[Tensor]:
    """What norms are divided by, so that at the start their squares are the error of giving up a group, by what it costs.

    In the mean over all groups they are then 1. Those of groups whose errors are not known stand to each other as the norms do.
    What a group costs depends on what else goes. With `kept`, how many of each family and layer the budget's search keeps, they
    are instead above 1 for as many, and below for those that go, so that one threshold leaves the network that it chose.
    """
    begun = [
        None if own is None else torch.from_numpy(own).clamp_min(0).sqrt() / price**0.5
        for own, price in zip(errors, prices, strict=True)
    ]
    known = torch.cat([own for own in begun if own is not None] or [torch.ones(1, dtype=torch.float64)])
    mean = float(known.mean()) or 1.0
    relative = [n / n.mean().clamp_min(TINY) if own is None else own / mean for n, own in zip(norms, begun, strict=True)]
    if kept is not None:
        relative = [own / _boundary(own, count) for own, count in zip(relative, kept, strict=True)]
    return [torch.where((n > 0) & (u > 0), n / u, n.mean().clamp_min(TINY)) for n, u in zip(norms, relative, strict=True)]


def _boundary(relative: Tensor, kept: int) -> float:
    """What lies between the least relative norm that stays and the largest that goes; half the least where all stay."""
    falling = relative.sort(descending=True).values.tolist()
    stays = falling[kept - 1]
    goes = falling[kept] if kept < len(falling) else 0.0
    return max(math.sqrt(stays * goes) if goes > 0 else stays / 2, TINY)


def _mean_of_largest(norms: Tensor, count: int) -> float:
    return max(float(norms.topk(count).values.mean()), TINY)


class Search:
    """Where a search stands: how hard it draws, and how far it is from its target."""

    def __init__(
        self,
        model: nn.Module,
        found: Sequence[Groups],
        budget: Budget,
        options: "Options",
        errors: Sequence[Floats | None],
        kept: Sequence[int] | None = None,
    ) -> None:
        """`errors` are what giving up each group would cost in error at the start, (count,) for each of those found, if known;
        `kept` how many of each stay in the network that the budget chooses at the start, if it is to be drawn to that.
        """
        self.found, self.budget, self.options = list(found), budget, options
        self.operator, self.least = OPERATORS[options.regularizer], STEPS[options.regularizer]
        norms = [each.norms(model).double().cpu() for each in found]
        self.means = torch.stack([own.mean() for own in norms]).clamp_min(TINY)
        self.prices = [_price(budget, each) if options.balance == "error" else 1.0 for each in found]
        self.kept = kept
        self.begun = [] if kept is None else [_mean_of_largest(own, count) for own, count in zip(norms, kept, strict=True)]
        self.units = [mean.expand_as(own) for mean, own in zip(self.means, norms, strict=True)]
        if options.balance == "none":
            self.units = [self.means.mean().expand_as(own) for own in norms]
        if options.balance == "error":
            self.units = _units(norms, errors, self.prices, kept)
        self.reach = torch.inf  # the relative norm up to which groups must go for the target
        self.ratio = 0.0  # of inner matrices' gradients to the outer ones'; 0: not known yet
        self.speed = 0.0  # of the relative norms, per step

    def parameter_groups(self, model: nn.Module, divided: Sequence[str]) -> list[dict[str, Any]]:
        """The matrices, at the run's learning rate, and all else at its share of it; factors of divided layers at their paces."""
        others = self.options.others
        left = dict(model.named_parameters())
        groups: list[dict[str, Any]] = []
        for layer in divided:
            matrix, filters = (left.pop(name) for name in factors(layer))
            first, second = paces(matrix, filters) if self.options.pace else (1.0, 1.0)
            groups += [{"params": [matrix], "pace": first}, {"params": [filters], "rate": others, "pace": second}]
        whole = [left.pop(name) for outer in (False, True) for name in self.carriers(outer=outer) if name in left]
        return [{"params": whole}, {"params": list(left.values()), "rate": others}, *groups]

    def carriers(self, *, outer: bool) -> list[str]:
        """The matrices' parameters, those of the last layers of residual blocks or the others."""
        carriers = (carrier for each in self.found for carrier in each.carriers if carrier.is_matrix)
        return list(dict.fromkeys(carrier.parameter for carrier in carriers if carrier.is_outer == outer))

    def adjust(self, model: nn.Module) -> None:
        """Let the outer matrices learn as fast as the inner ones, by the running ratio of their gradients.

        Only their gradients are scaled, not the learning rates of all others (the authors' p1), so it is for sgd; and the
        ratio is smoothed, which theirs hardly is.
        """
        inner, outer = (sum(float(e.slopes(model).sum()) for e in self.found if e.outer == side) for side in (False, True))
        if not inner or not outer:
            return
        now = inner / outer
        self.ratio = min(max(MOMENTUM * self.ratio + (1 - MOMENTUM) * now if self.ratio else now, 1 / MOST), MOST)
        for name in self.carriers(outer=True):
            gradient = model.get_parameter(name).grad
            if gradient is not None:
                gradient.mul_(self.ratio**EXPONENT)

    def step(self, model: nn.Module, progress: Progress) -> None:
        """The proximal step behind the optimizer's."""
        norms = [each.norms(model) for each in self.found]
        if factor := self.options.factor / self.annealed(norms):
            for each, own, mean in zip(self.found, norms, self.means.tolist(), strict=True):
                t = factor * (1.0 if self.options.balance == "none" else mean) * progress.learning_rates[0]
                each.scale_(model, self.operator(own, t))
            return
        relative = self.relative(norms)
        self.look(relative, progress)
        level = self.reach
        if self.options.regularizer == "l0":  # it has no slow way to zero, so that the level rises slowly
            level = min(level * min(progress.share / DONE_BY, 1), progress.step * self.options.speed)
        if self.speed > 0:
            for each, own, in_units in zip(self.found, norms, relative, strict=True):
                scales = self.operator(in_units.to(own), self.least(level, self.speed))
                each.scale_(model, scales, each.regrown(own, scales))

    def annealed(self, norms: Sequence[Tensor]) -> float:
        """What a given factor is divided by, as the norms of the inner matrices fall."""
        options = self.options
        if not options.factor or not options.anneal:
            return 1.0
        inner = [own.sum() for each, own in zip(self.found, norms, strict=True) if not each.outer]
        length = float(torch.stack(inner or [own.sum() for own in norms]).mean())
        return float(options.anneal ** ((length <= options.anneal_first) + (length <= options.anneal_second)))

    def look(self, norms: Sequence[Tensor], progress: Progress) -> None:
        """By their relative norms, how far the groups are from the target, and how fast they must go to be there in time."""
        candidates = np.unique(torch.cat([torch.zeros(1, dtype=torch.float64), *norms]).numpy())
        low, high = 0, len(candidates) - 1
        while low < high:
            middle = (low + high) // 2
            if self.cost(norms, float(candidates[middle])) <= self.budget.target:
                high = middle
            else:
                low = middle + 1
        self.reach = float(candidates[high]) * (1 + 1e-6)  # rounding shall spare none
        steps = progress.step / progress.share if progress.share else torch.inf  # of the whole search
        wanted = self.reach * min(PULL / max((DONE_BY - progress.share) * steps, 1.0), 1.0)
        self.speed = min(wanted, self.options.speed)

    def relative(self, norms: Sequence[Tensor]) -> list[Tensor]:
        """The norms of every family's and layer's groups in their units, on the CPU."""
        every = torch.cat(list(norms)).double().cpu()  # one copy for all groups
        norms = torch.split(every, [each.count for each in self.found])
        return [own / (units * drift) for own, units, drift in zip(norms, self.units, self.drifts(norms), strict=True)]

    def drifts(self, norms: Sequence[Tensor]) -> list[float]:
        """By what the norms of every family and layer have grown since the start, in the mean over those that are to stay.

        Training makes all norms of a layer grow or fall, which says nothing of what its groups are worth beside another's.
        """
        if self.kept is None:
            return [1.0] * len(norms)
        now = [_mean_of_largest(own, count) for own, count in zip(norms, self.kept, strict=True)]
        return [max(one / begun, TINY) for one, begun in zip(now, self.begun, strict=True)]

    def norms(self, model: nn.Module) -> list[Floats]:
        """The same, as they are now."""
        return [own.numpy() for own in self.relative([each.norms(model) for each in self.found])]

    def cost(self, norms: Sequence[Floats | Tensor], threshold: float) -> float:
        """What the network costs with the groups above the threshold, and the floor of each; no weight is touched."""
        along, ranks = self.budget.along(), self.budget.ranks()
        for each, own in zip(self.found, norms, strict=True):
            kept = max(int((own > threshold).sum()), int(np.ceil(self.options.floor * each.count)), 1)
            if each.family is not None:
                along -= (each.count - kept) * self.budget.per_set[each.family]
            else:
                ranks[each.layer] = kept
        decomposed = np.where(ranks <= self.budget.most_ranks(along), ranks, np.inf)
        return float(self.budget.cost(along, decomposed))

    def done(self, model: nn.Module) -> bool:
        """Whether what is left without the groups below the threshold costs no more above the target than the option says."""
        if not self.options.stop:
            return False
        most = self.budget.target + self.options.stop * self.budget.original
        return self.cost(self.norms(model), self.options.threshold) <= most

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "means": self.means,
            "units": torch.cat(self.units),
            "standing": torch.tensor([self.reach, self.ratio, self.speed], dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.means = state["means"].clone()
        self.units = list(torch.split(state["units"].clone(), [each.count for each in self.found]))
        self.reach, self.ratio, self.speed = state["standing"].tolist()
