"""Batch norms folded into the layers before them: the same function, in fewer layers.

In eval mode a batch norm scales and shifts each channel by fixed numbers, and so can the layer that makes the channel:
with s = weight / sqrt(running_var + eps), (W, b) becomes (s W, s (b - running_mean) + bias). Which layers these are
the graph says, not their names: a convolution or linear layer called once, whose output one batch norm alone reads.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from . import law
from .errors import CompactError
from .graph import Graph, operation, trace
from .recipe import Replace
from .surgery import LAYERS, LayerKind

LINEAR = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def fold_(model: nn.Module, input_shape: tuple[int, ...]) -> list[Replace]:
    """Fold batch norms in place, for images of shape (channels, height, width); the edits that did it, two for each.

    Raises CompactError where an output changes by more than float64 rounds.
    """
    edits = []
    for layer, norm in pairs(trace(model, input_shape), model):
        weight, bias = _folded(model.get_submodule(layer), model.get_submodule(norm))
        edits.append(Replace(layer, "folding.layer", {}, {"weight": weight, "bias": bias}))
        edits.append(Replace(norm, "folding.norm", {}))
    if edits:
        dtype = next(model.parameters()).dtype
        law.apply_same_(model, edits, input_shape)
        for edit in edits:
            model.get_submodule(edit.module).to(dtype)
    return edits


def norms(model: nn.Module) -> int:
    """How many batch norms a network has."""
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def pairs(graph: Graph, model: nn.Module) -> list[tuple[str, str]]:
    """(layer, batch norm) by their paths, where the batch norm can be folded into the layer."""
    found = []
    for node in graph.nodes:
        if operation(node) in ("native_batch_norm", "_native_batch_norm_legit_no_training"):
            layer = node.all_input_nodes[0]
            if _is_fixed(node, graph) and _is_plain(layer, graph) and set(layer.users) == {node}:
                pair = graph.owners[layer], graph.owners[node]
                if _has_kind(model, pair[0], LINEAR) and (_has_kind(model, pair[1], NORMS) or _has_activation(model, pair[1])):
                    found.append(pair)
    return found


def _is_fixed(node: fx.Node, graph: Graph) -> bool:
    """Whether a batch norm normalises by running statistics, with tensors that no other operation reads."""
    mean = node.args[3]
    training = operation(node) == "native_batch_norm" and node.args[5]
    return not training and mean is not None and all(_is_own(each, node, graph) for each in node.args[1:5])


def _is_plain(node: fx.Node, graph: Graph) -> bool:
    """Whether a node is a convolution or linear layer of parameters that no other operation reads."""
    match operation(node):
        case "convolution":
            weight, bias = node.args[1:3]
            return _is_own(weight, node, graph) and _is_own(bias, node, graph)
        case "addmm" | "mm":
            turned: Any = node.args[-1]
            bias = node.args[0] if operation(node) == "addmm" else None
            is_weight = operation(turned) == "t" and set(turned.users) == {node} and _is_own(turned.args[0], turned, graph)
            return is_weight and _is_own(bias, node, graph)
    return False


def _is_own(tensor: Any, reader: fx.Node, graph: Graph) -> bool:
    """Whether the tensor is a parameter or buffer that `reader` alone reads, or is not there at all."""
    return tensor is None or (tensor in graph.tensors and set(tensor.users) == {reader})


def _has_kind(model: nn.Module, path: str, kinds: tuple[type, ...]) -> bool:
    """Whether the module is just such a layer, under this name alone."""
    module = model.get_submodule(path)
    return type(module) in kinds and sum(each is module for _, each in model.named_modules(remove_duplicate=False)) == 1


def _has_activation(model: nn.Module, path: str) -> bool:
    """Whether the module is timm's batch norm with dropout and an activation in it."""
    module = model.get_submodule(path)
    return type(module).__name__ == "BatchNormAct2d" and {*dict(module.named_children())} == {"drop", "act"}


def _folded(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64 of the layer with the batch norm behind it."""
    zero = norm.running_mean.new_zeros(())
    mean, variance, gain, shift, bias = (
        (default if tensor is None else tensor).detach().double()
        for tensor, default in (
            *((norm.running_mean, zero), (norm.running_var, zero), (norm.weight, zero + 1), (norm.bias, zero)),
            (layer.bias, zero),
        )
    )
    scale = gain / torch.sqrt(variance + norm.eps)
    return _scaled(layer, scale), scale * (bias - mean) + shift


def _scaled(layer: Any, scale: Tensor) -> Tensor:
    """The layer's weight in float64 with its outputs multiplied."""
    weight: Tensor = layer.weight.detach().double()
    if isinstance(layer, _ConvTransposeNd):  # (i, o / groups, ...), the inputs of a group together
        own = scale.view(layer.groups, -1).repeat_interleave(len(weight) // layer.groups, 0)  # (i, o / groups)
        return weight * own.view(*weight.shape[:2], *[1] * (weight.ndim - 2))
    return weight * scale.view(-1, *[1] * (weight.ndim - 1))


def _build_layer(old: nn.Module, options: Mapping[str, int]) -> nn.Module:
    if not isinstance(old, LINEAR):
        raise CompactError(f"the recipe folds a batch norm into a {type(old).__name__}, which has no weight for it")
    layer = copy.copy(old)
    outputs = old.out_features if isinstance(old, nn.Linear) else old.out_channels
    layer._parameters = {
        "weight": nn.Parameter(torch.empty_like(old.weight)),
        "bias": nn.Parameter(old.weight.new_empty(outputs)),
    }
    return layer


def _build_norm(old: nn.Module, options: Mapping[str, int]) -> nn.Module:
    if type(old) in NORMS:
        return nn.Identity()
    if not isinstance(old, _BatchNorm):
        raise CompactError(f"the recipe folds a {type(old).__name__}, which is no batch norm")
    return nn.Sequential(*old.children())


LAYERS["folding.layer"] = LayerKind(_build_layer, lambda layer: layer)
LAYERS["folding.norm"] = LayerKind(_build_norm, lambda layer: layer)
