"""Least squares from sums: what a layer's own inputs explain of what its outputs should be."""

from collections.abc import Callable

import torch
from torch import Tensor

from .surgery import Regression

ROWS_BYTES = 32 << 20  # of a layer's inputs and residuals that wait to enter its Gram matrix
COLUMNS = 128  # of a Gram matrix at once, in float32 before they are added up in float64, from its diagonal on


class Sums:
    """Sums over rows x (i*k*k) of the model's inputs and y (o) of the target's outputs."""

    def __init__(self, start: Tensor, bias: Tensor | None, *, centred: bool) -> None:
        self.start, self.bias, self.centred, self.count = start, 0.0 if bias is None else bias, centred, 0
        outs, ins = start.shape
        self.xx = torch.zeros(ins, ins, dtype=torch.float64)
        self.rx = torch.zeros(outs, ins, dtype=torch.float64)
        self.x = torch.zeros(ins, dtype=torch.float64)
        self.r = torch.zeros(outs, dtype=torch.float64)
        self.origin: tuple[Tensor, Tensor] | None = None  # of x and r: near their means, so that float32 products lose nothing
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        residual = y - x @ self.start.T - self.bias  # small where little was changed, so that little is added
        self.waiting.append((x, residual))
        if sum(x.nbytes + residual.nbytes for x, residual in self.waiting) >= ROWS_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Products cost one pass over the Gram matrix each, so rows gather before."""
        x, residual = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        self.waiting.clear()
        self.count += len(x)
        if self.centred:
            self.origin = self.origin or (x.mean(0), residual.mean(0))
            x.sub_(self.origin[0])
            residual.sub_(self.origin[1])
        for at in range(0, x.shape[1], COLUMNS):
            self.xx[at : at + COLUMNS, at:] += x[:, at : at + COLUMNS].T @ x[:, at:]
        self.rx += residual.T @ x
        self.x += x.sum(0)
        self.r += residual.sum(0)

    def ready(self) -> bool:
        """Add what waits; whether all sums are finite."""
        if self.waiting:
            self._flush()
        return all(bool(sums.isfinite().all()) for sums in (self.xx, self.rx, self.x, self.r))

    def solve(self, scale: Tensor) -> tuple[Regression, Callable[[Tensor], Tensor]]:
        """The regression, and the shift (o,) of the mean that a weight then still needs.

        Its ridge pulls towards the weight that is there. It is the mean power of the inputs times
        unknowns per equation, so that a few images do not talk a layer out of what it knows.
        """
        self.xx.triu_().add_(self.xx.triu(1).T)
        xx, rx, x, r = (sums.div_(self.count) for sums in (self.xx, self.rx, self.x, self.r))
        if self.centred:
            assert self.origin is not None
            xx, rx = xx.addr_(x, x, alpha=-1), rx.addr_(r, x, alpha=-1)
            x, r = x + self.origin[0], r + self.origin[1]
        ridge = len(xx) / self.count * float(xx.diagonal().mean()) or 1.0
        xx.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(xx)
        xx.diagonal().sub_(ridge)
        weight = self.start.double() + torch.cholesky_solve(rx.T, factor).T
        return Regression(weight, xx, scale), lambda reached: r + (self.start.double() - reached) @ x
