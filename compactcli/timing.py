"""How long each layer takes at other widths: a table measured on this machine, which a budget of latency is met by."""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import budget, latency, resume
from .artefact import Network
from .budget import LayerTime, Times
from .errors import CompactError, shape_text
from .graph import copied, trace
from .latency import FORMATS, MemoryFormat
from .layers import Layer, layers
from .plain import plained

SCHEMA = "compactcli/latency-table/1"
KEY = "compactcli_latency"  # the metadata entry of a run that is planned by a table
SHARES = (1.0, 0.5, 0.25)  # of a layer's channels, at which it is timed
ROUNDS = 9  # at least
SECONDS = 0.05  # for each kind of layer, at least
WHOLE = 20  # times as long for the network
WIDEST = 1 << 31  # channels beyond all sense

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}  # by axes

LIKE = ("kernel_size", "stride", "padding", "dilation", "padding_mode")  # what convolutions of other widths have alike

Point = tuple[int, int, float]  # (outputs, inputs, milliseconds)


@dataclass(frozen=True)
class Timed:
    """One layer at several widths; all in milliseconds for one batch."""

    name: str
    shape: tuple[int, ...]  # of its weight
    kernel: tuple[Point, ...]  # the layer itself
    pointwise: tuple[Point, ...]  # one that is applied to each of its outputs alone, as decompositions end in
    after: tuple[Point, ...]  # normalisation and activation behind it


@dataclass(frozen=True)
class Table:
    """What `bench --save` writes: a network's layers, and the network, timed at one setting."""

    arch: str
    input_shape: tuple[int, ...]
    batch: int
    threads: int
    device: str
    processor: str
    torch: str
    memory_format: MemoryFormat
    whole_ms: float
    layers: tuple[Timed, ...]

    def times(self, layers: Sequence[Layer]) -> Times:
        """What the budget of a network with these layers counts. Raises CompactError if the table is another network's."""
        known = {timed.name: timed for timed in self.layers}
        for layer in layers:
            if layer.called and (layer.name not in known or known[layer.name].shape != layer.shape):
                other = known[layer.name].shape if layer.name in known else ()
                what = (
                    f"{layer.name} is {shape_text(layer.shape)} here, {shape_text(other) if other else 'not there'} in the table"
                )
                raise CompactError(f"the latency table is of another network: {what}; measure it with bench --save")
        own = {name: LayerTime(*map(_fitted, (timed.kernel, timed.pointwise, timed.after))) for name, timed in known.items()}
        return Times(own, self.whole_ms)

    def dumps(self) -> bytes:
        """The table as a file holds it: schema compactcli/latency-table/1."""
        tree = {"schema": SCHEMA, **vars(self), "layers": [vars(timed) for timed in self.layers]}
        return f"{json.dumps(tree, indent=1)}\n".encode()


def load(path: Path) -> Table:
    """The table in a file. Raises CompactError if there is none."""
    try:
        return loads(path.read_text(encoding="utf-8"), path.name)
    except OSError as problem:
        raise CompactError(f"{path}: {(problem.strerror or str(problem)).lower()}; make it with bench --save") from None
    except UnicodeDecodeError:
        raise CompactError(f"{path.name} is not a latency table; make one with bench --save") from None


def kept(path: Path) -> Table | None:
    """The table that a search was planned by, in the file that it is kept in; None if it was by none.

    Raises CompactError if that is no such file.
    """
    text = resume.check(path).get(KEY)
    return None if text is None else loads(text, path.name)


def loads(text: str, name: str) -> Table:
    """The table that `dumps` wrote, in the file `name`. Raises CompactError if it is none."""
    try:
        tree = json.loads(text)
        whole = float(tree.pop("whole_ms"))
        if tree.pop("schema") != SCHEMA or not 0 < whole < math.inf:
            raise ValueError
        layers = tuple(
            Timed(each["name"], tuple(each["shape"]), *(_points(each[key]) for key in ("kernel", "pointwise", "after")))
            for each in tree.pop("layers")
        )
        return Table(**{**tree, "input_shape": tuple(tree["input_shape"])}, whole_ms=whole, layers=layers)
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError):
        raise CompactError(f"{name} is not a latency table; make one with bench --save") from None


def _points(rows: Any) -> tuple[Point, ...]:
    points = tuple((int(out), int(into), float(ms)) for out, into, ms in rows)
    if not all(math.isfinite(ms) and ms >= 0 and min(out, into) >= 0 and max(out, into) < WIDEST for out, into, ms in points):
        raise ValueError
    return points


