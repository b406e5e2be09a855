"""What a training step is made of: settings, optimizer, learning rates, loss, averaged weights, precision."""

import ctypes
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed
from .errors import CompactError, UsageError
from .graph import run_fake
from .kernels import KernelLayer
from .methods import LARGEST, Method


@dataclass(frozen=True)
class Settings:
    """How to train. Weight decay acts on every parameter, batch-norm and biases included, as in the papers."""

    epochs: int = 10
    lr: float | None = None  # peak; None: 0.05 for sgd, 0.001 for adamw
    weight_decay: float = 1e-4
    optimizer: Literal["sgd", "adamw"] = "sgd"  # sgd: Nesterov, momentum 0.9
    schedule: Literal["cosine", "milestones", "constant"] = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)  # shares of the run at which the rate falls to a tenth
    warmup_epochs: float = 1.0  # linear from 0; at most a tenth of the run
    batch_size: int = 128  # of all processes together
    accumulate: int = 1  # parts in which a batch is computed: less memory, the same gradients
    label_smoothing: float = 0.0
    clip_grad: float | None = None  # largest norm of the gradient of all parameters
    ema: float | None = None  # decay of the averaged weights, which are then what is validated and kept
    cutout: int = 0  # side of a square of every training image that is blanked, pixels
    distill_weight: float = 0.4  # share of the teacher in the loss, where there is one
    temperature: float = 4.0
    batch_norm: Literal["train", "frozen", "sync"] = "train"  # frozen: its own statistics; sync: of all processes' images
    validation_share: float = 0.1  # of the training images, at most train.VALIDATION_LIMIT of them
    patience: int | None = None  # epochs without a better one after which to end
    time_limit: float | None = None  # seconds after which to end
    save_every: int = 500  # steps from one resume file to the next; there is one at each epoch's end as well
    seed: int = 0
    device: str = "cpu"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the hardware computes in it
    compile: bool = False  # torch.compile: minutes to begin with, then faster steps on a GPU
    cuda_graphs: bool = False  # record a step's passes once and replay them; one process on a GPU
    workers: int | None = None  # threads that decode images while others are trained on; None: where they fill the memory

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in asdict(self).items() if isinstance(value, int | float) and name != "seed"}
        for name, good, wanted in (
            *((name, -LARGEST <= value <= LARGEST, f"a number of at most {LARGEST:,}") for name, value in numbers.items()),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
            ("epochs", self.epochs >= 0, "0 or more"),
            ("lr", self.lr is None or self.lr >= 0, "0 or more"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("optimizer", self.optimizer in ("sgd", "adamw"), "sgd or adamw"),
            ("schedule", self.schedule in ("cosine", "milestones", "constant"), "cosine, milestones or constant"),
            ("milestones", all(0 < share < 1 for share in self.milestones), "shares of the run, between 0 and 1"),
            ("warmup_epochs", self.warmup_epochs >= 0, "0 or more"),
            ("batch_size", self.batch_size >= 2, "2 or more, for batch-norm"),
            ("accumulate", 1 <= self.accumulate <= self.batch_size // 2, "1 or more, and leave parts of 2 images"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to below 1"),
            ("clip_grad", self.clip_grad is None or self.clip_grad > 0, "above 0"),
            ("ema", self.ema is None or 0 < self.ema < 1, "between 0 and 1"),
            ("cutout", self.cutout >= 0, "0 or more pixels"),
            ("distill_weight", 0 <= self.distill_weight <= 1, "from 0 to 1"),
            ("temperature", self.temperature > 0, "above 0"),
            ("batch_norm", self.batch_norm in ("train", "frozen", "sync"), "train, frozen or sync"),
            ("validation_share", 0 < self.validation_share < 1, "between 0 and 1"),
            ("patience", self.patience is None or self.patience >= 1, "1 or more"),
            ("time_limit", self.time_limit is None or self.time_limit > 0, "above 0"),
            ("save_every", self.save_every >= 1, "1 or more"),
            ("precision", self.precision in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16"),
            ("workers", self.workers is None or self.workers >= 0, "0 or more"),
        ):
            if not good:
                raise UsageError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be {wanted}")
        if self.cuda_graphs and (self.compile or not self.device.startswith("cuda")):
            raise UsageError("--cuda-graphs: it is for --device cuda, without --compile")
        if self.cuda_graphs and distributed.running():
            raise UsageError("--cuda-graphs: it is for one process; leave it out, or start without torchrun")

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return self.lr if self.lr is not None else {"sgd": 0.05, "adamw": 0.001}[self.optimizer]

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on where it stopped."""
        passing = ("device", "patience", "time_limit", "save_every", "workers", "compile", "cuda_graphs")
        return {name: value for name, value in asdict(self).items() if name not in passing} | {"lr": self.peak_lr}


def optimizer(model: nn.Module, hooks: Iterable[Method], settings: Settings) -> torch.optim.Optimizer:
    """The optimizer over every trainable parameter: first those that no hook claims, then the hooks' groups in order."""
    groups = [dict(group) for hook in hooks for group in hook.parameter_groups(model) or ()]
    claimed: set[int] = set()
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in claimed]
        claimed |= {id(parameter) for parameter in group["params"]}
        rate, pace = group.pop("rate", 1.0), group.pop("pace", 1.0)
        group.setdefault("lr", settings.peak_lr * rate * (pace if settings.optimizer == "sgd" else 1.0))
    plain = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in claimed]
    groups = [{"params": plain}, *groups]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.peak_lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(groups, lr=settings.peak_lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay)


def schedule(settings: Settings, steps_per_epoch: int) -> Callable[[int], float]:
    """step -> share of the peak learning rate: linear warm-up, then constant, tenths at milestones, or half a cosine to 0."""
    total = settings.epochs * steps_per_epoch
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), total // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if settings.schedule == "constant":
            return 1.0
        if settings.schedule == "milestones":
            return float(0.1 ** sum(step >= share * total for share in settings.milestones))
        return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2

    return factor


