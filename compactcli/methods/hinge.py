"""Hinge: group sparsity prunes filters and lowers ranks in one network (Li et al., CVPR 2020).

A convolution W (o filters over i*k*k inputs) is seen as W = A W', with W' the convolution of a few
filters and A a 1x1 convolution. Columns of A that vanish prune outputs, rows that vanish lower the
rank: pruning and decomposition are two directions of group sparsity on one matrix (section 3).
Where a shortcut ties the outputs of several layers, only the rank is free.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..budget import Budget, Dial, Floats, Layer
from ..channels import Channels, Ids, edits
from ..errors import CompactError
from ..recipe import Edit, Replace
from ..surgery import LAYERS, LayerKind
from . import Method

if TYPE_CHECKING:
    from ..calibrate import Moments


@dataclass(frozen=True)
class Options:
    """How hinge chooses."""

    mode: Annotated[
        Literal["auto", "prune", "decompose"], "prune filters, lower ranks, or whichever costs less error per layer"
    ] = "auto"
    floor: Annotated[float, "smallest share of its filters and of its rank that a layer keeps"] = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor={self.floor:g}: it is a share above 0, up to 1")


class Hinge(Method):
    """Filters and ranks chosen over the whole network by one threshold on error per cost."""

    Options = Options

    def finish(self, model: nn.Module, channels: Channels, budget: Budget, moments: "Moments | None") -> list[Edit]:
        """The filters to remove and the layers to decompose, so that the budget is met."""
        dials, orders = [], []
        if self.options.mode != "decompose":
            for family, order, errors in _widths(model, channels, budget):
                orders.append(order)
                dials.append(self._dial(budget, errors, family=family))
        if self.options.mode != "prune":
            dials += [self._dial(budget, errors, layer=index) for index, errors in _ranks(model, channels, budget)]
        settings = budget.solve(dials)
        removed = [s for order, n in zip(orders, settings, strict=False) for s in order[: len(order) - n].tolist()]
        result = edits(channels, removed, model)
        ranks = [
            (budget.layers[dial.layer], n)
            for dial, n in zip(dials, settings, strict=True)
            if dial.layer is not None and n < dial.full
        ]
        for layer, rank in ranks:
            result.append(_decompose(model, channels, layer, rank, removed))
        return result

    def _dial(self, budget: Budget, errors: Floats, *, family: int | None = None, layer: int | None = None) -> Dial:
        full = len(errors) - 1
        return Dial(errors, budget.step(full), int(np.ceil(self.options.floor * full)), family, layer)


def _widths(model: nn.Module, channels: Channels, budget: Budget) -> list[tuple[int, Ids, Floats]]:
    """(family, its sets from least to most important, error by how many are kept) of what one layer alone produces."""
    result = []
    for index, family in enumerate(budget.families):
        axes = {axis for axis, _ in family.axes}
        producers = [layer for layer in budget.layers if layer.groups == 1 and (layer.weight, int(layer.transposed)) in axes]
        consumers = [layer for layer in budget.layers if (layer.weight, 1 - int(layer.transposed)) in axes]
        if len(producers) != 1 or len(family.sets) < 2:
            continue
        power = _power(model, channels, family.sets, axes, producers[0])
        share = np.zeros(len(family.sets))
        for layer in consumers or producers:
            side = 1 - int(layer.transposed) if consumers else int(layer.transposed)
            read = _per_set(_energy(model, layer, side), channels.axes[layer.weight, side], family.sets)
            share += (power if consumers else 1.0) * read / max(float((power * read).sum() if consumers else read.sum()), 1e-30)
        order = np.argsort(share, kind="stable")
        lost = np.concatenate([[0.0], np.cumsum(share[order])])[::-1].copy()
        result.append((index, family.sets[order], lost))
    return result


def _ranks(model: nn.Module, channels: Channels, budget: Budget) -> list[tuple[int, Floats]]:
    """(layer, error by rank) of the layers that may be decomposed: not the stem, not the classifier."""
    result = []
    for index, layer in enumerate(budget.layers):
        module = model.get_submodule(layer.name)
        ends = [channels.reason((layer.weight, axis)) for axis in (0, 1)]
        if not isinstance(module, nn.Conv2d | nn.Linear) or layer.groups > 1 or min(layer.shape[:2]) < 2 or any(ends):
            continue
        matrix = _scaled(model, channels, layer, module.weight)
        energy = torch.linalg.svdvals(matrix).square().numpy()
        tail = np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]]) / max(float(energy.sum()), 1e-30)
        result.append((index, tail))
    return result


def _decompose(model: nn.Module, channels: Channels, layer: Layer, rank: int, removed: list[int]) -> Replace:
    """The layer, cut to what is kept, as two: W' holds the first right singular vectors, A the rest (`svd2`)."""
    module = model.get_submodule(layer.name)
    assert isinstance(module, nn.Conv2d | nn.Linear)
    out, into = (torch.from_numpy(~np.isin(channels.axes[layer.weight, axis], removed)) for axis in (0, 1))
    weight = module.weight.detach()[out][:, into]
    scale = _row_scale(model, channels, layer)[out]
    U, S, V = torch.linalg.svd(scale[:, None] * weight.flatten(1).double(), full_matrices=False)
    A = (U[:, :rank] * S[:rank]) / scale[:, None]  # (o, r)
    tensors = {
        "0.weight": V[:rank].reshape(-1, *weight.shape[1:]).to(weight.dtype).contiguous(),
        "1.weight": A.reshape(len(A), -1, *[1] * (weight.ndim - 2)).to(weight.dtype).contiguous(),
    }
    if module.bias is not None:
        tensors["1.bias"] = module.bias.detach()[out]
    return Replace(layer.name, "hinge.decomposed", {"rank": len(V[:rank])}, tensors)


