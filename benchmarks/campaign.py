"""Everything that takes hours, as one list that goes on where it was: `python -m benchmarks campaign`.

- ResNet-56 on CIFAR-10 (JPEG images) at 50 % and 24 % of its MACs, 40 epochs in all with weight decay 5e-4, beside the
  uncompressed control and Torch-Pruning 1.6.1 with and without sparse learning (`finetune`). Required: hinge's error at most 0.0
  and 0.8 points above the control's, its accuracy 0.5 and 1.0 points above the best of the peer's in the mean of 3 seeds, more
  than 0.3 in one.
- ResNet-20 with all five methods at their papers' rates, 30 epochs in all, beside the control (`finetune`).
- ResNet-34, ResNet-50 and VGG-16 by all five methods: time in PyTorch and ONNX Runtime, batch 1 and 16 (`runtimes`).
- with `--device cuda`, the first again with 120 epochs, by 3 seeds.

A search, where there is one, has a quarter of the epochs. Each row is a command of its own, in a process of its own, which
writes its row the moment it ends; what fails is told at the end and keeps none of the others. Rows that there are stay, and a run
that was broken off goes on, with --resume; without it all is made anew. `--list` runs nothing: it shows what is done and what is
left, in minutes on one thread of an AMD EPYC (on another machine, or a GPU, they differ). Then `python -m benchmarks tables`.

    python -m benchmarks campaign [--resume] [--list] [--only resnet56 "auto 0.5"] [--device cuda] [--limit 1000]
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from compactcli.methods import names

from . import runtimes
from ._common import ROOT, read
from ._papers import RATES
from .finetune import PEERS, Run

RATIOS = (0.5, 0.24)
EPOCH = {"resnet20": 1.6, "resnet56": 4.8}  # minutes of one, with the teacher: benchmarks/results/finetune-resnet20.json, by MACs
TIMES = {"resnet34": 10.0, "resnet50": 10.0, "cifar:vgg16": 4.0}  # minutes of a row, roughly
DECAY = {"resnet20": Run.weight_decay, "resnet56": 5e-4}  # weight decay of all of a network's rows
LENGTHS = {40: (0,), 120: (0, 1, 2)}  # seeds by epochs, of ResNet-56
EPOCHS = 30  # of ResNet-20
SEARCH = 4  # as many epochs to each one of the search


@dataclass(frozen=True)
class Entry:
    """One row: the file it is in, its key there, the command that makes it."""

    file: str
    key: str
    command: tuple[str, ...]
    minutes: float

    @property
    def name(self) -> str:
        return f"{self.file.partition('-')[2]} {self.key}".strip()

    @property
    def row(self) -> dict[str, Any] | None:
        """What there is of it."""
        found: dict[str, Any] | None = read(self.file).get("rows", {}).get(self.key)
        return found


def main(arguments: list[str]) -> None:
    """Run what is wanted, or list it."""
    parser = argparse.ArgumentParser(prog="campaign")
    parser.add_argument("--resume", action="store_true", help="keep the rows there are; go on with a run that was broken off")
    parser.add_argument("--list", action="store_true", help="what is done and what is left; nothing is run")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name holds one of these")
    parser.add_argument("--device", default="cpu", help="that trains: cpu, cuda")
    parser.add_argument("--limit", type=int, help="images of each split, to try it out")
    options = parser.parse_args(arguments)
    chosen = [entry for entry in entries(options.device, options.limit) if any(part in entry.name for part in options.only)]
    if options.list:
        show(chosen)
        return
    failed = []
    for entry in chosen:
        if not (options.resume and entry.row):
            resume = ["--resume"] if options.resume else []
            if subprocess.run([sys.executable, "-m", "benchmarks", *entry.command, *resume], cwd=ROOT).returncode:
                failed.append(entry.name)
    show(chosen)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; --resume tries them again")


def entries(device: str = "cpu", limit: int | None = None) -> list[Entry]:
    """All rows, in the order in which they are made."""
    return [*(_trained(run) for run in _runs(device, limit)), *_timed()]


def planned(network: str, contender: str, ratio: float, epochs: int, **others: Any) -> Run:
    """The campaign's run of a contender of `finetune`."""
    own = Run("auto", ratio, epochs // SEARCH, epochs, weight_decay=DECAY[network], network=network, **others)
    return own.of(contender)


def _runs(device: str, limit: int | None) -> Iterator[Run]:
    """The runs of `finetune`; each once."""
    common: dict[str, Any] = {"limit": limit, "device": device}
    for epochs, seeds in LENGTHS.items() if device != "cpu" else [(40, LENGTHS[40])]:
        for seed in seeds:
            yield planned("resnet56", "control", 1.0, epochs, seed=seed, **common)
            for ratio in RATIOS:
                for contender in ("auto", *PEERS):
                    yield planned("resnet56", contender, ratio, epochs, seed=seed, **common)
    for contender, ratio in [("control", 1.0), *((name, rate.ratio) for name, rate in RATES.items())]:
        yield planned("resnet20", contender, ratio, EPOCHS, **common)


def _trained(run: Run) -> Entry:
    flags = [word for flag in run.flags for word in flag.split()]
    own = ("--network", run.network, "--only", run.contender, "--ratios", f"{run.ratio:g}", *flags, "--device", run.device)
    share = 1.0 if run.limit is None else min(1.0, run.limit / 50_000)
    return Entry(f"finetune-{run.network}", run.key, ("finetune", *own), EPOCH[run.network] * run.epochs * share)


def _timed() -> Iterator[Entry]:
    for network in runtimes.NETWORKS:
        for method in names():
            command = ("runtimes", "--networks", network, "--methods", method)
            yield Entry("runtimes", f"{network} {method}", command, TIMES[network])


def show(chosen: list[Entry]) -> None:
    """What is done, and what is left."""
    table = Table("row", "state", "minutes")
    left = [entry for entry in chosen if entry.row is None]
    for entry in chosen:
        row = entry.row
        state = "left" if row is None else "refused" if "failed" in row else "done"
        took = f"{row['seconds'] / 60:.0f}" if row and "seconds" in row else f"~{entry.minutes:.0f}"
        table.add_row(entry.name, state, took)
    minutes = sum(entry.minutes for entry in left)
    table.caption = f"{len(chosen) - len(left)} of {len(chosen)} done; about {minutes / 60:.1f} hours left"
    Console(width=130).print(table)
