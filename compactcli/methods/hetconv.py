"""HetConv: k x k kernels on a part of a filter's inputs, 1 x 1 on others (Singh et al., CVPR 2019).

Filters and inputs are divided into P parts. A filter has k x k kernels on the inputs of its own part, and 1 x 1 kernels on all
others (section 3): a grouped convolution and a pointwise one, whose blocks that the first covers are neither stored nor
trained. What is executed is 1/P + 1/k^2 of the layer, and 1/2 + 1/(2 k^2) with two parts, where those blocks are skipped.

The paper trains from scratch. From a checkpoint the kernels are the least-squares fit in the metric of what the layer
reads, channels between two layers are put in the order in which the parts lose least, which changes nothing else, and P is
chosen in each layer by error per cost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..allocate import Choice
from ..budget import Budget, Of
from ..channels import Channels
from ..errors import CompactError
from ..kernels import VECTOR, KernelLayer
from ..layers import Layer
from ..recipe import Edit, Replace
from ..surgery import LAYERS, LayerKind, Regression
from . import Method
from ._arrange import arrange_
from ._errors import Metrics, ridge_
from ._layers import dense, eligible, like, meet

if TYPE_CHECKING:
    from ..moments import Moments

RIDGE = 1e-6  # of the power of all that a layer reads, in which rounding is lost
ARRANGED = 4  # parts for which channels are put in order, where the layer may have so many: for fewer it is good as well


@dataclass(frozen=True)
class Options:
    """How hetconv chooses."""

    parts: Annotated[int, "parts P of every layer that they divide; 0: by error per cost in each"] = 0
    width: Annotated[int, "fewest inputs of a part: narrower ones save nothing in time"] = 4
    arrange: Annotated[
        Literal["auto", "contiguous"],
        "order of the channels between two layers, which is free: auto: that in which the parts lose least; contiguous: as it is",
    ] = "auto"

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("parts", self.parts >= 0 and self.parts != 1, "0, or 2 or more"),
            ("width", self.width >= 1, "1 or more"),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)}: it is {wanted}")


class HetConv(Method):
    """Layers in parts, as many and of as many parts as the ratio needs."""

    Options = Options
    of: ClassVar[tuple[Of, ...]] = ("macs", "params")
    rounds = False

    def start(
        self,
        model: nn.Module,
        channels: Channels,
        budget: Budget,
        moments: Mapping[str, "Moments"] | None = None,
        *,
        trains: bool = False,
    ) -> list[Edit]:
        """The layers to replace, so that the budget is met."""
        found = _eligible(model, budget.layers)
        every = {layer.name: self._parts(layer) for layer in found}
        metrics = Metrics(model, channels, budget, moments)
        if self.options.arrange == "auto":
            some = {name: max([p for p in own if p <= ARRANGED] or own[:1]) for name, own in every.items() if own}
            metrics = Metrics(model, channels, budget, arrange_(model, channels, budget, metrics, some))
        choices = []
        for layer in found:
            weight, metric = _weight(model, layer), metrics.of(layer)
            errors = [metric.cost(weight.flatten(1) - fit(weight, metric.inputs, p).flatten(1)) for p in every[layer.name]]
            costs = [_cost(layer, p, budget) for p in every[layer.name]]
            choices.append(Choice(np.array([_cost(layer, 1, budget), *costs], dtype=float), np.array([0.0, *errors])))
        refitted = found if moments is not None else ()
        chosen = meet(budget, choices, "hetconv", "compute with fewer products", refitted=refitted)
        result: list[Edit] = []
        for layer, form in zip(found, chosen, strict=True):
            if form:
                parts = every[layer.name][form - 1]
                result.append(_edit(model, layer, parts, fit(_weight(model, layer), metrics.of(layer).inputs, parts)))
        self.losses = {
            layer.name: float(each.errors[form]) for layer, each, form in zip(found, choices, chosen, strict=True) if form
        }
        return result

    def _parts(self, layer: Layer) -> list[int]:
        """The numbers of parts that a layer may have, from 2 on."""
        outputs, inputs = layer.shape[:2]
        if self.options.parts:
            return [self.options.parts] if outputs % self.options.parts == 0 == inputs % self.options.parts else []
        most = inputs // self.options.width
        return [p for p in range(2, most + 1) if outputs % p == 0 == inputs % p]


def _eligible(model: nn.Module, found: Sequence[Layer]) -> list[Layer]:
    """Those that parts make cheaper: kernels with a centre, in one group, on images that keep their places."""
    return [layer for layer in eligible(model, found) if _has_centre(model.get_submodule(layer.name))]


def _has_centre(module: nn.Module) -> bool:
    """Whether a pointwise layer of the same stride reads what the centre of the kernel does."""
    if not isinstance(module, nn.Conv2d) or module.groups > 1 or module.kernel_size == (1, 1):
        return False
    around = tuple(dilation * (size - 1) // 2 for dilation, size in zip(module.dilation, module.kernel_size, strict=True))
    return all(size % 2 for size in module.kernel_size) and module.padding in ("same", around)


def _cost(layer: Layer, parts: int, budget: Budget) -> float:
    """Of one layer: multiply-accumulates that are executed, or numbers that are stored."""
    outputs, inputs = layer.shape[:2]
    pairs = outputs * inputs
    pointwise = pairs * (parts - 1) // parts if budget.of == "params" or parts <= 2 else pairs
    each = pairs * layer.kernel // parts + pointwise
    return float(each * (layer.positions if budget.of == "macs" else 1))


def _weight(model: nn.Module, layer: Layer) -> Tensor:
    """The kernel (o, i, k, k) float64."""
    return model.get_parameter(layer.weight).detach().double()


def fit(weight: Tensor, inputs: Tensor | None, parts: int) -> Tensor:
    """The kernel (o, i, k, k) in that many parts nearest to `weight`, by what the layer reads (i*k*k, i*k*k); None: alike."""
    kept = _support(weight.shape, parts)
    if inputs is None:
        return torch.where(kept, weight, 0.0)
    gram = ridge_(inputs.to(torch.float64, copy=True), RIDGE)
    wanted = weight.flatten(1) @ gram  # (o, i*k*k)
    result = torch.zeros_like(wanted)
    for rows, target, support in zip(wanted.chunk(parts), result.chunk(parts), kept.flatten(1).chunk(parts), strict=True):
        own = support[0].nonzero().flatten()
        target[:, own] = torch.cholesky_solve(rows[:, own].T, torch.linalg.cholesky(gram[own][:, own])).T
    return result.view(weight.shape)


def _support(shape: Sequence[int], parts: int) -> Tensor:
    """(o, i, k, k) bool: what is not zero."""
    outputs, inputs, *kernel = shape
    same = torch.arange(parts).repeat_interleave(outputs // parts)[:, None] == torch.arange(parts).repeat_interleave(
        inputs // parts
    )
    centre = torch.zeros(kernel, dtype=torch.bool)
    centre[tuple(size // 2 for size in kernel)] = True
    return same[:, :, None, None] | centre


class Parallel(nn.Module):
    """The two convolutions that a layer in parts is run as: their outputs are added.

    With two parts the pointwise one reads for each half of the filters the other half of the inputs alone.
    """

    def __init__(self, grouped: nn.Conv2d, pointwise: nn.Conv2d) -> None:
        super().__init__()
        self.grouped, self.pointwise = grouped, pointwise

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.grouped(image) + self.pointwise(_crossed(image) if self.pointwise.groups > 1 else image)
        return result


def _crossed(image: Tensor) -> Tensor:
    """The second half of the channels before the first."""
    half = image.shape[1] // 2
    return torch.cat((image[:, half:], image[:, :half]), dim=1)


class Parts(KernelLayer):
    """Kernels `grouped` (o, i/P, k, k) on the inputs of a filter's own part, `pointwise` (P, P-1, o/P, i/P) on the others'.

    For each part of the filters come the other parts of the inputs in their order.
    """

    def __init__(self, like: nn.Conv2d, parts: int) -> None:
        super().__init__(like)
        outputs, inputs, *kernel = self.shape
        if not _has_centre(like) or parts < 2 or outputs % parts or inputs % parts:
            raise CompactError(f"the recipe divides a layer {'x'.join(map(str, self.shape))} into {parts} parts, which cannot be")
        self.parts = parts
        self.grouped = nn.Parameter(like.weight.new_empty(outputs, inputs // parts, *kernel))
        self.pointwise = nn.Parameter(like.weight.new_empty(parts, parts - 1, outputs // parts, inputs // parts))

    @property
    def used(self) -> int:
        return (self.grouped.numel() + self.pointwise.numel()) // self.outputs

    @property
    def executed(self) -> int:
        return self.grouped.numel() // self.outputs + (self.in_channels // 2 if self.parts == 2 else self.in_channels)

    @property
    def narrow(self) -> bool:
        return any(channels // self.parts % VECTOR for channels in self.shape[:2])

    @property
    def synthesis_macs(self) -> int:
        return 0

    @property
    def synthesis_sums(self) -> int:
        return 0

    def full(self) -> Tensor:
        """The pointwise kernel (o, i), zero on a filter's own part.

        In a row the blocks off the diagonal of P x P are P - 1 runs of P, with one of the diagonal between two of them.
        """
        p, _, down, along = (self.parts, *self.pointwise.shape[1:])
        runs = self.pointwise.reshape(p - 1, p, down, along)
        zero = runs.new_zeros(p - 1, 1, down, along)
        blocks = torch.cat((zero[:1, 0], torch.cat((runs, zero), dim=1).flatten(0, 1)))  # (p * p, o/p, i/p)
        return blocks.view(p, p, down, along).transpose(1, 2).reshape(p * down, p * along)

    def kernel(self) -> Tensor:
        p, (outputs, inputs, *kernel) = self.parts, self.shape
        pointwise = F.pad(self.full()[:, :, None, None], [edge for size in reversed(kernel) for edge in (size // 2, size // 2)])
        own = torch.diag_embed(self.grouped.view(p, outputs // p, inputs // p, *kernel).movedim(0, -1), dim1=0, dim2=2)
        return pointwise + own.view(p, outputs // p, p, inputs // p, *kernel).reshape(self.shape)

    def forward(self, image: Tensor) -> Tensor:
        own = self.applied(image, self.grouped, self.parts)
        if self.parts == 2:
            return own + F.conv2d(_crossed(image), self._halves(), None, self.stride, groups=2)
        return own + F.conv2d(image, self.full()[:, :, None, None], None, self.stride)

    def _halves(self) -> Tensor:
        """With two parts, the pointwise kernel (o, i/2, 1, 1) as one of two groups."""
        return self.pointwise.reshape(self.shape[0], -1, 1, 1)

    def folded(self, *, hollow: bool = False) -> nn.Module:
        """The two convolutions that the layer is run as."""
        grouped = self.plain(self.grouped.detach(), self.parts)
        kernel = self._halves() if self.parts == 2 else self.full()[:, :, None, None]
        groups, stride = 2 if self.parts == 2 else 1, (self.stride[0], self.stride[1])
        pointwise = nn.Conv2d(self.in_channels, self.out_channels, 1, stride, groups=groups, bias=False, device="meta")
        pointwise.weight = nn.Parameter(kernel.detach().contiguous())
        return Parallel(grouped, pointwise).train(self.training)


def _edit(model: nn.Module, layer: Layer, parts: int, kernel: Tensor) -> Replace:
    """Put a kernel that is in parts in the place of a layer's."""
    module = model.get_submodule(layer.name)
    assert isinstance(module, nn.Conv2d)
    tensors = {name: tensor.to(module.weight.dtype).contiguous() for name, tensor in _tensors(kernel, parts).items()}
    if module.bias is not None:
        tensors["bias"] = module.bias.detach()
    return Replace(layer.name, "hetconv.parts", {"parts": parts}, tensors)


