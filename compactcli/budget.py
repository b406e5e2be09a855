"""What a candidate costs, without building it, and the one threshold that meets a budget.

A method offers dials. A dial is one number to choose: how many channels of a family of alike sets
stay (a width), or the rank of a decomposed layer. It says what each setting would do to the
network's output; the cost follows from the widths and ranks alone. Minimising

    sum of errors + threshold * cost

over all dials, one after the other until none moves, gives one candidate per threshold, and
bisection finds the threshold whose candidate meets the budget. The cost that is minimised may be the
one that the budget counts, or an estimate of the time that the network takes.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import nn

from .channels import Axis, Channels, Ids
from .errors import CompactError
from .graph import Graph
from .kernels import VECTOR
from .layers import Layer, costs

Of = Literal["macs", "params", "latency"]
Price = Literal["cost", "time"]  # what error is weighed against: what the budget counts, or the time it takes

LANDING = 0.01  # of the original's cost: so near to the target rounding may be, where nobody asked for it
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


@dataclass(frozen=True)
class Dial:
    """One number to choose. `errors[n]` is what keeping n does to the output; the last entry is 0.

    A width keeps n sets of `family`; a rank replaces the layer by two of inner width n, except that
    the last setting leaves the layer as it is.
    """

    errors: Floats
    step: int  # settings are multiples of it; the largest is always allowed
    floor: int  # the smallest setting
    family: int | None = None  # index into the budget's families
    layer: int | None = None  # index into the budget's layers

    @property
    def full(self) -> int:
        return len(self.errors) - 1

    @property
    def settings(self) -> Ids:
        """The allowed values, ascending."""
        first = min(-(-max(self.floor, 1) // self.step) * self.step, self.full)
        return np.unique([*range(first, self.full + 1, self.step), self.full])


class Budget:
    """The cost of candidates, and the search for the one that meets `ratio` of the original's.

    A state of the network is `along`, the positions left on every axis, and `ranks`, one per layer,
    infinite where the layer is whole. Both may have leading axes: many candidates at once. `original` is what the ratio is
    of, where that is not this network but what it was before. `times` are what a budget of latency counts, and what tells the
    time of any other.
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
    ) -> None:
        self.ratio, self.of, self.round_to, self.nearest = ratio, of, round_to, nearest
        self.graph = graph
        self.layers, self._elsewhere = costs(graph)
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

    def losses(self, dials: Sequence[Dial], settings: Sequence[int]) -> dict[str, float]:
        """The error of each layer, by name, that the settings change."""
        result: dict[str, float] = defaultdict(float)
        for dial, setting in zip(dials, settings, strict=True):
            if setting < dial.full:
                result[self.layers[self.place(dial.family, dial.layer)].name] += float(dial.errors[setting])
        return dict(result)

    def solve(self, dials: Sequence[Dial], price: Price = "cost", *, refitted: bool = False) -> list[int]:
        """The setting of each dial: the smallest summed error found at no more than the target.

        With `refitted`, of what is left of the errors when the layers are refitted to images, one after another (`left`).

        Among candidates of equal cost, `price` "time" takes faster ones, at more error. A layer is
        decomposed only where that makes it faster (`most_rank`). Where the steps that suit the kernels leave the
        target out of reach, any setting will do.

        Raises CompactError naming the nearest reachable ratio where even the least that the dials
        allow costs more (unless `nearest`), and where there are none.
        """
        if not dials and not self.nearest:
            raise CompactError("there is nothing here that this method can make smaller; `compactcli analyze` says why")
        smallest = _State(self, dials, self.cost)
        least = smallest.settle(np.inf)
        if least > self.target:
            if self.round_to is None and any(dial.step > 1 for dial in dials):
                return self.solve([replace(dial, step=1) for dial in dials], price, refitted=refitted)
            if self.nearest:
                return smallest.values
            raise self.out_of_reach(least)
        state, best = _State(self, dials, self.time if price == "time" else self.cost), smallest.values
        low, high = 0.0, 1e-6 / self.original  # errors are relative: this threshold gives up next to nothing
        while state.settle(high) > self.target and high < 1e6:
            low, high = high, 10 * high
        while high - low > 1e-3 * high:
            middle = (low + high) / 2
            if state.settle(middle) > self.target:
                low = middle
            else:
                high, best = middle, state.values
        state.set(best)
        settings = state.fill()
        if not refitted:
            return settings
        left = self.left(sum(float(dial.errors[n]) for dial, n in zip(dials, settings, strict=True)))
        return self.solve(
            [replace(dial, errors=left[self.place(dial.family, dial.layer)] * dial.errors) for dial in dials], price
        )

    def out_of_reach(self, least: float) -> CompactError:
        """What to raise where the least that a method can do costs more than the target."""
        reachable = math.ceil(1000 * least / self.original) / 1000
        if reachable >= 1:
            return CompactError(
                f"--ratio {self.ratio:g} of {self.of} is out of reach: this method makes nothing smaller here; try another "
                "--method, or `compactcli analyze`, which says why"
            )
        return CompactError(
            f"--ratio {self.ratio:g} of {self.of} is out of reach: this method can keep no less than {reachable:g} here; "
            f"try --ratio {reachable:g}, or --nearest"
        )


