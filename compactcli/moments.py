"""What a change of each layer's weights would do to the network's outputs, from images without labels."""

import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors

from . import data
from .graph import Graph, named_failure, not_finite, scores
from .recipe import Preprocessing

MOMENT_IMAGES = 256  # enough for the moments
SKETCH = 128  # random combinations of a layer's outputs, or inputs, that stand for all of them where there are more
WIDEST = 8_192  # inputs of a layer, i*k*k, up to which its covariance is affordable
BATCH_BYTES = 64 << 20  # of all values of one batch
BATCH = 64
LEAST = 1e-30  # of a sum of squares in float32
ALIKE = 1e-12  # of the squares of outputs: what they deviate from their mean by rounding alone


@dataclass(frozen=True)
class Moments:
    """What changing a layer's weight does to the network's outputs.

    A change dW (o, i*k*k) moves them by trace(worth dW inputs dW^T), as a share of their mean square
    deviation (`measured_by`), to first order and with its mean made good by an intercept. With G the sum over
    positions of gradient times input, for one image and one random direction of the outputs, these
    are the Kronecker factors E G G^T and E G^T G of the Gauss-Newton matrix (Martens & Grosse, 2015;
    one step of the power iteration to the nearest product, Morwani et al., 2024). Unlike the
    covariances of inputs and gradients they know that errors at neighbouring positions add up.
    """

    inputs: Tensor  # (i*k*k, i*k*k) float32, of trace 1; zeros where the layer reads nothing, or nothing comes of it
    worth: Tensor  # (o, o) float32


