"""The rules: one small function per kind of ATen operation, from the node to the labels of its value."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from ..graph import operation
from .walk import INPUT, Ids, Label, Rule, Walk, argument, nodes_in, shape_of

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operations, by their names without overload."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@rule(
    *("relu", "relu_", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "sigmoid", "sigmoid_", "tanh", "tanh_"),
    *("silu", "silu_", "gelu", "elu", "elu_", "hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "mish", "mish_"),
    *("softplus", "log_sigmoid_forward", "relu6", "celu", "celu_", "selu", "selu_", "threshold", "hardshrink", "softshrink"),
    *("clone", "alias", "detach", "_to_copy", "lift_fresh_copy", "copy", "copy_", "fill", "fill_", "zero_"),
    *("neg", "abs", "sign", "exp", "log", "log1p", "expm1", "sin", "cos", "erf", "floor", "ceil", "round", "reciprocal"),
    *("sqrt", "rsqrt", "pow", "clamp", "clamp_", "clamp_min", "clamp_max", "rsub", "lerp", "where", "masked_fill"),
    *("bernoulli", "bernoulli_", "uniform_", "normal_", "eq", "ne", "lt", "le", "gt", "ge"),
    *("logical_and", "logical_or", "logical_not", "remainder", "fmod", "atan2"),
    *("neg_", "abs_", "exp_", "sqrt_", "rsqrt_", "pow_", "clamp_min_", "clamp_max_", "lerp_", "masked_fill_"),
)
def _pointwise(walk: Walk, node: fx.Node) -> list[Label]:
    """Each element depends on its own predecessors. f(0) need not be 0: consumers are what is masked."""
    return _elementwise(walk, node)


@rule("native_dropout")
def _dropout(walk: Walk, node: fx.Node) -> list[Label]:
    return walk.of(node.args[0])


@rule("as_strided_")
def _same_shape(walk: Walk, node: fx.Node) -> list[Label]:
    """Global pooling puts its result into another memory layout; any other use locks."""
    source = argument(node, 0)
    if source.meta["val"].shape == node.meta["val"].shape:
        return walk.of(source)
    walk.lock(walk.of(source), "no rule for the operation as_strided_")
    return []


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
def _like(walk: Walk, node: fx.Node) -> list[Label]:
    """As many as there are channels, whatever their values."""
    return walk.of(node.args[0])


@rule("empty", "zeros", "ones", "full", "arange", "scalar_tensor", "eye", "linspace", "rand", "randn")
@rule("new_empty", "new_zeros", "new_ones", "new_full")
def _constant(_walk: Walk, _op: fx.Node) -> list[Label]:
    return []


@rule("convolution")
def _convolution(walk: Walk, node: fx.Node) -> list[Label]:
    image, weight, bias = node.args[:3]
    transposed, groups = node.args[6], node.args[8]
    assert isinstance(groups, int)
    inward, outward = (0, 1) if transposed else (1, 0)
    walk.lock((label for label in walk.of(weight) if label.axis > 1), "a position of the kernel")
    walk.lock((label for label in walk.of(image) if label.axis != 1), "a position read by a convolution")
    arriving, into, out = walk.along(image, 1), walk.along(weight, inward), walk.along(weight, outward)
    if groups == 1:
        _contract(walk, arriving, into)
    elif not arriving or not out:
        walk.lock(walk.of(node.args[:3]), "a grouped convolution that reads the network's input")
        return []
    elif transposed:
        out = _grouped_transposed(walk, node, groups, arriving, into, out)
    else:
        _grouped(walk, node, groups, arriving, into, out)
    if not out:
        walk.lock(walk.of(bias), "the bias of a computed weight")
    for ids in out:
        for other in walk.along(bias, 0):
            walk.tie(ids, other)
    return [Label(1, ids) for ids in out]


def _grouped(walk: Walk, node: fx.Node, groups: int, arriving: list[Ids], into: list[Ids], out: list[Ids]) -> None:
    """Few wide groups: the same position of every group goes, its inputs apart from its outputs.

    Many narrow ones: whole groups go, inputs and outputs as one set (depthwise: a channel and its filters).
    """
    members = [ids.reshape(groups, -1) for ids in [*arriving, *out]]
    if members[0].shape[1] > groups:
        for ids in members:
            walk.tie(ids[:1], ids)
        _contract(walk, [ids[0] for ids in members[: len(arriving)]], into)
    else:
        walk.lock((Label(1, ids) for ids in into), "an input inside a group")
        _whole_groups(walk, node, "groups", members)


def _grouped_transposed(
    walk: Walk, node: fx.Node, groups: int, arriving: list[Ids], into: list[Ids], out: list[Ids]
) -> list[Ids]:
    """Whole groups go. The weight (i, o / groups, k, k) has all inputs, and its outputs once for all groups."""
    walk.lock((Label(1, ids) for ids in out), "an output inside a group")
    members = [ids.reshape(groups, -1) for ids in [*arriving, *into]]
    _whole_groups(walk, node, "groups", members)
    return [np.repeat(members[0][:, 0], len(out[0]))]


def _whole_groups(walk: Walk, node: fx.Node, attribute: str, members: Sequence[Ids]) -> None:
    """A group, one row of each of `members`, is one set; the issuing module's attribute counts the groups."""
    for ids in members:
        walk.tie(members[0][:, :1], ids)
    if walk.held(node, attribute, len(members[0])):
        walk.slot(walk.graph.owners[node], attribute, members[0][:, 0])
    else:
        walk.lock((Label(0, ids.ravel()) for ids in members), "the number of groups is written in code")


