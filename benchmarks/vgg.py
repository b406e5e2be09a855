"""HetConv's VGG-16 with four parts in every layer, trained here: `python -m benchmarks vgg`.

VGG-16 with batch norm on CIFAR-10 (JPEG images), from nothing, 15 epochs at weight decay 5e-4 (the paper's). From there, with
that network as teacher, 12 epochs more of

- control: the network itself;
- hetconv: `compress --method hetconv --set parts=4`, calibrated on 1,024 training images;

the last weights, all 10,000 test images. Then the time of both on the CPU, in turn, at batch 1 and 64; medians. Required: at
most 1.0 points below the control, and at most 0.67 of its time.

A row is written to benchmarks/results/vgg.json the moment it is there; --resume keeps those there are, and goes on with a run
that was broken off. The trained network stays in the temporary folder.

    python -m benchmarks vgg [--only trained control hetconv times] [--resume] [--epochs 15] [--more 12] [--lr 0.05]
                             [--seed 0] [--limit 1000] [--repeats 9] [--device cuda]
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from compactcli import artefact, data, kernels, latency, measure, report, sources
from compactcli.artefact import Network
from compactcli.compress import Calibration, Target, compress
from compactcli.finetune import finetune
from compactcli.history import Watch
from compactcli.methods import get, parse_options
from compactcli.optim import Settings

from ._common import Row, Rows, add, images, provenance, rows

NETWORK = "cifar:vgg16"
IMAGES = 1024  # to calibrate on
BATCHES = (1, 64)
MOST_BELOW_CONTROL = 1.0  # points
MOST_TIME = 0.67  # of the original's
ROWS = ("trained", "control", "hetconv", "times")
TRAINED = Path(tempfile.gettempdir()) / "compactcli-vgg" / "trained.safetensors"


def main(arguments: list[str]) -> None:
    """Train, then time, and write benchmarks/results/vgg.json after each."""
    parser = argparse.ArgumentParser(prog="vgg")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--resume", action="store_true", help="keep the rows there are; go on with a run that was broken off")
    parser.add_argument("--epochs", type=int, default=15, help="of the network from nothing")
    parser.add_argument("--more", type=int, default=12, help="epochs that follow, of either")
    parser.add_argument("--lr", type=float, help="peak learning rate; by default that of finetune")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="images of each split")
    parser.add_argument("--repeats", type=int, default=9, help="of timing")
    parser.add_argument("--device", default="cpu", help="that trains: cpu, cuda")
    options = parser.parse_args(arguments)
    command = " ".join(["python -m benchmarks vgg", *arguments])
    TRAINED.parent.mkdir(exist_ok=True)
    for key in options.only:
        if options.resume and key in rows("vgg") and (key != "trained" or TRAINED.is_file()):
            continue
        print(key, flush=True)
        device = "cpu" if key == "times" else options.device
        row = _timed(options.repeats) if key == "times" else _trained(key, options)
        add("vgg", {key: {**provenance(command, device), **row}}, _judged)
    _show()


def _trained(key: str, options: argparse.Namespace) -> Row:
    """One network after its training: its accuracy before and after, and how it went."""
    if key == "trained":
        one, teacher, epochs = artefact.fresh(artefact.Wishes(NETWORK), options.seed), None, options.epochs
    else:
        one, epochs = artefact.open_model(TRAINED), options.more
        teacher = copy.deepcopy(one)
    shape, preprocessing = one.input_shape, one.recipe.preprocessing
    dataset = sources.open_dataset(str(images()), input_shape=shape, preprocessing=preprocessing, limit=options.limit)
    assert dataset.train is not None
    if key == "hetconv":
        _in_parts_(one, Calibration(data.sample(dataset.train, IMAGES, options.seed), dataset.name), options.seed)
    before = report.evaluate(one, dataset, device=options.device).accuracy.top1
    told: list[Any] = []
    watch = Watch(log=lambda line: print(f"  {line}", flush=True), history=lambda records: told.append(records))
    settings = Settings(epochs=epochs, lr=options.lr, weight_decay=5e-4, seed=options.seed, device=options.device)
    kept = TRAINED.with_name(f"{key}.resume.safetensors")
    finetune(one, dataset, settings, teacher=teacher, keep="last", kept=kept, resume=options.resume, watch=watch)
    kept.unlink()
    if key == "trained":
        artefact.save(one, str(TRAINED))
    step, history = one.recipe.steps[-1], [vars(record) for record in told[-1]]
    return {
        "params": measure.params(one.module),
        "macs": measure.macs(one.module, shape),
        "before": before,
        "after": step.measures.accuracy,
        "evaluated": step.measures.evaluated,
        "seconds": sum(record["seconds"] for record in history),
        "settings": step.options,
        "history": history,
    }


def _in_parts_(network: Network, calibration: Calibration | None, seed: int) -> None:
    """Four parts in every layer that they divide, in place."""
    kind = get("hetconv")
    method = kind(parse_options(kind, ["parts=4"]))
    compress(network, "hetconv", method, Target(0.01, nearest=True), calibration=calibration, seed=seed)


def _timed(repeats: int) -> Row:
    """Both networks' times on the CPU, which do not depend on the weights."""
    dense = artefact.fresh(artefact.Wishes(NETWORK), 0)
    parts = copy.deepcopy(dense)
    _in_parts_(parts, None, 0)
    found = []
    for batch in BATCHES:
        modules = [dense.module, kernels.folded(parts.module)]
        whole, now = latency.of(modules, dense.input_shape, batch=batch, repeats=repeats)
        own = {"batch": batch, "threads": whole.threads, "original_ms": whole.median_ms, "original_iqr_ms": whole.iqr_ms}
        found.append(own | {"hetconv_ms": now.median_ms, "hetconv_iqr_ms": now.iqr_ms, "share": now.median_ms / whole.median_ms})
    met = all(own["share"] <= MOST_TIME for own in found)
    return {"repeats": repeats, "times": found, "required": {"at_most": MOST_TIME, "met": met}}


def _judged(found: Rows) -> Rows:
    """The same; hetconv's accuracy beside what is required of it."""
    if {"control", "hetconv"} <= found.keys():
        below = found["control"]["after"] - found["hetconv"]["after"]
        found["hetconv"]["below_control"] = {"points": below, "at_most": MOST_BELOW_CONTROL, "met": below <= MOST_BELOW_CONTROL}
    return found


def _show() -> None:
    found, table = rows("vgg"), Table("network", "parameters", "MACs", "before", "after", "minutes")
    for key, row in found.items():
        if key != "times":
            sizes = (f"{row[figure] / 1e6:.2f} M" for figure in ("params", "macs"))
            table.add_row(key, *sizes, f"{row['before']:.2f}", f"{row['after']:.2f}", f"{row['seconds'] / 60:.0f}")
    times = ", ".join(f"{own['share']:.2f} at batch {own['batch']}" for own in found.get("times", {}).get("times", []))
    table.caption = f"time: {times}" if times else None
    Console(width=100).print(table)
