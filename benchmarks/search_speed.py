"""Time of a method's training step beside a plain one: `python -m benchmarks search_speed`.

A CIFAR-10 ResNet (JPEG images, decoded beforehand), batch 128, no teacher, the settings and the precision of `finetune`:

- plain: the original in the one training loop, without hooks;
- search: the same loop as `compress --method METHOD --ratio R --epochs N` runs it, at the defaults, on copies of the original.

In every repeat each trains once, in turn, in one process: WARM_UP steps that are not counted, then `--steps` that are; all the
work of a step counts, its data included. The figure of a repeat is the mean step, what is told the median over the
repeats. `hooks_share` is the part of a search step that the hooks take; what else it takes more than a plain one are the
kernels that are made, and their gradients. Let nothing else run.

For the methods whose layers make their kernels, `folded` is the time of the network that `load` gives, in eval mode in its
better memory format, as a share of the original's: one image, median of 9 rounds in turn.

Required are the shares in CASES.

    python -m benchmarks search_speed [--methods hinge linearconv csg fcf] [--repeats 5] [--steps 20]
"""

import argparse
import copy
import os
import statistics
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from compactcli import artefact, kernels, latency, train
from compactcli.artefact import Network
from compactcli.compress import Search, Target, compress
from compactcli.history import Watch
from compactcli.methods import Method, Progress, get

from ._common import checkpoint, write
from .train_speed import SETTINGS, WARM_UP, Clock, Enough, Material, images_needed, material_of, precision

ROUNDS = 9  # of the folded network's time


@dataclass(frozen=True)
class Case:
    """What is timed of a method, and the most that it may take."""

    network: str
    ratio: float
    step: float  # in plain steps
    folded: float | None = None  # in the original's time; None: its layers are plain


CASES = {
    "hinge": Case("resnet56", 0.5, 1.35),
    "linearconv": Case("resnet20", 0.5, 1.15, 1.05),
    "csg": Case("resnet20", 0.43, 1.25, 1.05),
    "fcf": Case("resnet20", 0.5, 1.05),
}


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/search_speed-METHOD.json for each method."""
    parser = argparse.ArgumentParser(prog="search_speed")
    parser.add_argument("--methods", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="that are timed in every run")
    options = parser.parse_args(arguments)
    command = " ".join(["python -m benchmarks search_speed", *arguments])
    for name in options.methods:
        load = os.getloadavg()[0]
        result = _timed(name, CASES[name], options.repeats, options.steps)
        settings = {**SETTINGS.identity(), "computed_in": precision(), "warm_up": WARM_UP}
        write(f"search_speed-{name}", {"command": command, "load_before": load, "settings": settings, **result})


def _timed(name: str, case: Case, repeats: int, steps: int) -> dict[str, Any]:
    """Everything about one method."""
    network = artefact.open_model(checkpoint(f"{case.network}-cifar10jpeg.th"))
    material = material_of(network, images_needed(steps))
    plain, search, hooks = [], [], []
    for _ in range(repeats):
        plain.append(_plain(network, material, steps))
        seconds, hooked = _search(network, material, steps, name, case.ratio)
        search.append(seconds)
        hooks.append(hooked)
        told = f"plain {1000 * plain[-1]:.0f} ms, search {1000 * seconds:.0f} ms, its hooks {1000 * hooked:.0f} ms"
        print(f"{name}, {case.network}, a step: {told}", flush=True)
    rows = [_row("plain", plain), _row("search", search), _row("hooks of a search step", hooks)]
    medians = [row["seconds_per_step"] for row in rows]
    verdict = {"ratio": medians[1] / medians[0], "required": case.step, "met": medians[1] / medians[0] <= case.step}
    verdict["hooks_share"] = medians[2] / medians[1]
    folded = None if case.folded is None else _folded(network, name, case.ratio, case.folded)
    _show(f"{name}, {case.network}, {steps} steps, median of {repeats}", rows, verdict, folded)
    result = {"network": case.network, "steps": steps, "repeats": repeats}
    method = {"name": name, "ratio": case.ratio, **asdict(get(name)().options)}
    return {**result, "method": method, "rows": rows, **verdict, "folded": folded}


def _plain(network: Network, material: Material, steps: int) -> float:
    """Seconds of a step."""
    module, clock = copy.deepcopy(network.module), Clock(steps)
    with suppress(Enough):
        train.fit_(module, material.dataset, material.preprocessing, SETTINGS, watch=_watched(clock))
    return clock.seconds() / steps


def _search(network: Network, material: Material, steps: int, name: str, ratio: float) -> tuple[float, float]:
    """Seconds of a step, and of those the hooks'."""
    took: list[float] = []
    method, clock = _hooked(get(name), took), Clock(steps)
    with suppress(Enough):
        search = Search(material.dataset, SETTINGS, watch=_watched(clock))
        compress(copy.deepcopy(network), name, method, Target(ratio), search=search)
    return clock.seconds() / steps, sum(took[-steps:]) / steps


def _hooked(method: type[Method], took: list[float]) -> Method:
    """The method, which notes the seconds that its hooks take in each step."""

    class Timed(method):  # type: ignore[misc,valid-type]
        def regularise(self, model: nn.Module, progress: Progress) -> None:
            start = time.perf_counter()
            super().regularise(model, progress)
            took.append(time.perf_counter() - start)

        def project(self, model: nn.Module, progress: Progress) -> None:
            start = time.perf_counter()
            super().project(model, progress)
            took[-1] += time.perf_counter() - start

    made: Method = Timed()
    return made


def _folded(network: Network, name: str, ratio: float, required: float) -> dict[str, Any]:
    """The time of the network as it is loaded, beside the original's."""
    one = compress(copy.deepcopy(network), name, get(name)(), Target(ratio))
    kernels.fold_(one.module)
    before, after = latency.of([network.module, one.module], network.input_shape, repeats=ROUNDS, seconds=0.0)
    share = after.median_ms / before.median_ms
    told = {"original_ms": before.median_ms, "folded_ms": after.median_ms, "rounds": ROUNDS}
    return {**told, "share": share, "required": required, "met": share <= required}


def _watched(clock: Clock) -> Watch:
    return Watch(progress=lambda done, total: clock())


def _row(name: str, runs: list[float]) -> dict[str, Any]:
    return {"name": name, "seconds_per_step": statistics.median(runs), "spread": max(runs) - min(runs), "runs": runs}


def _show(title: str, rows: list[dict[str, Any]], verdict: dict[str, Any], folded: dict[str, Any] | None) -> None:
    table = Table("", title=title, title_justify="left")
    for column in ("ms", "spread", "of plain", "required"):
        table.add_column(column, justify="right")
    for row in rows:
        required = f"{verdict['required']:.2f}" if row["name"] == "search" else ""
        share = row["seconds_per_step"] / rows[0]["seconds_per_step"]
        figures = (f"{1000 * row['seconds_per_step']:.1f}", f"{1000 * row['spread']:.1f}")
        table.add_row(row["name"], *figures, f"{share:.3f}", required)
    if folded is not None:
        table.add_row("folded", f"{folded['folded_ms']:.2f}", "", f"{folded['share']:.3f}", f"{folded['required']:.2f}")
    Console(width=120).print(table)
