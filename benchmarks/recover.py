"""Accuracy after compression and fine-tuning, ours beside Torch-Pruning 1.6.1: `python -m benchmarks recover`.

A CIFAR-10 ResNet at 50 % of its MACs, trained for 15 epochs by `finetune` at its defaults with the original as teacher; the
last weights (the originals have seen all training images, so none of them can tell which are best), all 10,000 test images.

- ours: `compress --method hinge --data`, calibrated on 1,024 training images;
- linearconv, csg: likewise, with 50 and 43 % of the parameters (csg: as many as the authors' slices of 12x12 and codes of 72);
- control: the uncompressed network, for what the training alone is worth;
- peer: Torch-Pruning's network of the same MACs, as in `oneshot`.

Required: ours at most 0.5 points below the original, at least 0.5 above the peer; after 20 epochs linearconv at most 0.7 and
csg at most 1.5 below the control.

A row is written to benchmarks/results/recover-NETWORK.json the moment its contender ends, under its name and the flags that
say how it was trained, where these are not the defaults. Until then the run is kept in the temporary folder. After a kill
--resume keeps the rows that there are and goes on with the run that was broken off.

    python -m benchmarks recover [--networks resnet20] [--only ours peer] [--resume] [--set NAME=VALUE ...]
                                 [--epochs 15] [--lr 0.01] [--weight-decay 0.0005] [--distill-weight 0.9] [--cutout 8]
                                 [--seed 0] [--limit 1000] [--device cuda]
"""

import argparse
import copy
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compactcli import artefact, data, measure, report, sources
from compactcli.artefact import Network
from compactcli.cli.training import history_writer
from compactcli.finetune import finetune
from compactcli.history import Watch
from compactcli.optim import Settings

from ._common import Rows, add, checkpoint, images, provenance, rows
from .oneshot import best_pruned, compressed, macs_kept

RATIO = 0.5
IMAGES = 1024  # to calibrate on
MOST_BELOW_ORIGINAL = 0.5  # points
LEAST_ABOVE_PEER = 0.5
MOST_BELOW_CONTROL = {"linearconv": 0.7, "csg": 1.5}
DEFAULTS: dict[str, Any] = {
    "epochs": 15, "lr": None, "weight_decay": 1e-4, "distill_weight": 0.4, "cutout": 0, "seed": 0, "limit": None,
}  # fmt: skip
KEPT = Path(tempfile.gettempdir()) / "compactcli-recover"  # of runs that have not ended

