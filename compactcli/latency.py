"""How long networks and their layers take: rounds over all that are compared, on a CPU or a GPU."""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .errors import CompactError
from .graph import copied

MemoryFormat = Literal["contiguous", "channels_last"]
FORMATS: dict[MemoryFormat, torch.memory_format] = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WARM_UP = 2  # runs before the first that counts
PASSES = 9  # over which the share of time of a layer is taken


@dataclass(frozen=True)
class Latency:
    """How long a network takes for one batch."""

    batch: int  # images
    threads: int  # of the CPU
    memory_format: MemoryFormat
    median_ms: float
    iqr_ms: float  # interquartile range
    images_per_second: float  # at the median
    runs: int
    peak_memory_bytes: int | None  # on CUDA; None where torch does not count


def of(
    modules: Sequence[nn.Module],
    input_shape: Sequence[int],
    *,
    batch: int = 1,
    threads: int | None = None,
    repeats: int = 5,
    seconds: float = 1.0,
    device: str = "cpu",
    memory_formats: Sequence[MemoryFormat] = ("contiguous", "channels_last"),
) -> list[Latency]:
    """Latency of each network in eval mode, in the memory format in which its median is lowest.

    Every round runs every network in every format once, so that a machine that slows down slows all alike. There are
    `repeats` rounds, and more until `seconds` have gone by. The networks and torch's threads are left as they were.
    Raises CompactError if a network does not run in such batches on the device, or there are fewer than two rounds.
    """
    if repeats < 2:
        raise CompactError(f"repeats is {repeats}; it must be 2 or more: one run has no spread")
    with thread_count(threads) as used:
        runs = []
        for module in modules:
            runs.append([_Run(module, input_shape, batch, device, memory_format) for memory_format in memory_formats])
        every = [run for each in runs for run in each]
        with torch.inference_mode():
            for run in every:
                run.warm_up()
            end = time.perf_counter() + seconds
            while len(every[-1].times_ms) < repeats or time.perf_counter() < end:
                for run in every:
                    run.once()
        return [min((run.latency(used) for run in each), key=lambda found: found.median_ms) for each in runs]


@contextmanager
def thread_count(threads: int | None) -> Iterator[int]:
    """torch's threads set to a number, or as they are, while the block runs. Yields how many there are."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def clock(device: str) -> Callable[[], float]:
    """What tells the seconds of work on a device. One thread of a CPU has its own: what others take in between does not count."""
    return time.thread_time if torch.device(device).type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def processor(device: str) -> str:
    """The name of what a device computes on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


class _Run:
    """One network in one memory format on one device, with its input and what its runs took."""

    def __init__(
        self, module: nn.Module, input_shape: Sequence[int], batch: int, device: str, memory_format: MemoryFormat
    ) -> None:
        self.memory_format, self.batch = memory_format, batch
        self.device = torch.device(device)
        self.times_ms: list[float] = []
        self.peak_memory_bytes: int | None = None
        with self._named_failure():
            self.module = _laid_out(module, self.device, memory_format)
            image = torch.rand(batch, *input_shape, generator=torch.Generator().manual_seed(0))
            self.image = image.to(self.device, memory_format=FORMATS[memory_format])

    def warm_up(self) -> None:
        """Let libraries choose their kernels; then measure memory."""
        with self._named_failure():
            for _ in range(WARM_UP):
                self.module(self.image)
            wait(self.device)
            if self.device.type == "cuda":
                self.peak_memory_bytes = self._peak_memory()

    def once(self) -> None:
        wait(self.device)
        start = time.perf_counter()
        self.module(self.image)
        wait(self.device)
        self.times_ms.append(1e3 * (time.perf_counter() - start))

    def latency(self, threads: int) -> Latency:
        low, median, high = statistics.quantiles(self.times_ms, n=4, method="inclusive")
        return Latency(
            batch=self.batch,
            threads=threads,
            memory_format=self.memory_format,
            median_ms=median,
            iqr_ms=high - low,
            images_per_second=1e3 * self.batch / median,
            runs=len(self.times_ms),
            peak_memory_bytes=self.peak_memory_bytes,
        )

    def _peak_memory(self) -> int:
        """Bytes of weights, input and activations: other networks' weights lie on the device too, and do not count."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.module(self.image)
        wait(self.device)
        own = {id(tensor): tensor for tensor in [*self.module.parameters(), *self.module.buffers(), self.image]}
        return torch.cuda.max_memory_allocated(self.device) - before + sum(tensor.nbytes for tensor in own.values())

    @contextmanager
    def _named_failure(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as problem:
            reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]
            what = f"the network does not run on {self.device} in batches of {self.batch}: {reason}"
            raise CompactError(f"{what}; try a smaller batch, or another device") from None


def _laid_out(module: nn.Module, device: torch.device, memory_format: MemoryFormat) -> nn.Module:
    """A copy in eval mode on the device. Tensors that lie there in this format already are shared, not copied."""

    def placed(tensor: Tensor) -> Tensor:
        there = tensor.detach().to(device, memory_format=FORMATS[memory_format] if tensor.ndim == 4 else torch.preserve_format)
        return nn.Parameter(there, requires_grad=False) if isinstance(tensor, nn.Parameter) else there

    memo = {id(tensor): placed(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    return copied(module, memo).eval()


def layer_times(model: nn.Module, names: Sequence[str], input_shape: Sequence[int], passes: int = PASSES) -> dict[str, float]:
    """The share of a forward pass of one image that each of the named layers takes: medians of a few passes."""
    layers = {model.get_submodule(name): name for name in names}
    started: dict[nn.Module, float] = {}
    taken: dict[str, list[float]] = {name: [] for name in names}

    now = clock("cpu")

    def enter(layer: nn.Module, _args: object) -> None:
        started[layer] = now()

    def leave(layer: nn.Module, _args: object, _output: object) -> None:
        taken[layers[layer]][-1] += now() - started[layer]

    whole: list[float] = []
    image = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0))
    with ExitStack() as hooks, torch.inference_mode():
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(enter))
            hooks.enter_context(layer.register_forward_hook(leave))
        for _ in range(WARM_UP + passes):
            for own in taken.values():
                own.append(0.0)
            start = now()
            model.eval()(image)
            whole.append(now() - start)
    shares = {name: [own / all_ for own, all_ in zip(times, whole, strict=True)] for name, times in taken.items()}
    return {name: statistics.median(own[WARM_UP:]) for name, own in shares.items()}
