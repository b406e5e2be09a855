"""What csg's layers may become: codes of every size, and any number of layers that stay plain, and what is lost with each."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..budget import Floats
from ..layers import Layer
from ._slices import Sliced, directions, scored

NUMBERS = 6  # of layers that stay plain that are scored, where codes may be of any size
SCORED = 4  # sizes of codes that are
SMALLEST = 16  # of these sizes: the largest divided by this; and 1
TRIED = 48  # sizes of codes that are tried; what is lost with them is interpolated
NOTHING = 1e-12  # loss that is none: a logarithm is taken of it

Ints = np.ndarray[Any, np.dtype[np.int64]]
Pairs = Sequence[tuple[Layer, Sliced]]  # the layers of one kernel size


@dataclass(frozen=True)
class Plan:
    """What the layers of one kernel size may become."""

    size: int  # of the codes
    plain: frozenset[str]  # the layers that stay as they are

    def coded(self, found: Pairs) -> list[tuple[Layer, Sliced]]:
        """Those of the layers that are made by codes of this size."""
        return [each for each in found if each[0].name not in self.plain]


@dataclass(frozen=True)
class Curve:
    """What is lost if all but some layers are made by codes, by the size of these."""

    plain: tuple[str, ...]
    coded: tuple[str, ...]
    kept: int  # numbers of the layers that stay plain
    each: int  # numbers for each number in a code: those of the generator, and one for each slice
    sizes: Ints  # of the codes that were scored, ascending
    lost: Floats  # (sizes, layers coded)

    def plans(self, shares: Mapping[str, float], *, between: bool) -> Iterator[tuple[float, float, Plan]]:
        """(numbers, loss, plan) for the sizes scored, or for those `between` too; a layer's loss counts by its share."""
        lost = np.log(np.maximum(self.lost @ [shares[name] for name in self.coded], NOTHING))
        sizes = self.sizes
        if between:
            sizes = np.unique(np.linspace(1, sizes[-1], TRIED).astype(np.int64))
        known = np.exp(np.interp(sizes, self.sizes, lost))
        for size, loss in zip(sizes.tolist(), known.tolist(), strict=True):
            yield float(self.kept + size * self.each), loss, Plan(size, frozenset(self.plain))


def curves(found: Pairs, code: int, generator: Tensor | None) -> Iterator[Curve]:
    """What is lost by how many layers stay plain, first those that gain least; with codes of a size, or of any where it is 0.

    A generator's own size is taken where there is one. Without it, that of each curve begins as the directions of its layers.
    """
    slices = [sliced for _, sliced in found]
    counts = np.array([sliced.slicing.count for sliced in slices])
    whole = np.array([sliced.weight.numel() for sliced in slices])
    numbers = slices[0].slicing.size

    def saves(of: Ints) -> int:
        """The size of codes up to which they are fewer numbers than the layers."""
        return int(whole[of].sum() // (counts[of].sum() + numbers))

    basis = directions(slices) if generator is None else generator
    most = basis.shape[1]
    middle = most if generator is not None else min(code or max(1, saves(np.arange(len(found))) // 2), most)
    lost = np.array(scored(slices, basis[:, :middle]))
    saved = whole - counts * middle
    order = np.argsort(-np.where(saved > 0, lost / np.maximum(saved, 1), np.inf), kind="stable")
    least = int((saved <= 0).sum())
    if generator is None and not code:  # sizes make up for numbers that are not tried
        tried = np.unique([0, *np.linspace(least, len(found) - 1, NUMBERS).round().astype(int)])
    else:
        tried = np.arange(least, len(found))
    for number in tried[tried < len(found)]:
        coded = order[number:]
        own = [slices[i] for i in coded]
        if generator is not None:
            sizes, table = np.array([middle]), lost[None, coded]
        else:
            basis = directions(own)
            rank = basis.shape[1]
            sizes = np.array([min(code, rank)]) if code else _sizes(min(saves(coded), rank))
            table = np.array([scored(own, basis[:, :size]) for size in sizes]).reshape(len(sizes), len(own))
        if len(sizes):
            names = [[found[i][0].name for i in part] for part in (order[:number], coded)]
            each = int(counts[coded].sum()) + numbers
            yield Curve(tuple(names[0]), tuple(names[1]), int(whole[order[:number]].sum()), each, sizes, table)


def _sizes(most: int) -> Ints:
    """The sizes of codes that are scored, up to the largest."""
    if most < 1:
        return np.zeros(0, dtype=np.int64)
    return np.unique([1, *np.geomspace(max(1, most // SMALLEST), most, SCORED).round().astype(np.int64)])
