"""Time of a step of hinge's search beside a plain training step: `python -m benchmarks search_speed`.

ResNet-56 on CIFAR-10 (JPEG images, decoded beforehand), batch 128, no teacher, the settings and the precision of `finetune`:

- plain: the original in the one training loop, without hooks;
- search: the same loop as `compress --method hinge --ratio 0.5 --epochs N` runs it, at the defaults (mode auto), on copies of
  the original: with a matrix behind every layer and a proximal step after each of the optimizer's.

In every repeat each trains once, in turn, in one process: WARM_UP steps that are not counted, then `--steps` that are; all the
work of a step counts, its data included. The figure of a repeat is the mean step, what is told the median over the
repeats. `proximal_share` is the part of a search step that the hooks take; what else it takes
more than a plain one are the products of matrices and filters, and their gradients. Let nothing else run.

Required: a search step takes at most 1.35 times as long as a plain one.

    python -m benchmarks search_speed [--repeats 5] [--steps 20]
"""

import argparse
import copy
import os
import statistics
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from compactcli import artefact, train
from compactcli.artefact import Network
from compactcli.compress import Search, Target, compress
from compactcli.history import Watch
from compactcli.methods import Progress
from compactcli.methods.hinge import Hinge

from ._common import checkpoint, write
from .train_speed import SETTINGS, WARM_UP, Clock, Enough, Material, images_needed, material_of, precision

NETWORK = "resnet56"
RATIO = 0.5
REQUIRED = 1.35  # most that a search step may take, in plain ones


class Timed(Hinge):
    """Hinge, and the seconds that its hooks take in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.took: list[float] = []

    def regularise(self, model: nn.Module, progress: Progress) -> None:
        start = time.perf_counter()
        super().regularise(model, progress)
        self.took.append(time.perf_counter() - start)

    def project(self, model: nn.Module, progress: Progress) -> None:
        start = time.perf_counter()
        super().project(model, progress)
        self.took[-1] += time.perf_counter() - start


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/search_speed.json."""
    parser = argparse.ArgumentParser(prog="search_speed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="that are timed in every run")
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    network = artefact.open_model(checkpoint(f"{NETWORK}-cifar10jpeg.th"))
    material = material_of(network, images_needed(options.steps))
    plain, search, hooks = [], [], []
    for _ in range(options.repeats):
        plain.append(_plain(network, material, options.steps))
        seconds, proximal = _search(network, material, options.steps)
        search.append(seconds)
        hooks.append(proximal)
        told = f"plain {1000 * plain[-1]:.0f} ms, search {1000 * seconds:.0f} ms, its hooks {1000 * proximal:.0f} ms"
        print(f"{NETWORK}, a step: {told}", flush=True)
    rows = [_row("plain", plain), _row("search", search), _row("hooks of a search step", hooks)]
    medians = [row["seconds_per_step"] for row in rows]
    verdict = {"ratio": medians[1] / medians[0], "required": REQUIRED, "met": medians[1] / medians[0] <= REQUIRED}
    verdict["proximal_share"] = medians[2] / medians[1]
    _show(f"{NETWORK}, {options.steps} steps, median of {options.repeats}", rows, verdict)
    command = " ".join(["python -m benchmarks search_speed", *arguments])
    result = {"command": command, "load_before": load, "network": NETWORK, "steps": options.steps, "repeats": options.repeats}
    settings = {**SETTINGS.identity(), "computed_in": precision(), "warm_up": WARM_UP}
    method = {"ratio": RATIO, **asdict(Hinge().options)}
    write("search_speed", {**result, "settings": settings, "method": method, "rows": rows, **verdict})


def _plain(network: Network, material: Material, steps: int) -> float:
    """Seconds of a step."""
    module, clock = copy.deepcopy(network.module), Clock(steps)
    with suppress(Enough):
        train.fit_(module, material.dataset, material.preprocessing, SETTINGS, watch=_watched(clock))
    return clock.seconds() / steps


def _search(network: Network, material: Material, steps: int) -> tuple[float, float]:
    """Seconds of a step, and of those the hooks'."""
    method, clock = Timed(), Clock(steps)
    with suppress(Enough):
        search = Search(material.dataset, SETTINGS, watch=_watched(clock))
        compress(copy.deepcopy(network), "hinge", method, Target(RATIO), search=search)
    return clock.seconds() / steps, sum(method.took[-steps:]) / steps


def _watched(clock: Clock) -> Watch:
    return Watch(progress=lambda done, total: clock())


def _row(name: str, runs: list[float]) -> dict[str, Any]:
    return {"name": name, "seconds_per_step": statistics.median(runs), "spread": max(runs) - min(runs), "runs": runs}


def _show(title: str, rows: list[dict[str, Any]], verdict: dict[str, Any]) -> None:
    table = Table("", title=title, title_justify="left")
    for column in ("ms per step", "spread", "of a plain step", "required"):
        table.add_column(column, justify="right")
    for row in rows:
        required = f"{verdict['required']:.2f}" if row["name"] == "search" else ""
        share = row["seconds_per_step"] / rows[0]["seconds_per_step"]
        figures = (f"{1000 * row['seconds_per_step']:.1f}", f"{1000 * row['spread']:.1f}")
        table.add_row(row["name"], *figures, f"{share:.3f}", required)
    Console(width=120).print(table)