def _fitted(points: Sequence[Point]) -> budget.Floats:
    """(a, b, c, d), none below zero, with a + b out + c in + d out in nearest to the times, as shares of them; zeros of none."""
    result = np.zeros(4)
    if not points:
        return result
    out, into, ms = np.array(points, dtype=float).T
    terms = np.stack([np.ones_like(out), out, into, out * into], axis=1) / np.maximum(ms, 1e-9)[:, None]
    scale = terms.max(0)
    left = np.flatnonzero(scale).tolist()
    while left:
        found = np.linalg.lstsq(terms[:, left] / scale[left], np.ones(len(ms)), rcond=1e-8)[0]
        if found.min() >= 0:
            result[left] = found / scale[left]
            break
        left.pop(int(found.argmin()))
    return result


def table(
    network: Network,
    *,
    input_shape: Sequence[int] | None = None,
    batch: int = 1,
    threads: int | None = None,
    device: str = "cpu",
) -> Table:
    """The network's layers timed on this machine, each kind of them once, at SHARES of its widths.

    In the memory format in which the whole network is faster. Raises CompactError where it does not run.
    """
    shape = tuple(input_shape or network.input_shape)
    module = plained(network.module, shape)
    found = [layer for layer in layers(trace(module, shape)) if layer.called]
    with latency.thread_count(threads) as used:
        memory_format, whole_ms = _whole(module, (batch, *shape), device, WHOLE * SECONDS)
        images = _images(module, [layer.name for layer in found], (batch, *shape))
        kinds: dict[str, tuple[tuple[Point, ...], ...]] = {}
        timed = []
        for layer in found:
            bench = _Bench(module, layer, images[layer.name], device, memory_format)
            if bench.kind not in kinds:
                kinds[bench.kind] = bench.points(SECONDS)
            timed.append(Timed(layer.name, layer.shape, *kinds[bench.kind]))
    return Table(
        arch=network.recipe.architecture,
        input_shape=shape,
        batch=batch,
        threads=used,
        device=device,
        processor=latency.processor(device),
        torch=torch.__version__,
        memory_format=memory_format,
        whole_ms=whole_ms,
        layers=tuple(timed),
    )


def _whole(module: nn.Module, shape: Sequence[int], device: str, seconds: float) -> tuple[MemoryFormat, float]:
    """(the memory format in which the network is faster, its milliseconds)."""
    forms: tuple[MemoryFormat, ...] = ("contiguous", "channels_last")
    timers = [timer(copied(module), shape, device, form) for form in forms]
    time_in_turn(timers, seconds)
    return min(zip(forms, (each.median_ms for each in timers), strict=True), key=lambda found: found[1])


