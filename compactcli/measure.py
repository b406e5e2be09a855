"""What a network is and does: parameters, MACs, thop's figure, latency, accuracy, redundancy."""

import copy
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .errors import CompactError
from .graph import run_fake


@dataclass(frozen=True)
class Accuracy:
    """How well a network labels images. Percent; cross-entropy in nats."""

    top1: float
    top5: float
    loss: float
    images: int


@dataclass(frozen=True)
class Redundancy:
    """How alike a layer's filters are (o filters, flattened and mean-centred)."""

    max_abs_corr: float  # mean over filters of the largest |correlation| with another filter
    mean_abs_corr: float  # mean |correlation| over pairs
    effective_rank: float  # exp of the entropy of the normalised singular values (Roy & Vetterli 2007)
    rank_ratio_99: float  # share of the singular values that hold 99 % of the energy


def params(model: nn.Module) -> int:
    """Parameters, each shared one once."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-accumulates of one image: what torch.utils.flop_counter counts, halved. On fake tensors."""
    with FlopCounterMode(display=False) as counter:
        run_fake(model, input_shape, batch=1)
    return int(counter.get_total_flops()) // 2


def thop_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """The figure that thop gives and many papers print, on a copy: thop leaves buffers behind."""
    profile = import_module("thop").profile
    with torch.no_grad():
        total, _ = profile(copy.deepcopy(model).eval(), (torch.zeros(1, *input_shape),), verbose=False)
    return int(total)


def latency_ms(models: Sequence[nn.Module], input_shape: Sequence[int], *, batch: int = 1, seconds: float = 1.0) -> list[float]:
    """Median milliseconds of one forward pass of each network in eval mode, measured in turn, on the CPU."""
    image = torch.zeros(batch, *input_shape)
    times: list[list[float]] = [[] for _ in models]
    for model in models:
        model.eval()
    with torch.inference_mode():
        for model in models:  # warm up
            model(image)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[-1]) < 5:
            for model, own in zip(models, times, strict=True):
                start = time.perf_counter()
                model(image)
                own.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Accuracy:
    """Top-1 and top-5 accuracy and mean cross-entropy in eval mode. Raises CompactError if there are no images."""
    model.eval()
    top1 = top5 = images = 0
    loss = 0.0
    with torch.inference_mode():
        for image, label in batches:
            logits = model(image).float()
            ranked = logits.topk(min(5, logits.shape[1])).indices == label[:, None]  # (n, 5)
            top1 += int(ranked[:, 0].sum())
            top5 += int(ranked.any(1).sum())
            loss += float(nn.functional.cross_entropy(logits, label, reduction="sum"))
            images += len(label)
    if not images:
        raise CompactError("there are no images to evaluate on")
    return Accuracy(100 * top1 / images, 100 * top5 / images, loss / images, images)


def redundancy(weight: Tensor) -> Redundancy | None:
    """How alike the filters of a weight (o, i, k, k) are; None if there are fewer than two, or none is finite."""
    filters = weight.detach().flatten(1).double()
    if len(filters) < 2 or not filters.isfinite().all():
        return None
    centred = filters - filters.mean(1, keepdim=True)
    unit = nn.functional.normalize(centred, dim=1)
    correlation = (unit @ unit.T).abs().fill_diagonal_(0)
    values = torch.linalg.eigvalsh(filters @ filters.T if len(filters) <= filters.shape[1] else filters.T @ filters)
    energy = values.flip(0).clamp_min(0)
    if not float(energy.sum()):
        return Redundancy(0.0, 0.0, 0.0, 0.0)
    share = energy.sqrt() / energy.sqrt().sum()
    held = energy.cumsum(0) / energy.sum()
    return Redundancy(
        max_abs_corr=float(correlation.amax(1).mean()),
        mean_abs_corr=float(correlation.sum() / (len(filters) * (len(filters) - 1))),
        effective_rank=float(torch.exp(torch.special.entr(share).sum())),
        rank_ratio_99=(int((held < 0.99).sum()) + 1) / len(energy),
    )
