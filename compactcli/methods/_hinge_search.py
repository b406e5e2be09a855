"""The search of hinge: proximal gradient on the groups of matrices while the network trains, until enough of them are nothing.

A matrix A is what a layer's kernel W = A W' is made with (`Product`), or a 1x1 convolution or linear layer that is one
already. A group is all that belongs to one thing that may go: a row of A, which reads one dimension of the layer's rank; a
column of A, which makes a channel, with the weights that read the channel behind it. (Behind a batch normalisation the column
alone would tell nothing: the network would not feel it shrink until it is gone.) Where a grouped convolution ties channels, all
that makes and reads them is one group, and of the channels of a bottleneck's 3x3 what reads them is.
Li et al., CVPR 2020 (Hinge), section 3.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..budget import Budget, Floats
from ..channels import Channels
from ..layers import Layer
from ..proximal import OPERATORS, STEPS, TINY
from . import Progress
from ._widths import numbered

if TYPE_CHECKING:
    from .hinge import Options

Init = Literal["svd2", "svd", "p-identity", "p-random", "disturbed-uniform", "disturbed-normal"]

PULL = 2.0  # how much faster than the way to zero asks for, for the gradient pulls back
DONE_BY = 0.5  # share of the search by which what is too much shall be gone; the rest is there to get over it
NOISE = 0.05  # of the disturbed starts
MOMENTUM = 0.9  # of the running ratio of gradients
MOST = 9 / 5  # that ratio, and the inverse of the least
EXPONENT = 1.35  # of that ratio in the learning rate
SHORTEST = 0.1  # spectral norm of a factor from which on its other learns no faster: it may grow while the paces stay

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


class Product(nn.Module):
    """A kernel as a product: weight (o, i, k, k) = A (o, r) times W' (r, i, k, k)."""

    def __init__(self, init: Init, generator: torch.Generator) -> None:
        super().__init__()
        self.init, self.generator = init, generator

    def forward(self, matrix: Tensor, filters: Tensor) -> Tensor:
        with torch.autocast(matrix.device.type, enabled=False):
            return (matrix @ filters.flatten(1)).view(len(matrix), *filters.shape[1:])

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A and W' for a kernel: with every start their product is the kernel.

        svd2: W' = the right singular vectors, A = U S, so that the rows of A are as long as the singular values. svd: W' =
        S V, A = U. p-identity: A = 1. p-random: A is Xavier normal. disturbed: A = 1 + noise, its columns of length 1.
        """
        matrix = weight.flatten(1).double()  # (o, i*k*k)
        o = len(matrix)
        if self.init in ("svd2", "svd"):
            U, S, V = torch.linalg.svd(matrix, full_matrices=False)
            A, filters = (U * S, V) if self.init == "svd2" else (U, S[:, None] * V)
        else:
            normal = torch.randn(o, o, generator=self.generator, dtype=torch.float64)
            uniform = 2 * torch.rand(o, o, generator=self.generator, dtype=torch.float64) - 1
            identity = torch.eye(o, dtype=torch.float64)
            noisy = identity + NOISE * (uniform if self.init == "disturbed-uniform" else normal)
            disturbed = noisy / noisy.norm(dim=1, keepdim=True)
            A = {"p-identity": identity, "p-random": normal / o**0.5}.get(self.init, disturbed).to(weight.device)
            filters = torch.linalg.solve(A, matrix)
        return A.to(weight.dtype), filters.view(-1, *weight.shape[1:]).to(weight.dtype)


@dataclass(frozen=True)
class Carrier:
    """One axis of a parameter, along which its slices belong to groups."""

    parameter: str
    axis: int
    of: Tensor  # the number of each position's group; the count of groups where it is in none
    is_matrix: bool  # rather than what reads the channels that a matrix makes
    is_outer: bool  # whether its layer makes what other layers make as well: the last of a residual block
    is_normed: bool  # whether batch normalisations behind its layer undo any scaling of all of it


@dataclass(frozen=True)
class Groups:
    """What may go from one family of alike channels, or of one layer's rank."""

    count: int
    carriers: tuple[Carrier, ...]
    family: int | None = None  # index into the budget's families
    layer: int | None = None  # index into the budget's layers

    @property
    def outer(self) -> bool:
        """Whether its matrix, or the first of them, is the last of a residual block."""
        return self.carriers[0].is_outer

    def norms(self, model: nn.Module) -> Tensor:
        """The norm of every group (count,)."""
        energy = torch.zeros(())
        for carrier in self.carriers:
            weight = model.get_parameter(carrier.parameter).detach()
            energy = energy.to(weight.device) + self._energies(weight, carrier)
        return energy.sqrt()

    def slopes(self, model: nn.Module) -> Tensor:
        """The norm of every group's gradient in the matrices (count,)."""
        energy = torch.zeros(self.count)
        for carrier in (carrier for carrier in self.carriers if carrier.is_matrix):
            gradient = model.get_parameter(carrier.parameter).grad
            if gradient is not None:
                energy = energy.to(gradient.device) + self._energies(gradient, carrier)
        return energy.sqrt()

    def _energies(self, weight: Tensor, carrier: Carrier) -> Tensor:
        energy = weight.float().square().transpose(0, carrier.axis).flatten(1).sum(1)
        return energy.new_zeros(self.count + 1).index_add_(0, carrier.of.to(energy.device), energy)[:-1]

    def regrown(self, norms: Tensor, scales: Tensor) -> Tensor | float:
        """What restores the length of all groups together; 1 unless a batch normalisation undoes what that does.

        Behind one, lengths mean nothing: were they to fall, no loss would resist, and all groups would go alike, where it is
        those that go which the network needs least.
        """
        left = (norms * scales).norm()
        return torch.where(left > 0, norms.norm() / left, 1.0) if all(carrier.is_normed for carrier in self.carriers) else 1.0

    def scale_(self, model: nn.Module, scales: Tensor, length: Tensor | float = 1.0) -> None:
        """Multiply every group with its scale (count,), and the whole parameters with `length`, in place."""
        every = torch.cat([scales, scales.new_ones(1)]) * length
        for carrier in self.carriers:
            weight = model.get_parameter(carrier.parameter).data
            shape = [-1 if axis == carrier.axis else 1 for axis in range(weight.ndim)]
            weight.mul_(every[carrier.of.to(weight.device)].to(weight.dtype).view(shape))


