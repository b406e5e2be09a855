"""The one threshold that meets a budget.

A method offers dials. A dial is one number to choose: how many channels of a family of alike sets
stay (a width), or the rank of a decomposed layer. It says what each setting would do to the
network's output; the cost follows from the widths and ranks alone. Minimising

    sum of errors + threshold * cost

over all dials, one after the other until none moves, gives one candidate per threshold, and
bisection finds the threshold whose candidate meets the budget. The cost that is minimised may be the
one that the budget counts, or an estimate of the time that the network takes.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .budget import Budget, Floats, Price
from .channels import Ids
from .errors import CompactError

LANDING = 0.01  # of the original's cost: so near to the target rounding may be, where nobody asked for it


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


def by_layer(budget: Budget, dials: Sequence[Dial], settings: Sequence[int]) -> dict[str, float]:
    """The error of each layer, by name, that the settings change."""
    result: dict[str, float] = defaultdict(float)
    for dial, setting in zip(dials, settings, strict=True):
        if setting < dial.full:
            result[budget.layers[budget.place(dial.family, dial.layer)].name] += float(dial.errors[setting])
    return dict(result)


def solve(budget: Budget, dials: Sequence[Dial], price: Price = "cost", *, refitted: bool = False) -> list[int]:
    """The setting of each dial: the smallest summed error found at no more than the target.

    With `refitted`, of what is left of the errors when the layers are refitted to images, one after another (`left`).

    Among candidates of equal cost, `price` "time" takes faster ones, at more error. A layer is
    decomposed only where that makes it faster (`most_rank`). Where the steps that suit the kernels leave the
    target out of reach, any setting will do.

    Raises CompactError naming the nearest reachable ratio where even the least that the dials
    allow costs more (unless `nearest`), and where there are none.
    """
    if not dials and not budget.nearest:
        raise CompactError("there is nothing here that this method can make smaller; `compactcli analyze` says why")
    if budget.met:
        return [dial.full for dial in dials]
    smallest = State(budget, dials, budget.cost)
    least = smallest.settle(np.inf)
    if least > budget.target:
        if budget.round_to is None and any(dial.step > 1 for dial in dials):
            return solve(budget, [replace(dial, step=1) for dial in dials], price, refitted=refitted)
        if budget.nearest:
            return smallest.values
        raise budget.out_of_reach(least)
    state, best = State(budget, dials, budget.time if price == "time" else budget.cost), smallest.values
    low, high = 0.0, 1e-6 / budget.original  # errors are relative: this threshold gives up next to nothing
    while state.settle(high) > budget.target and high < 1e6:
        low, high = high, 10 * high
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        if state.settle(middle) > budget.target:
            low = middle
        else:
            high, best = middle, state.values
    state.set(best)
    settings = state.fill()
    if not refitted:
        return settings
    left = budget.left(sum(float(dial.errors[n]) for dial, n in zip(dials, settings, strict=True)))
    return solve(
        budget, [replace(dial, errors=left[budget.place(dial.family, dial.layer)] * dial.errors) for dial in dials], price
    )


class State:
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
