"""What an error in a layer's weight does to the network's outputs, by images or as far as the weights alone tell."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..budget import Budget, Floats
from ..channels import Channels
from ..layers import Layer

if TYPE_CHECKING:
    from ..moments import Moments

LEAST = 1e-30  # what is added to a matrix of nothing
WEAKEST = 1e-15  # power of a layer's outputs from which on it counts less: its inverse, cubed, stays within float32


@dataclass(frozen=True)
class Metric:
    """An error dW (o, i*k*k) in a layer's weight costs trace(outputs dW inputs dW^T)."""

    outputs: Tensor  # (o, o), positive semidefinite
    inputs: Tensor | None  # (i*k*k, i*k*k); None: the identity

    def read(self, rows: Tensor) -> Tensor:
        """Rows (n, i*k*k) times `inputs`."""
        return rows if self.inputs is None else rows @ self.inputs.to(rows.dtype)

    def cost(self, error: Tensor) -> float:
        """What an error (o, i*k*k) costs."""
        return float(((self.outputs.to(error.dtype) @ error) * self.read(error)).sum())


class Metrics:
    """The metric of every layer: of images where they were.

    Else outputs count by the batch normalisation behind them, all of a layer by its power, and layers by what they add to
    the network's outputs.
    """

    def __init__(self, model: nn.Module, channels: Channels, budget: Budget, moments: "Mapping[str, Moments] | None") -> None:
        self.model, self.moments = model, moments or {}
        self.worth = worths(model, channels, budget, moments)

    def of(self, layer: Layer) -> Metric:
        """The metric of one layer."""
        known = self.moments.get(layer.name)
        if known is not None:
            return Metric(known.worth, known.inputs)
        weight = self.model.get_parameter(layer.weight).detach().transpose(0, layer.out_axis).flatten(1).double()
        square = row_scale(self.model, layer).square()
        power = float((square[:, None] * weight.square()).sum())
        return Metric(torch.diag(square * (self.worth.get(layer.name, 1.0) / max(power, WEAKEST))), None)


def multiplied(lost: Floats) -> Floats:
    """What losing a share of a signal's power counts: layers hand on what is left, so the shares kept multiply."""
    return np.asarray(-np.log1p(-np.minimum(lost, 1 - 1e-6)))


def worths(
    model: nn.Module, channels: Channels, budget: Budget, moments: "Mapping[str, Moments] | None" = None
) -> dict[str, float]:
    """What a relative error in each layer's output does to the network's, as far as weights tell; none where moments tell all.

    What is added to a shortcut counts by its share of the power of all that is; before that, an
    error is handed on undiminished.
    """
    result: dict[str, float] = {}
    if moments is not None and all(layer.name in moments for layer in budget.layers):
        return result
    readers: dict[int, list[Layer]] = {}  # set -> the layers that read it
    writers: dict[int, list[Layer]] = {}
    for layer in budget.layers:
        for number in np.unique(channels.axes[layer.weight, layer.in_axis]).tolist():
            readers.setdefault(number, []).append(layer)
        if layer.groups == 1:
            for number in np.unique(channels.axes[layer.weight, layer.out_axis]).tolist():
                writers.setdefault(number, []).append(layer)
    for layer in reversed(budget.layers):
        first = int(channels.axes[layer.weight, layer.out_axis][0])
        together = [other for other in writers.get(first, ()) if other.norm is not None]
        if layer in together and len(together) > 1:
            powers = [_output_power(model, other) for other in together]
            result[layer.name] = powers[together.index(layer)] / max(sum(powers), 1e-30)
        else:
            result[layer.name] = max((result.get(reader.name, 1.0) for reader in readers.get(first, ())), default=1.0)
    return result


def _output_power(model: nn.Module, layer: Layer) -> float:
    """The mean square of what comes out of the batch normalisation behind the layer."""
    norm = norm_of(model, layer)
    return 1.0 if norm is None else float((norm.weight.detach().square() + norm.bias.detach().square()).mean())


def row_scale(model: nn.Module, layer: Layer) -> Tensor:
    """|gamma| / sigma of the batch normalisation behind the layer (o,); ones where there is none."""
    norm = norm_of(model, layer)
    if norm is None:
        return torch.ones(layer.shape[0], dtype=torch.float64)
    assert norm.running_var is not None
    scale = norm.weight.detach().double().abs() / (norm.running_var.double() + norm.eps).sqrt()
    return scale.clamp_min(1e-3 * float(scale.max()) or 1.0)


def norm_of(model: nn.Module, layer: Layer) -> nn.BatchNorm2d | nn.SyncBatchNorm | None:
    """The batch normalisation behind the layer, where it scales and keeps statistics."""
    norm = None if layer.norm is None else model.get_submodule(layer.norm)
    return norm if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) and norm.affine and norm.track_running_stats else None


def ridge_(matrix: Tensor, share: float) -> Tensor:
    """Add that share of its trace to the diagonal, in place, so that it can be inverted, even where it is nothing."""
    matrix.diagonal().add_(max(share * float(matrix.diagonal().sum()), LEAST))
    return matrix


def root(matrix: Tensor) -> Tensor:
    """R in float64 with R^T R the positive semidefinite matrix, to a millionth of its trace, in which rounding is lost.

    To more of it where there is more rounding.
    """
    root: Tensor
    for share in (1e-6, 1e-4):
        root, failed = torch.linalg.cholesky_ex(ridge_(matrix.to(torch.float64, copy=True), share))
        if not failed:
            return root.T
    root = torch.linalg.cholesky(ridge_(matrix.to(torch.float64, copy=True), 1e-2))
    return root.T
