"""The rules of operations that pair positions, mix channels or keep them apart: from the node to the labels of its value."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import fx, nn

from ..graph import operation
from .walk import INPUT, SOFT, Ids, Label, Walk, argument, axis_of, nodes_in, rule, shape_of


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

    They can where it is the module's own weight that scales them: of that the module, and the law, know how many there are.
    """
    owner = walk.graph.owners[node]
    scaled = any(walk.graph.tensors.get(each) == f"{owner}.weight" for each in nodes_in(node.args[1:4]))
    follows = bool(over) and scaled and isinstance(walk.model.get_submodule(owner), nn.LayerNorm | nn.GroupNorm)
    if not follows or not walk.soft:
        walk.lock([*over, *vectors], f"{reason}{SOFT}" if follows else reason)
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
    source, axis = argument(node, 0), axis_of(node, 2 if operation(node) == "topk" else 1, -1)
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
