"""Batch normalisation while training: on its own statistics, or on those of all processes' images."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import distributed
from .errors import CompactError


def train_(model: nn.Module, how: Literal["train", "frozen", "sync"]) -> None:
    """Put the network into training mode; with "frozen", its batch normalisations keep their running statistics."""
    model.train()
    if how == "frozen":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


@contextmanager
def synchronised(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Statistics of all processes' images together, on any device, while the block runs (torch's own refuses CPU tensors)."""
    chosen = [module for module in model.modules() if isinstance(module, _BatchNorm)] if wanted else []
    others = {type(module).__name__ for module in chosen if type(module).forward is not _BatchNorm.forward}
    if others:  # what else they do is not known: timm's have the activation in them
        raise CompactError(f"--sync-bn does not know {', '.join(sorted(others))}; leave it out, or take --freeze-bn")
    for module in chosen:
        module.forward = partial(_forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in chosen:
            del module.forward


def _forward(module: _BatchNorm, x: Tensor) -> Tensor:
    """(n, c, ...) normalised with the mean and variance over all processes, in two passes so that nothing cancels."""
    if not module.training or distributed.world_size() == 1:
        return _BatchNorm.forward(module, x)
    shape = (1, -1, *[1] * (x.ndim - 2))
    axes = [axis for axis in range(x.ndim) if axis != 1]
    wide = x.float()
    count = torch.tensor([wide.numel() / wide.shape[1]], device=x.device)
    sums = _total(torch.cat([wide.sum(axes), count]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    variance = _total((wide - mean.view(shape)).square().sum(axes)) / count
    if module.track_running_stats:
        _note(module, mean.detach(), variance.detach(), count)
    scale = (variance + module.eps).rsqrt()
    result = (wide - mean.view(shape)) * scale.view(shape)
    if module.affine:
        result = result * module.weight.view(shape) + module.bias.view(shape)
    return result.to(x.dtype)


def _total(tensor: Tensor) -> Tensor:
    summed: Tensor = distributed.Sum.apply(tensor)  # type: ignore[no-untyped-call]
    return summed


def _note(module: _BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """Move the running statistics as torch's batch normalisation does."""
    assert module.running_mean is not None
    assert module.running_var is not None
    assert module.num_batches_tracked is not None
    module.num_batches_tracked += 1
    share = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
    module.running_mean.lerp_(mean, share)
    module.running_var.lerp_(variance * (count / (count - 1).clamp_min(1)), share)
