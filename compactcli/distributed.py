"""Processes that train together, started by `torchrun`: one where there are no others."""

import gc
import hashlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import CompactError

PATIENCE = timedelta(hours=6)  # for one that reads, tests or writes alone; torchrun ends all where one has failed


def rank() -> int:
    """This process's number, from 0."""
    return torch.distributed.get_rank() if running() else 0


def running() -> bool:
    """Whether this process is one of torchrun's, be it the only one."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def world_size() -> int:
    """How many processes work together."""
    return torch.distributed.get_world_size() if running() else 1


def is_main() -> bool:
    """Whether this process is the one that reads stdin, writes and logs."""
    return rank() == 0


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did, while the block runs. Yields this process's device.

    gloo for tensors on the CPU, nccl for those on CUDA, where each process takes the device of its place on the machine.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_torchelastic_launched():
        yield device
        return
    if device == "cuda":
        place, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= there:
            raise CompactError(
                f"--device cuda: process {place} wants a GPU of its own, and there are {there}; start {there or 'none'}"
            )
        device = f"cuda:{place}"
        torch.cuda.set_device(device)
    importlib.import_module("torch.distributed.nn")  # wrapping a network does, and then its defaults would keep the group alive
    # What is kept of a run lies on the CPU, so that gloo is wanted beside nccl.
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    try:
        yield device
        wait()
    finally:
        gc.collect()  # wrapped networks hold on to the group in cycles, and its threads must end before the interpreter does
        torch.distributed.destroy_process_group()


def shared(value: Any) -> Any:
    """The main process's value, in every process."""
    if not running():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def total(values: Sequence[float], device: str = "cpu") -> list[float]:
    """The sums over all processes."""
    if not running():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    summed: list[float] = tensor.tolist()
    return summed


def share_(tensors: Iterable[Tensor]) -> None:
    """Give every process the main one's values, in place: of running statistics, which each takes over its own images."""
    if running():
        for tensor in tensors:
            torch.distributed.broadcast(tensor.detach(), src=0)  # else a parameter would be taken for a result of it


def wait() -> None:
    """Until every process has come here: one that ends takes the others with it."""
    if running():
        torch.distributed.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """The block runs in the main process before it does in the others: what it downloads is there for them."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def check_alike(model: nn.Module, what: str) -> None:
    """Raise CompactError unless every process has the same network (names and shapes) and the same `what`."""
    if not running():
        return
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in model.state_dict().items()]
    own = hashlib.sha256(repr((shapes, what)).encode()).hexdigest()
    digests: list[str] = [""] * world_size()
    torch.distributed.all_gather_object(digests, own)
    others = [number for number, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise CompactError(f"process {others[0]} has another network, other settings or other data; give all the same")


def sharers(images: int) -> int:
    """How many processes share a batch: one of fewer than two images for each is taken whole by every one."""
    return world_size() if images >= 2 * world_size() else 1


def part(batch: Tensor) -> Tensor:
    """What this process takes of a batch (n,)."""
    return batch[rank() :: world_size()] if sharers(len(batch)) > 1 else batch


def wrapped(network: nn.Module, device: str, has_unused: Callable[[], bool]) -> nn.Module:
    """The network with the mean of all processes' gradients behind each backward pass.

    `has_unused` says whether there are parameters that the loss does not depend on.
    """
    if not running():
        return network
    where = [device] if device.startswith("cuda") else None
    return DistributedDataParallel(network, device_ids=where, find_unused_parameters=has_unused())


def unsynchronised(network: nn.Module) -> AbstractContextManager[Any]:
    """Backward passes that only add to this process's gradients."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


class Sum(torch.autograd.Function):
    """The sum of a tensor over all processes, through which gradients flow."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        """(any shape) -> the same shape."""
        summed = tensor.clone()
        torch.distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        """Every process's loss depends on every process's part."""
        summed = gradient.contiguous().clone()
        torch.distributed.all_reduce(summed)
        return summed
