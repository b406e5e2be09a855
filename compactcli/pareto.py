"""Which of several networks no other beats."""

from collections.abc import Mapping, Sequence

NOISE = {"latency": 0.05}  # share of a cost within which two are taken for equal: so far apart are times of the same network
ALIKE = f"latencies within {100 * NOISE['latency']:g} % count as equal"


def marks(good: Sequence[float], costs: Mapping[str, Sequence[float]]) -> list[list[str]]:
    """For each network the costs for which no other is as good at less, or better at no more."""
    best = {name: optimal(list(zip(good, own, strict=True)), NOISE.get(name, 0.0)) for name, own in costs.items()}
    return [[name for name in best if best[name][place]] for place in range(len(good))]


def optimal(points: Sequence[tuple[float, float]], noise: float = 0.0) -> list[bool]:
    """For each (how good, what it costs) whether no other point is as good at less, or better at no more.

    Costs that differ by a share of at most `noise` are taken for equal.
    """

    def beaten(own: tuple[float, float]) -> bool:
        good, cost = own
        return any(
            (other > good and price <= cost * (1 + noise)) or (other >= good and price * (1 + noise) < cost)
            for other, price in points
        )

    return [not beaten(point) for point in points]
