"""FCF's time beside the paper's: `python -m benchmarks fcf_time`.

ResNet-34 at 224 x 224 with random weights, on which time does not depend, one thread, 1 and 16 images.

- whole: `compress --method fcf --ratio R --round auto` at the four cuts of the authors' table, timed in turn with the dense
  network: the whole network, and its convolutions inside blocks alone (the time between hooks around them);
- layer: one 3 x 3 convolution of 128 channels at 28 x 28 that loses the same share of filters and of inputs, as a standard
  convolution of that width, and as a squeeze layer in the width of the whole, with the shares of gather, convolution and scatter.

Each network and layer is timed in both memory formats and counted in its better one; figures are medians. A cut is the share that
is saved. Required is more than the paper's cut in time in every whole row; the goal is 0.8 of the cut in MACs.
A row is written to benchmarks/results/fcf_time.json the moment it is there; --resume keeps those there are.

    python -m benchmarks fcf_time [--repeats 9] [--resume]
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from compactcli import artefact, kernels, measure
from compactcli.artefact import Network
from compactcli.compress import ROUND, Target, compress
from compactcli.latency import FORMATS, MemoryFormat
from compactcli.methods import get
from compactcli.methods._squeeze import Squeeze, expanded

from ._common import Row, Rows, rows, write

WHOLE = {26.83: (10.90, 16.13), 41.37: (16.86, 23.77), 54.87: (31.06, 41.12), 66.05: (42.59, 55.09)}  # MACs -> time, of convs
LAYER = {26.04: (17.63, 13.42), 43.75: (34.71, 30.64), 57.75: (42.19, 40.88), 75.00: (65.70, 59.20)}  # MACs -> standard, squeeze
BATCHES = (1, 16)
GOAL = 0.8  # of the cut in MACs
CHANNELS, SIZE = 128, 28
WARM_UP = 1


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/fcf_time.json."""
    parser = argparse.ArgumentParser(prog="fcf_time")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--resume", action="store_true", help="keep the rows there are")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    command = " ".join(["python -m benchmarks fcf_time", *arguments])
    found = rows("fcf_time") if options.resume else {}
    made: dict[float, nn.Module] = {}
    dense = artefact.fresh(artefact.Wishes("resnet34"), 0)
    for batch in BATCHES:
        todo: list[tuple[str, Callable[[], Row]]] = [
            (f"layer {cut:.2f} batch {batch}", partial(_layer, cut, batch, options.repeats)) for cut in LAYER
        ]
        todo += [(f"whole {cut:.2f} batch {batch}", partial(_whole, dense, made, cut, batch, options.repeats)) for cut in WHOLE]
        for key, row in todo:
            if key not in found:
                found[key] = {"repeats": options.repeats, "load_before": os.getloadavg()[0], **row()}
                write("fcf_time", {"command": command, "rows": found})
    _show(found)


def _whole(dense: Network, made: dict[float, nn.Module], cut: float, batch: int, repeats: int) -> Row:
    """The dense network and a smaller one, in turn."""
    if cut not in made:
        target = Target(1 - cut / 100, round_to=ROUND["cpu"])
        made[cut] = kernels.folded(compress(copy.deepcopy(dense), "fcf", get("fcf")(), target).module)
    nets, image = [dense.module.eval(), made[cut].eval()], torch.randn(batch, *dense.input_shape)
    whole, convs = _in_turn([_Clocked(net, image, name) for net in nets for name in FORMATS], repeats)
    macs = [measure.macs(net, dense.input_shape) for net in nets]
    saved = 1 - macs[1] / macs[0]
    paper, paper_convs = WHOLE[cut]
    cut_time = 1 - whole[1] / whole[0]
    return {
        "macs_cut": 100 * saved,
        "dense_ms": whole[0],
        "ms": whole[1],
        "time_cut": 100 * cut_time,
        "convolutions_dense_ms": convs[0],
        "convolutions_ms": convs[1],
        "convolutions_time_cut": 100 * (1 - convs[1] / convs[0]),
        "paper": {"time_cut": paper, "convolutions_time_cut": paper_convs},
        "met": 100 * cut_time > paper,
        "goal_met": cut_time >= GOAL * saved,
    }