@rule("addmm")
def _addmm(walk: Walk, node: fx.Node) -> list[Label]:
    bias, left, right = node.args[:3]
    labels = _product(walk, left, right)
    outs = [label.ids for label in labels if label.axis == 1]
    if not outs:
        walk.lock(walk.of(bias), "the bias of a computed weight")
    for out in outs:
        for ids in walk.along(bias, 0):
            walk.tie(out, ids)
    return labels


@rule("mm")
def _mm(walk: Walk, node: fx.Node) -> list[Label]:
    return _product(walk, *node.args[:2])


def _product(walk: Walk, left: Any, right: Any) -> list[Label]:
    """left (n, i) times right (i, o): the contraction axis is tied, rows and columns pass. Images may come from either side."""
    if left in walk.moving and right in walk.moving:
        walk.lock(walk.of((left, right)), "activations multiplied with activations")
        return []
    inner = walk.along(left, 1), walk.along(right, 0)
    _contract(walk, *(inner[::-1] if right in walk.moving and left not in walk.moving else inner))
    return [Label(0, ids) for ids in walk.along(left, 0)] + [Label(1, ids) for ids in walk.along(right, 1)]


def _contract(walk: Walk, arriving: list[Ids], into: list[Ids]) -> None:
    """A layer's input axis meets the channels that arrive."""
    if not arriving:
        walk.lock((Label(0, ids) for ids in into), INPUT)
    if not into:
        walk.lock((Label(0, ids) for ids in arriving), "multiplied with a constant")
    for ids in into:
        walk.consume(ids)
        for other in arriving:
            walk.tie(ids, other)


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def _batch_norm(walk: Walk, node: fx.Node) -> list[Label]:
    """The channels pass. Of a weight that is standardised that is its outputs: statistics are taken over its inputs."""
    others = [label for label in walk.of(node.args[0]) if label.axis != 1]
    walk.lock(others, "a position that goes into the statistics of a batch normalisation")
    arriving = walk.along(node.args[0], 1)
    for vector in nodes_in(node.args[1:5]):
        ids = walk.along(vector, 0)
        if ids and arriving and len(ids[0]) == len(arriving[0]):
            walk.tie(ids[0], arriving[0])
        elif arriving:  # one vector for every image
            walk.lock(walk.of((vector, node.args[0])), "normalised with vectors that are not its channels'")
        else:
            walk.lock(walk.of(vector), "normalises the network's input")
    return [Label(1, ids) for ids in arriving] + others


@rule("native_layer_norm")
def _layer_norm(walk: Walk, node: fx.Node) -> list[Label]:
    """Statistics are taken over the last axes; the others pass."""
    shape: Any = node.args[1]
    first = len(shape_of(node.args[0])) - len(shape)
    over = [label for label in walk.of(node.args[0]) if label.axis >= first]
    if len(shape) > 1:
        walk.lock([*over, *walk.of(node.args[2:4])], "channels and positions that a layer normalisation takes statistics over")
    else:
        _statistics_over(walk, node, over, walk.of(node.args[2:4]), "channels that a layer normalisation takes statistics over")
    return walk.of(node.args[0])


