"""What a network is and does: parameters, MACs, thop's figure, latency, accuracy, redundancy."""

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import kernels
from .errors import CompactError
from .graph import copied, named_failure, not_finite, run_fake, scores

MemoryFormat = Literal["contiguous", "channels_last"]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WARM_UP = 2  # runs before the first that counts
PASSES = 9  # over which the share of time of a layer is taken
ACTIVATION_IMAGES = 64  # of which the redundancy of activations is taken, and of as many ...
ACTIVATION_ROWS = 4_096  # positions of a batch
ROUNDING = 1e-12  # of an energy, below which nothing is left of it but rounding
PROBES = 8  # random images on which a network is compared with what it was, where there are no real ones


@dataclass(frozen=True)
class Accuracy:
    """How well a network labels images. Percent; cross-entropy in nats."""

    top1: float
    top5: float
    loss: float
    images: int


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


@dataclass(frozen=True)
class Redundancy:
    """How alike a layer's filters are (o filters, flattened and mean-centred), or what they make of images."""

    max_abs_corr: float  # mean over filters of the largest |correlation| with another filter
    mean_abs_corr: float  # mean |correlation| over pairs
    effective_rank: float  # exp of the entropy of the normalised singular values (Roy & Vetterli 2007)
    rank_ratio_99: float  # share of the singular values that hold 99 % of the energy


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


def latency(
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


def redundancy(weight: Tensor) -> Redundancy | None:
    """How alike the filters of a weight (o, i, k, k) are; None if there are fewer than two, or one is not finite."""
    filters = weight.detach().flatten(1).double()
    if len(filters) < 2 or not filters.isfinite().all():
        return None
    gram = filters @ filters.T
    return _redundancy(_correlation(filters, gram), gram if len(filters) <= filters.shape[1] else filters.T @ filters)


def _redundancy(correlation: Tensor, gram: Tensor) -> Redundancy:
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


def activation_redundancy(
    model: nn.Module, names: Sequence[str], batches: Sequence[Tensor], images: int = ACTIVATION_IMAGES
) -> dict[str, Redundancy]:
    """How alike the channels are that each of the named convolutions and linear layers makes of images, from `images` at most."""
    layers = {model.get_submodule(name): name for name in names}
    layers = {layer: name for layer, name in layers.items() if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)}
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}  # positions, sum (o,), products (o, o), about the mean of the first batch
    origins: dict[str, Tensor] = {}

    def add(layer: nn.Module, _args: object, output: Tensor) -> None:
        rows = (output if isinstance(layer, nn.Linear) else output.movedim(1, -1)).flatten(0, -2)
        rows = rows[:: -(-len(rows) // ACTIVATION_ROWS)]
        name = layers[layer]
        rows = rows - origins.setdefault(name, rows.mean(0))
        count, total, products = sums.get(name, (0, torch.zeros(()), torch.zeros(())))
        sums[name] = (count + len(rows), total + rows.sum(0).double(), products + (rows.T @ rows).double())

    with ExitStack() as hooks, torch.inference_mode():
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(add))
        for batch in islice(batches, max(1, -(-images // len(batches[0])))):
            model.eval()(batch)
    return {name: _redundancy(*_covariances(*own)) for name, own in sums.items() if len(own[2]) > 1}


def _covariances(count: int, total: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """(|correlation|, covariance) from a number of rows, their sum and the sum of their products."""
    covariance = (products - torch.outer(total, total) / count) / count
    deviation = covariance.diagonal().clamp_min(1e-30).sqrt()
    return (covariance / torch.outer(deviation, deviation)).abs().fill_diagonal_(0), covariance


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