def _scaled(model: nn.Module, channels: Channels, layer: Layer, weight: Tensor) -> Tensor:
    """The filters as rows (o, i*k*k), each scaled as the batch normalisation behind it will scale it."""
    return _row_scale(model, channels, layer)[:, None] * weight.detach().flatten(1).double()


def _row_scale(model: nn.Module, channels: Channels, layer: Layer) -> Tensor:
    """|gamma| / sigma of the batch normalisation on the layer's outputs (o,); ones where there is none."""
    norm = _norm(model, channels, channels.axes[layer.weight, 0])
    if norm is None:
        return torch.ones(layer.shape[0], dtype=torch.float64)
    assert norm.running_var is not None
    scale = norm.weight.detach().double().abs() / (norm.running_var.double() + norm.eps).sqrt()
    return scale.clamp_min(1e-3 * float(scale.max()) or 1.0)


def _norm(model: nn.Module, channels: Channels, sets: Ids) -> nn.BatchNorm2d | None:
    """The batch normalisation whose channels are exactly these sets, in this order; the only one, or None."""
    found = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        and module.affine
        and module.track_running_stats
        and np.array_equal(channels.axes.get((f"{path}.weight", 0), ()), sets)
    ]
    return found[0] if len(found) == 1 else None


def _power(model: nn.Module, channels: Channels, sets: Ids, axes: set[tuple[str, int]], producer: Layer) -> Floats:
    """The mean square of each channel as its consumers read it.

    From the last batch normalisation on it, taken as normal behind a ReLU; without one, from the
    norms of the filters that make it.
    """
    for tensor, _ in sorted(axes, reverse=True):
        module = model.get_submodule(tensor.rpartition(".")[0])
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            power = _rectified_power(module.weight.detach().double(), module.bias.detach().double())
            return _per_set(power.numpy(), channels.axes[tensor, 0], sets)
    side = int(producer.transposed)
    return _per_set(_energy(model, producer, side), channels.axes[producer.weight, side], sets)


def _rectified_power(gamma: Tensor, beta: Tensor) -> Tensor:
    """E max(0, beta + gamma z)^2 for standard normal z."""
    spread = gamma.abs().clamp_min(1e-12)
    ratio = beta / spread
    density = torch.exp(-ratio.square() / 2) / (2 * torch.pi) ** 0.5
    power: Tensor = (beta.square() + spread.square()) * torch.special.ndtr(ratio) + beta * spread * density
    return power


def _energy(model: nn.Module, layer: Layer, axis: int) -> Floats:
    """Sum of squares of the weight at each position of the axis."""
    weight = model.get_parameter(layer.weight).detach().double()
    return np.asarray(weight.square().transpose(0, axis).flatten(1).sum(1).numpy())


def _per_set(values: Floats, positions: Ids, sets: Ids) -> Floats:
    """Sum the values of the positions that belong to each set."""
    total = np.zeros(int(max(positions.max(), sets.max())) + 1)
    np.add.at(total, positions, values)
    return total[sets]


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


def _dense(pair: nn.Module) -> nn.Module:
    """The one layer that the two are equal to: kernel A W'."""
    assert isinstance(pair, nn.Sequential)
    first, second = pair
    assert isinstance(first, nn.Conv2d | nn.Linear)
    assert isinstance(second, nn.Conv2d | nn.Linear)
    layer = _like(first, len(first.weight[0]), len(second.weight), biased=second.bias is not None)
    tensors = {"weight": torch.einsum("or,r...->o...", second.weight.flatten(1), first.weight)}
    layer.load_state_dict(tensors if second.bias is None else {**tensors, "bias": second.bias})
    return layer


def _like(layer: nn.Conv2d | nn.Linear, inputs: int, outputs: int, *, biased: bool) -> nn.Conv2d | nn.Linear:
    """An ungrouped layer of the same geometry between other widths."""
    where: Any = {"bias": biased, "device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.Linear(inputs, outputs, **where)
    geometry: Any = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    mode: Any = layer.padding_mode
    return nn.Conv2d(inputs, outputs, *geometry, padding_mode=mode, **where)


LAYERS["hinge.decomposed"] = LayerKind(_build, _dense)
