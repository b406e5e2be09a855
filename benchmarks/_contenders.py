"""The networks that `finetune` trains: ours, Torch-Pruning's and the control, searched for where their way is to search."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compactcli import data, report
from compactcli.artefact import Network
from compactcli.budget import Floats
from compactcli.compress import Calibration, Search, Target, compress
from compactcli.finetune import kept_run
from compactcli.history import EpochRecord, Watch
from compactcli.methods import Method, Progress, get, parse_options
from compactcli.methods.fcf import FCF
from compactcli.methods.hinge import Hinge
from compactcli.train import fit_

from ._runs import OURS, Run
from .oneshot import best_pruned, ignored, pruned
from .starts import ByNorm

IMAGES = 1024  # to calibrate on


@dataclass
class Made:
    """A network to be fine-tuned, and how it came about."""

    network: Network
    options: dict[str, Any]
    search: list[dict[str, Any]] = field(default_factory=list)  # its epochs
    norms: Floats | None = None  # of the groups that the search ended with, in their units
    scalars: dict[str, float] | None = None  # of fcf, what `Watched` tells


class Epochs:
    """The epochs of a training run, those before a kill included."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def watch(self) -> Watch:
        return Watch(log=say, history=self._take)

    def _take(self, records: Sequence[EpochRecord]) -> None:
        self.told = [asdict(record) for record in records]


def say(line: str) -> None:
    print(f"  {line}", flush=True)


def network_of(run: Run, original: Network, dataset: data.Dataset, search: Path, resume: bool) -> Made:
    """The network that the run fine-tunes; a search is kept in a file of its own."""
    makers = {"peer": _sparse, "peer-norm": _pruned, "control": _whole}
    return makers.get(run.contender, _compressed)(run, original, dataset, search, resume)


def _compressed(run: Run, original: Network, dataset: data.Dataset, kept: Path, resume: bool) -> Made:
    """Ours: a copy of the original, after the search if there is one, calibrated."""
    assert dataset.train is not None
    way, one, epochs, search = OURS[run.contender], copy.deepcopy(original), Epochs(), None
    if way.searched:
        search = Search(dataset, run.settings(run.search_epochs), original, kept, resume, epochs.watch())
    kind: type[Method] = ByNorm if run.contender == "magnitude" else get(way.method)
    method = kind(parse_options(kind, [*way.options, *run.set]))
    if way.method == "fcf" and way.searched:
        method = Watched(method.options, lambda: report.evaluate(one, dataset, device=run.device).accuracy.top1)
    calibration = Calibration(data.sample(dataset.train, IMAGES, run.seed), dataset.name)
    means: dict[str, Any] = {"calibration": calibration, "search": search, "seed": run.seed}
    compress(one, way.method, method, Target(run.ratio), **means, log=say)
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
    one, epochs = copy.deepcopy(original), Epochs()
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