def _tensors(kernel: Tensor, parts: int) -> dict[str, Tensor]:
    """What a layer holds whose kernel (o, i, k, k) is in parts."""
    outputs, inputs, *size = kernel.shape
    blocks = kernel.view(parts, outputs // parts, parts, inputs // parts, *size)
    centre = blocks[..., size[0] // 2, size[1] // 2].transpose(1, 2).flatten(0, 1)  # (P * P, o/P, i/P)
    others = [block for number, block in enumerate(centre) if number % (parts + 1)]
    grouped = torch.cat([blocks[part, :, part] for part in range(parts)])
    return {"grouped": grouped, "pointwise": torch.stack(others).view(parts, parts - 1, outputs // parts, inputs // parts)}


def _build(old: nn.Module, options: Mapping[str, int]) -> nn.Module:
    return Parts(like(old), options.get("parts", 0))


def _refit(layer: nn.Module, regression: Regression) -> None:
    """The nearest kernel in as many parts."""
    assert isinstance(layer, Parts)
    kernel = fit(regression.weight.view(layer.shape), regression.inputs, layer.parts)
    for name, tensor in _tensors(kernel, layer.parts).items():
        layer.get_parameter(name).data.copy_(tensor)


LAYERS["hetconv.parts"] = LayerKind(_build, dense, _refit)
