"""Rank and world size: 0 and 1 unless a process group is running (`torchrun` is the engine)."""

import torch.distributed


def rank() -> int:
    """This process's number, from 0."""
    return torch.distributed.get_rank() if _running() else 0


def world_size() -> int:
    """How many processes work together."""
    return torch.distributed.get_world_size() if _running() else 1


def is_main() -> bool:
    """Whether this process is the one that reads, writes and logs."""
    return rank() == 0


def _running() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
