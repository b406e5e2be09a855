"""The driver of fine-tuning: teacher, training, accuracy on the test images, and one `Step` in the recipe."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from . import __version__, artefact, data, distributed, measure, methods, precision, report, train
from .artefact import Network
from .errors import CompactError, short
from .history import Watch
from .optim import Settings
from .recipe import OPEN, Measures, Step
from .resume import Store


def find_teacher(
    network: Network,
    wanted: str | None,
    *,
    arch: str | None = None,
    trust_pickle: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> Network | None:
    """The network to learn from: the file given, or the original where it lies beside the input or in the working folder.

    "none" asks for no teacher. A file found by its name counts only if its sha256 is the recorded one, and if it can be read:
    nobody asked for it. `arch` names the user's own factory where the history began with one.
    Raises CompactError if the file given cannot be read.
    """
    if wanted == "none":
        return None
    if wanted is not None:
        return artefact.open_beside(wanted, network, arch, trust_pickle=trust_pickle)
    source = network.recipe.source
    if source is None or all(step.command == OPEN for step in network.recipe.steps):
        return None
    for folder in filter(None, (network.folder, Path())):
        path = folder / source.name
        if artefact.file_sha256(path) == source.sha256:
            try:
                teacher = artefact.open_beside(path, network, arch, trust_pickle=trust_pickle)
            except CompactError as problem:
                log(f"no teacher: {problem}; training without one")
                return None
            log(f"teacher: {short(source.name)}")
            return teacher
    log(f"no teacher: {short(source.name)} is not beside the input; training without one (--teacher FILE gives one)")
    return None


def finetune(
    network: Network,
    dataset: data.Dataset,
    settings: Settings,
    *,
    teacher: Network | None = None,
    keep: Literal["best", "last"] = "best",
    kept: Path | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    watch: Watch | None = None,
) -> Network:
    """Train the network in place on the training images; the same network, one step on, with its test accuracy.

    A network that was trained on the same images before does too well on those held out: `keep="last"` judges by none.
    The run is kept in the file `kept` until it ends, and with `resume` goes on from there, if all is the same that makes it
    and that `identity` names. Of many processes only the main one has the step and the accuracy. What was stored in half
    precision is so no more; with a `dtype` (`recipe.DTYPES`) it is rounded to that in the end, with a step and an accuracy of
    its own.
    Raises CompactError if the data does not fit the network, or the teacher does not.
    """
    watch = watch or Watch()
    check(network, dataset, teacher)
    if dataset.test is not None:
        data.labels_of(dataset.test)  # better before the work than after
    precision.uncast_(network, watch.log)
    recipe = network.recipe
    if any(step.command == "export" and step.options.get("fold_bn") for step in recipe.steps):
        watch.log(f"{network.name}: its batch norms are folded into other layers; training may diverge without, try a small --lr")
    history = train.fit_(
        network.module,
        dataset,
        recipe.preprocessing,
        settings,
        teacher=None if teacher is None else teacher.module,
        hooks=methods.attached(recipe, network.module),
        keep=keep,
        store=None if kept is None else kept_run(kept, network, dataset, settings, teacher, {"keep": keep, **(identity or {})}),
        resume=resume,
        watch=watch,
    )
    if not distributed.is_main():
        return network
    if keep == "best" and history.best_epoch == 0 and len(history.epochs) > 1:
        figure = f"{history.best_accuracy:.2f} % of the images held out"
        watch.log(f"no epoch did better than the weights from before training ({figure}), which are kept; try --keep last")
    measures = Measures(params=measure.params(network.module), macs=measure.macs(network.module, network.input_shape))
    tested = None
    if dataset.test is not None:
        tested = report.evaluate(network, dataset, device=settings.device)
        measures = replace(measures, accuracy=tested.accuracy.top1, evaluated=tested.to_json())
        watch.log(f"test accuracy {tested.accuracy.top1:.2f} %")
        if teacher is not None and recipe.source is not None and teacher.sha256 == recipe.source.sha256:
            original = report.evaluate(teacher, dataset, device=settings.device)
            known = replace(recipe.source.measures, accuracy=original.accuracy.top1, evaluated=original.to_json())
            recipe = replace(recipe, source=replace(recipe.source, measures=known))
    else:
        evaluated = {"dataset": dataset.name, "split": "validation", "images": None}
        accuracy = history.best_accuracy if keep == "best" else history.epochs[-1].accuracy
        measures = replace(measures, accuracy=accuracy, evaluated=evaluated)
    options = {
        **settings.identity(),
        "teacher": None if teacher is None else teacher.name,
        "keep": keep,
        "best_epoch": history.best_epoch,
    }
    if teacher is None:
        options |= {"distill_weight": None, "temperature": None}
    step = Step("finetune", None, options, (), measures, None, __version__)
    network.recipe = replace(
        recipe.then(step), dataset=dataset.name if dataset.named else recipe.dataset, classes=dataset.classes or recipe.classes
    )
    if dtype is not None:
        judge = dataset if dataset.test is not None else _held_out(dataset, settings)
        precision.cast_(network, dtype, judge, before=tested, device=settings.device, log=watch.log)
    return network


def _held_out(dataset: data.Dataset, settings: Settings) -> data.Dataset:
    """The images that training validated on."""
    _, held = data.training_parts(dataset, settings.validation_share, train.VALIDATION_LIMIT, settings.seed)
    return replace(dataset, train=replace(held, name="validation"), test=None)


def check(network: Network, dataset: data.Dataset, teacher: Network | None) -> None:
    """Raise CompactError if the data has no training images or does not fit the network, or the teacher does not."""
    data.check_classes(dataset, network.num_classes)
    data.training_images(dataset)
    if teacher is not None and (teacher.num_classes, teacher.input_shape) != (network.num_classes, network.input_shape):
        raise CompactError(
            f"the teacher {teacher.name} has {teacher.num_classes} classes and input {teacher.input_shape}, "
            f"the network {network.num_classes} and {network.input_shape}; give the original with --teacher"
        )


def kept_run(
    path: Path,
    network: Network,
    dataset: data.Dataset,
    settings: Settings,
    teacher: Network | None,
    more: Mapping[str, Any] | None = None,
) -> Store:
    """Where a run is kept: with the recipe, so that the network can be had from it, and what another run has otherwise.

    `more` is what else must be the same for it to go on.
    """
    images = data.training_images(dataset)
    identity = {
        **settings.identity(),
        "data": [dataset.name, len(images)],
        "images": data.digest(images, settings.seed),
        "teacher": None if teacher is None else teacher.sha256,
        "network": hashlib.sha256(network.recipe.dumps().encode()).hexdigest(),
        **(more or {}),
    }
    return Store(path, identity, {artefact.KEY: network.recipe.dumps()})