METHODS = {"ours": ("hinge", RATIO), "linearconv": ("linearconv", 0.5), "csg": ("csg", 0.43)}  # by contender, and what it keeps
CONTENDERS = (*METHODS, "control", "peer")


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/recover-NETWORK.json for each network."""
    parser = argparse.ArgumentParser(prog="recover")
    parser.add_argument("--networks", nargs="+", default=["resnet20"])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--resume", action="store_true", help="keep the rows there are; go on with a run that was broken off")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--lr", type=float, help="peak learning rate; by default that of finetune")
    parser.add_argument("--weight-decay", type=float, help="weight decay, on every parameter")
    parser.add_argument("--distill-weight", type=float, help="share of the teacher in the loss")
    parser.add_argument("--cutout", type=int, help="side of a square of every training image that is blanked, pixels")
    parser.add_argument("--seed", type=int, help="of calibration and training")
    parser.add_argument("--limit", type=int, help="images of each split")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="option of our method; may be repeated")
    parser.add_argument("--device", default="cpu", help="that trains: cpu, cuda")
    parser.set_defaults(**DEFAULTS)
    options = parser.parse_args(arguments)
    command = " ".join(["python -m benchmarks recover", *arguments])
    chosen = {flag: value for flag, default in DEFAULTS.items() if (value := getattr(options, flag)) != default}
    flags = [f"--{flag.replace('_', '-')} {value}" for flag, value in chosen.items()]
    chosen_settings = {name: getattr(options, name) for name in (*DEFAULTS, "device") if name != "limit"}
    settings = Settings(**chosen_settings)
    for name in options.networks:
        network = artefact.open_model(checkpoint(f"{name}-cifar10jpeg.th"))
        shape, preprocessing = network.input_shape, network.recipe.preprocessing
        dataset = sources.open_dataset(str(images()), input_shape=shape, preprocessing=preprocessing, limit=options.limit)
        for contender in options.only:
            given = [f"--set {pair}" for pair in options.set if contender in METHODS]
            key = " ".join([contender, *flags, *given])
            if options.resume and key in rows(f"recover-{name}"):
                continue
            print(f"{name}, {key}", flush=True)
            start = time.perf_counter()
            one = _made(contender, network, dataset, settings.seed, options.set)
            made = {**provenance(command, options.device), "seed": settings.seed, "seconds_to_make": time.perf_counter() - start}
            kept = KEPT / (re.sub(r"[^\w.=-]+", "_", f"{name} {key}") + ".safetensors")
            row = made | _trained(one, network, dataset, settings, kept, options.resume)
            add(f"recover-{name}", {key: row}, _judged)
        _show(name)


def _made(contender: str, original: Network, dataset: data.Dataset, seed: int, given: list[str]) -> Network:
    """What is to be trained."""
    if contender in METHODS:
        method, ratio = METHODS[contender]
        return compressed(original, dataset, ratio, IMAGES, seed, method, given)
    return copy.deepcopy(original) if contender == "control" else best_pruned(original, dataset, RATIO)[0]


def _trained(
    one: Network, original: Network, dataset: data.Dataset, settings: Settings, kept: Path, resume: bool
) -> dict[str, Any]:
    """Train one contender with the original as teacher: its accuracy on the test images, before and after, and how it went."""
    row = {
        "macs_kept": macs_kept(one, original),
        "params_kept": measure.params(one.module) / measure.params(original.module),
        "original": report.evaluate(original, dataset, device=settings.device).accuracy.top1,
        "before": report.evaluate(one, dataset, device=settings.device).accuracy.top1,
    }
    print(f"  {row['macs_kept']:.3f} of MACs: {row['before']:.2f} %, the original {row['original']:.2f} %", flush=True)
    KEPT.mkdir(exist_ok=True)
    history = kept.with_suffix(".jsonl")  # a file, for a run that goes on after its last epoch tells of no epoch
    watch = Watch(log=lambda line: print(f"  {line}", flush=True), history=history_writer(history))
    finetune(one, dataset, settings, teacher=original, keep="last", kept=kept, resume=resume, watch=watch)
    epochs = [json.loads(line) for line in history.read_text().splitlines()]
    kept.unlink()
    history.unlink()
    step = one.recipe.steps[-1]
    return row | {
        "after": step.measures.accuracy,
        "evaluated": step.measures.evaluated,
        "seconds": sum(epoch["seconds"] for epoch in epochs),
        "settings": step.options,
        "history": epochs,
    }


def _judged(every: Rows) -> Rows:
    """The same; those of ours beside what is required of them, as far as the peer's are there."""
    for key, row in every.items():
        if key.startswith("ours"):
            peer = every.get(_without_options(key).replace("ours", "peer", 1))
            below, above = row["original"] - row["after"], None if peer is None else row["after"] - peer["after"]
            row["below_original"] = {"points": below, "at_most": MOST_BELOW_ORIGINAL, "met": below <= MOST_BELOW_ORIGINAL}
            met = None if above is None else above >= LEAST_ABOVE_PEER
            row["above_peer"] = {"points": above, "at_least": LEAST_ABOVE_PEER, "met": met}
        for method, most in MOST_BELOW_CONTROL.items():
            control = every.get(_without_options(key).replace(method, "control", 1)) if key.startswith(method) else None
            if control is not None:
                below = control["after"] - row["after"]
                row["below_control"] = {"points": below, "at_most": most, "met": below <= most}
    return every


def _without_options(key: str) -> str:
    return re.sub(r" --set \S+", "", key)


def _show(name: str) -> None:
    table = Table("contender", title=name, title_justify="left")
    for column in ("MACs kept", "before", "after", "original", "above the peer", "below the control", "minutes"):
        table.add_column(column, justify="right")
    for key, row in rows(f"recover-{name}").items():
        above, below = (row.get(name, {}).get("points") for name in ("above_peer", "below_control"))
        figures = (f"{row[figure]:.2f}" for figure in ("before", "after", "original"))
        others = (*("" if each is None else f"{each:+.2f}" for each in (above, below)), f"{row['seconds'] / 60:.0f}")
        table.add_row(key, f"{row['macs_kept']:.3f}", *figures, *others)
    Console(width=120).print(table)
