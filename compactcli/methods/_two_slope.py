"""The activation of hinge's residual blocks: a ReLU that lets through the negative side as well, each with a learnt slope.

Li et al., CVPR 2020 (Hinge), in the authors' code of the plain ResNets.
"""

import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..channels import INPUT, Channels
from ..errors import CompactError
from ..graph import Graph, operation
from ..layers import Layer, weight_of
from ..recipe import Replace
from ..surgery import LAYERS, LayerKind

START = {"positive": 1.0, "negative": 0.0}  # the slopes with which it is a ReLU


class TwoSlope(nn.Module):
    """positive * relu(x) + negative * relu(-x), of one slope each for all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative = (nn.Parameter(torch.tensor(START[name])) for name in ("positive", "negative"))

    def forward(self, x: Tensor) -> Tensor:
        return self.positive * F.relu(x) + self.negative * F.relu(-x)


def replacements(model: nn.Module, graph: Graph, channels: Channels, layers: list[Layer]) -> list[Replace]:
    """The unit for every nn.ReLU inside a residual block. Those that are there stay as they are.

    Such a ReLU alone reads what one layer makes, or the batch normalisation behind it: channels that no other layer adds to,
    in a network where layers add to each other's.
    Raises CompactError where there is none, or a module stands in several places: these would share their slopes.
    """
    weights = {layer.weight: layer for layer in layers}
    makers = Counter(
        n for layer in layers if layer.groups == 1 for n in set(channels.axes[layer.weight, layer.out_axis].tolist())
    )
    paths = Counter(graph.owners[node] for node in graph.nodes if operation(node) in ("relu", "relu_"))
    result = []
    for node in graph.nodes:
        if operation(node) not in ("relu", "relu_") or type(model.get_submodule(graph.owners[node])) is not nn.ReLU:
            continue
        layer = weights.get(_maker(graph, node.args[0]) or "")
        if layer is None or layer.fixed or channels.reason((layer.weight, layer.in_axis)) == INPUT:
            continue
        if max(makers[number] for number in channels.axes[layer.weight, layer.out_axis].tolist()) > 1:
            continue
        path = graph.owners[node]
        if paths[path] > 1:
            raise CompactError(f"two_slope: {path} is one ReLU in {paths[path]} places, which would share slopes; leave it out")
        tensors = {name: torch.tensor(value) for name, value in START.items()}
        result.append(Replace(path, "hinge.two_slope", {}, tensors))
    residual = max(makers.values(), default=0) > 1
    if not (residual and result) and not any(isinstance(module, TwoSlope) for module in model.modules()):
        raise CompactError("two_slope: the network has no residual block with a ReLU module inside; leave it out")
    return result if residual else []


def _maker(graph: Graph, value: Any) -> str | None:
    """The weight of the layer that made the value, a batch normalisation behind it or not, where nothing else was read."""
    if isinstance(value, fx.Node) and value.target is operator.getitem and len(value.users) == 1:
        norm: Any = value.args[0]
        value = norm.args[0] if "batch_norm" in operation(norm) else None
    if not isinstance(value, fx.Node) or len(value.users) > 1:
        return None
    weight = weight_of(graph, value)
    return None if weight is None else graph.tensors[weight]


def _build(old: nn.Module, options: Mapping[str, int]) -> nn.Module:
    if not isinstance(old, nn.ReLU):
        raise CompactError(f"the recipe gives a {type(old).__name__} two slopes, which it cannot have")
    return TwoSlope()


def _dense(unit: nn.Module) -> nn.Module:
    """The ReLU that it is at the start; later itself."""
    slopes = {name: slope.item() for name, slope in unit.named_parameters()}
    return nn.ReLU() if slopes == START else unit


LAYERS["hinge.two_slope"] = LayerKind(_build, _dense)
