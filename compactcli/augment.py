"""Training images moved, mirrored and in part blanked, as tensors, by numbers that depend on each image alone."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK = 0xFFFFFFFF


def varied(
    images: Tensor,
    index: Tensor,
    epoch: int,
    seed: int,
    *,
    flip: bool,
    cutout: int = 0,
    blank: Sequence[float] = (0.0,),
) -> Tensor:
    """`images` uint8 (n, c, h, w) moved by up to an eighth of their size, black beyond the border; half of them mirrored.

    With `cutout`, a square of that many pixels about a random one is filled with `blank`, a share of 255 per channel or
    for all (DeVries & Taylor, 2017). The random numbers depend on (index, epoch, seed) alone, not on what else is in the
    batch, so that the number of processes changes nothing. 32 pixels give the usual crop with padding 4.
    """
    height, width = images.shape[2:]
    pad_y, pad_x = round(height / 8), round(width / 8)
    key = _mix(_mix(_mix(index) ^ (epoch & _MASK)) ^ (seed & _MASK))
    top, left = _mix(key ^ 1) % (2 * pad_y + 1), _mix(key ^ 2) % (2 * pad_x + 1)
    windows = F.pad(images, (pad_x, pad_x, pad_y, pad_y)).unfold(2, height, 1).unfold(3, width, 1)  # a view
    moved = windows[torch.arange(len(images)), :, top, left]  # (n, c, h, w)
    if flip:
        mirrored = (_mix(key ^ 3) & 1).bool().view(-1, 1, 1, 1).to(images.device)
        moved = torch.where(mirrored, moved.flip(3), moved)
    moved = moved.contiguous(memory_format=torch.channels_last)
    if not cutout:
        return moved
    in_rows = _near(_mix(key ^ 4) % height, height, cutout).unsqueeze(2)  # (n, h, 1)
    in_columns = _near(_mix(key ^ 5) % width, width, cutout).unsqueeze(1)  # (n, 1, w)
    fill = torch.tensor(blank).mul(255).round().to(torch.uint8).view(1, -1, 1, 1)
    return torch.where((in_rows & in_columns).unsqueeze(1).to(images.device), fill.to(images.device), moved)


def _near(centre: Tensor, size: int, side: int) -> Tensor:
    """Which of `size` positions lie in the `side` about each centre, (n, size)."""
    first = (centre - side // 2).unsqueeze(1)
    position = torch.arange(size)
    return (position >= first) & (position < first + side)


def _mix(x: Tensor) -> Tensor:
    """A hash of 32-bit integers held in int64, uniform on 0 .. 2^32 - 1 (lowbias32; both factors are below 2^31, so that
    no product leaves int64)."""
    x = (x + 0x9E3779B9) & _MASK
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)