class _Clocked:
    """A network in one memory format, which notes the time of its convolutions inside blocks as well."""

    def __init__(self, net: nn.Module, image: Tensor, name: MemoryFormat) -> None:
        self.net = copy.deepcopy(net).to(memory_format=FORMATS[name])  # type: ignore[call-overload]
        self.image = image.contiguous(memory_format=FORMATS[name])
        self.inside, self.started = 0.0, 0.0
        for path, module in self.net.named_modules():
            if path.startswith("layer") and path.rpartition(".")[2] in ("conv1", "conv2"):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def _leave(self, *_: Any) -> None:
        self.inside += time.perf_counter() - self.started

    def once(self) -> tuple[float, float]:
        """Milliseconds of the whole network, and of those convolutions."""
        self.inside, start = 0.0, time.perf_counter()
        self.net(self.image)
        return 1e3 * (time.perf_counter() - start), 1e3 * self.inside


def _in_turn(clocked: list[_Clocked], repeats: int) -> tuple[list[float], list[float]]:
    """Medians of each network in its better format: of the whole, of its convolutions."""
    runs: list[list[tuple[float, float]]] = [[] for _ in clocked]
    with torch.inference_mode():
        for number in range(WARM_UP + repeats):
            for own, each in zip(runs, clocked, strict=True):
                took = each.once()
                if number >= WARM_UP:
                    own.append(took)
    medians = [tuple(statistics.median(part) for part in zip(*own, strict=True)) for own in runs]
    best = [min(medians[at : at + len(FORMATS)]) for at in range(0, len(medians), len(FORMATS))]
    return [whole for whole, _ in best], [convs for _, convs in best]


def _layer(cut: float, batch: int, repeats: int) -> Row:
    """One layer: dense, standard at the smaller width, squeezed in the width of the whole and its three parts."""
    kept = round(CHANNELS * (1 - cut / 100) ** 0.5)
    found = [_parts(kept, batch, 5 * repeats, name) for name in FORMATS]
    dense, standard, squeeze = (min(each[name] for each in found) for name in ("dense", "standard", "squeeze"))
    best = min(found, key=lambda each: each["squeeze"])
    parts = {name: best[name] for name in ("gather", "convolution", "scatter")}
    return {
        "kept": kept,
        "macs_cut": 100 * (1 - (kept / CHANNELS) ** 2),
        "dense_ms": dense,
        "standard_time_cut": 100 * (1 - standard / dense),
        "squeeze_time_cut": 100 * (1 - squeeze / dense),
        "shares": {name: part / sum(parts.values()) for name, part in parts.items()},
        "paper": dict(zip(("standard_time_cut", "squeeze_time_cut"), LAYER[cut], strict=True)),
    }


def _parts(kept: int, batch: int, repeats: int, name: MemoryFormat) -> dict[str, float]:
    """Milliseconds of the layer in each form and of its parts, in one memory format."""
    generator, memory_format = torch.Generator().manual_seed(0), FORMATS[name]
    dense = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
    standard = nn.Conv2d(kept, kept, 3, padding=1, bias=False)
    layer = Squeeze(dense, kept, kept)
    nn.init.normal_(layer.weight)
    for places in (layer.read, layer.written):
        places.copy_(torch.randperm(CHANNELS, generator=generator)[:kept].sort().values)
    squeeze = layer.folded()
    for module in (dense, standard, squeeze):
        module.to(memory_format=memory_format)  # type: ignore[call-overload]
    image = torch.randn(batch, CHANNELS, SIZE, SIZE).contiguous(memory_format=memory_format)
    part = image[:, :kept].contiguous(memory_format=memory_format)
    gathered = image[:, layer.read]
    forms: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: dense(image),
        "standard": lambda: standard(part),
        "squeeze": lambda: squeeze(image),
        "gather": lambda: image[:, layer.read],
        "convolution": lambda: squeeze.get_submodule("conv")(gathered),
        "scatter": lambda: expanded(part, layer.written, CHANNELS),
    }
    runs: dict[str, list[float]] = {form: [] for form in forms}
    with torch.inference_mode():
        for number in range(WARM_UP + repeats):
            for form, call in forms.items():
                start = time.perf_counter()
                call()
                if number >= WARM_UP:
                    runs[form].append(1e3 * (time.perf_counter() - start))
    return {form: statistics.median(own) for form, own in runs.items()}


def _show(found: Rows) -> None:
    table = Table("row", title="cuts, percent: ours (the paper's)", title_justify="left")
    for column in ("MACs", "time", "convolutions", "standard", "squeeze", "gather, conv, scatter"):
        table.add_column(column, justify="right")
    for key, row in found.items():
        figures = [f"{row['macs_cut']:.1f}"]
        for name in ("time_cut", "convolutions_time_cut", "standard_time_cut", "squeeze_time_cut"):
            figures.append(f"{row[name]:.1f} ({row['paper'][name]:.1f})" if name in row else "")
        figures.append(", ".join(f"{share:.2f}" for share in row.get("shares", {}).values()))
        table.add_row(key, *figures)
    Console(width=130).print(table)
