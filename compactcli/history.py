"""What a training run tells: while it goes on, and in the end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


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
