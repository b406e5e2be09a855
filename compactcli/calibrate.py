"""Images without labels make a cut network good: least squares of each layer onto the original.

Two networks run side by side over the same images, one operation at a time, each value carried forward
once: the target, as it was before the edit, and the model, as it is now. Where a layer of the model is
reached, its own inputs, with all that went wrong before it, are regressed onto the target's outputs; its
new weights are used from there on, so that errors do not pile up.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import kernels
from .errors import CompactError
from .graph import Graph, operation, trace
from .layers import norm_behind, weight_of
from .moments import patches, regressible, trim
from .recipe import Edit, Keep, Replace, Share
from .regression import Sums
from .replay import Stream, Streams
from .surgery import LAYERS

WEAKEST = 1e-3  # of the scales of a batch normalisation, to its largest, that outputs are weighed by
POSITIONS = 65_536  # sampled per layer for the regression, over all images


def _sample(positions: int, wanted: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(positions, generator=generator)[:wanted]


def refit_(
    model: nn.Module,
    target: nn.Module,
    edits: Sequence[Edit],
    batches: Sequence[Tensor],
    *,
    only: Collection[str] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Regress the layers of `model` (or those named) onto `target` in place; the relative error left in the outputs.

    `edits` are those that made the one from the other. Nothing is changed before what the first of them changed.
    The mean of each output is met through the batch normalisation behind it, or the bias.
    """
    trim()
    size, shape = len(batches[0]), batches[0].shape[1:]
    kept = {(edit.module, edit.axis): torch.tensor(edit.index) for edit in edits if isinstance(edit, Keep)}
    kinds = {edit.module: edit.layer for edit in edits if isinstance(edit, Replace)}
    changed = {edit.module for edit in edits if not isinstance(edit, Share)}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        plain = kernels.folded(model, dense="always")  # a kernel that is made is put there when its layer has been refitted
        theirs, ours = (Stream(trace(network, shape, batch=size), network) for network in (target, plain))
        streams = Streams(theirs, ours, batches)
        sites = _sites(streams, kinds)
        start = _first_changed(theirs.graph, changed)
        first = next((index for index, site in enumerate(sites) if theirs.position[site.target] >= start), len(sites))
        for index, site in enumerate(sites[first:], first + 1):
            if only is not None and site.name not in only:
                continue
            _refit_site_(streams, model, site, kept, kinds.get(site.name), generator)
            if progress is not None:
                progress(index, len(sites))
        return streams.error()


@dataclass(frozen=True)
class _Site:
    """A layer to refit: where it is in both graphs, and what stands behind it."""

    name: str
    last: str  # the module that holds its bias: itself, or the last part of what replaced it
    target: fx.Node  # makes the target's output
    model: fx.Node  # reads the model's input
    biased: bool  # whether the target's output has the bias in it: code may add that later
    norm: str | None  # the batch normalisation that alone reads it
    shortcut: tuple[fx.Node, fx.Node] | None  # what is then added to it, in target and model


def _sites(streams: Streams, kinds: Mapping[str, str]) -> list[_Site]:
    """The layers to regress, in the order in which they run: ungrouped, applied once, plain or of a kind that refits."""
    ours = _layer_nodes(streams.model.graph)
    sites = []
    for name, node in _layer_nodes(streams.target.graph).items():
        old = streams.target.model.get_submodule(name)
        parts = [path for path in ours if path == name or (name in kinds and path.startswith(f"{name}."))]
        if not parts or not regressible(old) or (name in kinds and LAYERS[kinds[name]].refit is None):
            continue
        upright, bias = _applied(streams.target.graph, node)
        own = bias is not None and streams.target.graph.tensors.get(bias) == f"{name}.bias"
        later = bias is None and (old.bias is None or streams.target.graph.owners[node] == name)
        if not upright or not (own or later):
            continue
        rows = [each.meta["val"].shape[0] for each in (node, ours[parts[0]])]
        if isinstance(old, nn.Linear) and rows[0] != rows[1]:  # channels are among them, and some of these are gone
            continue
        norm, added = _behind(streams.model.graph, ours[parts[-1]])
        _, original = _behind(streams.target.graph, node)
        shortcut = None if added is None or original is None else (original, added)
        sites.append(_Site(name, parts[-1], node, ours[parts[0]], own, norm, shortcut))
    return sites


