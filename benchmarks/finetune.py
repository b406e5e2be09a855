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
import copy
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from compactcli import artefact, data, measure, report, sources
from compactcli.artefact import Network
from compactcli.budget import Floats
from compactcli.compress import Calibration, Search, Target, compress
from compactcli.finetune import finetune, kept_run
from compactcli.history import EpochRecord, Watch
from compactcli.methods import Method, Progress, get, parse_options
from compactcli.methods.fcf import FCF
from compactcli.methods.hinge import Hinge
from compactcli.optim import Settings
from compactcli.train import fit_

from ._common import Rows, add, checkpoint, images, provenance, rows
from .oneshot import best_pruned, ignored, macs_kept, pruned
from .starts import ByNorm

IMAGES = 1024  # to calibrate on


class Way(NamedTuple):
    """How a contender of ours is made."""

    method: str
    options: tuple[str, ...] = ()
    searched: bool = False


OURS = {
    "auto": Way("hinge", ("mode=auto",), searched=True),
    "prune": Way("hinge", ("mode=prune",), searched=True),
    "decompose": Way("hinge", ("mode=decompose",), searched=True),
    "calibrated": Way("hinge", ("mode=auto",)),
    "fcf": Way("fcf", searched=True),
    "magnitude": Way("fcf"),
    "linearconv": Way("linearconv"),
    "csg": Way("csg"),
    "hetconv": Way("hetconv"),
}
PEERS = ("peer", "peer-norm")
CONTENDERS = (*OURS, *PEERS, "control")
DEFAULT = ("auto", "prune", "decompose", "calibrated", *PEERS, "control")
SEARCHED = {"peer", *(name for name, way in OURS.items() if way.searched)}
LEAST_ABOVE_PEER = {0.5: 0.5, 0.24: 1.0}  # points, by ratio
MOST_BEHIND = 0.3  # points, of prune and of decompose
LEAST_ABOVE_CONTROL = {"resnet56": {0.5: 0.0, 0.24: -0.8}}  # points, by network and ratio
BINS = 20
KEPT = Path(tempfile.gettempdir()) / "compactcli-finetune"  # of runs that have not ended


@dataclass(frozen=True)
class Run:
    """What a row is the result of."""

    contender: str
    ratio: float
    search_epochs: int = 5
    epochs: int = 20  # search and fine-tuning together
    lr: float | None = None  # peak, of ours in both stages and of the peer's fine-tuning; None: that of the commands
    weight_decay: float = 1e-4  # of all but the peer's sparse learning
    seed: int = 0
    limit: int | None = None  # images of each split
    set: tuple[str, ...] = ()  # further options of hinge
    peer_lr: float = 0.01  # of its sparse learning
    peer_reg: float = 5e-4
    network: str = field(default="resnet20", compare=False)  # each has a file of its own
    device: str = field(default="cpu", compare=False)

    @property
    def flags(self) -> list[str]:
        """Those that say how it was trained, where these are not the defaults."""
        own = [(item.name, getattr(self, item.name)) for item in fields(self)[2:] if item.compare]
        told = {name: " ".join(value) if name == "set" else value for name, value in own if value != getattr(Run, name)}
        return [f"--{name.replace('_', '-')} {value}" for name, value in told.items()]

    @property
    def key(self) -> str:
        return " ".join([f"{self.contender} {self.ratio:g}", *self.flags])

    @property
    def file(self) -> Path:
        """Where the run is kept, but for the stage and the ending."""
        return KEPT / re.sub(r"[^\w.=-]+", "_", f"{self.network} {self.key}")

    def settings(self, epochs: int, **others: Any) -> Settings:
        own = {name: getattr(self, name) for name in ("lr", "weight_decay", "seed", "device")}
        return Settings(**{"epochs": epochs, "cuda_graphs": self.device != "cpu", **own, **others})

    def of(self, contender: str) -> "Run":
        """The run of another contender to compare with: alike, but for the flags that do not concern it."""
        own: dict[str, Any] = {} if contender in SEARCHED else {"search_epochs": Run.search_epochs}
        own |= {} if contender in OURS else {"set": Run.set}
        own |= {} if contender == "peer" else {"peer_lr": Run.peer_lr, "peer_reg": Run.peer_reg}
        own |= {"ratio": 1.0} if contender == "control" else {}
        return replace(self, contender=contender, **own)


@dataclass
class Made:
    """A network to be fine-tuned, and how it came about."""

    network: Network
    options: dict[str, Any]
    search: list[dict[str, Any]] = field(default_factory=list)  # its epochs
    norms: Floats | None = None  # of the groups that the search ended with, in their units
    scalars: dict[str, float] | None = None  # of fcf, what `Watched` tells


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
    makers = {"peer": _sparse, "peer-norm": _pruned, "control": _whole}
    made = makers.get(run.contender, _compressed)(run, original, dataset, search, resume)
    one, used = made.network, made.search[-1]["epoch"] if made.search else 0
    row = {
        "macs_kept": macs_kept(one, original),
        "params_kept": measure.params(one.module) / measure.params(original.module),
        "original": report.evaluate(original, dataset, device=run.device).accuracy.top1,
        "before": report.evaluate(one, dataset, device=run.device).accuracy.top1,
    }
    print(f"  {row['macs_kept']:.3f} of MACs: {row['before']:.2f} %, the original {row['original']:.2f} %", flush=True)
    settings, epochs = run.settings(run.epochs - used), _Epochs()
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


