"""One choice for each of many layers, so that they cost no more than a target together and lose least."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .budget import Floats


@dataclass(frozen=True)
class Choice:
    """What a layer may become: the cost and the error of each form."""

    costs: Floats
    errors: Floats


def allocate(choices: Sequence[Choice], target: float) -> list[int]:
    """The form of each layer; the cheapest if even those cost more than the target.

    Minimises error + price * cost in each layer, at the one price that meets the target (Everett, 1963), which bisection
    finds; what is then left of the target is spent where it saves most error for its cost.
    """
    chosen = [int(np.lexsort((each.errors, each.costs))[0]) for each in choices]
    if _cost(choices, chosen) > target:
        return chosen
    low, high = 0.0, 1e-30
    while _cost(choices, _at(choices, high)) > target and high < 1e30:
        low, high = high, 10 * high
    for _ in range(60):
        middle = (low * high) ** 0.5 if low else high / 10
        if _cost(choices, _at(choices, middle)) > target:
            low = middle
        else:
            high, chosen = middle, _at(choices, middle)
    return _filled(choices, chosen, target)


def _at(choices: Sequence[Choice], price: float) -> list[int]:
    return [int(np.argmin(each.errors + price * each.costs)) for each in choices]


def _cost(choices: Sequence[Choice], chosen: Sequence[int]) -> float:
    return float(sum(each.costs[form] for each, form in zip(choices, chosen, strict=True)))


def _filled(choices: Sequence[Choice], chosen: list[int], target: float) -> list[int]:
    while True:
        slack = target - _cost(choices, chosen)
        best: tuple[float, int, int] | None = None
        for index, (each, form) in enumerate(zip(choices, chosen, strict=True)):
            more, saved = each.costs - each.costs[form], each.errors[form] - each.errors
            rate = np.where((more <= slack) & (saved > 0), saved / np.maximum(more, 1e-9), -np.inf)
            found = int(np.argmax(rate))
            if rate[found] > (best[0] if best else 0.0):
                best = (float(rate[found]), index, found)
        if best is None:
            return chosen
        chosen[best[1]] = best[2]
