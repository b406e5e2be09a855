"""Which of several networks no other beats."""

from collections.abc import Sequence


def optimal(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (how good, what it costs) whether no other point is as good at less, or better at no more."""

    def beaten(own: tuple[float, float]) -> bool:
        return any(other != own and other[0] >= own[0] and other[1] <= own[1] for other in points)

    return [not beaten(point) for point in points]