class _State:
    """The present setting of every dial, and what moving one of them alone would cost."""

    def __init__(self, budget: Budget, dials: Sequence[Dial], price: Callable[[Floats, Floats], Floats]) -> None:
        self.budget, self.dials, self.price = budget, dials, price
        self.settings = [dial.settings for dial in dials]
        self.errors = [_sloped(dial) for dial in dials]
        self.set([dial.full for dial in dials])

    def set(self, values: Sequence[int]) -> None:
        self.values = [dial.full for dial in self.dials]
        self.along, self.ranks = self.budget.along(), self.budget.ranks()
        for index, value in enumerate(values):
            self.move(index, value)

    def move(self, index: int, value: int) -> None:
        self.along, self.ranks = (part[0] for part in self.moved(index, np.array([value])))
        self.values[index] = value

    def moved(self, index: int, values: Ids) -> tuple[Floats, Floats]:
        """The states in which one dial has each of the values."""
        dial = self.dials[index]
        along, ranks = np.tile(self.along, (len(values), 1)), np.tile(self.ranks, (len(values), 1))
        if dial.family is not None:
            along += np.outer(values - self.values[index], self.budget.per_set[dial.family])
        else:
            ranks[:, dial.layer] = np.where(values == dial.full, np.inf, values)
        return along, ranks

    def prices(self, index: int) -> Floats:
        """The price at each setting of one dial; infinite for a rank that makes its layer slower.

        A width enters as a polynomial of degree two, a rank as one of degree one, so three settings
        tell all; the last setting of a rank is the whole layer and stands outside.
        """
        settings = self.settings[index]
        if len(settings) <= 4:
            curve = self.price(*self.moved(index, settings))
        else:
            points = settings[[0, len(settings) // 2, -2, -1]]
            at = self.price(*self.moved(index, points))
            curve = _parabola(points[:3].astype(float), at[:3], settings.astype(float))
            curve[-1] = at[3]
        curve[self.slower(index, settings)] = np.inf
        return curve

    def slower(self, index: int, values: Ids) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which values decompose the dial's layer into what is slower than it was."""
        dial = self.dials[index]
        if dial.layer is None:
            return np.zeros(len(values), dtype=bool)
        return (values > self.budget.most_rank(dial.layer, self.along)) & (values < dial.full)

    def settle(self, threshold: float) -> float:
        """Minimise error + threshold * cost, one dial after the other, from the whole network; the cost there."""
        self.set([dial.full for dial in self.dials])
        for _ in range(8):  # three suffice as a rule
            before = list(self.values)
            for index in range(len(self.dials)):
                prices = self.prices(index)
                score = prices if np.isinf(threshold) else self.errors[index] + threshold * prices
                self.move(index, int(self.settings[index][np.argmin(score)]))
            if self.values == before:
                break
        return float(self.budget.cost(self.along, self.ranks))

    def fill(self) -> list[int]:
        """Spend what is left of the budget: the next setting that saves most error for its cost, until none fits."""
        while True:
            slack = self.budget.target - float(self.budget.cost(self.along, self.ranks))
            moves = [move for index in range(len(self.dials)) if (move := self.raise_(index, slack)) is not None]
            if not moves:
                break
            _, index, value = max(moves)
            self.move(index, value)
        coarse = any(dial.step > 1 or dial.layer is not None for dial in self.dials)
        if coarse and self.budget.round_to is None and slack > LANDING * self.budget.original:
            self.land()
        return self.values

    def land(self) -> None:
        """Come nearer to the target than the settings allow: one dial takes a value between two of its own, or gives way
        to another that moves up.
        """
        before = list(self.values)
        found = [(float(self.budget.cost(self.along, self.ranks)), before)]
        for index, settings in enumerate(self.settings):
            above = settings[settings > before[index]]
            above = above[~self.slower(index, above)]
            if not len(above):
                continue
            found += self.within(index, before[index] + 1, int(above[0]))
            self.move(index, int(above[0]))
            for other in range(len(self.dials)):
                if other != index:
                    found += self.within(other, int(self.settings[other][0]), before[other])
            self.move(index, before[index])
        near = [values for cost, values in found if cost >= self.budget.target - LANDING * self.budget.original]
        self.set(min(near, key=self.error) if near else max(found)[1])

    def error(self, values: Sequence[int]) -> float:
        """What the dials' settings do to the output."""
        return float(sum(dial.errors[value] for dial, value in zip(self.dials, values, strict=True)))

    def within(self, index: int, low: int, high: int) -> list[tuple[float, list[int]]]:
        """The dearest state within the target in which one dial has a value from low up to below high; none if there is none."""
        values = np.arange(low, high)
        costs = self.budget.cost(*self.moved(index, values)) if len(values) else np.empty(0)
        costs = np.where((costs <= self.budget.target) & ~self.slower(index, values), costs, -np.inf)
        if not len(costs) or costs.max() == -np.inf:
            return []
        best = int(np.argmax(costs))
        return [(float(costs[best]), [*self.values[:index], int(values[best]), *self.values[index + 1 :]])]

    def raise_(self, index: int, slack: float) -> tuple[float, int, int] | None:
        """(error saved per cost, dial, value) of one dial's best larger setting within the slack."""
        settings, errors = self.settings[index], self.errors[index]
        now = int(np.searchsorted(settings, self.values[index]))
        above = settings[
            [*range(now + 1, min(now + 2, len(settings))), *([len(settings) - 1] if now + 2 < len(settings) else [])]
        ]
        if not len(above):
            return None
        costs = self.budget.cost(*self.moved(index, np.array([self.values[index], *above])))
        extra = costs[1:] - costs[0]
        saved = errors[now] - errors[np.searchsorted(settings, above)]
        fits = (extra <= slack) & (saved >= 0) & ((saved > 0) | (extra <= 0)) & ~self.slower(index, above)
        if not fits.any():
            return None
        rate = np.where(fits, saved / np.maximum(extra, 1e-9), -np.inf)
        chosen = int(np.argmax(rate))
        return float(rate[chosen]), index, int(above[chosen])


def _bilinear(terms: Floats, out: Floats, into: Floats) -> Floats:
    """a + b out + c in + d out in."""
    a, b, c, d = terms.T
    return np.asarray(a + b * out + c * into + d * out * into)


def _sloped(dial: Dial) -> Floats:
    """The error of each setting, and next to nothing more for each that is smaller: a budget is used where no error tells."""
    return np.asarray(dial.errors[dial.settings] + 1e-9 * (1 - dial.settings / dial.full) ** 2)


def _parabola(x: Floats, y: Floats, at: Floats) -> Floats:
    """The polynomial of degree two through three points, at many places (Lagrange)."""
    a, b, c = x
    first = y[0] * (at - b) * (at - c) / ((a - b) * (a - c))
    second = y[1] * (at - a) * (at - c) / ((b - a) * (b - c))
    third = y[2] * (at - a) * (at - b) / ((c - a) * (c - b))
    return np.asarray(first + second + third)
