"""One readable loop: method hooks, distillation, mixed precision, best weights."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import data, distributed, measure
from .errors import CompactError, UsageError
from .methods import Method, Progress
from .recipe import Preprocessing

VALIDATION_LIMIT = 5_000  # images: more would not order epochs better, only take longer


@dataclass(frozen=True)
class Settings:
    """How to train. Weight decay acts on every parameter, batch-norm and biases included, as in the papers."""

    epochs: int = 10
    lr: float | None = None  # peak; None: 0.05 for sgd, 0.001 for adamw
    weight_decay: float = 1e-4
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd: Nesterov, momentum 0.9
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = 1.0  # linear from 0; at most a tenth of the run
    batch_size: int = 128
    distill_weight: float = 0.4  # share of the teacher in the loss, where there is one
    temperature: float = 4.0
    validation_share: float = 0.1  # of the training images, at most VALIDATION_LIMIT of them
    seed: int = 0
    device: str = "cpu"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the hardware computes in it

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("epochs", self.epochs >= 0, "0 or more"),
            ("lr", self.lr is None or self.lr >= 0, "0 or more"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("optimizer", self.optimizer in ("sgd", "adamw"), "sgd or adamw"),
            ("schedule", self.schedule in ("cosine", "constant"), "cosine or constant"),
            ("warmup_epochs", self.warmup_epochs >= 0, "0 or more"),
            ("batch_size", self.batch_size >= 2, "2 or more, for batch-norm"),
            ("distill_weight", 0 <= self.distill_weight <= 1, "from 0 to 1"),
            ("temperature", self.temperature > 0, "above 0"),
            ("validation_share", 0 < self.validation_share < 1, "between 0 and 1"),
            ("precision", self.precision in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16"),
        ):
            if not good:
                raise UsageError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be {wanted}")

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return self.lr if self.lr is not None else {"sgd": 0.05, "adamw": 0.001}[self.optimizer]


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: its number (0: before training), what it measured, and how long it took."""

    epoch: int
    loss: float | None  # mean over the training images
    accuracy: float  # validation, top-1 percent
    validation_loss: float
    seconds: float


@dataclass(frozen=True)
class History:
    """Every epoch, and which one's weights the model holds now if the best were kept."""

    epochs: tuple[EpochRecord, ...]
    best_epoch: int
    best_accuracy: float  # validation, top-1 percent


def fit_(
    model: nn.Module,
    dataset: data.Dataset,
    preprocessing: Preprocessing,
    settings: Settings,
    *,
    teacher: nn.Module | None = None,
    hooks: Sequence[Method] = (),
    keep: Literal["best", "last"] = "best",
    log: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> History:
    """Trains `model` on the training images; leaves it on the CPU in eval mode with its best weights. Returns the history.

    Best: most accurate on validation images held out from the training images (the lower loss decides a tie), the weights
    before training included, so that a model does not get worse. `keep="last"` leaves the last weights, for a search.
    The test images are never read. `log` gets a line per epoch, `progress` (steps done, steps in all) after each step.
    The same seed gives the same weights on a CPU; torch's global random state is set by every epoch.

    With a teacher the loss is (1 - w) CE + w T^2 KL(teacher || student at temperature T): Hinton et al., 2015.

    Raises CompactError if there are no labels or too few images, and if the loss stops being finite with nothing to go
    back to (a model that was so from the start, or `keep="last"`). Otherwise training then stops there, with a log line.
    """
    say = log if log is not None and distributed.is_main() else lambda line: None
    device = torch.device(settings.device)
    training, validation = _parts(dataset, settings)
    images, labels = training.images(), data.labels_of(training)

    networks = [model] if teacher is None else [model, teacher]
    _place(networks, device, torch.channels_last)
    steps_per_epoch = math.ceil(len(training) / settings.batch_size) - (len(training) % settings.batch_size == 1)
    total_steps = settings.epochs * steps_per_epoch
    optimizer = _optimizer(model, hooks, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _factor(settings, steps_per_epoch))

    def record(epoch: int, loss: float | None, since: float) -> EpochRecord:
        found = measure.accuracy(model, data.batches(validation, preprocessing, 2 * settings.batch_size, device))
        return EpochRecord(epoch, loss, found.top1, found.loss, time.perf_counter() - since)

    started = time.perf_counter()
    best, best_weights = record(0, None, started), _copy(model)
    if not math.isfinite(best.validation_loss):
        raise CompactError("the network's outputs are not finite before training; try analyze on it")
    records = [best]
    say(f"before training: validation {best.accuracy:.2f} %, {len(validation):,} images; training on {len(training):,}")

    step = 0
    finite = True
    for epoch in range(1, settings.epochs + 1):
        epoch_started = time.perf_counter()
        torch.manual_seed(_seed(settings.seed, epoch))  # for dropout and the like
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(_seed(settings.seed, epoch)))
        model.train()
        loss_sum, seen = 0.0, 0
        for index in torch.split(order, settings.batch_size)[:steps_per_epoch]:
            now = Progress(step, epoch - 1, step / total_steps, tuple(group["lr"] for group in optimizer.param_groups))
            batch = data.augment(images[index].to(device), index, epoch, settings.seed, flip=dataset.flip)
            inputs = data.normalise(batch, preprocessing)
            with _autocast(settings, device):
                outputs = _logits(model(inputs))
                with torch.no_grad():
                    targets = None if teacher is None else _logits(teacher(inputs))
            loss = _loss(outputs, labels[index].to(device), targets, settings)
            value = loss.item()
            finite = math.isfinite(value)
            if not finite:
                break

            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for hook in hooks:
                hook.regularise(model, now)
            optimizer.step()
            for hook in hooks:
                hook.project(model, now)
            schedule.step()

            step += 1
            loss_sum, seen = loss_sum + value * len(index), seen + len(index)
            if progress is not None:
                progress(step, total_steps)

        if not finite:
            if keep == "last":
                raise CompactError(f"the loss is not finite at step {step} of {total_steps}; try a lower --lr")
            say(f"stopped: the loss is not finite at step {step} of {total_steps}; try a lower --lr")
            break
        speed = seen / (time.perf_counter() - epoch_started)
        records.append(record(epoch, loss_sum / seen, epoch_started))
        if (records[-1].accuracy, -records[-1].validation_loss) > (best.accuracy, -best.validation_loss):
            best, best_weights = records[-1], _copy(model)
        left = (time.perf_counter() - started) / epoch * (settings.epochs - epoch)
        figures = f"loss {loss_sum / seen:.4f}, validation {records[-1].accuracy:.2f} %, {speed:,.0f} images/s"
        say(f"epoch {epoch}/{settings.epochs}: {figures}, {_duration(left)} left")
        if any(hook.done(model) for hook in hooks):
            break

    if keep == "best":
        model.load_state_dict(best_weights)
    _place(networks, torch.device("cpu"), torch.contiguous_format)
    return History(tuple(records), best.epoch, best.accuracy)


