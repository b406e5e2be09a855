"""The squeeze layer of FCF: a convolution that computes some of its filters, of some of its inputs, in the width of the whole.

It gathers the inputs that it reads, convolves, and puts what it made in its places among zeros: so do channels stay in line
that shortcuts add up (Li et al., CVPR 2019, section 3.4).
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from ..budget import MOVED_TIME, WEIGHT_TIME, Floats
from ..errors import CompactError
from ..kernels import KernelLayer, check_places
from ..layers import Layer
from ..recipe import Replace
from ..surgery import LAYERS, LayerKind, Regression
from ._errors import ridge_
from ._layers import dense, like

RIDGE = 1e-6  # of the power of all that a layer reads, in which rounding is lost


def expanded(part: Tensor, written: Tensor, width: int) -> Tensor:
    """Channels (n, p, h, w) at the places `written` (p,) of `width`, zeros elsewhere, in the memory format that they have."""
    images, _, height, columns = part.shape
    if part.is_contiguous(memory_format=torch.channels_last):
        whole = part.new_zeros(images, height, columns, width).movedim(-1, 1)
    else:
        whole = part.new_zeros(images, width, height, columns)
    return whole.index_copy_(1, written, part)


class Squeezed(nn.Module):
    """What a squeeze layer is run as: a plain convolution between a gather and a scatter, where it needs them."""

    read: Tensor | None
    written: Tensor | None

    def __init__(self, conv: nn.Conv2d, read: Tensor | None, written: Tensor | None, width: int, bias: Tensor | None) -> None:
        """`bias` (width,) is of all filters, where there is a scatter; else the convolution has its own."""
        super().__init__()
        self.conv, self.width, self.bias = conv, width, bias
        self.register_buffer("read", read)
        self.register_buffer("written", written)

    def forward(self, image: Tensor) -> Tensor:
        part: Tensor = self.conv(image if self.read is None else image[:, self.read])
        if self.written is None:
            return part
        whole = expanded(part, self.written, self.width)
        return whole if self.bias is None else whole + self.bias[:, None, None]


class Squeeze(KernelLayer):
    """The kernel `weight` (p, q, k, k) of the filters `written` (p,) on the inputs `read` (q,); other filters give their bias."""

    read: Tensor
    written: Tensor

    def __init__(self, like: nn.Conv2d, filters: int, inputs: int) -> None:
        super().__init__(like)
        if like.groups != 1 or not 1 <= filters <= self.outputs or not 1 <= inputs <= self.in_channels:
            asked = f"{filters} filters of {inputs} inputs"
            raise CompactError(f"the recipe asks for {asked} in a layer {'x'.join(map(str, self.shape))} of {like.groups} groups")
        self.weight = nn.Parameter(like.weight.new_empty(filters, inputs, *self.shape[2:]))
        self.register_buffer("read", torch.arange(inputs, device=like.weight.device))
        self.register_buffer("written", torch.arange(filters, device=like.weight.device))

    def check(self) -> None:
        check_places("read", self.read, self.in_channels)
        check_places("written", self.written, self.outputs)

    @property
    def gathers(self) -> bool:
        """Whether there are inputs that it does not read."""
        return len(self.read) < self.in_channels

    @property
    def scatters(self) -> bool:
        """Whether there are filters that it does not compute."""
        return len(self.written) < self.outputs

    @property
    def used(self) -> Fraction:
        return Fraction(self.weight.numel(), self.outputs)

    @property
    def executed(self) -> Fraction:
        return self.used

    @property
    def synthesis_macs(self) -> int:
        return 0

    @property
    def synthesis_sums(self) -> int:
        return 0

    def kernel(self) -> Tensor:
        return self.weight.new_zeros(self.shape).index_put((self.written[:, None], self.read), self.weight)

    def forward(self, image: Tensor) -> Tensor:
        read = image[:, self.read] if self.gathers else image
        if not self.scatters:
            return self.applied(read, self.weight, 1)
        whole = expanded(self.applied(read, self.weight, 1, bias=False), self.written, self.outputs)
        return whole if self.bias is None else whole + self.bias[:, None, None]

    def folded(self, *, hollow: bool = False) -> nn.Module:
        """The convolution between a gather and a scatter that the layer is run as."""
        conv = self.plain(self.weight.detach(), 1)
        if self.scatters:
            conv.bias = None
        parts = (self.read if self.gathers else None, self.written if self.scatters else None)
        return Squeezed(conv, *parts, self.outputs, self.bias if self.scatters else None).train(self.training)


def saved_time(model: nn.Module, layer: Layer, kept: Floats, full: Floats) -> float:
    """What a layer takes less with (filters, inputs) `kept` than with all, in multiply-accumulates that take as long.

    An estimate: its products and its weights, less the values that gather and scatter move.
    """
    stride = model.get_submodule(layer.name).stride
    assert isinstance(stride, tuple)
    products = float(full.prod() - kept.prod()) * layer.kernel * (layer.positions + WEIGHT_TIME)
    moved = float((kept < full) * full @ (1, stride[0] * stride[1])) * layer.positions
    return products - MOVED_TIME * moved


def edit(model: nn.Module, layer: Layer, present: Sequence[Tensor], kept: Sequence[Tensor]) -> Replace:
    """Put a squeeze layer in the place of one.

    Of its filters and inputs (n,) bool, `present` are those that no other edit removes, `kept` are those that it keeps.
    """
    module = model.get_submodule(layer.name)
    assert isinstance(module, nn.Conv2d)
    written, read = (own[there].nonzero().flatten() for own, there in zip(kept, present, strict=True))
    rows, columns = ((own & there).nonzero().flatten() for own, there in zip(kept, present, strict=True))
    weight = module.weight.detach()[rows][:, columns].contiguous()
    tensors = {"weight": weight, "written": written, "read": read}
    if module.bias is not None:
        tensors["bias"] = module.bias.detach()[present[0]]
    return Replace(layer.name, "fcf.squeeze", {"filters": len(written), "inputs": len(read)}, tensors)


def _build(old: nn.Module, options: Mapping[str, int]) -> nn.Module:
    return Squeeze(like(old), options.get("filters", 0), options.get("inputs", 0))


def _refit(layer: nn.Module, regression: Regression) -> None:
    """The rows of the filters that are kept, on the inputs that are read, as least squares have them."""
    assert isinstance(layer, Squeeze)
    weight = regression.weight.view(layer.shape)[layer.written]
    if layer.gathers:
        weight = _on(weight, layer.read, regression.inputs)
    layer.weight.data.copy_(weight)


def _on(weight: Tensor, read: Tensor, inputs: Tensor) -> Tensor:
    """The kernel (p, q, k, k) on the inputs `read` (q,) nearest to one on all (p, i, k, k), of moments (i*k*k, i*k*k)."""
    size = weight.shape[2:].numel()
    columns = (read[:, None] * size + torch.arange(size)).flatten()
    gram = ridge_(inputs.to(torch.float64, copy=True), RIDGE)
    wanted = weight.flatten(1).double() @ gram[:, columns]
    solved = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(gram[columns][:, columns])).T
    return solved.view(len(weight), len(read), *weight.shape[2:])


LAYERS["fcf.squeeze"] = LayerKind(_build, dense, _refit)
