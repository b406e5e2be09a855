"""One readable loop: method hooks, distillation, mixed precision, many processes, best weights, exact resume."""

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import augment, batchnorm, data, distributed, gradient, measure, optim
from .errors import CompactError, brief
from .gradient import Gradient
from .history import EpochRecord, History, Watch, better, records_of
from .methods import Method, Progress
from .optim import Settings
from .recipe import Preprocessing
from .resume import Interruption, Store, check_shapes, pack, under, unpack_

VALIDATION_LIMIT = 5_000  # images: more would not order epochs better, only take longer


def fit_(
    model: nn.Module,
    dataset: data.Dataset,
    preprocessing: Preprocessing,
    settings: Settings,
    *,
    teacher: nn.Module | None = None,
    hooks: Sequence[Method] = (),
    keep: Literal["best", "last"] = "best",
    store: Store | None = None,
    resume: bool = False,
    watch: Watch | None = None,
) -> History:
    """Trains `model` on the training images; leaves it on the CPU in eval mode with its best weights. Returns the history.

    Best: most accurate on validation images held out from the training images (the lower loss decides a tie), the weights
    before training included, so that a model does not get worse. `keep="last"` leaves the last weights, for a search.
    The test images are never read. The same seed gives the same weights on a CPU; torch's global random state is set by
    every step, and with glibc the process keeps the memory that it frees. With a teacher the loss is that of Hinton et al.,
    2015 (`optim.loss`).

    With a `store` the run is kept in a file every `save_every` steps and at each epoch's end; with `resume` it goes on
    from there, to the very weights of an unbroken run. Ctrl-C and SIGTERM keep it, and raise KeyboardInterrupt.

    In many processes (`distributed.joined`) each takes its part of every batch: `batch_size` is of all together.

    Raises CompactError if there are no labels or too few images, and if the loss stops being finite with nothing to go
    back to (a model that was so from the start, or `keep="last"`). Otherwise training then stops there, with a log line.
    """
    device = torch.device(settings.device)
    training, validation = data.training_parts(dataset, settings.validation_share, VALIDATION_LIMIT, settings.seed)
    distributed.check_alike(model, repr((settings.identity(), len(training), teacher is None)))
    optim.keep_heap()
    networks = [model] if teacher is None else [model, teacher]
    _place(networks, device, torch.channels_last)
    run = _Run(model, teacher, hooks, dataset, training, validation, preprocessing, settings, keep, store, watch)
    with Interruption().watched() as run.interruption, batchnorm.synchronised(model, settings.batch_norm == "sync"):
        network: Any = torch.compile(model) if settings.compile else model
        network = distributed.wrapped(network, settings.device, lambda: optim.ignores_outputs(model, training.shape))
        run.gradient = gradient.of(network, teacher, run.settings)
        run.begin(resume)
        while run.step < run.total_steps and run.ended is None:
            run.train_epoch()
            if run.ended is None:
                run.end_epoch()
        if not run.lost and run.asked()[1]:
            run.stop(True)
    if run.ended is not None and run.lost and keep == "last":
        raise CompactError(run.ended)
    if run.ended is not None:
        run.watch.log(f"stopped: {run.ended}")
    if keep == "best":
        model.load_state_dict(run.best_weights)
    elif run.average is not None:
        model.load_state_dict(run.average.tensors)
    _place(networks, torch.device("cpu"), torch.contiguous_format)
    return History(tuple(run.records), run.best.epoch, run.best.accuracy)