def _images(module: nn.Module, names: Sequence[str], shape: Sequence[int]) -> dict[str, torch.Size]:
    """The shape of what each layer reads when the network does images of a shape."""
    found: dict[str, torch.Size] = {}

    def note(layer: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        found[names_of[layer]] = (args[0] if args else kwargs["input"]).shape

    names_of = {module.get_submodule(name): name for name in names}
    with ExitStack() as hooks, torch.inference_mode():
        for layer in names_of:
            hooks.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
        module.eval()(torch.zeros(*shape))
    return found


class _Bench:
    """One layer by itself, and what comes behind it, at any widths, which are those of its weight's first two axes."""

    def __init__(self, module: nn.Module, layer: Layer, image: torch.Size, device: str, memory_format: MemoryFormat) -> None:
        self.layer, self.image, self.device, self.memory_format = layer, image, device, memory_format
        self.owner = module.get_submodule(layer.name)
        geometry = {name: value for name, value in vars(self.owner).items() if isinstance(value, int | tuple | str)}
        biased = getattr(self.owner, "bias", None) is not None
        self.kind = repr((type(self.owner), layer.shape, layer.positions, layer.norm is not None, image, geometry, biased))

    def points(self, seconds: float) -> tuple[tuple[Point, ...], ...]:
        """Of the layer, of a pointwise one on its outputs, and of what comes behind it; none where it is of another kind."""
        if not isinstance(self.owner, (nn.Linear, *CONVOLUTIONS)):
            return (), (), ()
        first, second = (self._widths(axis) for axis in (0, 1))
        timers = {("kernel", a, b): self._timer(*self._kernel(a, b)) for a in first for b in second}
        with torch.inference_mode():
            written = timers["kernel", first[0], second[0]].run().shape
        if isinstance(self.owner, nn.Conv2d | nn.Linear) and self.layer.groups == 1:
            timers |= {("pointwise", a, b): self._timer(*self._pointwise(a, b, written)) for a in first for b in first}
        if self.layer.norm is not None:
            axis = self.layer.out_axis
            for out in self._widths(axis):
                behind = nn.Sequential(NORMS[len(written)](out), nn.ReLU())
                timers["after", *((out, 0) if axis == 0 else (0, out))] = self._timer(behind, (written[0], out, *written[2:]))
        time_in_turn(list(timers.values()), seconds)
        return tuple(
            tuple((a, b, timer.median_ms) for (part, a, b), timer in timers.items() if part == wanted)
            for wanted in ("kernel", "pointwise", "after")
        )

    def _widths(self, axis: int) -> list[int]:
        """Shares of an axis of the weight that the layer can have, the whole first."""
        full, groups = self.layer.shape[axis], self.layer.groups
        if groups == 1 or (axis == 0 and self.layer.shape[1] == 1):
            return sorted({max(1, round(share * full)) for share in SHARES}, reverse=True)
        whole = groups if axis == 0 else 1  # the outputs of a group, or its inputs
        return sorted({max(whole, round(share * full / whole) * whole) for share in SHARES}, reverse=True)

    def _kernel(self, first: int, second: int) -> tuple[nn.Module, Sequence[int]]:
        """The layer with other widths, and the shape of what it reads then."""
        if isinstance(self.owner, nn.Linear):
            return nn.Linear(second, first), (*self.image[:-1], second)
        assert isinstance(self.owner, CONVOLUTIONS)
        groups = self.owner.groups
        if groups > 1 and self.layer.shape[1] == 1:  # each channel by itself: there are fewer groups then
            groups = max(1, groups * first // self.layer.shape[0])
        inputs, outputs = (first, second * groups) if self.layer.transposed else (second * groups, first)
        like: Any = {name: getattr(self.owner, name) for name in LIKE}
        layer = type(self.owner)(inputs, outputs, groups=groups, bias=self.owner.bias is not None, **like)
        return layer, (self.image[0], inputs, *self.image[2:])

    def _pointwise(self, outputs: int, inputs: int, written: Sequence[int]) -> tuple[nn.Module, Sequence[int]]:
        if isinstance(self.owner, nn.Linear):
            return nn.Linear(inputs, outputs), (*written[:-1], inputs)
        return nn.Conv2d(inputs, outputs, 1, bias=False), (written[0], inputs, *written[2:])

    def _timer(self, module: nn.Module, shape: Sequence[int]) -> "Timer":
        return timer(module, shape, self.device, self.memory_format)


def timer(module: nn.Module, shape: Sequence[int], device: str, memory_format: MemoryFormat) -> "Timer":
    """A network or layer that is to be timed on images of a shape (n, c, h, w), on a device and in a memory format."""
    form = FORMATS[memory_format] if len(shape) == 4 else torch.contiguous_format
    module = module.eval().to(device)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:  # others have no such format
            tensor.data = tensor.data.to(memory_format=form)
    return Timer(module, torch.rand(*shape).to(device, memory_format=form))


class Timer:
    """A module, what it reads, and how long it took."""

    def __init__(self, module: nn.Module, image: Tensor) -> None:
        self.module, self.image = module, image
        self.times_ms: list[float] = []

    def run(self) -> Tensor:
        result: Tensor = self.module(self.image)
        return result

    def once(self, clock: Callable[[], float]) -> None:
        latency.wait(self.image.device)
        start = clock()
        self.run()
        latency.wait(self.image.device)
        self.times_ms.append(1e3 * (clock() - start))

    @property
    def median_ms(self) -> float:
        return statistics.median(self.times_ms[latency.WARM_UP :])


def time_in_turn(timers: Sequence[Timer], seconds: float) -> None:
    """Round after round, so that a machine that slows down slows all alike, by the device's own `latency.clock`."""
    clock = latency.clock(str(timers[0].image.device))
    end = time.perf_counter() + seconds
    with torch.inference_mode():
        while len(timers[-1].times_ms) < latency.WARM_UP + ROUNDS or time.perf_counter() < end:
            for timer in timers:
                timer.once(clock)
