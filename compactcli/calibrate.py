"""Images without labels make a cut network good: what each layer reads, and least squares onto the original.

`moments` tells what a change of each layer's weights would do to the network's outputs. `refit_` lets
two networks run side by side over the same images, one operation at a time, each value carried forward
once: the target, as it was before the edit, and the model, as it is now. Where a layer of the model is
reached, its own inputs, with all that went wrong before it, are regressed onto the target's outputs; its
new weights are used from there on, so that errors do not pile up.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import budget, data
from .graph import Graph, trace
from .recipe import Edit, Keep, Preprocessing, Replace, Share
from .surgery import LAYERS, Regression, outputs

POSITIONS = 65_536  # sampled per layer, over all images
MOMENT_IMAGES = 256  # enough for the moments: every position is a sample
RIDGE = 1e-4  # of a layer's mean input power; it pulls towards the weights that the layer has
LIVE_BYTES = 512 << 20  # of values carried forward in both networks; more images join as they shrink
BATCH_BYTES = 256 << 20  # of all values of one batch
BATCH = 64


@dataclass(frozen=True)
class Moments:
    """What a layer reads, and what its outputs are worth.

    A change dW (o, i*k*k) of its weight changes the network's outputs by trace(worth dW inputs dW^T),
    as a share of their mean square deviation: to first order, with inputs and worth independent (the
    Kronecker factors of Martens & Grosse, 2015, for the network's own outputs).
    """

    inputs: Tensor  # (i*k*k, i*k*k) float64: covariance of what the kernel is applied to
    worth: Tensor  # (o, o) float64


def batched(images: Tensor, preprocessing: Preprocessing, input_bytes: int) -> list[Tensor]:
    """The images (n, c, h, w) uint8 as equal batches of network input; a remainder is left out.

    `input_bytes` is what one image's values take in the network.
    """
    limit = max(1, min(BATCH, BATCH_BYTES // input_bytes))
    count = -(-len(images) // limit)
    size = len(images) // count
    return [data.normalise(images[start : start + size], preprocessing) for start in range(0, count * size, size)]


def value_bytes(graph: Graph) -> int:
    """Bytes of all the values that one image makes, in float32."""
    values = [node.meta.get("val") for node in graph.nodes if node.op == "call_function"]
    return sum(4 * value[0].numel() for value in values if isinstance(value, Tensor) and value.ndim > 1)


def moments(model: nn.Module, names: Sequence[str], batches: Sequence[Tensor], *, seed: int = 0) -> dict[str, Moments]:
    """Moments of the named convolutions and linear layers, from MOMENT_IMAGES at most.

    One forward and one backward pass per batch, against random directions of the outputs.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = {name: model.get_submodule(name) for name in names}
    sums = {name: _Sums() for name in names}
    images, deviation = 0, 0.0
    positions = max(1, POSITIONS // min(MOMENT_IMAGES, sum(len(batch) for batch in batches)))
    with _recorded(model, layers) as seen:
        for batch in batches:
            if images >= MOMENT_IMAGES:
                break
            logits = outputs(model(batch.detach().requires_grad_()))[0]
            centred = logits.detach() - logits.detach().mean(0)
            (logits * torch.randn(logits.shape, generator=generator)).sum().backward()  # type: ignore[no-untyped-call]
            images, deviation = images + len(batch), deviation + float(centred.square().sum())
            for name, (image, output) in seen.items():
                if output.grad is not None:
                    at = _sample(output.shape[2:].numel(), positions, generator)
                    sums[name].add(patches(layers[name], image, at), output.grad)
            seen.clear()
    return {name: own.moments(images, deviation / images) for name, own in sums.items() if own.count}


class _Sums:
    """Running sums for one layer's moments."""

    def __init__(self) -> None:
        self.count = 0
        self.square: Tensor | float = 0.0
        self.first: Tensor | float = 0.0
        self.worth: Tensor | float = 0.0

    def add(self, rows: Tensor, gradient: Tensor) -> None:
        """rows (m, i*k*k) that the kernel met, and the gradient (n, o, ...) of the outputs."""
        self.count += len(rows)
        self.square = self.square + (rows.T @ rows).double()
        self.first = self.first + rows.sum(0).double()
        columns = gradient.transpose(0, 1).flatten(1)  # (o, positions)
        self.worth = self.worth + (columns @ columns.T).double()

    def moments(self, images: int, deviation: float) -> Moments:
        mean = torch.as_tensor(self.first) / self.count
        covariance = torch.as_tensor(self.square) / self.count - torch.outer(mean, mean)
        return Moments(covariance, torch.as_tensor(self.worth) / images / max(deviation, 1e-30))


@contextmanager
def _recorded(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """While it lasts, each forward pass leaves (input, output with gradient) of the layers in the yielded dictionary."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, layer in layers.items():

        def record(_layer: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            output.retain_grad()
            seen[name] = (args[0].detach(), output)

        handles.append(layer.register_forward_hook(record))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield seen
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()


def patches(layer: nn.Module, image: Tensor, at: Tensor) -> Tensor:
    """What the layer's kernel is applied to at output positions `at` of every image: (n * positions, i*k*k)."""
    if not isinstance(layer, nn.Conv2d):
        return image.reshape(-1, image.shape[-1])
    (top, left), (height, width) = _padding(layer), layer.kernel_size
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(image, (left, left, top, top), mode=mode)
    columns = (padded.shape[3] - layer.dilation[1] * (width - 1) - 1) // layer.stride[1] + 1
    row = (at // columns * layer.stride[0])[:, None, None] + (torch.arange(height) * layer.dilation[0])[:, None]
    column = (at % columns * layer.stride[1])[:, None, None] + torch.arange(width) * layer.dilation[1]
    return padded[:, :, row, column].permute(0, 2, 1, 3, 4).reshape(len(image) * len(at), -1)  # (n, p, i, k, k)


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    """Rows and columns put around the image; "same" is symmetric for odd kernels, the only ones taken here."""
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        return layer.dilation[0] * (layer.kernel_size[0] - 1) // 2, layer.dilation[1] * (layer.kernel_size[1] - 1) // 2
    assert isinstance(layer.padding, tuple)
    rows, columns = layer.padding
    return rows, columns


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

    `edits` are those that made the one from the other. Nothing is changed before the first edited layer.
    The mean of each output is met through the batch normalisation behind it, or the bias.
    """
    size, shape = len(batches[0]), batches[0].shape[1:]
    kept = {(edit.module, edit.axis): torch.tensor(edit.index) for edit in edits if isinstance(edit, Keep)}
    kinds = {edit.module: edit.layer for edit in edits if isinstance(edit, Replace)}
    changed = {edit.module for edit in edits if not isinstance(edit, Share)}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        theirs, ours = (_Stream(trace(network, shape, batch=size), network) for network in (target, model))
        streams = _Streams(theirs, ours, batches)
        sites = _sites(streams, kinds)
        first = next((index for index, site in enumerate(sites) if site.name in changed), len(sites))
        for index, site in enumerate(sites[first:], first + 1):
            if only is not None and site.name not in only:
                continue
            _refit_site_(streams, site, kept, kinds.get(site.name), generator)
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
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        for used in self.dead.get(node, ()):
            values.pop(used, None)

    def value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node in values:
            return values[node]
        name = self.graph.tensors.get(node)
        return self.graph.constants[node] if name is None else self.tensors[name]

    def live_bytes(self) -> int:
        """Bytes of the values that one batch holds now."""
        return sum(value.nbytes for value in self.values[0].values() if isinstance(value, Tensor))


@dataclass(frozen=True)
class _Site:
    """A layer to refit: where it is in both graphs, and what stands behind it."""

    name: str
    last: str  # the module that holds its bias: itself, or the last part of what replaced it
    target: fx.Node  # makes the target's output
    model: fx.Node  # reads the model's input
    norm: str | None  # the batch normalisation that alone reads it
    shortcut: tuple[fx.Node, fx.Node] | None  # what is then added to it, in target and model


class _Streams:
    """Both networks in step."""

    def __init__(self, target: _Stream, model: _Stream, batches: Sequence[Tensor]) -> None:
        self.target, self.model, self.waiting = target, model, list(batches)
        self._join()

    def _join(self) -> None:
        batch = self.waiting.pop(0)
        self.target.join(batch)
        self.model.join(batch)

    def reach(self, site: _Site) -> None:
        """The target's output and the model's input of the site are there, for as many batches as memory takes."""
        self.target.advance(site.target, through=True)
        self.model.advance(site.model, through=False)
        each = self.target.live_bytes() + self.model.live_bytes()
        while self.waiting and (len(self.target.values) + 1) * each <= LIVE_BYTES:
            self._join()

    def error(self) -> float:
        """|difference| / |deviation of the target's outputs from their mean|."""
        ends = [stream.graph.nodes[-1].all_input_nodes[0] for stream in (self.target, self.model)]
        self.target.advance(ends[0], through=True)
        self.model.advance(ends[1], through=True)
        wanted = torch.cat([values[ends[0]] for values in self.target.values])
        got = torch.cat([values[ends[1]] for values in self.model.values])
        return float((got - wanted).norm() / (wanted - wanted.mean(0)).norm().clamp_min(1e-30))


def _sites(streams: _Streams, kinds: Mapping[str, str]) -> list[_Site]:
    """The layers to regress, in the order in which they run: ungrouped, applied once, plain or of a kind that refits."""
    ours = _layer_nodes(streams.model.graph)
    sites = []
    for name, node in _layer_nodes(streams.target.graph).items():
        old = streams.target.model.get_submodule(name)
        parts = [path for path in ours if path == name or (name in kinds and path.startswith(f"{name}."))]
        if not parts or not _regressible(old) or (name in kinds and LAYERS[kinds[name]].refit is None):
            continue
        norm, added = _behind(streams.model.graph, ours[parts[-1]])
        _, original = _behind(streams.target.graph, node)
        shortcut = None if added is None or original is None else (original, added)
        sites.append(_Site(name, parts[-1], node, ours[parts[0]], norm, shortcut))
    return sites


def _regressible(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and (layer.padding != "same" or all(size % 2 for size in layer.kernel_size))
    return isinstance(layer, nn.Linear)


def _layer_nodes(graph: Graph) -> dict[str, fx.Node]:
    """Module path -> the node that applies its weight, for weights that are applied once."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        weight = budget.weight_of(graph, node)
        if weight is not None:
            found.setdefault(graph.tensors[weight].rpartition(".")[0], []).append(node)
    return {name: nodes[0] for name, nodes in found.items() if len(nodes) == 1}


def _behind(graph: Graph, node: fx.Node) -> tuple[str | None, fx.Node | None]:
    """(the batch normalisation that alone reads the node, what is added right after), where there are such."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is None or "batch_norm" not in str(reader.target):
        return None, None
    mean = reader.args[3]
    assert isinstance(mean, fx.Node)
    norm = graph.tensors[mean].rpartition(".")[0]
    value = next((user for user in reader.users if user.args[1] == 0), None)
    after = next(iter(value.users)) if value is not None and len(value.users) == 1 else None
    if after is None or not str(after.target).startswith("aten.add") or after.kwargs:
        return norm, None
    other = after.args[0] if after.args[1] is value else after.args[1]
    return norm, other if isinstance(other, fx.Node) else None


def _refit_site_(
    streams: _Streams, site: _Site, kept: Mapping[tuple[str, int], Tensor], kind: str | None, generator: torch.Generator
) -> None:
    """Regress one layer: the part of its residual that its inputs explain is put on top of its weight."""
    streams.reach(site)
    old = streams.target.model.get_submodule(site.name)
    layer, last = streams.model.model.get_submodule(site.name), streams.model.model.get_submodule(site.last)
    norm = None if site.norm is None else streams.model.model.get_submodule(site.norm)
    assert isinstance(old, nn.Conv2d | nn.Linear)
    start = old.weight
    for axis in (0, 1):
        if (site.name, axis) in kept:
            start = start.index_select(axis, kept[site.name, axis])
    scale = _scale(norm, len(start))
    outputs_kept = kept.get((site.name, 0))
    bias = last.bias if isinstance(last, nn.Conv2d | nn.Linear) else None
    known = None if bias is None else bias.clone()
    sums = _RegressionSums(start.flatten(1), known, centred=norm is not None or bias is not None)
    wanted = max(1, POSITIONS // sum(len(values[site.target]) for values in streams.target.values))
    for theirs, ours in zip(streams.target.values, streams.model.values, strict=True):
        output, image = theirs[site.target], streams.model.value(site.model.args[_image_at(site.model)], ours)  # type: ignore[arg-type]
        if outputs_kept is not None:
            output = output.index_select(-1 if isinstance(old, nn.Linear) else 1, outputs_kept)
        output = output + _shortcut_error(site, theirs, ours, outputs_kept, output.shape, scale)
        at = _sample(output.shape[2:].numel(), wanted, generator)
        rows = output if isinstance(old, nn.Linear) else output.flatten(2)[:, :, at].transpose(1, 2)  # (n, p, o)
        sums.add(patches(old, image, at), rows.reshape(-1, len(start)))
    regression, shift = sums.solve(scale.abs())
    if kind is None:
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        layer.weight.copy_(regression.weight.reshape(layer.weight.shape))
        reached = regression.weight
    else:
        LAYERS[kind].refit(layer, regression)  # type: ignore[misc]
        dense = LAYERS[kind].dense(layer)
        assert isinstance(dense, nn.Conv2d | nn.Linear)
        reached = dense.weight.flatten(1).double()
    if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d) and norm.running_mean is not None:
        norm.running_mean.sub_(shift(reached))
    elif bias is not None:
        bias.add_(shift(reached))


def _image_at(node: fx.Node) -> int:
    """Which argument of a convolution or matrix product is the image."""
    return 1 if "addmm" in str(node.target) else 0


def _scale(norm: nn.Module | None, outputs: int) -> Tensor:
    """gamma / sigma of the batch normalisation behind a layer (o,) float64, at least a thousandth of the largest; else 1."""
    if not isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d) or norm.running_var is None:
        return torch.ones(outputs, dtype=torch.float64)
    gamma = norm.weight.double() if norm.affine else torch.ones(outputs, dtype=torch.float64)
    scale = gamma / (norm.running_var.double() + norm.eps).sqrt()
    return torch.where(scale < 0, -1.0, 1.0) * scale.abs().clamp_min(1e-3 * float(scale.abs().max()) or 1.0)


def _shortcut_error(
    site: _Site, theirs: Mapping[fx.Node, Any], ours: Mapping[fx.Node, Any], kept: Tensor | None, shape: torch.Size, scale: Tensor
) -> Tensor:
    """What the output must make up for of the error in the shortcut that is added to it, if that is known by now."""
    if site.shortcut is None or site.shortcut[0] not in theirs or site.shortcut[1] not in ours:
        return torch.zeros(())
    wanted, got = theirs[site.shortcut[0]], ours[site.shortcut[1]]
    if kept is not None:
        wanted = wanted.index_select(1, kept)
    if wanted.shape != shape or got.shape != shape:
        return torch.zeros(())
    missing: Tensor = (wanted - got) / scale.to(got.dtype)[:, None, None]
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

    def add(self, x: Tensor, y: Tensor) -> None:
        residual = y - x @ self.start.T - self.bias  # small where little was changed, so that little is added
        self.count += len(x)
        self.xx += (x.T @ x).double()
        self.rx += (residual.T @ x).double()
        self.x += x.sum(0).double()
        self.r += residual.sum(0).double()

    def solve(self, scale: Tensor) -> tuple[Regression, Callable[[Tensor], Tensor]]:
        """The regression, and the shift (o,) of the outputs' mean that a weight then still needs."""
        xx, rx, x, r = self.xx / self.count, self.rx / self.count, self.x / self.count, self.r / self.count
        if self.centred:
            xx, rx = xx - torch.outer(x, x), rx - torch.outer(r, x)
        ridge = RIDGE * float(xx.diagonal().mean()) or 1.0
        factor = torch.linalg.cholesky(xx + ridge * torch.eye(len(xx), dtype=xx.dtype))
        weight = self.start.double() + torch.cholesky_solve(rx.T, factor).T
        return Regression(weight, xx, scale), lambda reached: r + (self.start.double() - reached) @ x
