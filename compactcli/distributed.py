"""Processes that train together, started by `torchrun`: one where there are no others."""

import gc
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from .errors import CompactError

PATIENCE = timedelta(hours=6)  # for one that reads, tests or writes alone; torchrun ends all where one has failed


def rank() -> int:
    """This process's number, from 0."""
    return torch.distributed.get_rank() if _running() else 0


def world_size() -> int:
    """How many processes work together."""
    return torch.distributed.get_world_size() if _running() else 1


def is_main() -> bool:
    """Whether this process is the one that reads stdin, writes and logs."""
    return rank() == 0


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did, while the block runs. Yields this process's device.

    gloo on a CPU, nccl on CUDA, where each process takes the device of its place on the machine.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_torchelastic_launched():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    try:
        yield device
        torch.distributed.barrier()  # a process that leaves early takes the connections of the others with it
    finally:
        gc.collect()  # wrapped networks hold on to the group in cycles, and its threads must end before the interpreter does
        torch.distributed.destroy_process_group()


def shared(value: Any) -> Any:
    """The main process's value, in every process."""
    if not _running():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def total(values: Sequence[float], device: str = "cpu") -> list[float]:
    """The sums over all processes."""
    if not _running():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    summed: list[float] = tensor.tolist()
    return summed


def share_buffers_(model: nn.Module) -> None:
    """Give every process the main one's running statistics, which DDP trains with."""
    if _running():
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


def check_alike(model: nn.Module, what: str) -> None:
    """Raise CompactError unless every process has the same network (names and shapes) and the same `what`."""
    if not _running():
        return
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in model.state_dict().items()]
    own = hashlib.sha256(repr((shapes, what)).encode()).hexdigest()
    digests: list[str] = [""] * world_size()
    torch.distributed.all_gather_object(digests, own)
    others = [number for number, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise CompactError(f"process {others[0]} has another network, other settings or other data; give all the same")


def gathered_gradients(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, through which gradients flow."""
    from torch.distributed.nn.functional import all_reduce

    summed: Tensor = all_reduce(tensor)  # type: ignore[no-untyped-call]
    return summed


def _running() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
