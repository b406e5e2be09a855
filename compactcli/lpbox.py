"""Vectors of zeros and ones with a given sum, approached by lp-box ADMM (Wu & Ghanem, TPAMI 2019; p = 2).

The vectors {0, 1}^n with sum k are where the box {0 <= z <= 1, sum z = k} meets the sphere |z - 1/2|^2 = n / 4. Many vectors are
held as rows of one matrix (layers, widest), filled up at their ends: `sizes` says how long each is. After Li et al., CVPR 2019
(FCF), section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FAR = 4.0  # below every entry of a row: where what fills it up lies


def onto_box(points: Tensor, counts: Tensor, sizes: Tensor) -> Tensor:
    """The nearest vectors (layers, widest) with entries from 0 to 1 and sums `counts` (layers,). Exact, O(n log n) a row.

    Such a vector is clip(x - t, 0, 1). Its sum falls with t along straight lines that bend at the entries, and at those
    less 1: sorted, the one between which the sum is reached gives t.
    """
    inside = _inside(points, sizes)
    low = torch.where(inside, points, torch.inf).amin(1, keepdim=True) - FAR
    x = torch.where(inside, points, low)
    bends, place = torch.cat((x, x - 1), dim=1).sort(dim=1, descending=True)
    steps = torch.where(place < x.shape[1], 1.0, -1.0).to(x.dtype)
    slopes = steps.cumsum(1)  # of the sum, as t falls from one bend to the next
    sums = torch.nn.functional.pad((slopes[:, :-1] * (bends[:, :-1] - bends[:, 1:])).cumsum(1), (1, 0))
    wanted = counts.to(x.dtype)[:, None]
    first = (sums < wanted).sum(1, keepdim=True).clamp(1, sums.shape[1] - 1)  # the first bend at which it is reached
    before = first - 1
    slope = slopes.gather(1, before).clamp_min(1)
    t = bends.gather(1, before) - (wanted - sums.gather(1, before)) / slope
    return torch.where(inside, (x - t).clamp(0, 1), 0.0)


def onto_sphere(points: Tensor, sizes: Tensor) -> Tensor:
    """The nearest vectors (layers, widest) at distance sqrt(n) / 2 from (1/2, ..., 1/2).

    From that point itself all are as near: it goes to (1, ..., 1).
    """
    inside = _inside(points, sizes)
    away = torch.where(inside, points - 0.5, 0.0)
    length = away.norm(dim=1, keepdim=True)
    radius = sizes.to(points.dtype).sqrt()[:, None] / 2
    unit = torch.where(length > 0, away / length.clamp_min(1e-30), inside / (2 * radius))
    return torch.where(inside, 0.5 + radius * unit, 0.0)


def _inside(points: Tensor, sizes: Tensor) -> Tensor:
    return torch.arange(points.shape[1], device=points.device) < sizes[:, None]


@dataclass
class Penalty:
    """How strongly vectors are drawn to zeros and ones, and how that grows: by `growth` a step, up to `most`."""

    rho: float = 0.01
    growth: float = 1.01
    most: float = 6.0


class Admm:
    """Vectors v (layers, widest) on their way to zeros and ones with sums `counts`: the dual variables of both constraints."""

    def __init__(self, counts: Tensor, sizes: Tensor, widest: int, penalty: Penalty) -> None:
        self.counts, self.sizes = counts, sizes
        self.growth, self.most, self.rho = penalty.growth, penalty.most, penalty.rho
        self.y1, self.y2, self.z1, self.z2 = torch.zeros(4, len(counts), widest, device=counts.device)

    def to_(self, device: torch.device) -> None:
        """Go on where v is."""
        if self.counts.device != device:
            self.counts, self.sizes, self.y1, self.y2 = (each.to(device) for each in (self.counts, self.sizes, self.y1, self.y2))

    def gradient(self, v: Tensor) -> Tensor:
        """Of the penalty in v, after z1 and z2 have moved to where it is least for this v."""
        self.z1 = onto_box(v + self.y1 / self.rho, self.counts, self.sizes)
        self.z2 = onto_sphere(v + self.y2 / self.rho, self.sizes)
        inside = _inside(v, self.sizes)
        return torch.where(inside, self.y1 + self.y2 + self.rho * (2 * v - self.z1 - self.z2), 0.0)

    def step(self, v: Tensor) -> None:
        """Raise the dual variables by how far v is from either constraint, and the penalty."""
        inside = _inside(v, self.sizes)
        self.y1 = torch.where(inside, self.y1 + self.rho * (v - self.z1), 0.0)
        self.y2 = torch.where(inside, self.y2 + self.rho * (v - self.z2), 0.0)
        self.rho = min(self.rho * self.growth, max(self.rho, self.most))

    def state_dict(self) -> dict[str, Tensor]:
        """What the next step depends on beside v."""
        return {"y1": self.y1, "y2": self.y2, "rho": torch.tensor(self.rho, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another left off."""
        self.y1, self.y2 = (state[name].to(self.counts.device, copy=True) for name in ("y1", "y2"))
        self.rho = float(state["rho"])
