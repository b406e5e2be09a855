"""How many channels may go, in which order, and what that does to the network's outputs: of images, or as far as weights tell."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..budget import Budget, Floats
from ..channels import Axis, Channels, Ids
from ..layers import Layer
from ._errors import multiplied, norm_of, root, worths
from ._layers import eligible

if TYPE_CHECKING:
    from ..moments import Moments

Widths = list[tuple[int, Ids, Floats]]  # (family, its sets in the order in which to give them up, error by how many are kept)
Sides = list[tuple[Layer, int, Ids, Floats]]  # (layer, 0: filters, 1: inputs, then as above)


def removable(
    model: nn.Module, channels: Channels, budget: Budget, moments: Mapping[str, "Moments"] | None, *, shared: bool
) -> Widths:
    """What may be removed of what one layer alone produces.

    With `shared`, of what several layers produce together as well.
    """
    result = []
    worth = worths(model, channels, budget, moments)
    for index, family in enumerate(budget.families):
        makers = budget.makers(family)
        producers = [layer for layer in makers if layer.groups == 1]
        consumers = [layer for layer in budget.readers(family) if layer.groups == 1]
        if not producers or len(family.sets) < 2 or (len(producers) > 1 and not shared):
            continue
        if moments is not None and consumers and all(layer.name in moments for layer in consumers):
            order, lost = _eliminate(model, channels, family.sets, consumers, moments)
        else:
            power = _power(model, channels, family.sets, {axis for axis, _ in family.axes}, makers)
            counts, shares = np.ones(1), power[None] / max(float(power.sum()), 1e-30)
            if consumers:
                counts = np.array([worth.get(layer.name, 1.0) for layer in consumers])
                shares = np.stack([_share(model, channels, family.sets, power, layer) for layer in consumers])
            by_share = np.argsort(counts @ shares, kind="stable")
            order, lost = family.sets[by_share], counts @ multiplied(np.cumsum(shares[:, by_share], axis=1))
        result.append((index, order, np.concatenate([lost[::-1], [0.0]])))
    return result


def squeezable(model: nn.Module, channels: Channels, budget: Budget, moments: Mapping[str, "Moments"] | None) -> Sides:
    """What single layers may leave out of channels that others make as well: filters that they add to, inputs that they read."""
    makers = Counter(n for layer in budget.layers if layer.groups == 1 for n in set(channels.axes[layer.weight, layer.out_axis]))
    worth = worths(model, channels, budget, moments)
    lie_on: dict[int, set[Axis]] = {}  # the axes of streams, by a set
    result: Sides = []
    for layer in eligible(model, budget.layers):
        if layer.groups > 1:
            continue
        known = None if moments is None else moments.get(layer.name)
        counts = worth.get(layer.name, 1.0)
        for side, axis in enumerate((layer.out_axis, layer.in_axis)):
            every = channels.axes[layer.weight, axis]
            shared = np.array([makers[number] > 1 for number in every.tolist()])
            sets = every[shared]
            if len(sets) < 2 or len(np.unique(every)) < len(every):
                continue
            if known is not None and side:
                order, lost = _eliminate(model, channels, sets, [layer], {layer.name: known})
            elif known is not None:
                order, lost = _give_up(filters(model, layer, known, shared), sets)
            else:
                share = _read(model, channels, budget, sets, layer, lie_on) if side else _made(model, layer)[shared]
                by_share = np.argsort(share, kind="stable")
                order, lost = sets[by_share], counts * multiplied(np.cumsum(share[by_share]))
            result.append((layer, side, order, np.concatenate([lost[::-1], [0.0]])))
    return result


def filters(model: nn.Module, layer: Layer, moments: "Moments", among: NDArray[np.bool_]) -> Tensor:
    """What giving up filters by themselves costs, of those `among` all (n, n): the sum over all pairs of them."""
    some = torch.from_numpy(among)
    weight = model.get_parameter(layer.weight).detach().double().flatten(1)[some]
    return moments.worth.double()[some][:, some] * (weight @ moments.inputs.double() @ weight.T)


def _give_up(costs: Tensor, sets: Ids) -> tuple[Ids, Floats]:
    """(order, summed error after each) in which filters are given up, each time the one that adds least."""
    adds, left = costs.diagonal().clone(), torch.ones(len(costs), dtype=torch.bool)
    order, lost = [], []
    for _ in range(len(costs)):
        chosen = int(torch.where(left, adds, torch.inf).argmin())
        lost.append(float(adds[chosen]))
        order.append(chosen)
        left[chosen] = False
        adds += 2 * costs[chosen]
    return sets[np.array(order)], np.maximum.accumulate(np.cumsum(lost))


def _made(model: nn.Module, layer: Layer) -> Floats:
    """Each filter's share of what a layer makes: the variance behind its batch normalisation, or its energy."""
    norm = norm_of(model, layer)
    own = _energy(model, layer, layer.out_axis) if norm is None else norm.weight.detach().double().square().numpy()
    return own / max(float(own.sum()), 1e-30)


