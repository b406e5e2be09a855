"""Filters as linear combinations of a few of them: what it costs in error, and the best such filters and coefficients."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..budget import Floats
from ._errors import Metric, ridge_, root

Variant = Literal["full", "lowrank", "sparse"]

ROUNDS = 10  # of refinement, at most
HELPS = 0.005  # of the error: a round that saves less is the last
SOLVES = 12  # steps of conjugate gradients for sparse coefficients
RIDGE = 1e-6  # of the mean energy of the primary filters


@dataclass(frozen=True)
class Form:
    """What the filters of a layer may be stored as."""

    variant: Variant
    primary: int  # p
    size: int = 0  # lowrank: the rank; sparse: how many coefficients

    def cost(self, outputs: int, reads: int) -> int:
        """Numbers that a kernel of `outputs` filters with `reads` inputs each is stored as."""
        p, s = self.primary, outputs - self.primary
        return p * reads + {"full": s * p, "lowrank": self.size * (s + p), "sparse": self.size}[self.variant]


@dataclass(frozen=True)
class Combination:
    """A kernel (o, i*k*k): rows `chosen` are `primary` (p, i*k*k), the others `coefficients` (s, p) times those."""

    chosen: Tensor  # (p,) int64, ascending
    primary: Tensor
    coefficients: Tensor

    @property
    def others(self) -> Tensor:
        """The rows that are combinations, ascending."""
        return _others(self.chosen, len(self.primary) + len(self.coefficients))

    def kernel(self) -> Tensor:
        """The filters in their order."""
        return self.spread() @ self.primary

    def spread(self) -> Tensor:
        """B (o, p) with kernel = B primary."""
        result = self.primary.new_zeros(len(self.primary) + len(self.coefficients), len(self.primary))
        result[self.chosen, torch.arange(len(self.chosen))] = 1
        result[self.others] = self.coefficients
        return result


class Curves:
    """The errors that the filters of one layer have in each form, before any refinement."""

    def __init__(self, weight: Tensor, metric: Metric) -> None:
        """`weight` (o, i*k*k) float64."""
        self.outputs, self.reads = weight.shape
        scaled = root(metric.outputs) @ weight
        energy = torch.linalg.eigvalsh(metric.read(scaled) @ scaled.T).clamp_min(0).flip(0).numpy()
        self.tails = np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]])  # beyond each rank
        rows = metric.outputs.diagonal().double().sqrt()[:, None] * weight
        self.gram = metric.read(rows) @ rows.T
        self.order = pivots(self.gram, min(self.outputs, self.reads))

    def full(self, primary: int) -> float:
        """The best of rank p: any such matrix is p of its rows and combinations of them."""
        return float(self.tails[min(primary, self.reads)])

    def lowrank(self, primary: int) -> Floats:
        """By rank of the coefficients, from 0 to the most there can be."""
        explained, missing = self._projected(primary)
        energy = torch.linalg.eigvalsh(explained).clamp_min(0).flip(0).numpy()[:primary]
        return missing + np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]])

    def sparse(self, primary: int, counts: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> Floats:
        """By how many coefficients there are, the others simply left out."""
        chosen, others = self._parts(primary)
        inside = self.gram[chosen][:, chosen]
        coefficients = _solved(inside, self.gram[chosen][:, others]).T  # (s, p)
        _, missing = self._projected(primary)
        worth = coefficients.square() * inside.diagonal()
        ranked = worth.flatten().argsort(descending=True)
        errors = []
        for count in counts.tolist():
            lost = coefficients.flatten().clone()
            lost[ranked[:count]] = 0
            left_out = lost.view_as(coefficients)
            errors.append(missing + float(((left_out @ inside) * left_out).sum()))
        return np.array(errors)

    def _parts(self, primary: int) -> tuple[Tensor, Tensor]:
        chosen = self.order[:primary].sort().values
        return chosen, _others(chosen, self.outputs)

    def _projected(self, primary: int) -> tuple[Tensor, float]:
        """(Gram matrix of the other filters as far as the primary ones make them, energy of the rest)."""
        chosen, others = self._parts(primary)
        across = self.gram[chosen][:, others]
        explained = across.T @ _solved(self.gram[chosen][:, chosen], across)
        missing = float((self.gram.diagonal()[others] - explained.diagonal()).clamp_min(0).sum())
        return explained, missing


def pivots(gram: Tensor, count: int) -> Tensor:
    """Rows in the order in which QR with pivoting takes them, from their Gram matrix: each time the one that is left longest."""
    left = gram.diagonal().clone()
    factors = gram.new_zeros(count, len(gram))
    order: list[int] = []
    for step in range(count):
        row = int(left.argmax())
        order.append(row)
        factor = (gram[row] - factors[:step, row] @ factors[:step]) / left[row].clamp_min(1e-300).sqrt()
        factors[step] = factor
        left = (left - factor.square()).clamp_min_(0)
        left[order] = -1.0
    return torch.tensor(order)


def fit(weight: Tensor, metric: Metric, form: Form) -> Combination:
    """The combination nearest to `weight` (o, i*k*k) float64: pivoted QR and least squares, in turn while it helps."""
    weight = weight.double()
    if form.variant == "full":
        return _truncated(weight, metric, form.primary)
    rows = metric.outputs.diagonal().double().sqrt()[:, None] * weight
    chosen = pivots(metric.read(rows) @ rows.T, form.primary).sort().values
    result, error = None, float("inf")
    for found in _refined(weight, metric, form, chosen):
        now = metric.cost(weight - found.kernel())
        if now < error:
            result = found
        if now > (1 - HELPS) * error:
            break
        error = now
    assert result is not None
    return result


def _truncated(weight: Tensor, metric: Metric, primary: int) -> Combination:
    """The best matrix of rank p, as p of its rows and combinations of those."""
    outer = root(metric.outputs)
    scaled = outer @ weight
    _, vectors = torch.linalg.eigh(metric.read(scaled) @ scaled.T)
    U = vectors.flip(1)[:, :primary]
    spread, core = torch.linalg.solve_triangular(outer, U, upper=True), U.T @ scaled  # the matrix is their product
    rows = metric.outputs.diagonal().double().sqrt()[:, None] * spread @ core
    chosen = pivots(metric.read(rows) @ rows.T, primary).sort().values
    inside = spread[chosen]
    coefficients = spread[_others(chosen, len(weight))] @ torch.linalg.pinv(inside)  # of less than rank p where filters are alike
    return Combination(chosen, inside @ core, coefficients)


def _refined(weight: Tensor, metric: Metric, form: Form, chosen: Tensor) -> Iterator[Combination]:
    """Coefficients for the primary filters, then filters for the coefficients, again and again."""
    others = _others(chosen, len(weight))
    outputs = ridge_(metric.outputs.to(torch.float64, copy=True), RIDGE / len(weight))
    within, across = outputs[others][:, others], outputs[others][:, chosen]
    primary = weight[chosen].clone()
    coefficients: Tensor | None = None
    for _ in range(ROUNDS):
        inside = metric.read(primary) @ primary.T
        target = weight[others] + torch.linalg.solve(within, across @ (weight[chosen] - primary))
        wanted = _solved(inside, metric.read(primary) @ target.T).T  # without any limit (s, p)
        if form.variant == "lowrank":
            coefficients = _of_rank(wanted, within, inside, form.size)
        else:
            coefficients = _of_count(wanted, within, inside, form.size, coefficients)
        yield Combination(chosen, primary, coefficients)
        spread = Combination(chosen, primary, coefficients).spread()
        weighted = outputs @ spread
        primary = torch.linalg.solve(spread.T @ weighted, weighted.T @ weight)
        yield Combination(chosen, primary, coefficients)


def _of_rank(wanted: Tensor, outer: Tensor, inner: Tensor, rank: int) -> Tensor:
    """The matrix of that rank nearest to the wanted one, where errors D cost trace(outer D inner D^T)."""
    left, right = root(outer), root(inner)
    U, S, V = torch.linalg.svd(left @ wanted @ right.T, full_matrices=False)
    core = (U[:, :rank] * S[:rank]) @ V[:rank]
    halved = torch.linalg.solve_triangular(left, core, upper=True)
    nearest: Tensor = torch.linalg.solve_triangular(right, halved.T, upper=True).T
    return nearest


def _of_count(wanted: Tensor, outer: Tensor, inner: Tensor, count: int, before: Tensor | None) -> Tensor:
    """The matrix with that many entries nearest to the wanted one: the entries that cost most to leave out.

    Those that are left make up for the others as least squares can, by conjugate gradients on them alone.
    """
    if before is None:
        worth = wanted.square() * outer.diagonal()[:, None] * inner.diagonal()
        mask = torch.zeros(wanted.numel(), dtype=torch.float64)
        mask[worth.flatten().topk(count).indices] = 1
        mask = mask.view_as(wanted)
    else:
        mask = (before != 0).double()
    entries = wanted * mask if before is None else before
    residual = mask * (outer @ (wanted - entries) @ inner)
    direction, power = residual, float(residual.square().sum())
    for _ in range(SOLVES):
        if power < 1e-30:
            break
        moved = mask * (outer @ direction @ inner)
        step = power / max(float((direction * moved).sum()), 1e-300)
        entries, residual = entries + step * direction, residual - step * moved
        power, last = float(residual.square().sum()), power
        direction = residual + (power / last) * direction
    return entries


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix^-1 right, with a small ridge; a larger one where there is more rounding, as in moments of few images."""
    for more in (1, 100):
        factor, failed = torch.linalg.cholesky_ex(ridge_(matrix.clone(), more * RIDGE / len(matrix)))
        if not failed:
            return torch.cholesky_solve(right, factor)
    return torch.cholesky_solve(right, torch.linalg.cholesky(ridge_(matrix.clone(), 1e4 * RIDGE / len(matrix))))


def _others(chosen: Tensor, count: int) -> Tensor:
    mask = torch.ones(count, dtype=torch.bool)
    mask[chosen] = False
    return mask.nonzero().flatten()