def attach_(
    model: nn.Module, channels: Channels, budget: Budget, eligible: Sequence[int], mode: str, init: Init
) -> tuple[list[str], list[Groups]]:
    """Give the layers that need one a matrix of their own; (those layers, all groups).

    `eligible` are the layers that may be decomposed, as indices into the budget's.
    """
    products: dict[str, Layer] = {}
    matrices: set[str] = set()  # the layers that are one themselves
    sides: dict[int, list[tuple[Layer, int]]] = {}  # of each family: what makes its channels and what reads them
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    eligible = [index for index in eligible if holders[id(model.get_parameter(budget.layers[index].weight))] == 1]  # none is tied
    decomposable = {budget.layers[index].name for index in eligible}
    for index, family in enumerate(budget.families if mode != "decompose" else ()):
        makers, readers = budget.makers(family), [layer for layer in budget.readers(family) if layer.groups == 1]
        single = [layer for layer in makers if layer.groups == 1]
        if len(single) != 1 or len(family.sets) < 2:
            continue
        maker, pointwise = single[0], [layer for layer in readers if layer.shape[2:] == (1, 1)]
        sides[index] = [(maker, maker.out_axis), *((layer, layer.in_axis) for layer in readers)]
        if len(makers) > 1:  # with what a grouped convolution makes of them
            matrices |= {maker.name, *(layer.name for layer in pointwise)}
        elif maker.kernel > 1 and readers and len(pointwise) == len(readers):
            matrices |= {layer.name for layer in pointwise}
            del sides[index][0]
        elif maker.kernel > 1 and maker.name in decomposable:
            products[maker.name] = maker
        else:
            matrices.add(maker.name)
    divided = [index for index in (eligible if mode != "prune" else ()) if budget.layers[index].name not in matrices]
    products |= {budget.layers[index].name: budget.layers[index] for index in divided}
    outer = _outer(channels, budget)
    found: list[Groups] = []
    for index, own in sides.items():
        carriers = {}
        for layer, axis in own:
            name = layer.weight if layer.name not in products else factors(layer.name)[0 if axis == layer.out_axis else 1]
            of = numbered(channels, channels.axes[layer.weight, axis], budget.families[index].sets)
            is_matrix = layer.name in matrices or (layer.name in products and axis == layer.out_axis)
            carriers[name, axis] = Carrier(name, axis, of, is_matrix, layer.name in outer, layer.normed)
        found.append(Groups(len(budget.families[index].sets), tuple(carriers.values()), family=index))
    for index in divided:
        layer = budget.layers[index]
        rank = min(layer.shape[0], layer.shape[1] * layer.kernel) if init.startswith("svd") else layer.shape[0]
        carrier = Carrier(factors(layer.name)[0], 1, torch.arange(rank), True, layer.name in outer, layer.normed)
        found.append(Groups(rank, (carrier,), layer=index))
    generator = torch.Generator().manual_seed(0)
    for name in products:
        parametrize.register_parametrization(model.get_submodule(name), "weight", Product(init, generator))
    return list(products), found


def detach_(model: nn.Module, layers: Sequence[str]) -> None:
    """Leave the layers plain, with the kernels that they had."""
    for name in layers:
        module = model.get_submodule(name)
        parametrize.remove_parametrizations(module, "weight")
        for other in [own for own in module._parameters if own != "weight"]:  # the weight is first again
            module._parameters[other] = module._parameters.pop(other)


def paces(matrix: Tensor, filters: Tensor) -> tuple[float, float]:
    """Learning rates of A (o, r) and W' (r, i, k, k) at which a step moves A W' about as far as it would a plain kernel."""
    one, other = (float(torch.linalg.matrix_norm(factor.detach().flatten(1).float(), 2)) for factor in (matrix, filters))
    return 1 / max(other, SHORTEST) ** 2, 1 / max(one, SHORTEST) ** 2


def factors(layer: str) -> tuple[str, str]:
    """The names of A and W' of a layer's product."""
    return f"{layer}.parametrizations.weight.original0", f"{layer}.parametrizations.weight.original1"


def _outer(channels: Channels, budget: Budget) -> set[str]:
    """The layers that make what other layers make as well."""
    made = {layer.name: set(channels.axes[layer.weight, layer.out_axis].tolist()) for layer in budget.layers}
    makers = Counter(number for layer in budget.layers if layer.groups == 1 for number in made[layer.name])
    return {layer.name for layer in budget.layers if any(makers[number] > (layer.groups == 1) for number in made[layer.name])}


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
        norms = [own.double().cpu() for own in norms]
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
