"""Images without labels make a cut network good: least squares of each layer onto the original.

Two networks run side by side over the same images, one operation at a time, each value carried forward
once: the target, as it was before the edit, and the model, as it is now. Where a layer of the model is
reached, its own inputs, with all that went wrong before it, are regressed onto the target's outputs; its
new weights are used from there on, so that errors do not pile up.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import kernels
from .errors import CompactError
from .graph import Graph, operation, trace
from .layers import norm_behind, weight_of
from .moments import patches, regressible, trim
from .recipe import Edit, Keep, Replace, Share
from .surgery import LAYERS, Regression

POSITIONS = 65_536  # sampled per layer for the regression, over all images
LIVE_BYTES = 192 << 20  # of values carried forward in both networks; more images join as they shrink
ROWS_BYTES = 32 << 20  # of a layer's inputs and residuals that wait to enter its Gram matrix
COLUMNS = 128  # of a Gram matrix at once, in float32 before they are added up in float64, from its diagonal on


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
        theirs, ours = (_Stream(trace(network, shape, batch=size), network) for network in (target, plain))
        streams = _Streams(theirs, ours, batches)
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


class _Stream:
    """A network's graph run over batches, node by node; a value lives until its last use."""

    def __init__(self, graph: Graph, model: nn.Module) -> None:
        self.graph, self.model = graph, model
        self.values: list[dict[fx.Node, Any]] = []
        self.position = {node: position for position, node in enumerate(graph.nodes)}
        self.tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.next = 0
        last = {used: node for node in graph.nodes for used in node.all_input_nodes}
        self.dead: dict[fx.Node, list[fx.Node]] = {}
        for used, node in last.items():
            self.dead.setdefault(node, []).append(used)
        self.ahead = self._ahead()

    def _ahead(self) -> list[int]:
        """The most bytes that the values of one batch will take from each node on."""
        sizes = {self.graph.image: self.graph.image.meta["val"].nbytes}
        live = []
        for node in self.graph.nodes:
            if node.users and any(used in sizes for used in node.all_input_nodes):  # the rest is the same for all batches
                value = node.meta.get("val")
                sizes[node] = value.nbytes if isinstance(value, Tensor) else 0
            live.append(sum(sizes.values()))
            for used in self.dead.get(node, ()):
                sizes[used] = 0
        return np.maximum.accumulate(live[::-1])[::-1].tolist()  # type: ignore[no-any-return]

    def join(self, batch: Tensor) -> None:
        """One more batch, brought to where the others are."""
        self.values.append({self.graph.image: batch.clone()})  # the network may work in place
        for node in self.graph.nodes[: self.next]:
            self._run(node, self.values[-1])

    def advance(self, node: fx.Node, *, through: bool) -> None:
        """Run up to the node, and with `through` the node as well."""
        end = self.position[node] + int(through)
        for each in self.graph.nodes[self.next : end]:
            for values in self.values:
                self._run(each, values)
        self.next = max(self.next, end)

    def _run(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        if node.op != "call_function":
            return
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: self.value(used, values))
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        if node.users:
            values[node] = value
        for used in self.dead.get(node, ()):
            values.pop(used, None)

    def value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node in values:
            return values[node]
        name = self.graph.tensors.get(node)
        return self.graph.constants[node] if name is None else self.tensors[name]


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


class _Streams:
    """Both networks in step."""

    def __init__(self, target: _Stream, model: _Stream, batches: Sequence[Tensor]) -> None:
        self.target, self.model, self.batches = target, model, batches
        self._join()

    def _join(self) -> None:
        batch = self.batches[len(self.target.values)]
        self.target.join(batch)
        self.model.join(batch)

    def reach(self, site: _Site) -> None:
        """The target's output and the model's input of the site are there, for as many batches as memory takes."""
        self.target.advance(site.target, through=True)
        self.model.advance(site.model, through=False)
        each = self.target.ahead[self.target.next - 1] + self.model.ahead[self.model.next - 1]
        while len(self.target.values) < len(self.batches) and (len(self.target.values) + 1) * each <= LIVE_BYTES:
            self._join()

    def error(self) -> float:
        """|difference| / |deviation of the target's outputs from their mean|."""
        ends = [_scores(stream.graph) for stream in (self.target, self.model)]
        self.target.advance(ends[0], through=True)
        self.model.advance(ends[1], through=True)
        wanted = torch.cat([values[ends[0]] for values in self.target.values])
        got = torch.cat([values[ends[1]] for values in self.model.values])
        return float((got - wanted).norm() / (wanted - wanted.mean(0)).norm().clamp_min(1e-30))


def _scores(graph: Graph) -> fx.Node:
    """What makes the first floating-point output."""
    return next(node for node in graph.nodes[-1].all_input_nodes if node.meta["val"].is_floating_point())


def _sites(streams: _Streams, kinds: Mapping[str, str]) -> list[_Site]:
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
    streams: _Streams,
    model: nn.Module,
    site: _Site,
    kept: Mapping[tuple[str, int], Tensor],
    kind: str | None,
    generator: torch.Generator,
) -> None:
    """Regress one layer: the part of its residual that its inputs explain is put on top of its weight."""
    streams.reach(site)
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
    sums = _RegressionSums(start.flatten(1), known, centred=norm is not None or bias is not None)
    applied = _as_applied(old, site.model)
    wanted = max(1, POSITIONS // sum(len(values[site.target]) for values in streams.target.values))
    for theirs, ours in zip(streams.target.values, streams.model.values, strict=True):
        output, image = theirs[site.target], streams.model.value(site.model.args[_image_at(site.model)], ours)  # type: ignore[arg-type]
        at = _sample(output.shape[2:].numel(), wanted, generator)
        if isinstance(old, nn.Linear):
            rows = output if outputs_kept is None else output.index_select(-1, outputs_kept)
        else:
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
    return torch.where(scale < 0, -1.0, 1.0) * scale.abs().clamp_min(1e-3 * float(scale.abs().max()) or 1.0)


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
    missing: Tensor = (_sampled(wanted, at, kept) - _sampled(got, at, None)) / scale.to(got.dtype)[:, None]
    return missing


class _RegressionSums:
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