def _statistics_over(walk: Walk, node: fx.Node, over: list[Label], vectors: list[Label], reason: str) -> None:
    """A removal changes the statistics of what stays: channels that go, with their scales and shifts, only if the walk is soft.

    They can where the module that normalises is told of their number by its vectors.
    """
    module = walk.model.get_submodule(walk.graph.owners[node])
    follows = bool(over and vectors) and isinstance(module, nn.LayerNorm | nn.GroupNorm)
    if not follows or not walk.soft:
        walk.lock([*over, *vectors], f"{reason}; they go with --set soft=true" if follows else reason)
    for label in vectors:
        for channels in over:
            walk.tie(label.ids, channels.ids)


@rule("native_group_norm")
def _group_norm(walk: Walk, node: fx.Node) -> list[Label]:
    """Statistics are taken over the channels of a group: whole groups go."""
    groups: Any = node.args[6]
    walk.lock(
        (label for label in walk.of(node.args[0]) if label.axis != 1),
        "a position that a group normalisation takes statistics over",
    )
    labels = [label for label in walk.of(node.args[0]) if label.axis == 1]
    members = [label.ids.reshape(groups, -1) for label in [*labels, *walk.of(node.args[1:3])]]
    if groups == 1:
        reason = "channels that a group normalisation takes statistics over"
        _statistics_over(walk, node, labels, walk.of(node.args[1:3]), reason)
    elif not labels:
        walk.lock(walk.of(node.args[1:3]), "normalises the network's input")
    else:
        _whole_groups(walk, node, "num_groups", members)
    return labels


