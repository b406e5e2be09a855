"""Images trained on in a second: our loop beside a minimal one and torchvision's reference: `python -m benchmarks train_speed`.

resnet20 and mobilenet_v2 at 32 x 32 on CIFAR-10 (JPEG images, decoded beforehand for every contender), batch 128, random
weights, all threads: the loop of `finetune` (`train.fit_`, no teacher) at its defaults, which keeps
the heap that a step frees (`optim.keep_heap`), as a process that trains may, beside

- minimal loop: by hand, the same precision, memory format, optimizer and augmentation, a cosine of learning rates, its data
  in memory as uint8 tensors; every image has a crop of its own, in the plainest operations that were found to be fast;
- torchvision reference: the training loop of torchvision/references/classification/train.py with the CIFAR transforms and
  without its meters: PIL images, a DataLoader with a worker for each core, float32, contiguous;
- torchvision reference, equal precision: the same in our loop's precision and memory format.

In every repeat each contender runs once, in turn, in a process of its own: else it would find the heap as the one before
left it, and page faults are a tenth of some runs. After WARM_UP steps, which are not counted, `--steps` are timed by one
clock that every loop calls after each of its steps: all the work of a step counts, its data and its loss as a number
included; validation and what goes before the first step do not. A share is a ratio of medians over the repeats. Let
nothing else run: of two threads the slower one counts.

Required: at least 0.97 times the minimal loop, 1.5 times the reference as shipped.

    python -m benchmarks train_speed [--networks resnet20] [--repeats 3] [--images 10000] [--steps 60]
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data import Dataset as TorchDataset

from compactcli import artefact, data, optim, sources, train
from compactcli.artefact import Network
from compactcli.history import Watch
from compactcli.optim import Settings
from compactcli.recipe import Preprocessing
from compactcli.vision import torchvision

from ._common import images, write

STEPS = {"resnet20": 60, "mobilenet_v2": 20}  # of every run: about ten seconds on two cores
WARM_UP = 5  # steps before those that are timed
REQUIRED = {"minimal loop": 0.97, "torchvision reference": 1.5}  # least share of our speed in theirs
SETTINGS = Settings(epochs=1, validation_share=0.01)


class Enough(Exception):  # noqa: N818 (it is no error)
    """All the steps were timed: ends a loop from within."""


class Clock:
    """What a loop calls after each of its steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.ends: list[float] = []

    def __call__(self) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) == WARM_UP + self.steps:
            raise Enough

    def seconds(self) -> float:
        """Of the steps that are timed."""
        return self.ends[-1] - self.ends[WARM_UP - 1]

    def images_per_second(self) -> float:
        return self.steps * SETTINGS.batch_size / self.seconds()


@dataclass(frozen=True)
class Material:
    """What every contender trains on."""

    dataset: data.Dataset  # its training images are those below
    images: Tensor  # uint8 (n, 3, 32, 32), in memory
    labels: Tensor  # int64 (n,)
    preprocessing: Preprocessing


Loop = Callable[[nn.Module, Material, Clock], None]  # trains until the clock has enough


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/train_speed.json."""
    parser = argparse.ArgumentParser(prog="train_speed")
    parser.add_argument("--networks", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--steps", type=int, help=f"that are timed in every run; by default {STEPS}")
    options = parser.parse_args(arguments)
    steps = {name: options.steps or STEPS[name] for name in options.networks}
    least = images_needed(max(steps.values()))
    if options.images < least:  # then an epoch of ours, and its validation, would end while the clock runs
        parser.error(f"--images {options.images}: so many steps take {least:,} or more")
    load = os.getloadavg()[0]
    networks = [_timed(name, options.images, steps[name], options.repeats) for name in options.networks]
    settings = {**SETTINGS.identity(), "computed_in": precision(), "warm_up": WARM_UP, "workers": _cores()}
    command = " ".join(["python -m benchmarks train_speed", *arguments])
    result = {"command": command, "load_before": load, "images": options.images, "repeats": options.repeats}
    write("train_speed", {**result, "settings": settings, "required": REQUIRED, "networks": networks})


def _timed(name: str, count: int, steps: int, repeats: int) -> dict[str, Any]:
    """One network: the speed of every contender in every repeat, and our share in each of the others'."""
    speeds: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    for _ in range(repeats):
        for contender, own in speeds.items():
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                own.append(process.submit(_speed, contender, name, count, steps).result())
            print(f"{name}, {contender}: {own[-1]:,.0f} images/s", flush=True)
    rows = [_row(contender, own, speeds["ours"]) for contender, own in speeds.items()]
    _show(f"{name}, {steps} steps, median of {repeats}", rows)
    return {"network": name, "steps": steps, "contenders": rows}