def _read(model: nn.Module, channels: Channels, budget: Budget, sets: Ids, layer: Layer, lie_on: dict[int, set[Axis]]) -> Floats:
    """Each channel's share of what a layer reads from all of the sets. `lie_on` are the axes that are known already."""
    first = int(sets[0])
    if first not in lie_on:
        lie_on[first] = {axis for axis, own in channels.axes.items() if first in own}
    lies_on = lie_on[first]
    makers = [layer for layer in budget.layers if (layer.weight, layer.out_axis) in lies_on]
    return _share(model, channels, sets, _power(model, channels, sets, lies_on, makers), layer)


def _share(model: nn.Module, channels: Channels, sets: Ids, power: Floats, consumer: Layer) -> Floats:
    """Each set's share of what a consumer reads from all of them: its power times the energy of the weights on it."""
    read = power * per_set(_energy(model, consumer, consumer.in_axis), channels.axes[consumer.weight, consumer.in_axis], sets)
    return read / max(float(read.sum()), 1e-30)


def _eliminate(
    model: nn.Module, channels: Channels, sets: Ids, consumers: list[Layer], moments: Mapping[str, "Moments"]
) -> tuple[Ids, Floats]:
    """(order, summed error after each) in which sets are given up, each time the one that costs least.

    The consumers' weights on the sets that are left make up for the lost one as least squares can
    (optimal brain surgeon, Hassibi & Stork 1993, with the consumers' columns of one set as a block).
    """
    readers = [Reader(model, channels, layer, sets, moments[layer.name]) for layer in consumers]
    left = np.ones(len(sets), dtype=bool)
    order: list[int] = []
    lost: list[float] = []
    stride = max(1, len(sets) // 128)  # wide layers give up a few at a time
    while left.any():
        costs = np.full(len(sets), np.inf)
        costs[left] = sum(reader.costs(left) for reader in readers)
        chosen = np.argsort(costs, kind="stable")[: min(stride, int(left.sum()))]
        left[chosen] = False
        order += chosen.tolist()
        lost += costs[chosen].tolist()
        for reader in readers:
            reader.give_up(chosen)
    return sets[np.array(order)], np.cumsum(lost)


class Reader:
    """A consumer of a family while sets are given up: its weight, and the inverse of its inputs' moment."""

    def __init__(self, model: nn.Module, channels: Channels, layer: Layer, sets: Ids, moments: "Moments") -> None:
        weight = model.get_parameter(layer.weight).detach().double().transpose(0, layer.out_axis).flatten(1)
        owner = np.repeat(channels.axes[layer.weight, layer.in_axis], layer.kernel)  # the set of every column
        self.block = torch.stack([torch.from_numpy(np.flatnonzero(owner == number)) for number in sets])  # (sets, columns of one)
        inverse = moments.inputs.double().mT  # in the layout in which all of this is done in place: it may be most of the memory
        inverse.diagonal().add_((1e-4 + 1e-6 * len(inverse)) * float(inverse.diagonal().mean()) or 1.0)
        torch.linalg.cholesky(inverse, out=inverse)
        self.inverse = torch.cholesky_inverse(inverse, out=inverse)
        self.weight = root(moments.worth) @ weight  # (o, i*k*k)

    def costs(self, of: NDArray[np.bool_]) -> Floats:
        """The error of giving up each of the sets `of` all, the others making up for it: tr(W_s P_ss^-1 W_s^T)."""
        return np.concatenate([self._costs(block) for block in torch.split(self.block[torch.from_numpy(of)], 64)])

    def _costs(self, block: Tensor) -> Floats:
        costs: Floats
        if block.shape[1] == 1:  # a column for each set
            columns = block[:, 0]
            costs = (self.weight[:, columns].square().sum(0) / (self.inverse[columns, columns] + 1e-12)).numpy()
            return costs
        pivots = self.inverse[block[:, :, None], block[:, None, :]]  # (sets, c, c)
        weights = self.weight[:, block].permute(1, 2, 0)  # (sets, c, o)
        solved = torch.linalg.solve(pivots + 1e-12 * torch.eye(pivots.shape[1], dtype=torch.float64), weights)
        costs = (weights * solved).sum((1, 2)).numpy()
        return costs

    def give_up(self, chosen: Ids) -> None:
        columns = self.block[torch.from_numpy(chosen)].flatten()
        rows = self.inverse[columns]  # (c, i*k*k)
        gain = torch.linalg.solve(rows[:, columns], rows)
        self.weight.addmm_(self.weight[:, columns], gain, alpha=-1)
        self.inverse.addmm_(rows.T, gain, alpha=-1)
        self.inverse[columns] = 0.0
        self.inverse[:, columns] = 0.0
        self.weight[:, columns] = 0.0


def _power(model: nn.Module, channels: Channels, sets: Ids, axes: set[tuple[str, int]], makers: list[Layer]) -> Floats:
    """The mean square of each channel as its consumers read it.

    Batch normalisations tell it, taken as normal behind a ReLU: those behind the layers that are added up,
    the one behind a depthwise layer on top of them, or another that lies on the channels; without one, the norms
    of the filters do.
    """
    grouped = [layer for layer in makers if layer.groups > 1]
    norms = [(f"{layer.norm}.weight", norm) for layer in grouped[-1:] or makers if (norm := norm_of(model, layer)) is not None]
    if not norms:
        others = [(tensor, model.get_submodule(tensor.rpartition(".")[0])) for tensor, _ in sorted(axes, reverse=True)]
        norms = [
            (tensor, module)
            for tensor, module in others
            if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and module.affine
        ][:1]
    if norms:
        shift = sum(per_set(norm.bias.detach().double().numpy(), channels.axes[tensor, 0], sets) for tensor, norm in norms)
        square = [norm.weight.detach().double().square().numpy() for _, norm in norms]
        spread = sum(per_set(own, channels.axes[tensor, 0], sets) for own, (tensor, _) in zip(square, norms, strict=True))
        return _rectified_power(torch.as_tensor(spread).sqrt(), torch.as_tensor(shift)).numpy()
    side = makers[0].out_axis
    return per_set(_energy(model, makers[0], side), channels.axes[makers[0].weight, side], sets)


def _rectified_power(gamma: Tensor, beta: Tensor) -> Tensor:
    """E max(0, beta + gamma z)^2 for standard normal z."""
    spread = gamma.abs().clamp_min(1e-12)
    ratio = beta / spread
    density = torch.exp(-ratio.square() / 2) / (2 * torch.pi) ** 0.5
    power: Tensor = (beta.square() + spread.square()) * torch.special.ndtr(ratio) + beta * spread * density
    return power


def _energy(model: nn.Module, layer: Layer, axis: int) -> Floats:
    """Sum of squares of the weight at each position of the axis."""
    weight = model.get_parameter(layer.weight).detach().double()
    return np.asarray(weight.square().transpose(0, axis).flatten(1).sum(1).numpy())


def per_set(values: Floats, positions: Ids, sets: Ids) -> Floats:
    """Sum the values of the positions that belong to each set."""
    total = np.zeros(int(max(positions.max(), sets.max())) + 1)
    np.add.at(total, positions, values)
    return total[sets]


def numbered(channels: Channels, positions: Ids, sets: Ids) -> Tensor:
    """For every position of an axis the place of its set among `sets`; their count where it is none of them."""
    place = np.full(channels.count, len(sets))
    place[sets] = np.arange(len(sets))
    return torch.from_numpy(place[positions])
