"""The rules of operations that move positions, and the ids with them: views, permutations, pieces, what is picked or padded."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from ..graph import operation
from .walk import Ids, Label, Walk, argument, axis_of, nodes_in, rule, shape_of


@rule("view", "_unsafe_view", "reshape")
def _view(walk: Walk, node: fx.Node) -> list[Label]:
    """Ids of merged axes are spread; those of a split axis stay free along its longest part alone."""
    source = argument(node, 0)
    before, after = tuple(source.meta["val"].shape), tuple(node.meta["val"].shape)
    result = []
    for label in walk.of(source):
        blocks = (block for block in _blocks(before, after) if block[0].start <= label.axis < block[0].stop)
        old, new = next(blocks, (None, None))
        if old is None or new is None:  # one element, of no axis any more
            walk.lock([label], f"dropped or spread by {operation(node)}")
            continue
        spread = _spread(label.ids, label.axis - old.start, old.stop - old.start)
        full = np.broadcast_to(spread, before[old]).reshape(after[new])
        if len(label.ids) == 1 < full.size:
            walk.lock([label], "one channel spread over many")
            continue
        varying = [axis for axis in range(full.ndim) if (full != np.take(full, [0], axis)).any()]
        axis = max(varying or range(full.ndim), key=lambda axis: full.shape[axis])
        lead = full[tuple(slice(None) if other == axis else 0 for other in range(full.ndim))]
        walk.tie(_spread(lead, axis, full.ndim), full)
        result.append(Label(new.start + axis, lead))
    return result


def _blocks(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[slice, slice]]:
    """The smallest runs of axes with equal products: [(axes before, axes after), ...]."""
    blocks = []
    i = j = 0
    while i < len(before) and j < len(after):
        start_i, start_j, left, right = i, j, before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        blocks.append([slice(start_i, i), slice(start_j, j)])
    if blocks:  # what remains has size one
        blocks[-1] = [slice(blocks[-1][0].start, len(before)), slice(blocks[-1][1].start, len(after))]
    return [(old, new) for old, new in blocks]


@rule("permute", "transpose", "t", "unsqueeze", "squeeze", "expand")
def _move(walk: Walk, node: fx.Node) -> list[Label]:
    """The axes in a new order, with axes of size one put in or taken out."""
    source = argument(node, 0)
    sizes = tuple(source.meta["val"].shape)
    order: list[int | None] = list(range(len(sizes)))  # old axis at each new place
    arguments: Any = node.args[1:]
    match operation(node):
        case "t":
            order.reverse()
        case "permute":
            order = [d % len(sizes) for d in arguments[0]]
        case "transpose":
            a, b = (d % len(sizes) for d in arguments)
            order[a], order[b] = order[b], order[a]
        case "unsqueeze":
            order.insert(arguments[0] % (len(sizes) + 1), None)
        case "squeeze":
            chosen = order if not arguments else [arguments[0]] if isinstance(arguments[0], int) else list(arguments[0])
            gone = {axis % len(sizes) for axis in chosen if axis is not None and sizes[axis] == 1}
            order = [axis for axis in order if axis not in gone]
        case "expand":
            order = [*[None] * (node.meta["val"].ndim - len(sizes)), *order]
    after = node.meta["val"].shape
    moved, lost = [], []
    for label in walk.of(source):
        new = order.index(label.axis) if label.axis in order else None
        if new is None or after[new] != len(label.ids):  # dropped, or one channel spread over many
            lost.append(label)
        else:
            moved.append(Label(new, label.ids))
    walk.lock(lost, f"dropped or spread by {operation(node)}")
    return moved


@rule("cat")
def _cat(walk: Walk, node: fx.Node) -> list[Label]:
    """One after the other along an axis; along the others position pairs with position."""
    tensors, axis = nodes_in(node.args[0]), axis_of(node, 1, 0)
    result = []
    for along in range(len(shape_of(node))):
        runs = []
        for tensor in tensors:
            ids = walk.along(tensor, along)
            if not ids:  # what it is paired with downstream may not be cut either
                ids = [walk.fresh(shape_of(tensor)[along])]
                walk.lock([Label(along, ids[0])], "concatenated with a tensor without channels")
            for extra in ids[1:]:
                walk.tie(ids[0], extra)
            runs.append(ids[0])
        if along == axis:
            result.append(Label(along, np.concatenate(runs)))
        elif any(walk.along(tensor, along) for tensor in tensors):
            result.append(_together(walk, along, runs))
    return result


@rule("stack")
def _stack(walk: Walk, node: fx.Node) -> list[Label]:
    """A new axis; along the others position pairs with position."""
    tensors, axis = nodes_in(node.args[0]), axis_of(node, 1, 0)
    result = []
    for along in range(len(shape_of(tensors[0]))):
        runs = [walk.along(tensor, along) for tensor in tensors]
        label = _together(walk, along + (along >= axis), [ids for run in runs for ids in run])
        if not all(runs):
            walk.lock([label], "stacked with a tensor without channels")
        result.append(label)
    return [label for label in result if len(label.ids)]


def _together(walk: Walk, axis: int, runs: Sequence[Ids]) -> Label:
    for ids in runs[1:]:
        walk.tie(runs[0], ids)
    return Label(axis, np.max(runs, axis=0) if runs else np.array([], dtype=np.int64))


BY_NUMBERS = "part of the channels is picked by numbers in code"


@rule("slice")
def _slice(walk: Walk, node: fx.Node) -> list[Label]:
    """Positions may be picked; so may the channels before or after a number that the issuing module holds."""
    source, axis = argument(node, 0), axis_of(node, 1, 0)
    size = shape_of(source)[axis]
    numbers: Any = [*node.args[2:], *(None, None, None)[len(node.args) - 2 :]]
    start, stop, step = numbers[0] or 0, size if numbers[1] is None else min(numbers[1], size), numbers[2] or 1
    result = [label for label in walk.of(source) if label.axis != axis]
    for ids in walk.along(source, axis):
        whole = (start, stop, step) == (0, size, 1)
        if not whole and (
            min(start, stop) < 0 or step != 1 or not all(walk.counted(node, ids[:end]) for end in (start, stop) if 0 < end < size)
        ):
            walk.lock([Label(axis, ids)], BY_NUMBERS)
        result.append(Label(axis, ids[start:stop:step]))
    return result


@rule("split", "split_with_sizes")
def _split(walk: Walk, node: fx.Node) -> list[Label]:
    """Even pieces go position by position, uneven ones as they like, where their sizes are known to follow."""
    source, axis = argument(node, 0), axis_of(node, 2, 0)
    sizes: Any = node.args[1]
    total = shape_of(source)[axis]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    ends = np.cumsum(sizes)[:-1].tolist()
    walk.pieces[node] = [[label for label in walk.of(source) if label.axis != axis] for _ in sizes]
    for ids in walk.along(source, axis):
        runs = np.split(ids, ends)
        if not _sizes_follow(walk, node, ids, runs):
            walk.lock([Label(axis, ids)], BY_NUMBERS)
        for piece, run in zip(walk.pieces[node], runs, strict=True):
            piece.append(Label(axis, run))
    return []


def _sizes_follow(walk: Walk, node: fx.Node, ids: Ids, runs: Sequence[Ids]) -> bool:
    if len(runs) == 1:
        return False
    if operation(node) == "split_with_sizes" and node not in walk.graph.chunks:
        return all(walk.counted(node, run) for run in runs)
    if len({len(run) for run in runs}) > 1:
        return False
    for run in runs:
        walk.tie(runs[0], run)
    return node in walk.graph.chunks or walk.counted(node, runs[0]) or walk.counted(node, ids)


@rule("unbind")
def _unbind(walk: Walk, node: fx.Node) -> list[Label]:
    labels = _picked(walk, node, axis_of(node, 1, 0))
    walk.pieces[node] = [labels] * shape_of(argument(node, 0))[axis_of(node, 1, 0)]
    return []


@rule("select")
def _select(walk: Walk, node: fx.Node) -> list[Label]:
    return _picked(walk, node, axis_of(node, 1, 0))


def _picked(walk: Walk, node: fx.Node, axis: int) -> list[Label]:
    """What is left where one axis is taken apart."""
    labels = walk.of(node.args[0])
    walk.lock((label for label in labels if label.axis == axis), BY_NUMBERS)
    return [Label(label.axis - (label.axis > axis), label.ids) for label in labels if label.axis != axis]


@rule("index", "index_select")
def _index(walk: Walk, node: fx.Node) -> list[Label]:
    """Positions may be picked; what holds channels, and is not picked by one vector, is locked."""
    if operation(node) == "index_select":
        axes, indices = [axis_of(node, 1, 0)], nodes_in(node.args[2])
        if walk.of(indices):
            return _picked_by(walk, node, axes[0])
    else:
        given: Any = node.args[1]
        axes, indices = [axis for axis, index in enumerate(given) if index is not None], nodes_in(given)
    walk.lock(walk.of(indices), "used as indices")
    labels = walk.of(node.args[0])
    simple = len(indices) == 1 and len(shape_of(indices[0])) == 1 and indices[0].meta["val"].dtype == torch.int64
    walk.lock((label for label in labels if not simple or label.axis in axes), BY_NUMBERS)
    return [label for label in labels if label.axis not in axes] if simple else []


def _picked_by(walk: Walk, node: fx.Node, axis: int) -> list[Label]:
    """Positions picked by a buffer that holds one number per channel: they go with the channels of the buffer."""
    walk.lock((label for label in walk.of(node.args[0]) if label.axis == axis), BY_NUMBERS)
    others = [label for label in walk.of(node.args[0]) if label.axis != axis]
    return others + [Label(axis, ids) for ids in walk.along(node.args[2], 0)]


@rule("index_copy")
def _put(walk: Walk, node: fx.Node) -> list[Label]:
    """Channels put in places that a buffer names, one number per channel: where they are gone there is zero."""
    into, axis, index, source = node.args[0], axis_of(node, 1, 0), node.args[2], node.args[3]
    walk.lock((label for label in walk.of(into) if label.axis == axis), BY_NUMBERS)
    arriving, places = walk.along(source, axis), walk.along(index, 0)
    if not arriving or not places:
        walk.lock(walk.of((index, source)), BY_NUMBERS)
    for ids in arriving:
        walk.consume(ids)
        for other in places:
            walk.tie(ids, other)
    return [label for label in [*walk.of(into), *walk.of(source)] if label.axis != axis]


@rule("roll", "flip")
def _roll(walk: Walk, node: fx.Node) -> list[Label]:
    """A reversal takes the ids along; a shift by a number in code locks them."""
    source = argument(node, 0)
    rank = len(shape_of(source))
    given: Any = (
        node.args[2 if operation(node) == "roll" else 1] if len(node.args) > 1 + (operation(node) == "roll") else range(rank)
    )
    dims = {d % rank for d in given} or set(range(rank))
    if operation(node) == "flip":
        return [Label(label.axis, label.ids[::-1] if label.axis in dims else label.ids) for label in walk.of(source)]
    walk.lock((label for label in walk.of(source) if label.axis in dims), "channels shifted by a number in code")
    return walk.of(source)


@rule("repeat")
def _repeat(walk: Walk, node: fx.Node) -> list[Label]:
    """The ids again and again; one channel spread over many is locked."""
    times: Any = node.args[1]
    new = len(times) - len(shape_of(argument(node, 0)))
    labels = walk.of(node.args[0])
    walk.lock(
        (label for label in labels if len(label.ids) == 1 < times[new + label.axis]), "one channel spread over many by repeat"
    )
    return [Label(new + label.axis, np.tile(label.ids, times[new + label.axis])) for label in labels]


@rule("pixel_shuffle", "pixel_unshuffle", "im2col", "col2im", "native_channel_shuffle", "channel_shuffle", "glu")
def _regroup(walk: Walk, node: fx.Node) -> list[Label]:
    """Several positions of the channel axis become one channel, or one several: they go together."""
    source, name = argument(node, 0), operation(node)
    arguments: Any = node.args
    axis = axis_of(node, 1, -1) if name == "glu" else len(shape_of(source)) - (2 if name in ("im2col", "col2im") else 3)
    if name == "im2col":
        axis -= 1
    walk.lock((label for label in walk.of(source) if label.axis > axis and name != "glu"), f"a position moved by {name}")
    result = [label for label in walk.of(source) if label.axis < axis or (name == "glu" and label.axis != axis)]
    for ids in walk.along(source, axis):
        match name:
            case "pixel_shuffle":
                ids = _tied_rows(walk, ids.reshape(-1, arguments[1] ** 2))
            case "col2im":
                ids = _tied_rows(walk, ids.reshape(-1, math.prod(arguments[2])))
            case "glu":
                ids = _tied_rows(walk, ids.reshape(2, -1).T)
            case "pixel_unshuffle":
                ids = np.repeat(ids, arguments[1] ** 2)
            case "im2col":
                ids = np.repeat(ids, math.prod(arguments[1]))
            case _:  # the number of groups stays
                groups = arguments[1]
                ids = np.repeat(_tied_rows(walk, ids.reshape(groups, -1).T), groups)
        result.append(Label(axis, ids))
    return result


def _tied_rows(walk: Walk, members: Ids) -> Ids:
    """The first of every row, tied to the rest of it."""
    walk.tie(members[:, :1], members)
    return members[:, 0]


@rule("constant_pad_nd")
def _pad(walk: Walk, node: fx.Node) -> list[Label]:
    """A padded channel is always zero: its module counts it in `before` or `after`, else it is locked."""
    source = argument(node, 0)
    amounts: Any = node.args[1]
    rank = source.meta["val"].ndim
    result = []
    for label in walk.of(source):
        at = 2 * (rank - 1 - label.axis)
        before, after = amounts[at : at + 2] or (0, 0)
        if min(before, after) < 0:  # cropped
            walk.lock([label], BY_NUMBERS)
            label = Label(label.axis, label.ids[max(-before, 0) : len(label.ids) + min(after, 0)])
            before, after = max(before, 0), max(after, 0)
        ids = [_padding(walk, node, "before", before), label.ids, _padding(walk, node, "after", after)]
        result.append(Label(label.axis, np.concatenate(ids)))
    return result


def _padding(walk: Walk, node: fx.Node, attribute: str, amount: int) -> Ids:
    ids = walk.fresh(amount)
    if walk.held(node, attribute, amount):
        walk.slot(walk.graph.owners[node], attribute, ids)
    else:
        walk.lock([Label(0, ids)], "the number of padded channels is written in code")
    return ids


def _spread(ids: Ids, axis: int, rank: int) -> Ids:
    """The vector along one of `rank` axes, size one elsewhere."""
    return ids.reshape([-1 if i == axis else 1 for i in range(rank)])