def loss(outputs: Tensor, labels: Tensor, targets: Tensor | None, settings: Settings) -> Tensor:
    """Mean over the batch, in float32: (1 - w) CE + w T^2 KL(teacher || student at temperature T) (Hinton et al., 2015).

    `targets` are the teacher's logits; None: cross-entropy alone. Raises CompactError where they are of other classes.
    """
    outputs = outputs.float()
    plain = F.cross_entropy(outputs, labels, label_smoothing=settings.label_smoothing)
    if targets is None:
        return plain
    if targets.shape != outputs.shape:
        raise CompactError(f"the teacher has {targets.shape[1]} classes, the network {outputs.shape[1]}; try another --teacher")
    student = (outputs / settings.temperature).log_softmax(1)
    teacher = (targets.float() / settings.temperature).log_softmax(1)
    # Softened gradients shrink as 1 / T^2; the factor keeps the balance of the two terms at any temperature.
    distilled = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * settings.temperature**2
    return (1 - settings.distill_weight) * plain + settings.distill_weight * distilled


def ignores_outputs(model: nn.Module, input_shape: Sequence[int]) -> bool:
    """Whether the network gives, while training, auxiliary scores that the loss does not look at."""
    return not isinstance(run_fake(model, input_shape, train=True), Tensor)


class Average:
    """The exponential moving average of a network's parameters and statistics (Polyak & Juditsky, 1992)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the network as it is; faster in the first steps, which start from what is soon far away."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                self.tensors[name].lerp_(tensor, 1 - decay)
            else:
                self.tensors[name].copy_(tensor)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The network with the averaged weights, while the block runs."""
        own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.tensors)
        try:
            yield
        finally:
            model.load_state_dict(own)


def keep_heap() -> None:
    """Let this process keep the memory that it frees, where the C library is glibc.

    A training step frees and asks for the same gigabyte again and again; handed back to the system in between, every page
    of it is a fault, which takes up to a quarter of a step on a CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
        library.mallopt(-4, 0)  # M_MMAP_MAX: nothing outside of it


def autocast(settings: Settings) -> AbstractContextManager[Any]:
    """The precision that forward passes are computed in."""
    device = torch.device(settings.device)
    enabled = settings.precision == "bfloat16" or (settings.precision == "auto" and _computes_bfloat16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def settled(settings: Settings, model: nn.Module, input_shape: Sequence[int]) -> Settings:
    """The same, or in float32 where `auto` would be bfloat16 and that goes wrong for inputs of that shape (c, h, w).

    It does on a CPU where a convolution's input is narrower than its stride: there oneDNN's gradients of the weight hold what
    was in memory before (torch 2.13).
    """
    device = torch.device(settings.device)
    if settings.precision != "auto" or device.type != "cpu" or not _computes_bfloat16(device):
        return settings
    return replace(settings, precision="float32") if _reads_less_than_its_stride(model, input_shape) else settings


def _reads_less_than_its_stride(model: nn.Module, input_shape: Sequence[int]) -> bool:
    found: list[bool] = []

    def look(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        stride: Any = layer.stride
        for image in arguments[:1]:  # none where it is given by name
            found.append(any(size < step for size, step in zip(image.shape[-2:], stride, strict=True)))

    def watch(shadow: nn.Module) -> None:
        for layer in shadow.modules():
            if isinstance(layer, nn.Conv2d | KernelLayer):
                layer.register_forward_pre_hook(look)

    run_fake(model, input_shape, train=True, change=watch)
    return any(found)


def _computes_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 arithmetic; where it only emulates it, float32 is faster."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def seed(*numbers: int) -> int:
    """One number for several, so that a step's random numbers do not depend on the steps before it."""
    mixed = 0
    for number in numbers:
        mixed = mixed * 1_000_003 + number
    return mixed % 2**63


def generator(*numbers: int) -> torch.Generator:
    """Random numbers of their own for those numbers."""
    return torch.Generator().manual_seed(seed(*numbers))