def _speed(contender: str, name: str, count: int, steps: int) -> float:
    """Images per second of one run."""
    network = artefact.fresh(artefact.Wishes(f"cifar:{name}"), 0)
    material, clock = material_of(network, count), Clock(steps)
    with suppress(Enough):
        CONTENDERS[contender](network.module, material, clock)
    return clock.images_per_second()


def images_needed(steps: int) -> int:
    """Training images of which an epoch does not end before so many steps are timed."""
    return math.ceil((WARM_UP + steps) * SETTINGS.batch_size / (1 - SETTINGS.validation_share)) + 1


def material_of(network: Network, count: int) -> Material:
    """That many training images, decoded."""
    preprocessing = network.recipe.preprocessing
    dataset = sources.open_dataset(str(images()), input_shape=network.input_shape, preprocessing=preprocessing, limit=count)
    assert dataset.train is not None
    decoded, labels = dataset.train.images(), data.labels_of(dataset.train)
    return Material(replace(dataset, train=data.from_tensors(decoded, labels, "train")), decoded, labels, preprocessing)


def _row(contender: str, speeds: list[float], ours: list[float]) -> dict[str, Any]:
    """The figures of one contender. `share` is our speed over its own."""
    median = statistics.median(speeds)
    share = statistics.median(ours) / median
    row = {"contender": contender, "images_per_second": median, "spread": max(speeds) - min(speeds), "runs": speeds}
    required = REQUIRED.get(contender)
    verdict = {} if required is None else {"required": required, "met": share >= required}
    return {**row, "share": share, **verdict}


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table("contender", title=title, title_justify="left")
    for column in ("images/s", "spread", "ours / it", "required"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = (f"{row['images_per_second']:,.0f}", f"{row['spread']:,.0f}", f"{row['share']:.3f}")
        table.add_row(row["contender"], *figures, f"{row['required']:.2f}" if "required" in row else "")
    Console(width=120).print(table)


def precision() -> str:
    """What `auto` is on this machine."""
    with optim.autocast(SETTINGS):
        return "bfloat16" if torch.is_autocast_enabled("cpu") else "float32"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


# The contenders


def _ours(module: nn.Module, material: Material, clock: Clock) -> None:
    watch = Watch(progress=lambda done, total: clock())
    train.fit_(module, material.dataset, material.preprocessing, SETTINGS, watch=watch)


def _minimal(module: nn.Module, material: Material, clock: Clock) -> None:
    model = module.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    batches = torch.randperm(len(material.images)).split(SETTINGS.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for index in batches:
        inputs = _augmented(material.images[index], material.preprocessing)
        with optim.autocast(SETTINGS):
            loss = F.cross_entropy(model(inputs), material.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        loss.item()  # as people do, for the mean of the epoch
        clock()


def _augmented(batch: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Images uint8 (n, 3, 32, 32), each cropped anywhere within 4 pixels of border, half of them mirrored; normalised."""
    windows = F.pad(batch, (4, 4, 4, 4)).unfold(2, 32, 1).unfold(3, 32, 1)  # (n, 3, 9, 9, 32, 32), a view
    top, left = torch.randint(0, 9, (2, len(batch)))
    cropped = windows[torch.arange(len(batch)), :, top, left]
    mirrored = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, cropped.flip(3), cropped)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return ((mirrored / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def _reference(
    settings: Settings, memory_format: torch.memory_format, module: nn.Module, material: Material, clock: Clock
) -> None:
    model = module.train().to(memory_format=memory_format)  # type: ignore[call-overload]
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    pictures = Pictures(material)
    loader = DataLoader(
        pictures,
        settings.batch_size,
        sampler=RandomSampler(pictures),
        num_workers=_cores(),
        multiprocessing_context="fork",  # Linux's own, which this spawned process has lost
    )
    for image, target in loader:
        with optim.autocast(settings):
            loss = criterion(model(image.contiguous(memory_format=memory_format)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        clock()


class Pictures(TorchDataset[tuple[Tensor, int]]):
    """The reference's images, as its data set has them once they are decoded."""

    def __init__(self, material: Material) -> None:
        transforms = torchvision().transforms
        self.pictures = [Image.fromarray(pixels) for pixels in material.images.permute(0, 2, 3, 1).contiguous().numpy()]
        self.labels: list[int] = material.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
                transforms.ConvertImageDtype(torch.float32),
                transforms.Normalize(material.preprocessing.mean, material.preprocessing.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[index]), self.labels[index]


CONTENDERS: dict[str, Loop] = {
    "ours": _ours,
    "minimal loop": _minimal,
    "torchvision reference": partial(_reference, replace(SETTINGS, precision="float32"), torch.contiguous_format),
    "torchvision reference, equal precision": partial(_reference, SETTINGS, torch.channels_last),
}
