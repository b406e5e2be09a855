"""What a training run tells: while it goes on, and in the end."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .errors import CompactError


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: its number (0: before training), what it measured, and how long it took."""

    epoch: int
    loss: float | None  # mean over the training images
    accuracy: float  # validation, top-1 percent
    validation_loss: float | None  # None: not finite
    lr: float | None  # of the last step
    images_per_second: float | None  # while training
    seconds: float


@dataclass(frozen=True)
class History:
    """Every epoch, and which one's weights the model holds now if the best were kept."""

    epochs: tuple[EpochRecord, ...]
    best_epoch: int
    best_accuracy: float  # validation, top-1 percent


@dataclass(frozen=True)
class Watch:
    """What is told while training, in the main process alone."""

    log: Callable[[str], None] = lambda line: None  # a line per epoch
    progress: Callable[[int, int], None] = lambda done, total: None  # images trained on, in all; after each step
    history: Callable[[Sequence[EpochRecord]], None] = lambda records: None  # all epochs so far; after each


def better(one: EpochRecord, other: EpochRecord) -> bool:
    """Whether an epoch is more accurate, or as accurate at a lower loss; never if its outputs are not finite."""
    if one.validation_loss is None or other.validation_loss is None:
        return other.validation_loss is None and one.validation_loss is not None
    return (one.accuracy, -one.validation_loss) > (other.accuracy, -other.validation_loss)


def loads(text: str, name: str) -> list[dict[str, Any]]:
    """The epochs of a file that `--history` wrote, each with its "stage" (None where the command had one only).

    Raises CompactError if it is none.
    """
    try:
        epochs = [json.loads(line) for line in text.splitlines()]
        known = bool(epochs) and all(_is_epoch(epoch) for epoch in epochs)
    except (ValueError, RecursionError):
        known = False
    if not known:
        raise CompactError(f"{name} is no history of epochs; give what finetune or compress wrote with --history")
    return [{"stage": None, **epoch} for epoch in epochs]


def records_of(trees: Sequence[Any]) -> list[EpochRecord]:
    """The records that these were as JSON. Raises ValueError where one is none."""
    if not all(_is_epoch(tree) and "stage" not in tree for tree in trees):
        raise ValueError("an epoch that is none")
    return [EpochRecord(**tree) for tree in trees]


def _is_epoch(tree: Any) -> bool:
    """Whether a line's document has the fields of a record, numbers or null, and at most a stage beside."""
    if not isinstance(tree, dict) or not isinstance(tree.get("stage"), str | None):
        return False
    figures = {name: value for name, value in tree.items() if name != "stage"}
    if figures.keys() != {field.name for field in fields(EpochRecord)}:
        return False
    known = [value for name, value in figures.items() if value is not None or name in ("epoch", "accuracy", "seconds")]
    return all(isinstance(value, int | float) and abs(value) <= sys.float_info.max for value in known)
