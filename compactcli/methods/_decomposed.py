"""hinge's layer: a convolution W = A W' as two, W' of a few filters and A pointwise (section 3)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..channels import Channels
from ..errors import CompactError
from ..layers import Layer
from ..recipe import Replace
from ..surgery import LAYERS, LayerKind, Regression
from ._errors import row_scale


def decompose(model: nn.Module, channels: Channels, layer: Layer, rank: int, removed: list[int]) -> Replace:
    """The layer, cut to what is kept, as two: W' and A share the largest singular values and their vectors."""
    module = model.get_submodule(layer.name)
    assert isinstance(module, nn.Conv2d | nn.Linear)
    out, into = (torch.from_numpy(~np.isin(channels.axes[layer.weight, axis], removed)) for axis in (0, 1))
    weight = module.weight.detach()[out][:, into]
    scale = row_scale(model, layer)[out]
    scaled = scale[:, None] * weight.flatten(1).double()  # (o, i*k*k) = U S V
    _, vectors = torch.linalg.eigh(gram(scaled))
    U = vectors.flip(1)[:, : min(rank, *scaled.shape)]  # (o, r)
    A, V = _even(U / scale[:, None], U.T @ scaled)
    tensors = {
        "0.weight": V.reshape(-1, *weight.shape[1:]).to(weight.dtype).contiguous(),
        "1.weight": A.reshape(len(A), -1, *[1] * (weight.ndim - 2)).to(weight.dtype).contiguous(),
    }
    if module.bias is not None:
        tensors["1.bias"] = module.bias.detach()[out]
    return Replace(layer.name, "hinge.decomposed", {"rank": len(V)}, tensors)


def gram(matrix: Tensor) -> Tensor:
    """M M^T in float64; its eigenvalues are the squares of M's singular values. Large products are made in float32."""
    small = matrix if matrix.numel() < 1 << 23 else matrix.float()
    return (small @ small.T).double()


def _build(old: nn.Module, options: Mapping[str, int]) -> nn.Module:
    """Two layers for one: the old geometry into `rank` channels, then a pointwise layer with the bias."""
    rank = options.get("rank", 0)
    if not isinstance(old, nn.Conv2d | nn.Linear) or (isinstance(old, nn.Conv2d) and old.groups > 1):
        raise CompactError(f"the recipe decomposes a {type(old).__name__}, which cannot be")
    limit = min(len(old.weight), old.weight[0].numel())
    if not 1 <= rank <= limit:
        raise CompactError(f"the recipe asks for rank {rank} of a layer whose rank is at most {limit}")
    first = _like(old, len(old.weight[0]), rank, biased=False)
    if isinstance(old, nn.Linear):
        return nn.Sequential(first, _like(old, rank, len(old.weight), biased=old.bias is not None))
    where: Any = {"device": old.weight.device, "dtype": old.weight.dtype}
    return nn.Sequential(first, nn.Conv2d(rank, len(old.weight), 1, bias=old.bias is not None, **where))


def parts(pair: nn.Module) -> tuple[nn.Conv2d | nn.Linear, nn.Conv2d | nn.Linear]:
    """W' and A of a decomposed layer."""
    assert isinstance(pair, nn.Sequential)
    first, second = pair
    assert isinstance(first, nn.Conv2d | nn.Linear)
    assert isinstance(second, nn.Conv2d | nn.Linear)
    return first, second


def _dense(pair: nn.Module) -> nn.Module:
    """The one layer that the two are equal to: kernel A W'."""
    first, second = parts(pair)
    layer = _like(first, len(first.weight[0]), len(second.weight), biased=second.bias is not None)
    tensors = {"weight": torch.einsum("or,r...->o...", second.weight.flatten(1), first.weight)}
    layer.load_state_dict(tensors if second.bias is None else {**tensors, "bias": second.bias})
    return layer


def _like(layer: nn.Conv2d | nn.Linear, inputs: int, outputs: int, *, biased: bool) -> nn.Conv2d | nn.Linear:
    """An ungrouped layer of the same geometry between other widths."""
    where: Any = {"bias": biased, "device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.Linear(inputs, outputs, **where)
    for name in ("stride", "padding", "dilation", "padding_mode"):
        where[name] = getattr(layer, name)
    kernel: Any = layer.kernel_size
    return nn.Conv2d(inputs, outputs, kernel, **where)


def _refit(pair: nn.Module, regression: Regression) -> None:
    """Reduced-rank regression: the weight projected on the directions in which its outputs are strongest."""
    first, second = parts(pair)
    scaled = regression.scale[:, None] * regression.weight  # (o, i*k*k)
    _, directions = torch.linalg.eigh(scaled @ regression.inputs @ scaled.T)
    U = directions[:, -len(first.weight) :]  # (o, r)
    A, V = _even(U / regression.scale[:, None], U.T @ scaled)
    first.weight.data.copy_(V.reshape(first.weight.shape))
    second.weight.data.copy_(A.reshape(second.weight.shape))


def _even(matrix: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """The factors (o, r) and (r, i*k*k) of the same product, each component as long in the one as in the other.

    Both then learn at the pace of one learning rate.
    """
    share = (filters.norm(dim=1).clamp_min(1e-30) / matrix.norm(dim=0).clamp_min(1e-30)).sqrt()
    return matrix * share, filters / share[:, None]


LAYERS["hinge.decomposed"] = LayerKind(_build, _dense, _refit)
