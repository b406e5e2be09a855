"""How alike the filters of a layer are, and the channels that it makes of images."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

IMAGES = 64  # of which the redundancy of activations is taken, and of as many ...
ROWS = 4_096  # positions of a batch
ROUNDING = 1e-12  # of an energy, below which nothing is left of it but rounding


@dataclass(frozen=True)
class Redundancy:
    """How alike a layer's filters are (o filters, flattened and mean-centred), or what they make of images."""

    max_abs_corr: float  # mean over filters of the largest |correlation| with another filter
    mean_abs_corr: float  # mean |correlation| over pairs
    effective_rank: float  # exp of the entropy of the normalised singular values (Roy & Vetterli 2007)
    rank_ratio_99: float  # share of the singular values that hold 99 % of the energy


def of(weight: Tensor) -> Redundancy | None:
    """How alike the filters of a weight (o, i, k, k) are; None if there are fewer than two, or one is not finite."""
    filters = weight.detach().flatten(1).double()
    if len(filters) < 2 or not filters.isfinite().all():
        return None
    gram = filters @ filters.T
    return _of_gram(_correlation(filters, gram), gram if len(filters) <= filters.shape[1] else filters.T @ filters)


def _of_gram(correlation: Tensor, gram: Tensor) -> Redundancy:
    """Of vectors (n, ...) with that |correlation| (n, n), and a matrix that has the squares of their singular values."""
    energy = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    if not float(energy.sum()):
        return Redundancy(0.0, 0.0, 0.0, 0.0)
    share = energy.sqrt() / energy.sqrt().sum()
    held = energy.cumsum(0) / energy.sum()
    return Redundancy(
        max_abs_corr=float(correlation.amax(1).mean()),
        mean_abs_corr=float(correlation.sum() / (len(correlation) * (len(correlation) - 1))),
        effective_rank=float(torch.exp(torch.special.entr(share).sum())),
        rank_ratio_99=(int((held < 0.99).sum()) + 1) / len(energy),
    )


def likeness(weight: Tensor) -> Tensor | None:
    """The largest |correlation| of each filter of a weight (o, i, k, k) with another (o,): its mean is `max_abs_corr`.

    None if there are fewer than two filters, or one is not finite.
    """
    filters = weight.detach().flatten(1).double()
    if len(filters) < 2 or not filters.isfinite().all():
        return None
    return _correlation(filters, filters @ filters.T).amax(1)


def _correlation(filters: Tensor, gram: Tensor) -> Tensor:
    """|correlation| of filters (o, n), of products (o, o), with each other (o, o), and 0 with themselves."""
    means = filters.mean(1)
    centred = gram - filters.shape[1] * torch.outer(means, means)
    energy = centred.diagonal()
    varies = energy > ROUNDING * gram.diagonal()  # a filter that is one number everywhere is like no other
    inverse = torch.where(varies, energy, torch.inf).rsqrt()
    return (centred * torch.outer(inverse, inverse)).abs().fill_diagonal_(0)


def of_activations(
    model: nn.Module, names: Sequence[str], batches: Sequence[Tensor], images: int = IMAGES
) -> dict[str, Redundancy]:
    """How alike the channels are that each of the named convolutions and linear layers makes of images, from `images` at most."""
    layers = {model.get_submodule(name): name for name in names}
    layers = {layer: name for layer, name in layers.items() if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)}
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}  # positions, sum (o,), products (o, o), about the mean of the first batch
    origins: dict[str, Tensor] = {}

    def add(layer: nn.Module, _args: object, output: Tensor) -> None:
        rows = (output if isinstance(layer, nn.Linear) else output.movedim(1, -1)).flatten(0, -2)
        rows = rows[:: -(-len(rows) // ROWS)]
        name = layers[layer]
        rows = rows - origins.setdefault(name, rows.mean(0))
        count, total, products = sums.get(name, (0, torch.zeros(()), torch.zeros(())))
        sums[name] = (count + len(rows), total + rows.sum(0).double(), products + (rows.T @ rows).double())

    with ExitStack() as hooks, torch.inference_mode():
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(add))
        for batch in islice(batches, max(1, -(-images // len(batches[0])))):
            model.eval()(batch)
    return {name: _of_gram(*_covariances(*own)) for name, own in sums.items() if len(own[2]) > 1}


def _covariances(count: int, total: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """(|correlation|, covariance) from a number of rows, their sum and the sum of their products."""
    covariance = (products - torch.outer(total, total) / count) / count
    deviation = covariance.diagonal().clamp_min(1e-30).sqrt()
    return (covariance / torch.outer(deviation, deviation)).abs().fill_diagonal_(0), covariance
