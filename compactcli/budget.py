"""What a candidate costs, and how long it takes, without building it: both follow from widths and ranks alone."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import nn

from .channels import Axis, Channels, Ids
from .errors import CompactError
from .graph import Graph
from .kernels import VECTOR
from .layers import Layer, costs, matching

Of = Literal["macs", "params", "latency"]
Price = Literal["cost", "time"]  # what error is weighed against: what the budget counts, or the time it takes

SEVERE = 0.1  # error, of the outputs' mean square deviation, from which on layers make good what went wrong before them

# The time of a layer beside its multiply-accumulates, in as many of them (measured on a CPU in float32, 1 and 16 images):
OUTPUT_TIME = (100, 1200)  # to write one output and take it through normalisation and activation, where ...
OUTPUT_BYTES = (1 << 24, 1 << 25)  # ... all outputs of 16 images take no more, and no less, than this
WEIGHT_TIME = 120  # to fetch one weight for one image
MOVED_TIME = 100  # to take one value to another channel, in a gather or a scatter, at whatever memory format

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of a layer, each as (a, b, c, d) with a + b outputs + c inputs + d outputs * inputs."""

    kernel: Floats  # the layer itself
    pointwise: Floats  # the second of two that it may be decomposed into; zeros where that was not measured
    after: Floats  # what normalises its outputs and goes on with them


@dataclass(frozen=True)
class Times:
    """How long a network takes, by layer; what layers do not take goes by how many numbers they put out."""

    layers: Mapping[str, LayerTime]
    whole: float  # milliseconds


@dataclass(frozen=True)
class Family:
    """Sets that are alike: each has as many positions on the same axes, so each costs the same."""

    sets: Ids
    axes: tuple[tuple[Axis, int], ...]  # (axis, positions of one set on it)


def families(channels: Channels) -> list[Family]:
    """The removable sets, grouped with those that lie on the same axes."""
    where: dict[int, Counter[Axis]] = defaultdict(Counter)
    for axis, sets in channels.axes.items():
        for number in sets.tolist():
            if number not in channels.locked:
                where[number][axis] += 1
    alike: dict[tuple[tuple[Axis, int], ...], list[int]] = defaultdict(list)
    for number, axes in where.items():
        alike[tuple(sorted(axes.items()))].append(number)
    return [Family(np.array(sets), axes) for axes, sets in alike.items()]