def _parts(dataset: data.Dataset, settings: Settings) -> tuple[data.Split, data.Split]:
    """(training, validation) images, both from the training images."""
    if dataset.train is None:
        raise CompactError(f"the data {dataset.name} has no training images; wanted train/ with a folder per class")
    data.labels_of(dataset.train)
    share = min(settings.validation_share, VALIDATION_LIMIT / len(dataset.train))
    training, validation = data.split_validation(dataset.train, share, settings.seed)
    if len(training) < 2:
        raise CompactError(f"the data {dataset.name} leaves 1 image to train on; wanted 2 or more, for batch-norm")
    return training, validation


def _place(networks: Iterable[nn.Module], device: torch.device, memory_format: torch.memory_format) -> None:
    for network in networks:
        network.eval().to(device=device, memory_format=memory_format)  # type: ignore[call-overload]


def _optimizer(model: nn.Module, hooks: Iterable[Method], settings: Settings) -> torch.optim.Optimizer:
    """The optimizer over every trainable parameter: first those that no hook claims, then the hooks' groups in order."""
    groups = [group for hook in hooks for group in hook.parameter_groups(model) or ()]
    claimed = {id(parameter) for group in groups for parameter in group["params"]}
    plain = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in claimed]
    groups = [{"params": plain}, *groups]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.peak_lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(groups, lr=settings.peak_lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay)


def _factor(settings: Settings, steps_per_epoch: int) -> Callable[[int], float]:
    """step -> share of the peak learning rate: linear warm-up, then constant or half a cosine down to 0."""
    total = settings.epochs * steps_per_epoch
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), total // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if settings.schedule == "constant":
            return 1.0
        return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2

    return factor


def _loss(outputs: Tensor, labels: Tensor, targets: Tensor | None, settings: Settings) -> Tensor:
    """Mean over the batch, in float32."""
    outputs = outputs.float()
    plain = F.cross_entropy(outputs, labels)
    if targets is None:
        return plain
    if targets.shape != outputs.shape:
        raise CompactError(f"the teacher has {targets.shape[1]} classes, the network {outputs.shape[1]}; try another --teacher")
    student = (outputs / settings.temperature).log_softmax(1)
    teacher = (targets.float() / settings.temperature).log_softmax(1)
    # Softened gradients shrink as 1 / T^2; the factor keeps the balance of the two terms at any temperature.
    distilled = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * settings.temperature**2
    return (1 - settings.distill_weight) * plain + settings.distill_weight * distilled


def _logits(output: Any) -> Tensor:
    """The classes' scores of a network that may give auxiliary ones behind them (torchvision's Inception, while training)."""
    logits: Tensor = output if isinstance(output, Tensor) else output[0]
    return logits


def _autocast(settings: Settings, device: torch.device) -> AbstractContextManager[Any]:
    enabled = settings.precision == "bfloat16" or (settings.precision == "auto" and _computes_bfloat16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def _computes_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 arithmetic; where it only emulates it, float32 is faster."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def _copy(model: nn.Module) -> dict[str, Tensor]:
    """The weights as they are now, on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


def _seed(seed: int, epoch: int) -> int:
    """One number for the pair, so that an epoch's random numbers do not depend on the epochs before it."""
    return (seed * 1_000_003 + epoch) % 2**63


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
