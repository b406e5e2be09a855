"""What consumers make good of channels that they no longer read, as far as weights tell.

A channel behind a batch normalisation and a ReLU is relu(beta + gamma z) with z normal; two filters see the same as far as they
point the same way, as they do on white inputs. So means and covariances of channels are known without an image, and with them
the least-squares fit of a removed channel to those that are kept, and the constant that is left of it.
"""

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..budget import Budget
from ..channels import Channels
from ..graph import Graph, operation
from ..layers import Layer, norm_behind, weight_of
from ._errors import norm_of

TERMS = 8  # of the Hermite series of a ReLU
RIDGE = 0.1  # of the mean variance of channels: how far weights are not believed


@dataclass(frozen=True)
class Pair:
    """A layer behind which are a batch normalisation and a ReLU, and another that alone reads what they make."""

    maker: Layer
    reader: Layer
    norm: str | None  # the batch normalisation behind the reader


def pairs(graph: Graph, layers: list[Layer]) -> list[Pair]:
    """All of the kind that a graph has."""
    by_weight = {layer.weight: layer for layer in layers}
    found = []
    for node in graph.nodes:
        maker = _layer(graph, node, by_weight)
        value = None if maker is None else _only(_normed(graph, node))
        if maker is None or value is None or operation(value) not in ("relu", "relu_"):
            continue
        after = _only(value)
        reader = None if after is None else _layer(graph, after, by_weight)
        if after is not None and reader is not None and reader.groups == maker.groups == 1:
            norm = norm_behind(graph, after)
            found.append(Pair(maker, reader, norm and norm[0]))
    return found


def _layer(graph: Graph, node: fx.Node, by_weight: Mapping[str, Layer]) -> Layer | None:
    """The layer that a node is, where that is called once and not transposed."""
    weight = weight_of(graph, node) if operation(node) == "convolution" else None
    layer = by_weight.get(graph.tensors[weight]) if weight is not None and len(weight.users) == 1 else None
    return None if layer is None or layer.transposed else layer


def _normed(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The value of the batch normalisation that alone reads a node."""
    found = norm_behind(graph, node)
    values = [] if found is None else [each for each in found[1].users if each.target is operator.getitem and each.args[1] == 0]
    return values[0] if values else None


def _only(node: fx.Node | None) -> fx.Node | None:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def moments(model: nn.Module, maker: Layer) -> tuple[Tensor, Tensor] | None:
    """Means (c,) and covariances (c, c) of a layer's channels behind its batch normalisation and a ReLU; None without one."""
    norm = norm_of(model, maker)
    if norm is None:
        return None
    gamma, beta = norm.weight.detach().double(), norm.bias.detach().double()
    filters = nn.functional.normalize(model.get_parameter(maker.weight).detach().double().flatten(1), dim=1)
    filters = torch.where(gamma < 0, -1.0, 1.0)[:, None] * filters
    spread = gamma.abs().clamp_min(1e-12)
    return _rectified(spread, beta / spread, filters @ filters.T)


def _rectified(spread: Tensor, ratio: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Means and covariances of spread * relu(ratio + z), z standard normal with correlations `cosine`.

    By Hermite polynomials: E f(z) g(z') is the sum over n of E f^(n) E g^(n) cosine^n / n!, and the derivatives of a ReLU
    are a step and, from the second on, those of an impulse.
    """
    density = torch.exp(-ratio.square() / 2) / (2 * torch.pi) ** 0.5
    step = torch.special.ndtr(ratio)
    mean = spread * (ratio * step + density)
    variance = spread.square() * ((1 + ratio.square()) * step + ratio * density) - mean.square()
    covariance, power, before, now = torch.zeros_like(cosine), cosine, torch.zeros_like(ratio), torch.ones_like(ratio)
    each = spread * step
    for n in range(1, TERMS + 1):
        covariance += each[:, None] * each * power
        power = power * cosine / (n + 1)
        each = spread * now * density
        before, now = now, -ratio * now - (n - 1) * before  # He_(n) at -ratio
    return mean, covariance.fill_diagonal_(0.0) + torch.diag(variance.clamp_min(0))


def absorbed(
    model: nn.Module, channels: Channels, budget: Budget, removed: Sequence[int], fixed: Collection[str]
) -> dict[str, Tensor]:
    """Tensor -> its values in the network without the sets, where those that read them make up for them.

    Of readers with a batch normalisation or a bias, to which the constant part of a channel goes; nothing else does of those
    that are `fixed`.
    """
    result: dict[str, Tensor] = {}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for pair in pairs(budget.graph, budget.layers):
        keep, stays = (
            torch.from_numpy(~np.isin(channels.axes[pair.reader.weight, axis], removed))
            for axis in (pair.reader.in_axis, pair.reader.out_axis)
        )
        known = None if keep.all() else moments(model, pair.maker)
        constant = _constant(model, pair)
        if known is None or constant is None or len(known[0]) != len(keep):
            continue
        mean, covariance = known
        weight = model.get_parameter(pair.reader.weight).detach().double()  # (o, i, k, k)
        inner = covariance[keep][:, keep]
        inner.diagonal().add_(RIDGE * float(covariance.diagonal().mean()) + 1e-30)
        fit = torch.linalg.solve(inner, covariance[keep][:, ~keep])  # (kept, removed)
        if pair.reader.name in fixed:
            fit.zero_()
        added = torch.einsum("orhw,kr->okhw", weight[:, ~keep], fit)
        missing = torch.einsum("orhw,r->o", weight[:, ~keep], mean[~keep]) - torch.einsum("okhw,k->o", added, mean[keep])
        name, sign = constant
        tensor = tensors[name]
        if pair.reader.name not in fixed:
            result[pair.reader.weight] = (weight[:, keep] + added)[stays].to(tensor.dtype)
        result[name] = (tensor.double() + sign * missing)[stays].to(tensor.dtype)
    return result


def _constant(model: nn.Module, pair: Pair) -> tuple[str, int] | None:
    """(the tensor that a constant is added to, its sign): the mean of the batch normalisation behind a layer, or its bias."""
    norm: Any = None if pair.norm is None else model.get_submodule(pair.norm)
    if getattr(norm, "running_mean", None) is not None:
        return f"{pair.norm}.running_mean", -1
    biased = getattr(model.get_submodule(pair.reader.name), "bias", None) is not None
    return (f"{pair.reader.name}.bias", 1) if biased else None