class Batches(Sequence[Tensor]):
    """Images (n, c, h, w) uint8 as equal batches of network input, made when asked for; a remainder is left out."""

    def __init__(self, images: Tensor, preprocessing: Preprocessing, input_bytes: int) -> None:
        """`input_bytes` is what one image's values take in the network."""
        limit = max(1, min(BATCH, BATCH_BYTES // input_bytes))
        self.images, self.preprocessing = images, preprocessing
        self.size = len(images) // -(-len(images) // limit)

    def __len__(self) -> int:
        return len(self.images) // self.size

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        images: Tensor = self.images[index * self.size : (index + 1) * self.size]
        return data.normalise(images, self.preprocessing)


def value_bytes(graph: Graph) -> int:
    """Bytes of all the values that one image makes, in float32."""
    values = [node.meta.get("val") for node in graph.nodes if node.op == "call_function"]
    return sum(4 * value[0].numel() for value in values if isinstance(value, Tensor) and value.ndim > 1)


def gather(model: nn.Module, names: Sequence[str], batches: Sequence[Tensor], *, seed: int = 0) -> dict[str, Moments]:
    """Moments of those of the named layers that can be regressed, from MOMENT_IMAGES at most.

    One forward and one backward pass per batch, against random directions of the outputs. Of layers that the network runs
    without gradients there are none.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = {name: model.get_submodule(name) for name in names}
    sums = {name: _Sums(layer, generator) for name, layer in layers.items() if regressible(layer)}
    images, total, square, unit = 0, torch.zeros(()), torch.zeros(()), 0.0
    with _recorded(model, {layers[name]: own for name, own in sums.items()}):
        for batch in batches:
            image = batch.detach().requires_grad_().clone()  # no leaf: the network may work in place
            logits = scores(model(image))
            values = logits.detach().double()
            if not values.isfinite().all():
                break
            images, total, square = images + len(batch), total + values.sum(0), square + values.square().sum()
            unit = unit or _unit(values)
            if logits.requires_grad:
                direction = unit * torch.randn(logits.shape, generator=generator)
                with named_failure("backwards; --no-calibrate uses the weights alone"):
                    (logits * direction).sum().backward()  # type: ignore[no-untyped-call]
            if images >= MOMENT_IMAGES:
                break
    if not values.isfinite().all():
        raise not_finite(model, batch, "these images")
    trim()
    deviation = unit**2 * measured_by(float(square), float(square - total.square().sum() / images))
    return {name: own.moments(deviation) for name, own in sums.items() if own.count}


def measured_by(square: float, deviation: float) -> float:
    """What squared errors of outputs are divided by: the squares of their deviation from the mean.

    Those of the outputs themselves where these do not deviate: of one image, of copies of it, of a network that tells none apart.
    """
    return deviation if deviation > ALIKE * square else square


def _unit(values: Tensor) -> float:
    """The power of two by which what outputs are measured by is about one, so that no square of gradients is lost."""
    square, about = (float(each.square().mean()) for each in (values, values - values.mean(0)))
    deviation = math.sqrt(measured_by(square, about))
    return 2.0 ** -min(max(math.frexp(deviation)[1], -60), 60)


def trim() -> None:
    """Give the memory that is free between blocks in use back to the system, where the C library is glibc."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class _Sums:
    """Running sums for one layer's moments."""

    def __init__(self, layer: nn.Module, generator: torch.Generator) -> None:
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        self.layer, self.generator = layer, generator
        outs, ins = len(layer.weight), _width(layer)
        self.inputs, self.worth = torch.zeros(ins, ins), torch.zeros(outs, outs)
        self.mean = torch.zeros(ins)
        self.count = 0

    def add(self, image: Tensor, gradient: Tensor) -> None:
        """What the layer read (n, ...) and the gradient (n, ...) of what it made of it."""
        x = patches(self.layer, image)  # (n, positions, i*k*k)
        images, positions, ins = x.shape
        g = gradient.flatten(2) if isinstance(self.layer, nn.Conv2d) else gradient.reshape(images, positions, -1).transpose(1, 2)
        count, outs = images * positions, g.shape[1]
        self.count += count
        self.mean += (x.mean((0, 1)) - self.mean) * (count / self.count)
        x = x - self.mean
        rows = (self._sketch(outs) @ g if outs > SKETCH else g) @ x  # (n, o or SKETCH, i*k*k)
        columns = rows if outs <= SKETCH else g @ (x @ self._sketch(ins).T if ins > SKETCH else x)  # (n, o, i*k*k or SKETCH)
        rows, columns = rows.flatten(0, 1), columns.transpose(0, 1).flatten(1)
        self.inputs.addmm_(rows.T, rows)
        self.worth.addmm_(columns, columns.T)

    def _sketch(self, width: int) -> Tensor:
        """Random combinations (SKETCH, width) that keep squares in the mean."""
        return torch.randn(SKETCH, width, generator=self.generator).div_(SKETCH**0.5)

    def moments(self, deviation: float) -> Moments:
        total = float(self.inputs.diagonal().sum())
        inputs = self.inputs.div_(total) if total > LEAST else self.inputs.zero_()  # else there is only rounding
        return Moments(inputs, self.worth.div_(max(deviation, LEAST**0.5)))


@contextmanager
def _recorded(model: nn.Module, layers: Mapping[nn.Module, _Sums]) -> Iterator[None]:
    """While it lasts, every backward pass adds to the layers' sums what they read and the gradients of what they made."""

    def record(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        image = (args[0] if args else kwargs["input"]).detach()
        if torch.is_grad_enabled() and not output.requires_grad:  # behind what the network runs without gradients
            output = output.detach().requires_grad_().clone()
        if output.requires_grad:
            output.register_hook(lambda gradient: layers[layer].add(image, gradient))  # type: ignore[no-untyped-call]
        return output

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(record, with_kwargs=True))
        model.eval().requires_grad_(False)
        hooks.enter_context(allow_mutation_on_saved_tensors())  # code for inference may write into what it has read
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


def _width(layer: nn.Module) -> int:
    """What one output of the layer reads: i*k*k."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    return layer.weight[0].numel()


def regressible(layer: nn.Module) -> bool:
    """Whether least squares can refit the layer: an ungrouped convolution, or a linear layer, that does not read too much."""
    if not isinstance(layer, nn.Conv2d | nn.Linear) or _width(layer) > WIDEST:
        return False
    if isinstance(layer, nn.Linear):
        return True
    return layer.groups == 1 and (layer.padding != "same" or all(size % 2 for size in layer.kernel_size))


def patches(layer: nn.Module, image: Tensor, at: Tensor | None = None) -> Tensor:
    """What the layer's kernel is applied to at output positions `at` (all) of every image: (n, positions, i*k*k)."""
    if not isinstance(layer, nn.Conv2d):
        return image.reshape(len(image), -1, image.shape[-1])
    (top, left), (height, width) = _padding(layer), layer.kernel_size
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(image, (left, left, top, top), mode=mode) if top or left else image  # a copy in any case
    if at is None and height * width == 1:  # unfold copies it as well
        return padded[:, :, :: layer.stride[0], :: layer.stride[1]].flatten(2).transpose(1, 2)
    if at is None:
        return F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride).transpose(1, 2)
    columns = (padded.shape[3] - layer.dilation[1] * (width - 1) - 1) // layer.stride[1] + 1
    row = (at // columns * layer.stride[0])[:, None, None] + (torch.arange(height) * layer.dilation[0])[:, None]
    column = (at % columns * layer.stride[1])[:, None, None] + torch.arange(width) * layer.dilation[1]
    place = (row * padded.shape[3] + column).flatten()  # all inputs of one place lie together: they are copied at once
    read = padded.flatten(2).transpose(1, 2).contiguous().index_select(1, place)  # (n, positions * k * k, i)
    return read.view(len(image), len(at), height * width, -1).transpose(2, 3).reshape(len(image), len(at), -1)


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    """Rows and columns put around the image; "same" is symmetric for odd kernels, the only ones taken here."""
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        return layer.dilation[0] * (layer.kernel_size[0] - 1) // 2, layer.dilation[1] * (layer.kernel_size[1] - 1) // 2
    assert isinstance(layer.padding, tuple)
    rows, columns = layer.padding
    return rows, columns
