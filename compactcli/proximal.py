"""Proximal operators of sparsity-inducing functions of group norms, which a proximal gradient step ends with.

Each takes the norms of groups (g,), all of one matrix, and a step t > 0, and gives the factors (g,) that the groups are
multiplied with: 0 removes a group. With x the new norm of a group and n its old one, x minimises (x - n)^2 / 2 + t f(x)
unless its docstring says otherwise. Formulas and conventions: Li et al., CVPR 2020 (Hinge), section 3.4 and its code.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

TINY = 1e-30  # below any norm that counts


def l1(norms: Tensor, t: float) -> Tensor:
    """f(x) = x: soft thresholding (group lasso, Yuan & Lin, 2006)."""
    return (1 - t / norms.clamp_min(TINY)).clamp_min(0)


def l_half(norms: Tensor, t: float) -> Tensor:
    """f(x) = sqrt(x): half thresholding (Xu et al., 2012), in the convention of (x - n)^2 + t sqrt(x), without the 1/2."""
    safe = norms.clamp_min(TINY)
    phi = torch.acos((t / 8 * (safe / 3) ** -1.5).clamp_max(1))
    kept = 2 / 3 * (1 + torch.cos(2 / 3 * (math.pi - phi)))
    return torch.where(norms > 54 ** (1 / 3) / 4 * t ** (2 / 3), kept, 0.0)


def l1_minus_2(norms: Tensor, t: float) -> Tensor:
    """f(x) = |x|_1 - |x|_2 of all norms together (Lou & Yan, 2018): soft thresholding, scaled back to the norm that it costs.

    Where no norm exceeds t the largest alone is left, as it is: |x|_1 - |x|_2 is nothing for a single group.
    """
    soft = (norms - t).clamp_min(0)
    length = soft.norm()
    if float(length) == 0:
        return (torch.arange(len(norms), device=norms.device) == norms.argmax()).to(norms.dtype)
    factors: Tensor = (1 + t / length) * soft / norms.clamp_min(TINY)
    return factors


def log_sum(norms: Tensor, t: float) -> Tensor:
    """f(x) = log(x + eps) (Candes et al., 2008): the larger stationary point, 0 where there is none."""
    eps = 1e-8
    first = norms - eps
    root = first.square() - 4 * (t - norms * eps)
    return torch.where(root > 0, (first + root.clamp_min(0).sqrt()) / (2 * norms.clamp_min(TINY)), 0.0)


def l0(norms: Tensor, t: float) -> Tensor:
    """f(x) = 1 for x > 0: hard thresholding; a group is kept if and only if n > sqrt(2 t)."""
    return (norms > math.sqrt(2 * t)).to(norms.dtype)


OPERATORS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "l1": l1,
    "l1/2": l_half,
    "l1-2": l1_minus_2,
    "log-sum": log_sum,
    "l0": l0,
}

# By operator: the step t that shortens a group of norm n by s, or removes it; for l1-2 about so, for l0 the one that removes it.
STEPS: dict[str, Callable[[float, float], float]] = {
    "l1": lambda n, s: s,
    "l1/2": lambda n, s: 4 * min(s, n / 3) * math.sqrt(max(n - s, 2 * n / 3)),
    "l1-2": lambda n, s: s,
    "log-sum": lambda n, s: min(s, n / 2) * max(n - s, n / 2),
    "l0": lambda n, s: n * n / 2,
}