def _applied(graph: Graph, node: fx.Node) -> tuple[bool, fx.Node | None]:
    """(whether a node applies its weight as layers do, not turned or in groups; the bias that it adds)."""
    arguments: Any = node.args
    match operation(node):
        case "convolution":
            return not arguments[6] and arguments[8] == 1, arguments[2]
        case "addmm":
            return arguments[2] not in graph.tensors and not node.kwargs, arguments[0]
    return arguments[1] not in graph.tensors, None


def _first_changed(graph: Graph, changed: Collection[str]) -> int:
    """The place of the first node that reads a parameter of the modules, or tensors, that were changed; else beyond the last."""
    for place, node in enumerate(graph.nodes):
        names = [graph.tensors.get(used, "") for used in node.all_input_nodes]
        if any(name in changed or name.rpartition(".")[0] in changed for name in names):
            return place
    return len(graph.nodes)


def _layer_nodes(graph: Graph) -> dict[str, fx.Node]:
    """Module path -> the node that applies its weight, for weights that are applied once."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        weight = weight_of(graph, node)
        if weight is not None:
            found.setdefault(graph.tensors[weight].rpartition(".")[0], []).append(node)
    return {name: nodes[0] for name, nodes in found.items() if len(nodes) == 1}


def _behind(graph: Graph, node: fx.Node) -> tuple[str | None, fx.Node | None]:
    """(the batch normalisation that alone reads the node, and nothing else, what is added right after), where there are such."""
    found = norm_behind(graph, node)
    if found is None:
        return None, None
    norm, reader = found
    mean: Any = reader.args[3]
    if len(mean.users) > 1:  # a shift of one layer's mean would be one of all
        return None, None
    value = next((user for user in reader.users if user.args[1] == 0), None)
    after = next(iter(value.users)) if value is not None and len(value.users) == 1 else None
    if after is None or not str(after.target).startswith("aten.add") or after.kwargs:
        return norm, None
    other = after.args[0] if after.args[1] is value else after.args[1]
    return norm, other if isinstance(other, fx.Node) else None


def _refit_site_(
    streams: Streams,
    model: nn.Module,
    site: _Site,
    kept: Mapping[tuple[str, int], Tensor],
    kind: str | None,
    generator: torch.Generator,
) -> None:
    """Regress one layer: the part of its residual that its inputs explain is put on top of its weight."""
    streams.reach(site.target, site.model)
    old = streams.target.model.get_submodule(site.name)
    layer, plain, last = (
        net.get_submodule(name)
        for net, name in ((model, site.name), (streams.model.model, site.name), (streams.model.model, site.last))
    )
    norm = None if site.norm is None else streams.model.model.get_submodule(site.norm)
    assert isinstance(old, nn.Conv2d | nn.Linear)
    start = old.weight
    for axis in (0, 1):
        if (site.name, axis) in kept:
            start = start.index_select(axis, kept[site.name, axis])
    scale = _scale(norm, len(start))
    outputs_kept = kept.get((site.name, 0))
    bias = last.bias if isinstance(last, nn.Conv2d | nn.Linear) else None
    known = bias.clone() if bias is not None and site.biased else None
    sums = Sums(start.flatten(1), known, centred=norm is not None or bias is not None)
    applied = _as_applied(old, site.model)
    wanted = max(1, POSITIONS // sum(len(values[site.target]) for values in streams.target.values))
    positions = sum(values[site.target][..., 0].numel() for values in streams.target.values)
    for theirs, ours in zip(streams.target.values, streams.model.values, strict=True):
        output, image = theirs[site.target], streams.model.value(site.model.args[_image_at(site.model)], ours)  # type: ignore[arg-type]
        if isinstance(old, nn.Linear):
            output, image = output.flatten(0, -2), image.flatten(0, -2)  # (positions, o) and (positions, i), of all images
            at = _sample(len(output), -(-len(output) * POSITIONS // positions), generator)
            output, image = output[at], image[at]
            rows = output if outputs_kept is None else output.index_select(-1, outputs_kept)
        else:
            at = _sample(output.shape[2:].numel(), wanted, generator)
            missing = _shortcut_error(site, theirs, ours, at, outputs_kept, output.shape, scale)
            rows = (_sampled(output, at, outputs_kept) + missing).transpose(1, 2)  # (n, p, o)
        sums.add(patches(applied, image, at).flatten(0, 1), rows.reshape(-1, len(start)))
    if not sums.ready():
        raise CompactError(f"{site.name}: its inputs for these images are too large to be squared; try --no-calibrate")
    regression, shift = sums.solve(scale.abs())
    if kind is None:
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        layer.weight.copy_(regression.weight.reshape(layer.weight.shape))
        reached = regression.weight
    else:
        LAYERS[kind].refit(layer, regression)  # type: ignore[misc]
        dense = LAYERS[kind].dense(layer)
        assert isinstance(dense, nn.Conv2d | nn.Linear)
        if plain is not layer:
            assert isinstance(plain, nn.Conv2d)
            plain.weight.copy_(dense.weight)
        reached = dense.weight.flatten(1).double()
    if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
        norm.running_mean.sub_(shift(reached))
    elif bias is not None:
        bias.add_(shift(reached))


def _as_applied(layer: nn.Conv2d | nn.Linear, node: fx.Node) -> nn.Module:
    """A layer of the geometry that the node has: what it reads may be padded before, or code apply the weight in its own way."""
    if isinstance(layer, nn.Linear):
        return layer
    stride, padding, dilation = (tuple(each) for each in node.args[3:6])  # type: ignore[arg-type]
    kernel: Any = layer.kernel_size
    return nn.Conv2d(1, 1, kernel, stride, padding, dilation, device="meta")


def _image_at(node: fx.Node) -> int:
    """Which argument of a convolution or matrix product is the image."""
    return 1 if "addmm" in str(node.target) else 0


def _scale(norm: nn.Module | None, outputs: int) -> Tensor:
    """gamma / sigma of the batch normalisation behind a layer (o,) float64, at least a thousandth of the largest; else 1."""
    if not isinstance(norm, _BatchNorm) or norm.running_var is None:
        return torch.ones(outputs, dtype=torch.float64)
    gamma = norm.weight.double() if norm.affine else torch.ones(outputs, dtype=torch.float64)
    scale = gamma / (norm.running_var.double() + norm.eps).sqrt()
    return torch.where(scale < 0, -1.0, 1.0) * scale.abs().clamp_min(WEAKEST * float(scale.abs().max()) or 1.0)


def _sampled(values: Tensor, at: Tensor, kept: Tensor | None) -> Tensor:
    """Values (n, c, h, w) at some positions, of all channels or those that are kept: (n, c, positions)."""
    found = values.flatten(2).index_select(2, at)
    return found if kept is None else found.index_select(1, kept)


def _shortcut_error(
    site: _Site,
    theirs: Mapping[fx.Node, Any],
    ours: Mapping[fx.Node, Any],
    at: Tensor,
    kept: Tensor | None,
    shape: torch.Size,
    scale: Tensor,
) -> Tensor:
    """What the output (n, o, h, w) must make up for, at some positions, of the error in the shortcut that is added to it.

    Nothing if that is not known by now.
    """
    if site.shortcut is None or site.shortcut[0] not in theirs or site.shortcut[1] not in ours:
        return torch.zeros(())
    wanted, got = theirs[site.shortcut[0]], ours[site.shortcut[1]]
    if wanted.shape != shape or got.shape != (shape[0], len(scale), *shape[2:]):
        return torch.zeros(())
    heard = scale.abs() > WEAKEST * scale.abs().max()  # what the normalisation silences cannot make up for anything
    inverse = torch.where(heard, 1 / scale, 0.0).to(got.dtype)
    missing: Tensor = (_sampled(wanted, at, kept) - _sampled(got, at, None)) * inverse[:, None]
    return missing