class _Epochs:
    """The epochs of a training run, those before a kill included."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def watch(self) -> Watch:
        return Watch(log=_say, history=self._take)

    def _take(self, records: Sequence[EpochRecord]) -> None:
        self.told = [asdict(record) for record in records]


def _say(line: str) -> None:
    print(f"  {line}", flush=True)


def _histogram(norms: Floats) -> dict[str, Any]:
    """Of relative norms, by what a group was worth at the start (of the peer, by the mean then); the last bin has all above 2."""
    counts, edges = np.histogram(np.minimum(norms, 2.0), bins=BINS, range=(0.0, 2.0))
    return {"groups": len(norms), "edges": edges.tolist(), "counts": counts.tolist()}


# The contenders


def _compressed(run: Run, original: Network, dataset: data.Dataset, kept: Path, resume: bool) -> Made:
    """Ours: a copy of the original, after the search if there is one, calibrated."""
    assert dataset.train is not None
    way, one, epochs, search = OURS[run.contender], copy.deepcopy(original), _Epochs(), None
    if way.searched:
        search = Search(dataset, run.settings(run.search_epochs), original, kept, resume, epochs.watch())
    kind: type[Method] = ByNorm if run.contender == "magnitude" else get(way.method)
    method = kind(parse_options(kind, [*way.options, *run.set]))
    if way.method == "fcf" and way.searched:
        method = Watched(method.options, lambda: report.evaluate(one, dataset, device=run.device).accuracy.top1)
    calibration = Calibration(data.sample(dataset.train, IMAGES, run.seed), dataset.name)
    means: dict[str, Any] = {"calibration": calibration, "search": search, "seed": run.seed}
    compress(one, way.method, method, Target(run.ratio), **means, log=_say)
    norms = np.concatenate(method.norms) if isinstance(method, Hinge) and method.norms is not None else None
    scalars = method.told if isinstance(method, Watched) else None
    return Made(one, dict(one.recipe.steps[-1].options), epochs.told, norms, scalars)


class Watched(FCF):
    """Tells what its scalars are worth when the search has ended: their largest distance from 0 or 1, and the accuracy, in
    percent, with them as they are and with k of each layer's at 1 and the others at 0."""

    def __init__(self, options: Any, accuracy: Callable[[], float]) -> None:
        super().__init__(options)
        self.accuracy = accuracy
        self.told: dict[str, float] = {}

    def end(self, model: nn.Module) -> str | None:
        values = torch.cat([v.detach() for v in self.scalars.values()])
        self.told = {"farthest": float(torch.minimum(values.abs(), (values - 1).abs()).max()), "searched": self.accuracy()}
        ended = [v.detach().clone() for v in self.scalars.values()]
        for (family, v), own in zip(self.scalars.items(), ended, strict=True):
            v.data = torch.zeros_like(own).index_fill(0, own.topk(self.kept[family]).indices, 1.0)
        self.told["binary"] = self.accuracy()
        for v, own in zip(self.scalars.values(), ended, strict=True):
            v.data = own
        return super().end(model)


def _whole(run: Run, original: Network, dataset: data.Dataset, kept: Path, resume: bool) -> Made:
    """The control: a copy of the original."""
    return Made(copy.deepcopy(original), {})


def _pruned(run: Run, original: Network, dataset: data.Dataset, kept: Path, resume: bool) -> Made:
    """Torch-Pruning's without sparse learning, by the better way to make groups comparable."""
    one, normalizer = best_pruned(original, dataset, run.ratio)
    options = {"torch_pruning": version("torch-pruning"), "ratio": run.ratio, "p": 2, "normalizer": normalizer}
    return Made(one, options)


def _sparse(run: Run, original: Network, dataset: data.Dataset, kept: Path, resume: bool) -> Made:
    """Torch-Pruning's: a copy of the original after sparse learning, pruned, batch-norm statistics measured anew."""
    one, epochs = copy.deepcopy(original), _Epochs()
    settings = run.settings(run.search_epochs, lr=run.peer_lr, weight_decay=0.0, schedule="milestones", milestones=(0.6, 0.8))
    method = SparseLearning(one.module, one.input_shape, run.peer_reg)
    before = method.norms()
    store = kept_run(kept, one, dataset, settings, original, {"method": f"sparse learning, {run.peer_reg:g}"})
    fit_(
        one.module,
        dataset,
        one.recipe.preprocessing,
        settings,
        teacher=original.module,
        hooks=[method],
        keep="last",
        store=store,
        resume=resume,
        watch=epochs.watch(),
    )
    norms = np.concatenate([after / start.mean() for after, start in zip(method.norms(), before, strict=True)])
    options = {"torch_pruning": version("torch-pruning"), "ratio": run.ratio, "reg": run.peer_reg, "p": 2, "normalizer": "max"}
    return Made(pruned(one, dataset, run.ratio, "max"), options | {"search": settings.identity()}, epochs.told, norms)


class SparseLearning(Method):
    """Torch-Pruning's group-norm pruner as hooks of our loop."""

    def __init__(self, model: nn.Module, input_shape: Sequence[int], reg: float) -> None:
        import torch_pruning as tp

        super().__init__()
        self.epoch = -1
        self.pruner = tp.pruner.GroupNormPruner(
            model,
            torch.randn(1, *input_shape),
            importance=tp.importance.GroupMagnitudeImportance(p=2, normalizer="max"),
            reg=reg,
            global_pruning=True,
            ignored_layers=ignored(model),
        )
        self.measured = tp.importance.GroupMagnitudeImportance(p=2, normalizer=None)

    def regularise(self, model: nn.Module, progress: Progress) -> None:
        if progress.epoch != self.epoch:
            self.epoch = progress.epoch
            self.pruner.update_regularizer()
        self.pruner.regularize(model)

    def norms(self) -> list[Floats]:
        """The norm of every channel, by group, as its importance has it."""
        self.pruner.update_regularizer()
        return [self.measured(group).sqrt().double().numpy() for group in self.pruner._groups]


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
