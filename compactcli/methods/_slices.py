"""Kernels cut into slices that one generator makes from codes: how they are cut, and the best generator and codes."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import shape_text
from ._errors import LEAST, Metric, ridge_

ROUNDS = 6  # of codes, then generator, at most
HELPS = 0.01  # of the error: a round that saves less is the last
SOLVES = 8  # steps of conjugate gradients for either
REFITS = 20  # for one layer's codes, when images refit it
STEPS = 5  # with FILTERS of each layer, where plans are compared
FILTERS = 16
WIDEST = 512  # outputs of a slice, and inputs*k*k, up to which steps reckon with how they count together
WEAKEST = 1e-4  # of the mean: no slice, and no direction in one, counts for less where a step is taken


Within = tuple[Tensor | None, Tensor | None]  # the metric along a slice's outputs, and along its inputs; None: the identity


def name_of(kernel: Sequence[int]) -> str:
    """Under which name the generator for a kernel size is shared."""
    return f"csg_{shape_text(kernel)}"


@dataclass(frozen=True)
class Slicing:
    """A kernel (o, i, k, k) as slices of `outputs` x `inputs` x k x k, filled up with zeros at the edges.

    Tiled: each slice is a block of filters by a block of inputs. By rows, as the authors' code does it: each is a run of
    consecutive numbers of the kernel, filled up; where sizes do not divide, some codes then make nothing that is used.
    """

    shape: tuple[int, ...]  # of the kernel
    outputs: int
    inputs: int
    by_rows: bool = False

    @property
    def blocks(self) -> tuple[int, int]:
        """Slices along filters, and along inputs."""
        return -(-self.shape[0] // self.outputs), -(-self.shape[1] // self.inputs)

    @property
    def count(self) -> int:
        """Slices."""
        return self.blocks[0] * self.blocks[1]

    @property
    def size(self) -> int:
        """Numbers in a slice."""
        return self.outputs * self.inputs * math.prod(self.shape[2:])

    def cut(self, kernel: Tensor) -> Tensor:
        """(o, i, k, k) -> (slices, numbers)."""
        (down, along), (o, i, *k) = self.blocks, self.shape
        filled = F.pad(kernel, (*[0] * 2 * len(k), 0, along * self.inputs - i, 0, down * self.outputs - o))
        if not self.by_rows:
            filled = filled.view(down, self.outputs, along, self.inputs, *k).transpose(1, 2)
        return filled.reshape(self.count, self.size)

    def paste(self, slices: Tensor) -> Tensor:
        """(slices, numbers) -> (o, i, k, k)."""
        (down, along), (o, i, *k) = self.blocks, self.shape
        if not self.by_rows:
            slices = slices.view(down, along, self.outputs, self.inputs, *k).transpose(1, 2)
        return slices.reshape(down * self.outputs, along * self.inputs, *k)[:o, :i]


@dataclass(frozen=True)
class Sliced:
    """A layer's kernel, how an error in it counts, and how it is cut."""

    weight: Tensor  # (o, i, k, k) float32
    metric: Metric
    slicing: Slicing

    def weights(self) -> Tensor:
        """How much each slice counts (slices,), by the diagonals of the metric."""
        outputs = self.metric.outputs.diagonal().float()
        inputs = torch.ones(self.weight[0].numel()) if self.metric.inputs is None else self.metric.inputs.diagonal().float()
        each = self.slicing.cut((outputs[:, None] * inputs).view(self.weight.shape))
        return each.sum(1) / self.slicing.cut(torch.ones_like(self.weight)).sum(1).clamp_min(1)

    @cached_property
    def within(self) -> Within:
        """(outputs, outputs) and (inputs*k*k, inputs*k*k): the metric within a slice, in the mean of all.

        Each slice's is about their product, times what the slice counts.
        """
        slicing, inputs = self.slicing, self.metric.inputs
        width = slicing.inputs * math.prod(slicing.shape[2:])
        if slicing.by_rows:  # they are of whatever filters and inputs come next
            return None, None
        return (
            None if slicing.outputs > WIDEST else _mean_block(self.metric.outputs, slicing.outputs),
            None if inputs is None or width > WIDEST else _mean_block(inputs, width),
        )

    def part(self, filters: int) -> "Sliced":
        """The same of blocks of its filters, from the first to the last, of no more than so many filters; or of the first."""
        few = max(1, filters // self.slicing.outputs)
        if few >= self.slicing.blocks[0]:
            return self
        blocks = torch.linspace(0, self.slicing.blocks[0] - 1, few).round().long()
        index = (blocks[:, None] * self.slicing.outputs + torch.arange(self.slicing.outputs)).flatten()
        index = index[index < len(self.weight)]
        metric = replace(self.metric, outputs=self.metric.outputs[index][:, index])
        slicing = replace(self.slicing, shape=(len(index), *self.slicing.shape[1:]))
        return Sliced(self.weight[index], metric, slicing)

    def weighed(self, error: Tensor) -> Tensor:
        """Half the gradient (slices, numbers) of what an error (o, i, k, k) costs."""
        rows = self.metric.outputs.to(error.dtype) @ self.metric.read(error.flatten(1))
        return self.slicing.cut(rows.view(error.shape))

    def cost(self, error: Tensor) -> float:
        """What an error (o, i, k, k) costs."""
        return self.metric.cost(error.flatten(1))


def directions(layers: Sequence[Sliced]) -> Tensor:
    """The principal directions (numbers, as many as there are) of all slices, each weighted by how much it counts."""
    scaled = [layer.slicing.cut(layer.weight) * layer.weights().clamp_min(0).sqrt()[:, None] for layer in layers]
    return _principal(torch.cat(scaled))


def scored(layers: Sequence[Sliced], generator: Tensor) -> list[float]:
    """What each layer loses with the best codes for a generator (numbers, d), nearly.

    That is what it loses if slices are projected, times what a few steps make of that on some of its filters.
    """
    inverse, lost = _inverse(generator), []
    for layer in layers:
        part = layer.part(FILTERS)
        codes = _nearest(part, inverse)
        sampled = _beyond(part, generator, codes)
        share = part.cost(part.weight - made(part, generator, solve_codes(part, generator, codes, STEPS))) / max(sampled, LEAST)
        every = sampled if part is layer else _beyond(layer, generator, _nearest(layer, inverse))
        lost.append(every * (share if sampled > 0 else 1.0))
    return lost


def _nearest(layer: Sliced, inverse: Tensor) -> Tensor:
    """The codes (slices, d) of the nearest slices that a generator makes, by its `_inverse`."""
    return (layer.slicing.cut(layer.weight).double() @ inverse).float()


def _beyond(layer: Sliced, generator: Tensor, codes: Tensor) -> float:
    """What codes (slices, d) leave of the slices, each weighted by how much it counts."""
    left = layer.slicing.cut(layer.weight) - codes @ generator.T
    return float((layer.weights() * left.square().sum(1)).sum())


def _principal(rows: Tensor) -> Tensor:
    """Directions, as columns, of rows (n, m), the strongest first; min(n, m) of them."""
    if len(rows) >= rows.shape[1]:
        return _eigh(rows.T @ rows).flip(1)
    directions: Tensor = torch.linalg.qr(rows.T @ _eigh(rows @ rows.T).flip(1)).Q
    return directions


def _eigh(gram: Tensor) -> Tensor:
    """Eigenvectors, the weakest first; by float64 where float32 does not converge, as of slices that are mostly zeros."""
    vectors: Tensor
    try:
        vectors = torch.linalg.eigh(gram).eigenvectors
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        vectors = torch.linalg.eigh(gram.double()).eigenvectors
    return vectors.to(gram.dtype)


def refine(layers: Sequence[Sliced], generator: Tensor, *, frozen: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Generator (numbers, d) and codes (slices, d) of each layer that cost least: in turn while it helps, from a generator."""
    generator = generator if frozen else torch.linalg.qr(generator).Q
    inverse = _inverse(generator)
    codes = [_nearest(layer, inverse) for layer in layers]
    error = float("inf")
    for _ in range(ROUNDS):
        codes = [solve_codes(layer, generator, own, SOLVES) for layer, own in zip(layers, codes, strict=True)]
        now = sum(layer.cost(layer.weight - made(layer, generator, own)) for layer, own in zip(layers, codes, strict=True))
        if frozen or now > (1 - HELPS) * error:
            break
        error = now
        generator = solve_generator(layers, generator, codes, SOLVES)
        generator, mixed = torch.linalg.qr(generator)
        codes = [own @ mixed.T for own in codes]
    return generator, codes


def _inverse(generator: Tensor) -> Tensor:
    """(numbers, d) in float64: slices times it are the codes nearest to them.

    Not by torch.linalg.lstsq, which does not give the same bits every time.
    """
    wide = generator.double()
    inverse: Tensor = wide @ torch.linalg.inv(ridge_(wide.T @ wide, 1e-10 / wide.shape[1]))
    return inverse


def made(layer: Sliced, generator: Tensor, codes: Tensor) -> Tensor:
    """The kernel that codes stand for."""
    return layer.slicing.paste(codes @ generator.T)


def solve_codes(layer: Sliced, generator: Tensor, codes: Tensor, steps: int) -> Tensor:
    """The codes (slices, d) of one layer that cost least, nearer by some steps of conjugate gradients."""
    gram = generator.T @ _across(layer.within, generator, layer.slicing.outputs)
    inverse, weights = _inverted(gram).to(codes.dtype), _floored(layer.weights())[:, None]

    def gradient(error: Tensor) -> Tensor:
        return layer.weighed(error) @ generator

    def easier(at: Tensor) -> Tensor:
        return at @ inverse / weights

    start = layer.weight.to(codes.dtype) - made(layer, generator, codes)
    return _conjugate(codes, gradient(start), lambda way: gradient(made(layer, generator, way)), easier, steps)


def solve_generator(layers: Sequence[Sliced], generator: Tensor, codes: Sequence[Tensor], steps: int) -> Tensor:
    """The generator (numbers, d) that costs least for the codes, nearer by some steps of conjugate gradients."""
    grams = [own.T @ (_floored(layer.weights())[:, None] * own) for layer, own in zip(layers, codes, strict=True)]
    inverse = _inverted(sum(grams, torch.zeros(())))
    each = [float(gram.diagonal().sum()) for gram in grams]
    within = _mean([layer.within[0] for layer in layers], each), _mean([layer.within[1] for layer in layers], each)
    easy = tuple(None if side is None else _inverted(side) for side in within)
    outputs = layers[0].slicing.outputs

    def gradient(errors: Iterator[Tensor]) -> Tensor:
        return sum(
            (layer.weighed(error).T @ own for layer, error, own in zip(layers, errors, codes, strict=True)), torch.zeros(())
        )

    start = gradient(layer.weight - made(layer, generator, own) for layer, own in zip(layers, codes, strict=True))
    moved: Callable[[Tensor], Tensor] = lambda way: gradient(  # noqa: E731
        made(layer, way, own) for layer, own in zip(layers, codes, strict=True)
    )
    return _conjugate(generator, start, moved, lambda at: _across((easy[0], easy[1]), at @ inverse, outputs), steps)


def _across(within: Within, columns: Tensor, outputs: int) -> Tensor:
    """The product of both sides times columns (numbers, d) of slices of so many outputs."""
    wide = columns.view(outputs, -1, columns.shape[1])
    if within[0] is not None:
        wide = torch.einsum("ab,bjd->ajd", within[0].to(wide.dtype), wide)
    if within[1] is not None:
        wide = torch.einsum("ij,ajd->aid", within[1].to(wide.dtype), wide)
    return wide.reshape(columns.shape)


def _mean_block(matrix: Tensor, size: int) -> Tensor:
    """The mean of the blocks (size, size) along a diagonal, each by the mean of its own; the last filled up with zeros."""
    count = -(-len(matrix) // size)
    more = count * size - len(matrix)
    filled = F.pad(matrix, (0, more, 0, more)) if more else matrix
    blocks = filled.reshape(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).float()
    there = (len(matrix) - size * torch.arange(count)).clamp_max(size)
    each = blocks.diagonal(dim1=1, dim2=2).sum(1) / there
    return (blocks / each.clamp_min(LEAST)[:, None, None]).mean(0)


def _mean(sides: Sequence[Tensor | None], shares: Sequence[float]) -> Tensor | None:
    """One side of the metric within slices, in the mean of layers that count by their shares."""
    width = next((len(side) for side in sides if side is not None), None)
    if width is None:
        return None
    every = zip(shares, sides, strict=True)
    total = sum((share * (torch.eye(width) if side is None else side) for share, side in every), torch.zeros(()))
    return total / max(sum(shares), LEAST)


def _floored(weights: Tensor) -> Tensor:
    """Weights of slices, none less than WEAKEST of their mean."""
    return weights.clamp_min(max(WEAKEST * float(weights.mean()), LEAST))


def _inverted(gram: Tensor) -> Tensor:
    """The inverse, by float64; of a generator from a file it is as near to singular as may be."""
    inverse: Tensor = torch.linalg.inv(ridge_(gram.double(), WEAKEST / len(gram)))
    return inverse.to(gram.dtype)


def _conjugate(
    start: Tensor, residual: Tensor, operator: Callable[[Tensor], Tensor], easier: Callable[[Tensor], Tensor], steps: int
) -> Tensor:
    """Nearer to where the residual is zero, by preconditioned conjugate gradients."""
    point, ready = start, easier(residual)
    direction, power = ready, float((residual * ready).sum())
    first = power
    for _ in range(steps):
        if not power > 1e-10 * first or power <= 0:
            break
        moved = operator(direction)
        curve = float((direction * moved).sum())
        if curve <= LEAST:  # of weights that are all but nothing there is only rounding left
            break
        step = power / curve
        point, residual = point + step * direction, residual - step * moved
        ready = easier(residual)
        power, last = float((residual * ready).sum()), power
        direction = ready + (power / last) * direction
    return point