@rule("_prelu_kernel", "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "addcmul", "addcdiv", "maximum", "minimum")
def _elementwise(walk: Walk, node: fx.Node) -> list[Label]:
    """Position pairs with position. An operand of size one along an axis pairs with nothing there."""
    shape = shape_of(node)
    result = []
    for axis, size in enumerate(shape):
        met: list[Ids] = []
        constant = False
        for operand in nodes_in((node.args, node.kwargs)):
            own = axis - len(shape) + len(operand.meta["val"].shape)
            if own >= 0 and operand.meta["val"].shape[own] == size:
                ids = walk.along(operand, own)
                met += ids
                constant |= not ids and size > 1
        if constant:  # it could not be cut with the channels
            walk.lock((Label(axis, ids) for ids in met), "met by a tensor without channels")
        for other in met[1:]:
            walk.tie(met[0], other)
        if met:
            result.append(Label(axis, np.max(met, axis=0)))  # any id of a position, NONE (0) only if all are
    return result


@rule("mean", "sum", "prod", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "logsumexp", "median")
@rule("var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm")
def _reduce(walk: Walk, node: fx.Node) -> list[Label]:
    """Over positions the channels pass; over channels they are locked."""
    source, name = argument(node, 0), operation(node)
    rank = len(shape_of(source))
    at = 2 if name in ("linalg_vector_norm", "norm") else 1
    dims: Any = node.args[at] if len(node.args) > at else None
    if isinstance(dims, fx.Node):  # the larger of two tensors
        return _elementwise(walk, node)
    reduced = {d % rank for d in ([dims] if isinstance(dims, int) else dims)} if dims not in (None, []) else set(range(rank))
    walk.lock((label for label in walk.of(source) if label.axis in reduced), f"reduced over channels by {name}")
    kept = [axis for axis in range(rank) if axis not in reduced or len(shape_of(node)) == rank]
    labels = [Label(kept.index(label.axis), label.ids) for label in walk.of(source) if label.axis not in reduced]
    walk.pieces[node] = [labels, labels]  # where there are two values
    return labels


@rule("_softmax", "_log_softmax", "sort", "topk")
def _compared(walk: Walk, node: fx.Node) -> list[Label]:
    """Every value depends on all along one axis; the others pass."""
    source, axis = argument(node, 0), _axis(node, 2 if operation(node) == "topk" else 1, -1)
    walk.lock(
        (label for label in walk.of(source) if label.axis == axis), f"compared across channels by {operation(node).strip('_')}"
    )
    kept = shape_of(source)[axis]
    if operation(node) == "topk":
        arguments: Any = node.args
        kept = arguments[1]
    labels = [Label(label.axis, label.ids[:kept] if label.axis == axis else label.ids) for label in walk.of(source)]
    walk.pieces[node] = [labels, labels]
    return labels


@rule("bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")
@rule("_scaled_dot_product_efficient_attention", "_scaled_dot_product_attention_math", "scaled_dot_product_attention")
def _attention(walk: Walk, node: fx.Node) -> list[Label]:
    walk.lock(walk.of(node.args), "activations multiplied with activations (attention)")
    return []


@rule(*("max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices", "max_unpool2d", "max_unpool3d"))
@rule(*("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d"))
@rule(*("adaptive_max_pool2d", "adaptive_max_pool3d", "fractional_max_pool2d", "grid_sampler_2d"))
@rule(
    *(
        f"upsample_{kind}"
        for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d", "trilinear3d")
    )
)
@rule(
    *(f"_upsample_{kind}" for kind in ("nearest_exact1d", "nearest_exact2d", "nearest_exact3d", "bilinear2d_aa", "bicubic2d_aa"))
)
@rule(*(f"{kind}_pad{rank}d" for kind in ("reflection", "replication") for rank in (1, 2, 3)))
def _spatial(walk: Walk, node: fx.Node) -> list[Label]:
    """Positions are mixed or moved within each channel; so are indices into them."""
    source, name = argument(node, 0), operation(node)
    first = len(shape_of(source)) - int(next(letter for letter in name if letter.isdigit()))
    labels = [label for label in walk.of(source) if label.axis < first]
    walk.lock((label for label in walk.of(source) if label.axis >= first), f"reduced by {name}")
    if name == "grid_sampler_2d":
        walk.lock(walk.of(node.args[1]), "positions to sample at")
    if name.startswith("max_unpool"):  # each channel has its own positions to go to
        values, places = walk.along(source, first - 1), walk.along(node.args[1], first - 1)
        if not places:
            walk.lock((label for label in labels if label.axis == first - 1), "taken apart by positions without channels")
        for own, others in itertools.product(values, places):
            walk.tie(own, others)
    walk.pieces[node] = [labels, labels]
    return labels


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
    tensors, axis = nodes_in(node.args[0]), _axis(node, 1, 0)
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
    tensors, axis = nodes_in(node.args[0]), _axis(node, 1, 0)
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
    source, axis = argument(node, 0), _axis(node, 1, 0)
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
    source, axis = argument(node, 0), _axis(node, 2, 0)
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
    labels = _picked(walk, node, _axis(node, 1, 0))
    walk.pieces[node] = [labels] * shape_of(argument(node, 0))[_axis(node, 1, 0)]
    return []


@rule("select")
def _select(walk: Walk, node: fx.Node) -> list[Label]:
    return _picked(walk, node, _axis(node, 1, 0))


def _picked(walk: Walk, node: fx.Node, axis: int) -> list[Label]:
    """What is left where one axis is taken apart."""
    labels = walk.of(node.args[0])
    walk.lock((label for label in labels if label.axis == axis), BY_NUMBERS)
    return [Label(label.axis - (label.axis > axis), label.ids) for label in labels if label.axis != axis]


@rule("index", "index_select")
def _index(walk: Walk, node: fx.Node) -> list[Label]:
    """Positions may be picked; what holds channels, and is not picked by one vector, is locked."""
    if operation(node) == "index_select":
        axes, indices = [_axis(node, 1, 0)], nodes_in(node.args[2])
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
    into, axis, index, source = node.args[0], _axis(node, 1, 0), node.args[2], node.args[3]
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
    axis = _axis(node, 1, -1) if name == "glu" else len(shape_of(source)) - (2 if name in ("im2col", "col2im") else 3)
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


def _axis(node: fx.Node, index: int, default: int) -> int:
    """The axis that an argument names, counted from the first of the tensor, or of the first one's result for a list."""
    value: Any = node.args[index] if len(node.args) > index else node.kwargs.get("dim", default)
    rank = len(shape_of(node)) if operation(node) in ("cat", "stack") else len(shape_of(argument(node, 0)))
    return int(value) % rank


def _spread(ids: Ids, axis: int, rank: int) -> Ids:
    """The vector along one of `rank` axes, size one elsewhere."""
    return ids.reshape([-1 if i == axis else 1 for i in range(rank)])