class _Run:
    """A training run: what it trains with, and where it stands after `step` steps. The latter is what a store keeps."""

    gradient: Gradient  # of `model` as it is called: compiled, in many processes
    interruption: Interruption

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        hooks: Sequence[Method],
        dataset: data.Dataset,
        training: data.Split,
        validation: data.Split,
        preprocessing: Preprocessing,
        settings: Settings,
        keep: str,
        store: Store | None,
        watch: Watch | None,
    ) -> None:
        self.model, self.teacher, self.hooks, self.keep, self.store = model, teacher, hooks, keep, store
        self.settings, self.preprocessing = optim.settled(settings, model, training.shape), preprocessing
        self.dataset, self.training, self.validation = dataset, training, validation
        self.labels = data.labels_of(training)
        mine = torch.arange(distributed.rank(), len(validation), distributed.world_size())
        self.validation_part = validation.subset(mine)  # this process's, which are decoded once
        self.watch = watch if watch is not None and distributed.is_main() else Watch()
        self.device = torch.device(settings.device)
        self.started = time.perf_counter()

        full, rest = divmod(len(training), settings.batch_size)
        self.steps_per_epoch = full + (rest >= 2)  # a batch of one image has no variance
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.factor = optim.schedule(settings, self.steps_per_epoch)
        self.optimizer = optim.optimizer(model, hooks, settings)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.average = None if settings.ema is None else optim.Average(model, settings.ema)

        self.step = 0
        self.loss_sum, self.seen = 0.0, 0  # of the epoch so far
        self.records: list[EpochRecord] = []
        self.best: EpochRecord
        self.best_weights: dict[str, Tensor] = {}
        self.ended: str | None = None  # why, before its last epoch
        self.lost = False  # the weights are no good any more

    def begin(self, resume: bool) -> None:
        """From the store, or from the weights there are, which are the first to be measured."""
        if resume and self.restore():
            self.watch.history(self.records)
            self.watch.log(f"resumed at step {self.step:,} of {self.total_steps:,}")
            return
        self.measure(0, None, None, self.started)
        if self.records[0].validation_loss is None:
            raise CompactError("the network's outputs are not finite before training; try analyze on it")
        counts = f"{len(self.validation):,} images; training on {len(self.training):,}"
        self.watch.log(f"before training: validation {self.best.accuracy:.2f} %, {counts}")

    def train_epoch(self) -> None:
        """The batches of the present epoch that are left, until one ends the run."""
        self.epoch, self.epoch_started, self.seen_before = self.step // self.steps_per_epoch + 1, time.perf_counter(), self.seen
        order = torch.randperm(len(self.training), generator=optim.generator(self.settings.seed, self.epoch))
        batches = torch.split(order, self.settings.batch_size)[self.step % self.steps_per_epoch : self.steps_per_epoch]
        batchnorm.train_(self.model, self.settings.batch_norm)
        own = [distributed.part(batch) for batch in batches]
        for batch, (index, images) in zip(batches, data.feed(self.training, own, self.settings.workers), strict=True):
            came, late = self.train_batch(index, images, batch)
            if self.ended is not None:
                return
            if self.step % self.steps_per_epoch == 0:
                continue  # the epoch's end has its own file
            if came or late or self.step % self.settings.save_every == 0:
                self.save()
            if came or late:
                self.stop(came)
                return

    def train_batch(self, index: Tensor, images: Tensor, batch: Tensor) -> tuple[bool, bool]:
        """One step, on this process's part of a batch. What was asked for meanwhile."""
        torch.manual_seed(optim.seed(self.settings.seed, self.step, distributed.rank()))  # for dropout and the like
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.factor(self.step)
        rates = tuple(group["lr"] for group in self.optimizer.param_groups)
        now = Progress(self.step, self.epoch - 1, self.step / self.total_steps, rates)

        self.optimizer.zero_grad()
        loss, came, late = self.asked(self.backward(index, images, batch))
        if not math.isfinite(loss):
            self.ended, self.lost = f"the loss is not finite at step {self.step} of {self.total_steps}; try a lower --lr", True
            return False, False
        for hook in self.hooks:
            hook.regularise(self.model, now)
        if self.settings.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.optimizer.step()
        for hook in self.hooks:
            hook.project(self.model, now)
        if self.average is not None:
            self.average.update(self.model, self.step)

        self.step += 1
        self.loss_sum, self.seen = self.loss_sum + loss * len(batch), self.seen + len(batch)
        done = (self.epoch - 1) * len(self.training) + self.seen
        self.watch.progress(done, self.settings.epochs * len(self.training))
        return bool(came), bool(late)

    def backward(self, index: Tensor, images: Tensor, batch: Tensor) -> float:
        """Gradients of the mean loss over a batch of all processes; this one's share of that mean."""
        labels = self.labels[index].to(self.device)
        choice: Any = {"flip": self.dataset.flip, "cutout": self.settings.cutout, "blank": self.preprocessing.mean}
        moved = augment.varied(images.to(self.device), index, self.epoch, self.settings.seed, **choice)
        inputs = data.normalise(moved, self.preprocessing)
        return float(self.gradient(inputs, labels, len(batch)))

    def end_epoch(self) -> None:
        """Measure, tell, keep; end the run where it is time."""
        loss, speed = self.loss_sum / self.seen, (self.seen - self.seen_before) / (time.perf_counter() - self.epoch_started)
        self.measure(self.epoch, loss, speed, self.epoch_started)
        seconds = (time.perf_counter() - self.epoch_started) * (self.settings.epochs - self.epoch)
        left = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        figures = f"loss {loss:.4f}, validation {self.records[-1].accuracy:.2f} %, {speed:,.0f} images/s"
        self.watch.log(f"epoch {self.epoch}/{self.settings.epochs}: {figures}, {left} left")
        self.loss_sum, self.seen = 0.0, 0
        patience = self.settings.patience
        done = any([hook.done(self.model) for hook in self.hooks])
        if distributed.total([done], self.settings.device)[0] and self.step < self.total_steps:
            self.ended = "the search is done"
        elif patience is not None and self.epoch - self.best.epoch >= patience and self.epoch < self.settings.epochs:
            self.ended = f"no better epoch in {patience}"
        if self.records[-1].validation_loss is None:
            self.ended, self.lost = f"the outputs are not finite after epoch {self.epoch}; try a lower --lr", True
            return
        self.save()
        _, came, late = self.asked()
        if self.ended is None and self.step < self.total_steps and (came or late):
            self.stop(bool(came))

    def measure(self, epoch: int, loss: float | None, speed: float | None, since: float) -> None:
        """Validate, each process a part of the images; keep the weights that are the best so far."""
        distributed.share_(self.model.buffers())
        if self.average is not None:
            distributed.share_(self.average.tensors.values())
        with self.average.applied(self.model) if self.average is not None else nullcontext():
            sums = [0.0, 0.0, 0.0]
            if len(self.validation_part):
                batches = data.batches(self.validation_part, self.preprocessing, 2 * self.settings.batch_size, self.device)
                with optim.autocast(self.settings):
                    found = measure.accuracy(self.model, batches)
                sums = [found.top1 * found.images, found.loss * found.images, found.images]
            hits, losses, images = distributed.total(sums, self.settings.device)
            lr = self.optimizer.param_groups[0]["lr"] if self.step else None
            validation_loss = losses / images if math.isfinite(losses) else None
            record = EpochRecord(epoch, loss, hits / images, validation_loss, lr, speed, time.perf_counter() - since)
            if not self.records or better(record, self.best):
                self.best, self.best_weights = record, _copy(self.model) if self.keep == "best" else {}
        self.records.append(record)
        self.watch.history(self.records)

    def asked(self, loss: float = 0.0) -> list[float]:
        """(a loss, whether a signal came, whether the time is up), summed over the processes: all do the same."""
        limit = self.settings.time_limit
        late = limit is not None and time.perf_counter() - self.started > limit
        return distributed.total([loss, self.interruption.came, late], self.settings.device)

    def stop(self, came: bool) -> None:
        """End the run between two steps, after it was kept. Raises KeyboardInterrupt if that is what was asked for."""
        distributed.wait()
        if came:
            raise KeyboardInterrupt("" if self.store is None else "--resume goes on from there")
        self.ended = f"the time is up, at step {self.step:,} of {self.total_steps:,}"
        if self.step % self.steps_per_epoch:
            self.measure(self.epoch, None, None, self.epoch_started)

    def save(self) -> None:
        """Put where the run stands into the store; the main process alone."""
        distributed.share_(self.model.buffers())
        if self.store is None or not distributed.is_main():
            return
        standing: dict[str, Any] = {"step": self.step, "left": 0 if self.ended else self.total_steps - self.step}
        standing |= {"loss_sum": self.loss_sum, "seen": self.seen, "best": self.best.epoch, "ended": self.ended}
        tensors = pack(self.model, self.optimizer, self.average, self.hooks)
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        self.store.save(tensors, {**standing, "peaks": self.peaks, "records": [asdict(record) for record in self.records]})

    def restore(self) -> bool:
        """Take back what `save` put there, in every process; False if there is nothing."""
        state = distributed.shared(self.store.load() if self.store is not None and distributed.is_main() else None)
        if state is None:
            return False
        try:
            self.take(*state)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, StopIteration) as problem:
            raise CompactError(f"the run's file is damaged ({brief(repr(problem))}); leave --resume out to begin again") from None
        return True

    def take(self, tensors: dict[str, Tensor], standing: dict[str, Any]) -> None:
        """Be where a run stood."""
        self.step, self.loss_sum, self.seen = int(standing["step"]), float(standing["loss_sum"]), int(standing["seen"])
        self.records = records_of(standing["records"])
        self.best = next(record for record in self.records if record.epoch == standing["best"])
        self.best_weights, self.peaks = under("best", tensors), [float(peak) for peak in standing["peaks"]]
        self.ended = None if standing["ended"] is None else brief(standing["ended"])
        if not 0 <= self.step <= self.total_steps or len(self.peaks) != len(self.optimizer.param_groups):
            raise ValueError("a step or a rate of another run")
        check_shapes(self.best_weights, self.model.state_dict() if self.keep == "best" else {})
        unpack_(tensors, self.model, self.optimizer, self.average, self.hooks)


def _place(networks: Iterable[nn.Module], device: torch.device, memory_format: torch.memory_format) -> None:
    for network in networks:
        network.eval().to(device=device, memory_format=memory_format)  # type: ignore[call-overload]


def _copy(model: nn.Module) -> dict[str, Tensor]:
    """The weights as they are now, on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
