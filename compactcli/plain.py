"""Layers that hide their channels are made plain, so that these can be cut: the same function, in other layers.

A convolution whose weight is computed (standardised, reparametrised) mixes its inputs' weights before it
reads them; a plain convolution with the weight that comes out does not. A filter along the channels
(ECA, Wang et al. 2020) knows them by position; with zeros in the places of those that are gone, any may go.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import kernels, law
from .errors import CompactError
from .graph import Graph, copied, operation, per_image, trace
from .recipe import Edit, Replace
from .surgery import LAYERS, LayerKind

EDGES = ("left", "right", "top", "bottom")


def plain_(model: nn.Module, input_shape: Sequence[int]) -> list[Edit]:
    """Make layers plain in place, where they make their kernels or where it frees channels; the edits that did it.

    Raises CompactError where an output changes by more than float64 rounds.
    """
    made = _made(model)
    _apply_(model, made, input_shape)
    if not any(map(_hides, model.modules())):
        return [*made]
    graph = trace(model, input_shape)
    found = {edit.module: edit for edit in [*_computed(graph, model), *_across(graph, model)]}
    edits = list(found.values())
    _apply_(model, edits, input_shape)
    return [*made, *edits]


def _apply_(model: nn.Module, edits: Sequence[Replace], input_shape: Sequence[int]) -> None:
    """Replace layers, by values in float64 that are rounded to the network's own type once they have been checked."""
    if edits:
        dtype = next(model.parameters()).dtype
        law.apply_same_(model, edits, input_shape)
        for edit in edits:
            model.get_submodule(edit.module).to(dtype)


def plained(model: nn.Module, input_shape: Sequence[int]) -> nn.Module:
    """The network itself, or a copy with plain layers where it has others."""
    if not kernels.layers(model) and not any(map(_hides, model.modules())):
        return model
    result = copied(model)
    plain_(result, input_shape)
    return result


def _hides(module: nn.Module) -> bool:
    """Whether it may be such a layer; a trace tells."""
    return isinstance(module, nn.Conv1d) or (
        isinstance(module, nn.Conv2d) and (type(module) is not nn.Conv2d or "weight" not in module._parameters)
    )


def _made(model: nn.Module) -> list[Replace]:
    """Layers that make their kernels become plain ones."""
    return [
        Replace(name, "plain.folded", {}, deepcopy(layer).double().dense().state_dict())
        for name, layer in kernels.layers(model).items()
    ]


def _computed(graph: Graph, model: nn.Module) -> list[Replace]:
    """Convolutions whose weight is computed from parameters alone become plain ones."""
    moving = per_image(graph)
    values = _Values(graph, model)
    result = []
    for node in graph.nodes:
        arguments: Any = node.args
        module = model.get_submodule(graph.owners.get(node, ""))
        if operation(node) != "convolution" or not isinstance(module, nn.Conv2d) or {*arguments[1:2]} & {*graph.tensors, *moving}:
            continue
        if [module.stride, module.dilation, module.groups] != [tuple(arguments[3]), tuple(arguments[5]), arguments[8]]:
            continue
        edges = dict(zip(EDGES, _padded(graph, node), strict=True))
        name = "1." if any(edges.values()) else ""
        tensors = {f"{name}weight": values.of(arguments[1])}
        if arguments[2] is not None:
            tensors[f"{name}bias"] = values.of(arguments[2])
        result.append(Replace(graph.owners[node], "plain.computed", edges, tensors))
    return result


def _padded(graph: Graph, node: fx.Node) -> tuple[int, ...]:
    """Zeros that the module's own code puts around the image: left, right, top, bottom."""
    image: Any = node.args[0]
    own = operation(image) == "constant_pad_nd" and graph.owners[image] == graph.owners[node]
    return tuple(image.args[1]) if own else (0, 0, 0, 0)


class _Values:
    """Values in float64 of nodes that no image goes into."""

    def __init__(self, graph: Graph, model: nn.Module) -> None:
        self.graph, self.tensors = graph, {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.known: dict[fx.Node, Any] = {}

    def of(self, node: Any) -> Any:
        if node not in self.known:
            if node in self.graph.tensors or node in self.graph.constants:
                held = self.tensors[self.graph.tensors[node]] if node in self.graph.tensors else self.graph.constants[node]
                self.known[node] = held.detach().double()
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.of)
                self.known[node] = node.target(*args, **kwargs)
        return self.known[node]


def _build_computed(old: nn.Module, options: Mapping[str, int]) -> nn.Module:
    if not isinstance(old, nn.Conv2d):
        raise CompactError(f"the recipe makes a {type(old).__name__} plain, which it cannot be")
    edges = tuple(options.get(edge, 0) for edge in EDGES)
    layer = nn.Conv2d(
        old.in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        old.groups,
        bias=old.bias is not None,
        padding_mode=old.padding_mode,
        device=next(old.parameters()).device,
    )
    return nn.Sequential(nn.ZeroPad2d(edges), layer) if any(edges) else layer  # type: ignore[arg-type]


def _across(graph: Graph, model: nn.Module) -> list[Replace]:
    """Filters that run along channels, laid out as positions of one channel."""
    result = []
    for node in graph.nodes:
        module = model.get_submodule(graph.owners.get(node, ""))
        if operation(node) == "convolution" and type(module) is nn.Conv1d and module.in_channels == module.out_channels == 1:
            image: Any = node.args[0]
            size = image.meta["val"].shape[2]
            if size == node.meta["val"].shape[2]:
                result.append(Replace(graph.owners[node], "plain.across", {"size": size}))
    return result


class Across(kernels.Indexed):
    """A filter along `size` channels, of which those at `place` are there: (n, 1, c) to (n, 1, c)."""

    place: Tensor
    present: Tensor

    def __init__(self, conv: nn.Conv1d, size: int) -> None:
        super().__init__()
        self.conv, self.size = conv, size
        device = conv.weight.device
        self.register_buffer("place", torch.arange(size, device=device))
        self.register_buffer("present", torch.ones(size, device=device))  # where the law takes channels away

    def check(self) -> None:
        kernels.check_places("place", self.place, self.size)

    def forward(self, channels: Tensor) -> Tensor:
        spread = channels.new_zeros(*channels.shape[:2], self.size).index_copy(2, self.place, channels * self.present)
        filtered: Tensor = self.conv(spread).index_select(2, self.place)
        return filtered


def _build_across(old: nn.Module, options: Mapping[str, int]) -> nn.Module:
    size = options.get("size", 0)
    if type(old) is not nn.Conv1d or not 1 <= size <= 1 << 20:
        raise CompactError(f"the recipe filters {size} channels with a {type(old).__name__}, which it cannot")
    return Across(old, size)


def _build_folded(old: nn.Module, options: Mapping[str, int]) -> nn.Module:
    if not isinstance(old, kernels.KernelLayer):
        raise CompactError(f"the recipe makes the kernel of a {type(old).__name__}, which has a plain one")
    return old.dense()


LAYERS["plain.folded"] = LayerKind(_build_folded, lambda layer: layer)
LAYERS["plain.computed"] = LayerKind(_build_computed, lambda layer: layer)
LAYERS["plain.across"] = LayerKind(_build_across, lambda layer: layer)
