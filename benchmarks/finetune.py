"""Accuracy after a search and fine-tuning, ours beside Torch-Pruning 1.6.1: `python -m benchmarks finetune`.

A CIFAR-10 ResNet (JPEG images), by default ResNet-20, at 50 % and 24 % of its MACs, 20 epochs of training in all with the
original as teacher; the last weights (the originals have seen all training images, so none of them can tell which are best),
all 10,000 test images.

- auto, prune, decompose: `compress --method hinge --set mode=... --data --epochs 5`, then `finetune` for what is left of the
  epochs; what a search that ends early does not use is fine-tuning's;
- calibrated: `auto` without a search, all epochs of fine-tuning;
- fcf: as `auto`; what its scalars came to, and the accuracy with them and with the nearest of 0 and 1, are told;
- magnitude: fcf's network of filters chosen by their mean |w|, as in `starts`, all epochs of fine-tuning;
- linearconv, csg (of their parameters), hetconv: as `calibrated`, which train what they start from;
- peer: Torch-Pruning's group-norm pruner with sparse learning, then pruned to the same MACs as in `oneshot`, then as ours;
- peer-norm: the same without sparse learning: pruned as in `oneshot`, all epochs of fine-tuning;
- control: the whole network, all epochs of fine-tuning, for what the training alone is worth. It has one ratio, 1.

The peer's settings are those of its own CIFAR-10 figures (`--method group_sl` of reproduce/main.py, reproduce/readme.md):
`GroupNormPruner` with reg 5e-4 and its growth of 2^4 towards the least important channels, `GroupMagnitudeImportance(p=2,
normalizer="max")`, global, `update_regularizer()` at each epoch's start and `regularize(model)` after backward, SGD at
learning rate 0.01 without weight decay, a tenth of it from 60 % and again from 80 % of the epochs on. There are 100 of those,
here as many as ours searches for: --peer-lr and --peer-reg try more. Our loop's are Nesterov's momentum, the warm-up and the
teacher. Iterative pruning in 400 steps, as there, gives the widths that bisection does: the largest importance is 1 in each
group, so that none is emptied.

Required: auto at least 0.5 points (at 50 %) and 1.0 (at 24 %) above the best of the peer's rows, and behind neither prune nor
decompose by more than 0.3; of ResNet-56, at most 0.0 and 0.8 below the control. What the search is worth, auto beside
calibrated, is told.

A row is written to benchmarks/results/finetune-NETWORK.json the moment its contender ends, under its name, its ratio and the
flags that say how it was trained, where these are not the defaults. Until then search and fine-tuning are kept in a file each
in the temporary folder. After a kill --resume keeps the rows that there are and goes on with the run that was broken off:
a search that had ended is not repeated, only what is derived from it in seconds.

    python -m benchmarks finetune [--network resnet20] [--ratios 0.5 0.24] [--only auto peer] [--resume] [--set NAME=VALUE ...]
                                  [--search-epochs 5] [--epochs 20] [--lr 0.05] [--weight-decay 0.0005] [--seed 0]
                                  [--limit 1000] [--peer-lr 0.01] [--peer-reg 0.0005] [--device cuda]
"""

import argparse
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from compactcli import artefact, data, measure, report, sources
from compactcli.artefact import Network
from compactcli.budget import Floats
from compactcli.finetune import finetune

from ._common import Rows, add, checkpoint, images, provenance, rows
from ._contenders import Epochs, network_of
from ._runs import CONTENDERS, KEPT, PEERS, Run
from .oneshot import macs_kept

