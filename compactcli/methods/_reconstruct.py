"""Which channels to keep so that those that read them can make good the others: lp-box ADMM on the error of that.

A consumer with the kernel W reads inputs of the second moments X. With S kept and R removed, least squares leaves it the error
tr(W_R P_RR^-1 W_R^T), P = X^-1. With scalars v between zero and one, channels count as read with a noise of power lambda / v^2:
the error is tr(W M W^T), M = (P + V^2 / lambda)^-1, which for zeros and ones is the same as lambda goes to zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..channels import Channels, Ids
from ..layers import Layer
from ..lpbox import Admm, Penalty
from ._errors import root
from ._widths import numbered

if TYPE_CHECKING:
    from ..moments import Moments

STEPS = 60
RATE = 0.1
NOISE = 1.0  # lambda, of the mean power of what is read
WIDEST = 1_024  # i*k*k up to which every position of the kernel counts by itself, not only the channels
FEW = 4  # consumers of the same channels up to which that is so
MOST = 4_096  # channels read, above which what to give up is left to the order
PENALTY = Penalty(0.05, 1.1, 6.0)


@dataclass(frozen=True)
class Problem:
    """What a consumer makes of its inputs: W (o, d) in the metric of its outputs, P (d, d), and whose each column is (d,)."""

    weight: Tensor
    precision: Tensor
    owner: Tensor  # the number of the column's channel among those to choose from; their count: of another
    noise: float  # lambda

    def error(self, removed: Tensor) -> float:
        """What is left of the error when those channels (n,) bool are gone and the others make up for them."""
        gone = torch.cat((removed, removed.new_zeros(1)))[self.owner]
        if not gone.any():
            return 0.0
        within = torch.linalg.cholesky(self.precision[gone][:, gone])
        return float(torch.linalg.solve_triangular(within, self.weight[:, gone].T, upper=False).square().sum())

    def slopes(self, v: Tensor) -> Tensor:
        """The gradient (n,) of the error in the scalars."""
        each = torch.cat((v, v.new_ones(1)))[self.owner]
        within = torch.linalg.cholesky(self.precision + torch.diag(each.square() / self.noise))
        read = torch.cholesky_solve(self.weight.T, within)  # M W^T, and M is symmetric
        slopes = -2 * each / self.noise * read.square().sum(1)
        return v.new_zeros(len(v) + 1).index_add_(0, self.owner, slopes)[:-1]


@dataclass(frozen=True)
class Alone:
    """Filters that nothing makes good: the cost of giving up two together (n, n), of each alone on the diagonal."""

    costs: Tensor

    def error(self, removed: Tensor) -> float:
        """What giving up those filters (n,) bool costs."""
        return float(self.costs[removed][:, removed].sum())

    def slopes(self, v: Tensor) -> Tensor:
        """The gradient (n,) in the scalars of the error when each filter is made so much of."""
        return -2 * self.costs @ (1 - v)


def small(consumer: Layer) -> bool:
    """Whether what a layer reads is few enough for as many inverses as ADMM takes."""
    channels = consumer.shape[consumer.in_axis]
    return (channels if channels * consumer.kernel > WIDEST else channels * consumer.kernel) <= MOST


def problem(
    model: nn.Module, channels: Channels, sets: Ids, consumer: Layer, moments: "Moments", *, coarse: bool = False
) -> Problem:
    """A consumer of the channels `sets`, by images; if `coarse`, all positions of the kernel as one."""
    weight = model.get_parameter(consumer.weight).detach().double().transpose(0, consumer.out_axis).flatten(1)
    weight = root(moments.worth) @ weight
    owner = numbered(channels, channels.axes[consumer.weight, consumer.in_axis], sets)
    inputs, kernel = moments.inputs.double(), consumer.kernel
    if (coarse or len(inputs) > WIDEST) and kernel > 1:
        inputs = _by_channel(inputs, kernel)
        weight = weight.view(len(weight), -1, kernel).transpose(1, 2).flatten(0, 1) / kernel**0.5  # W^T W is the mean as well
    else:
        owner = owner.repeat_interleave(kernel)
    if len(weight) > weight.shape[1]:
        weight = torch.linalg.qr(weight, mode="r").R  # only W^T W counts
    power = float(inputs.diagonal().mean()) or 1.0
    inputs = inputs + (1e-4 + 1e-6 * len(inputs)) * power * torch.eye(len(inputs), dtype=torch.float64)
    return Problem(weight, torch.linalg.inv(inputs), owner, NOISE * power)


def _by_channel(matrix: Tensor, kernel: int) -> Tensor:
    """(i*k*k, i*k*k) -> (i, i): the mean over equal positions of the kernel."""
    inputs = len(matrix) // kernel
    return matrix.view(inputs, kernel, inputs, kernel).diagonal(dim1=1, dim2=3).mean(2)


def choose(problems: Sequence[Problem | Alone], order: Ids, keep: int) -> Tensor:
    """Which channels go (n,) bool, so that `keep` stay; at least as good as giving them up in the order (n,)."""
    count = len(order)
    greedy = torch.zeros(count, dtype=torch.bool)
    greedy[torch.from_numpy(order[: count - keep].copy())] = True
    if not problems or keep in (0, count):
        return greedy
    found = _admm(problems, count, keep)
    candidates = [greedy, found]
    errors = [sum(each.error(removed) for each in problems) for removed in candidates]
    return candidates[int(np.argmin(errors))]


def _admm(problems: Sequence[Problem | Alone], count: int, keep: int) -> Tensor:
    """Which channels go (n,) bool, by gradient steps on the error and the penalty; the first slopes are 1 in the mean."""
    sizes, counts = torch.tensor([count]), torch.tensor([keep])
    admm = Admm(counts, sizes, count, PENALTY)
    v = torch.full((1, count), keep / count, dtype=torch.float64)
    scale = 0.0
    for _ in range(STEPS):
        slopes = sum((each.slopes(v[0]) for each in problems), torch.zeros(()))
        scale = scale or 1 / max(float(slopes.abs().mean()), 1e-30)
        v = v - RATE * (scale * slopes + admm.gradient(v).double())
        admm.step(v)
    removed = torch.ones(count, dtype=torch.bool)
    removed[v[0].topk(keep).indices] = False
    return removed