class Budget:
    """The cost of candidates, and the target: `ratio` of the original's.

    A state of the network is `along`, the positions left on every axis, and `ranks`, one per layer,
    infinite where the layer is whole. Both may have leading axes: many candidates at once. `original` is what the ratio is
    of, where that is not this network but what it was before. `times` are what a budget of latency counts, and what tells the
    time of any other. `leave` names layers that stay as they are.
    """

    def __init__(
        self,
        graph: Graph,
        channels: Channels,
        model: nn.Module,
        *,
        ratio: float,
        of: Of = "macs",
        round_to: int | None = None,
        nearest: bool = False,
        original: float | None = None,
        times: Times | None = None,
        leave: Sequence[str] = (),
    ) -> None:
        self.ratio, self.of, self.round_to, self.nearest = ratio, of, round_to, nearest
        self.graph = graph
        self.layers, self._elsewhere = costs(graph)
        fixed = {layer.weight for layer in matching(self.layers, leave)}
        self.layers = [replace(layer, fixed=layer.weight in fixed) for layer in self.layers]
        self.families = families(channels)
        self._column = column = {axis: index for index, axis in enumerate(channels.axes)}
        self._full = np.array([*(len(sets) for sets in channels.axes.values()), 1], dtype=float)
        self.per_set = np.zeros((len(self.families), len(self._full)))  # what one set takes along each axis
        for index, family in enumerate(self.families):
            for axis, positions in family.axes:
                self.per_set[index, column[axis]] = positions
        self._out = [column[layer.weight, 0] for layer in self.layers]
        self._in = [column[layer.weight, 1] for layer in self.layers]
        self._kernel = np.array([layer.kernel for layer in self.layers], dtype=float)
        self._positions = np.array([layer.positions for layer in self.layers], dtype=float)
        outputs = 16 * 4 * self._positions * self._full[self._out]  # bytes
        self._output_time = np.interp(outputs, OUTPUT_BYTES, OUTPUT_TIME)
        self.times = times
        if times is not None:
            none = LayerTime(np.zeros(4), np.zeros(4), np.zeros(4))
            found = [times.layers.get(layer.name, none) for layer in self.layers]
            self._kernel_ms, self._pointwise_ms, self._after_ms = (
                np.array([getattr(each, part) for each in found]).reshape(-1, 4) for part in ("kernel", "pointwise", "after")
            )
            known = float(self._layers_ms(self.along(), self.ranks()))
            self._scale = min(1.0, times.whole / max(known, 1e-9))  # of layers that take longer alone than the network does
            self._rest_ms = times.whole - self._scale * known
        shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
        most = max(shapes.values(), default=1)
        self._sides = np.array([[column[n, axis] if axis < rank else -1 for axis in range(most)] for n, rank in shapes.items()])
        self.original = float(self.cost(self.along(), self.ranks())) if original is None else original
        self.target = ratio * self.original

    @property
    def met(self) -> bool:
        """Whether the network costs no more than the target as it is, as one may that plain layers have made smaller."""
        return float(self.cost(self.along(), self.ranks())) <= self.target

    def alone(self, axis: Axis, sets: Ids) -> int:
        """The index of a new family: the positions of one axis by themselves, whatever else goes with their channels."""
        row = np.zeros((1, len(self._full)))
        row[0, self._column[axis]] = 1
        self.families.append(Family(sets, ((axis, 1),)))
        self.per_set = np.concatenate([self.per_set, row])
        return len(self.families) - 1

    def makers(self, family: Family) -> list[Layer]:
        """The layers that make a family's channels."""
        axes = {axis for axis, _ in family.axes}
        return [layer for layer in self.layers if (layer.weight, layer.out_axis) in axes]

    def readers(self, family: Family) -> list[Layer]:
        """The layers that read a family's channels."""
        axes = {axis for axis, _ in family.axes}
        return [layer for layer in self.layers if (layer.weight, layer.in_axis) in axes]

    def step(self, width: int, price: Price = "cost", family: int | None = None) -> int:
        """What a rank, or the width of a family, is a multiple of: `--round`, or what suits the kernels of a CPU.

        A depthwise layer is many times slower in ONNX Runtime where its channels do not fill vectors.
        """
        if self.round_to:
            return self.round_to
        if family is not None and any(layer.groups == layer.shape[0] > 1 for layer in self.makers(self.families[family])):
            return {"cost": VECTOR if width > 64 else 1, "time": VECTOR}[price]
        return {"cost": 8 if width > 64 else 1, "time": VECTOR if width >= 64 else 1}[price]

    def along(self) -> Floats:
        """The positions on every axis of the whole network."""
        return self._full.copy()

    def sizes(self, along: Floats) -> Floats:
        """What is left of the first two axes of every layer's weight (layers, 2)."""
        return np.stack([along[self._out], along[self._in]], axis=1)

    def ranks(self) -> Floats:
        """No layer decomposed."""
        return np.full(len(self.layers), np.inf)

    def cost(self, along: Floats, ranks: Floats) -> Floats:
        """MACs of one image, parameters, or milliseconds, at each state."""
        if self.of == "latency":
            return self.time(along, ranks)
        out, into = along[..., self._out], along[..., self._in] * self._kernel
        whole = np.isinf(ranks)
        layer = np.where(whole, out * into, np.where(whole, 0.0, ranks) * (out + into))
        if self.of == "macs":
            return np.asarray(layer @ self._positions + self._elsewhere)
        plain = along[..., self._sides].prod(-1).sum(-1)
        return np.asarray(plain + (layer - out * into).sum(-1))

    def time(self, along: Floats, ranks: Floats) -> Floats:
        """An estimate of the time of one image at each state: in milliseconds where layers were timed, else in
        multiply-accumulates that take as long.
        """
        if self.times is not None:
            outputs = along[..., self._out] @ self._positions / (self._full[self._out] @ self._positions)
            return np.asarray(self._scale * self._layers_ms(along, ranks) + self._rest_ms * outputs)
        return self._estimate(along, ranks)

    def taken(self, macs: float) -> float:
        """The time of so many multiply-accumulates, in the unit of `time`."""
        if self.times is None:
            return macs
        return macs * self.times.whole / float(self._estimate(self.along(), self.ranks()))

    def _estimate(self, along: Floats, ranks: Floats) -> Floats:
        """The time of one image in multiply-accumulates that take as long."""
        out, into = along[..., self._out], along[..., self._in] * self._kernel
        whole = np.isinf(ranks)
        rank = np.where(whole, 0.0, ranks)
        weights = np.where(whole, out * into, rank * (out + into))
        return np.asarray((weights + self._output_time * (out + rank)) @ self._positions + WEIGHT_TIME * weights.sum(-1))

    def _layers_ms(self, along: Floats, ranks: Floats) -> Floats:
        """Milliseconds of all layers at each state."""
        out, into = along[..., self._out], along[..., self._in]
        whole = np.isinf(ranks)
        rank = np.where(whole, out, ranks)
        pointwise = np.where(whole, 0.0, _bilinear(self._pointwise_ms, out, rank))
        each = _bilinear(self._kernel_ms, rank, into) + pointwise + _bilinear(self._after_ms, out, into)
        return np.asarray(each.sum(-1))

    def most_rank(self, layer: int, along: Floats) -> float:
        """The largest rank at which a layer is no slower decomposed than whole, by the estimate."""
        return float(self.most_ranks(along)[layer])

    def most_ranks(self, along: Floats) -> Floats:
        """The same for every layer."""
        if self.times is not None:
            out, into = along[self._out], along[self._in]
            (_, b, _, d), (e, f, g, h) = self._kernel_ms.T, self._pointwise_ms.T
            spared = b * out + d * out * into - e - f * out  # the first of two layers takes as long to begin, and to read
            return np.asarray(np.where(e + f + g + h > 0, spared / np.maximum(b + d * into + g + h * out, 1e-30), 0.0))
        out, into = along[self._out], along[self._in] * self._kernel
        each = self._positions + WEIGHT_TIME  # the time of one weight
        return np.asarray(each * out * into / (each * (out + into) + self._positions * self._output_time))

    def left(self, lost: float = SEVERE) -> Floats:
        """The share of each layer's error that is left where the layers behind are refitted, and the errors sum to `lost`.

        Each of them makes good a part of what went wrong before it, which a sum of errors to first order does not know: the
        worse, the more so. (On ResNet-20 for CIFAR-10 one over the number of layers from there on chose better networks at half
        and at a quarter of the MACs; at 70 %, where the errors sum to 0.03, the plain sum did.)
        """
        share: Floats = np.arange(len(self.layers), 0, -1.0) ** -min(1.0, lost / SEVERE)
        return share

    def place(self, family: int | None, layer: int | None) -> int:
        """The index of the layer that is changed: of a family the first that makes it; the first that reads it, if none does."""
        if layer is not None or family is None:
            return layer or 0
        changed = self.makers(self.families[family]) or self.readers(self.families[family])
        return self.layers.index(changed[0]) if changed else 0

    def out_of_reach(self, least: float) -> CompactError:
        """What to raise where the least that a method can do costs more than the target."""
        reachable = math.ceil(1000 * least / self.original) / 1000
        if reachable >= 1 and (self.round_to or 1) > 1:
            return CompactError(
                f"--ratio {self.ratio:g} of {self.of} is out of reach: nothing here can be made smaller by steps of "
                f"{self.round_to}; try --round 1"
            )
        if reachable >= 1:
            return CompactError(
                f"--ratio {self.ratio:g} of {self.of} is out of reach: this method makes nothing smaller here; try another "
                "--method, or `compactcli analyze`, which says why"
            )
        return CompactError(
            f"--ratio {self.ratio:g} of {self.of} is out of reach: this method can keep no less than {reachable:g} here; "
            f"try --ratio {reachable:g}, or --nearest"
        )


def _bilinear(terms: Floats, out: Floats, into: Floats) -> Floats:
    """a + b out + c in + d out in."""
    a, b, c, d = terms.T
    return np.asarray(a + b * out + c * into + d * out * into)
