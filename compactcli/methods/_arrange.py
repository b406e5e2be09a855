"""The order of channels that lie between two layers: free to choose, for one layer writes and others read them by place.

Layers that are divided into parts keep most where channels that have much to do with each other are in one part.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..budget import Budget, Family
from ..channels import Axis, Channels, Ids
from ..law import same_function
from ..layers import Layer
from ._errors import Metrics

if TYPE_CHECKING:
    from ..moments import Moments

SWEEPS = 10  # over all layers, there and back: each order depends on those before and behind it

Matrix = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class _Between:
    """Channels that one layer writes, and others read."""

    axes: tuple[Axis, ...]
    writer: Layer | None  # where it is divided
    readers: tuple[Layer, ...]  # those that are divided
    count: int


def arrange_(
    model: nn.Module,
    channels: Channels,
    budget: Budget,
    metrics: Metrics,
    parts: Mapping[str, int],
) -> "Mapping[str, Moments]":
    """Reorder channels in place so that layers in so many `parts` (by name) keep most; the moments in the new order.

    The network computes what it did. Raises CompactError if it does not.
    """
    layers = {layer.name: layer for layer in budget.layers if layer.name in parts}
    energies = {name: _energies(model, layer, metrics) for name, layer in layers.items()}
    found = [each for family in budget.families if (each := _between(family, channels, budget, layers)) is not None]
    orders: dict[Axis, Ids] = {axis: np.arange(each.count) for each in found for axis in each.axes}
    for sweep in range(SWEEPS):
        still = True
        for each in found[:: -1 if sweep % 2 else 1]:
            order = _order(each, energies, parts)
            if order is None or np.array_equal(order, np.arange(each.count)):
                continue
            still = False
            for axis in each.axes:
                orders[axis] = orders[axis][order]
            for layer, side in [*([(each.writer, 0)] if each.writer else []), *((reader, 1) for reader in each.readers)]:
                energies[layer.name] = energies[layer.name].take(order, axis=side)
        if still:
            break
    shape = budget.graph.image.meta["val"].shape[1:]
    with same_function(model, shape, "the network with its channels in another order (try --set arrange=contiguous)"):
        _permute_(model, orders)
    every = {layer.name: layer for layer in budget.layers}
    return {name: _permuted(known, every[name], orders) for name, known in metrics.moments.items()}


def _energies(model: nn.Module, layer: Layer, metrics: Metrics) -> Matrix:
    """(o, i): what it costs to leave out the kernel between two channels but for its centre, to first order."""
    weight = model.get_parameter(layer.weight).detach().double().flatten(2)  # (o, i, k*k)
    metric = metrics.of(layer)
    power = torch.ones(weight[0].numel()) if metric.inputs is None else metric.inputs.diagonal()
    each = metric.outputs.diagonal().double()[:, None, None] * weight.square() * power.double().view(weight[0].shape)
    each[..., each.shape[2] // 2] = 0
    return np.asarray(each.sum(2).numpy())


def _between(family: Family, channels: Channels, budget: Budget, layers: Mapping[str, Layer]) -> _Between | None:
    """The channels of a family if nothing but the layers around them, and what normalises them, knows their places."""
    axes = tuple(axis for axis, _ in family.axes)
    first = channels.axes[axes[0]]
    alike = len(first) == len(family.sets) and all(np.array_equal(channels.axes[axis], first) for axis in axes)
    own = set(axes)
    around = [layer for layer in budget.layers if {(layer.weight, 0), (layer.weight, 1)} & own]
    writers = [layer for layer in around if (layer.weight, layer.out_axis) in own]
    readers = [layer for layer in around if (layer.weight, layer.in_axis) in own]
    if not alike or len(writers) != 1 or any(not layer.called or layer.groups > 1 for layer in around):
        return None
    divided = tuple(layer for layer in readers if layer.name in layers)
    writer = writers[0] if writers[0].name in layers else None
    return _Between(axes, writer, divided, len(family.sets)) if writer or divided else None


def _order(between: _Between, energies: Mapping[str, Matrix], parts: Mapping[str, int]) -> Ids | None:
    """The order in which the layers around lose least, their other sides as they are; None where there is no choice."""
    around = [*([(between.writer, energies[between.writer.name])] if between.writer else [])]
    around += [(reader, energies[reader.name].T) for reader in between.readers]
    most = max(parts[layer.name] for layer, _ in around)
    gains = np.zeros((between.count, most))
    for layer, energy in around:  # (channels in between, channels on the other side)
        own = parts[layer.name]
        if most % own or between.count % most:
            continue
        by_part = energy.reshape(between.count, own, -1).sum(2)
        gains += by_part[:, np.arange(most) * own // most]
    if between.count % most or not gains.any():
        return None
    return np.argsort(balanced(gains), kind="stable")


def balanced(gains: Matrix) -> Ids:
    """A group for each item (n,) so that all groups have as many and the sum of gains (n, groups) is the largest.

    Items choose in the order of what they lose if they come late; then each of several groups hands an item on to the
    next, while there is a circle of them in which that helps: where there is none, nothing is better (Klein, 1967).
    """
    count, groups = gains.shape
    sorted_gains = np.sort(gains, axis=1)
    room, result = np.full(groups, count // groups), np.full(count, -1)
    for item in np.argsort(-(sorted_gains[:, -1] - sorted_gains[:, 0]), kind="stable"):
        group = int(np.argmax(np.where(room > 0, gains[item], -np.inf)))
        result[item], room[group] = group, room[group] - 1
    for _ in range(count * groups):
        items = np.argsort(result, kind="stable").reshape(groups, -1)
        moved = gains[items] - gains[items, np.arange(groups)[:, None]][..., None]  # (group, item of it, group it moves to)
        circle = _circle(moved.max(1), 1e-12 * float(np.abs(gains).max()))
        for group, following in zip(circle, [*circle[1:], *circle[:1]], strict=True):
            result[items[group, moved[group, :, following].argmax()]] = following
        if not circle:
            break
    return result


def _circle(gains: Matrix, least: float) -> list[int]:
    """Groups in a circle, each of which gains (from, to) by handing on to the next, and all together more than the least.

    None if there is no such circle. By the longest paths: one that is longer than there are groups goes in a circle.
    """
    a, b = np.unravel_index(np.argmax(gains + gains.T), gains.shape)
    if gains[a, b] + gains[b, a] > least:
        return [int(a), int(b)]
    reached, before = np.zeros(len(gains)), np.zeros(len(gains), dtype=int)
    for _ in range(len(gains)):
        through = reached[:, None] + gains
        longer = through.max(0) > reached + least
        before = np.where(longer, through.argmax(0), before)
        reached = np.where(longer, through.max(0), reached)
        if not longer.any():
            return []
    group = int(np.argmax(longer))
    for _ in range(len(gains)):
        group = int(before[group])
    circle = [group]
    while (group := int(before[group])) != circle[0]:
        circle.append(group)
    return circle[::-1]


def _permute_(model: nn.Module, orders: Mapping[Axis, Ids]) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for (name, axis), order in orders.items():
        tensors[name].data = tensors[name].data.index_select(axis, torch.from_numpy(order))


def _permuted(known: "Moments", layer: Layer, orders: Mapping[Axis, Ids]) -> "Moments":
    """The moments of a layer whose channels were put in an order."""
    if (layer.weight, layer.in_axis) in orders:
        order = orders[layer.weight, layer.in_axis]
        index = torch.from_numpy((order[:, None] * layer.kernel + np.arange(layer.kernel)).flatten())
        known = replace(known, inputs=known.inputs[index][:, index])
    if (layer.weight, layer.out_axis) in orders:
        index = torch.from_numpy(orders[layer.weight, layer.out_axis])
        known = replace(known, worth=known.worth[index][:, index])
    return known