DEFAULT = ("auto", "prune", "decompose", "calibrated", *PEERS, "control")
LEAST_ABOVE_PEER = {0.5: 0.5, 0.24: 1.0}  # points, by ratio
MOST_BEHIND = 0.3  # points, of prune and of decompose
LEAST_ABOVE_CONTROL = {"resnet56": {0.5: 0.0, 0.24: -0.8}}  # points, by network and ratio
BINS = 20


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/finetune-NETWORK.json."""
    options = parsed(arguments)
    original = artefact.open_model(checkpoint(f"{options.network}-cifar10jpeg.th"))
    shape, preprocessing = original.input_shape, original.recipe.preprocessing
    dataset = sources.open_dataset(str(images()), input_shape=shape, preprocessing=preprocessing, limit=options.limit)
    command = " ".join(["python -m benchmarks finetune", *arguments])
    for run in asked(options):
        if options.resume and run.key in rows(f"finetune-{run.network}"):
            continue
        print(f"{run.network}, {run.key}", flush=True)
        row = {"run": asdict(run), **provenance(command, run.device), **_ended(run, original, dataset, options.resume)}
        add(f"finetune-{run.network}", {run.key: row}, _judged)
    _show(options.network)


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="finetune")
    parser.add_argument("--network", default=Run.network, help="of ../shared/checkpoints")
    parser.add_argument("--ratios", nargs="+", type=float, default=list(LEAST_ABOVE_PEER))
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=DEFAULT)
    parser.add_argument("--resume", action="store_true", help="keep the rows there are; go on with a run that was broken off")
    parser.add_argument("--search-epochs", type=int, default=Run.search_epochs)
    parser.add_argument("--epochs", type=int, default=Run.epochs, help="of search and fine-tuning together")
    parser.add_argument("--lr", type=float, help="peak learning rate; by default that of the commands")
    parser.add_argument("--weight-decay", type=float, default=Run.weight_decay, help="of all but the peer's sparse learning")
    parser.add_argument("--seed", type=int, default=Run.seed, help="of calibration and training")
    parser.add_argument("--limit", type=int, help="images of each split")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="option of our method; may be repeated")
    parser.add_argument("--peer-lr", type=float, default=Run.peer_lr, help="of the peer's sparse learning")
    parser.add_argument("--peer-reg", type=float, default=Run.peer_reg, help="strength of the peer's regularisation")
    parser.add_argument("--device", default=Run.device, help="that trains: cpu, cuda")
    options = parser.parse_args(arguments)
    if not 1 <= options.search_epochs < options.epochs:
        parser.error(f"--search-epochs {options.search_epochs}: 1 or more, and fewer than --epochs {options.epochs}")
    if any(pair.startswith("mode=") for pair in options.set):
        parser.error("--set mode: it is the contender's; see --only")
    return options


def asked(options: argparse.Namespace) -> list[Run]:
    """The runs that the options ask for, each once."""
    wanted = {item.name: getattr(options, item.name) for item in fields(Run)[2:]} | {"set": tuple(sorted(options.set))}
    runs = [Run(contender, ratio, **wanted).of(contender) for ratio in options.ratios for contender in options.only]
    return list(dict.fromkeys(runs))


def _ended(run: Run, original: Network, dataset: data.Dataset, resume: bool) -> dict[str, Any]:
    """Search, make smaller and fine-tune: the accuracies on the test images, and how it went."""
    KEPT.mkdir(exist_ok=True)
    search, tuning = (Path(f"{run.file}.{stage}.safetensors") for stage in ("search", "finetune"))
    if not resume:  # else a run that is broken off now would go on with the fine-tuning of an earlier one
        search.unlink(missing_ok=True)
        tuning.unlink(missing_ok=True)
    made = network_of(run, original, dataset, search, resume)
    one, used = made.network, made.search[-1]["epoch"] if made.search else 0
    row = {
        "macs_kept": macs_kept(one, original),
        "params_kept": measure.params(one.module) / measure.params(original.module),
        "original": report.evaluate(original, dataset, device=run.device).accuracy.top1,
        "before": report.evaluate(one, dataset, device=run.device).accuracy.top1,
    }
    print(f"  {row['macs_kept']:.3f} of MACs: {row['before']:.2f} %, the original {row['original']:.2f} %", flush=True)
    settings, epochs = run.settings(run.epochs - used), Epochs()
    finetune(one, dataset, settings, teacher=original, keep="last", kept=tuning, resume=resume, watch=epochs.watch())
    tuning.unlink()
    search.unlink(missing_ok=True)
    step = one.recipe.steps[-1]
    return row | {
        "after": step.measures.accuracy,
        "evaluated": step.measures.evaluated,
        "epochs": {"search": used, "finetune": epochs.told[-1]["epoch"]},
        "seconds": sum(epoch["seconds"] for epoch in [*made.search, *epochs.told]),
        "options": made.options,
        "settings": step.options,
        "search_history": made.search,
        "history": epochs.told,
        "norms": None if made.norms is None else _histogram(made.norms),
        "scalars": made.scalars,
    }


def _histogram(norms: Floats) -> dict[str, Any]:
    """Of relative norms, by what a group was worth at the start (of the peer, by the mean then); the last bin has all above 2."""
    counts, edges = np.histogram(np.minimum(norms, 2.0), bins=BINS, range=(0.0, 2.0))
    return {"groups": len(norms), "edges": edges.tolist(), "counts": counts.tolist()}


# The results


def _run(row: dict[str, Any]) -> Run:
    return Run(**{**row["run"], "set": tuple(row["run"]["set"])})


def _judged(every: Rows) -> Rows:
    """The same; with those of auto how many points they are above others, and whether that is as many as required."""
    for row in every.values():
        run = _run(row)
        if run.contender == "auto":
            least = {"peer": LEAST_ABOVE_PEER.get(run.ratio), "prune": -MOST_BEHIND, "decompose": -MOST_BEHIND}
            least["control"] = LEAST_ABOVE_CONTROL.get(run.network, {}).get(run.ratio)
            row["above"] = {name: _above(every, row, run, name, least.get(name)) for name in (*least, "calibrated")}
    return every


def _above(every: Rows, row: dict[str, Any], run: Run, name: str, least: float | None) -> dict[str, Any]:
    """How far a row is above the best of a contender's, whatever the searches were like; nothing where there are none."""
    found = []
    for other in every.values():
        own = _run(other)
        free = {each: getattr(own, each) for each in ("search_epochs", "peer_lr", "peer_reg")}
        if own.contender in (PEERS if name == "peer" else [name]) and own == replace(run.of(own.contender), **free):
            found.append(other["after"])
    points = row["after"] - max(found) if found else None
    return {"points": points, "at_least": least, "met": None if points is None or least is None else points >= least}


def _show(network: str) -> None:
    table = Table("contender", title=network, title_justify="left")
    others = ("peer", "prune", "decompose", "control", "calibrated")
    for column in ("MACs kept", "before", "after", "original", "epochs", "minutes", *(f"above {name}" for name in others)):
        table.add_column(column, justify="right")
    found = rows(f"finetune-{network}").items()
    for key, row in sorted(found, key=lambda item: (-_run(item[1]).ratio, CONTENDERS.index(_run(item[1]).contender))):
        accuracies = (f"{row[figure]:.2f}" for figure in ("before", "after", "original"))
        epochs = f"{row['epochs']['search']} + {row['epochs']['finetune']}"
        verdicts = (_told(row.get("above", {}).get(name)) for name in others)
        table.add_row(key, f"{row['macs_kept']:.3f}", *accuracies, epochs, f"{row['seconds'] / 60:.0f}", *verdicts)
    Console(width=150).print(table)


def _told(verdict: dict[str, Any] | None) -> str:
    """How far a row is above another; what is not met is marked."""
    if verdict is None or verdict["points"] is None:
        return ""
    return f"{verdict['points']:+.2f}" + (" !" if verdict["met"] is False else "")
