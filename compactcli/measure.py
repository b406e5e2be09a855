"""What a network is and does: parameters, MACs, thop's figure, accuracy."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import kernels
from .errors import CompactError
from .graph import copied, named_failure, not_finite, run_fake, scores

PROBES = 8  # random images on which a network is compared with what it was, where there are no real ones


@dataclass(frozen=True)
class Accuracy:
    """How well a network labels images. Percent; cross-entropy in nats."""

    top1: float
    top5: float
    loss: float
    images: int


def params(model: nn.Module) -> int:
    """Parameters, each shared one once."""
    return sum(parameter.numel() for parameter in model.parameters())


def params_materialised(model: nn.Module) -> int:
    """Parameters of the network as it is run, with all kernels made."""
    made = kernels.layers(model).values()
    held = {id(each): each.numel() for layer in made for each in layer.parameters()}
    shared = sum(params(layer) for layer in kernels.shared(model).values())
    return params(model) - sum(held.values()) - shared + sum(params(layer.folded(hollow=True)) for layer in made)


def params_without_shared(model: nn.Module) -> int | None:
    """Parameters but for those of what layers share; None if they share nothing."""
    shared = kernels.shared(model).values()
    return params(model) - sum(map(params, shared)) if shared else None


def macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-accumulates of one image: what torch.utils.flop_counter counts, halved. On fake tensors.

    Kernels that are made are taken as made: `kernels.synthesis_macs` tells what that costs, once. Attention takes the path
    on which its products can be seen.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            before = 0

            def change(shadow: nn.Module) -> None:
                nonlocal before
                before = counter.get_total_flops()  # of a run that met what needs real values, and was given up
                kernels.fold_(shadow, hollow=True)

            run_fake(model, input_shape, batch=1, change=change)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops() - before) // 2


def wholes(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """What ratios are of, for a network whose layers are yet to be made plain: these may cost more, or have fewer parameters.

    Multiply-accumulates only where it makes its kernels: others cost the same.
    """
    return {"params": params(model)} | ({"macs": macs(model, input_shape)} if kernels.layers(model) else {})


def thop_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """The figure that thop gives and many papers print, all kernels made; on a copy, for thop leaves buffers behind."""
    profile = import_module("thop").profile
    with torch.no_grad():
        total, _ = profile(copied(kernels.folded(model)).eval(), (torch.zeros(1, *input_shape),), verbose=False)
    return int(total)


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Accuracy:
    """Top-1 and top-5 accuracy and mean cross-entropy in eval mode. Raises CompactError if there are no images."""
    model.eval()
    top1 = top5 = images = 0
    loss = 0.0
    with torch.inference_mode():
        for image, label in batches:
            with named_failure("on these images"):
                logits = scores(model(image)).float()
            ranked = logits.topk(min(5, logits.shape[1])).indices == label[:, None]  # (n, 5)
            top1 += int(ranked[:, 0].sum())
            top5 += int(ranked.any(1).sum())
            loss += float(nn.functional.cross_entropy(logits, label, reduction="sum"))
            images += len(label)
    if not images:
        raise CompactError("there are no images to evaluate on")
    return Accuracy(100 * top1 / images, 100 * top5 / images, loss / images, images)


def probed(model: nn.Module, input_shape: Sequence[int], *, finite: bool = False) -> Tensor:
    """The first floating-point output (PROBES, ...) in eval mode for random images, always the same.

    Raises CompactError if it must be `finite` and holds NaN or Inf.
    """
    images = torch.randn(PROBES, *input_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), named_failure("on random images"):
        found = scores(model.eval()(images))
    if finite and not found.isfinite().all():
        raise not_finite(model, images, "random images")
    return found


def relative_change(now: Tensor, before: Tensor) -> float:
    """How far outputs are from what they were, as a share of their length."""
    change = float((now - before).norm() / before.norm().clamp_min(1e-30))
    if math.isfinite(change) and before.square().sum().isfinite():
        return change
    return float((now.double() - before.double()).norm() / before.double().norm())  # too large for squares in float32
