"""Images that are decoded when asked for, their classes, and batches of them.

Shapes: n images, c channels, h x w pixels. Images are uint8 (n, c, h, w), already at the network's input size, until
`normalise` makes a batch of them the network's input.
"""

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from .distributed import world_size
from .errors import CompactError, short
from .recipe import Preprocessing

MEMORY_LIMIT = 8 * 10**9  # bytes of decoded images held at once
KEEP_LIMIT = 10**9  # bytes up to which `batches` keeps what it decoded for the next pass
SEEN = 256  # images that tell a split from others

Shape = tuple[int, int, int]  # channels, height, width
Reader = Callable[[Tensor], Tensor]  # positions in a source (m,) -> images (m, c, h, w)


@dataclass(frozen=True, eq=False)
class Split:
    """Images that are decoded when asked for, and their classes."""

    name: str  # "train", "val", "test" or "all"
    labels: Tensor | None  # int64 (n,); None: a folder without classes
    shape: Shape
    index: Tensor  # int64 (n,): which images of the source these are
    read: Reader

    def __len__(self) -> int:
        return len(self.index)

    def images(self, index: Tensor | None = None) -> Tensor:
        """Images `index` of this split, uint8 (m, c, h, w). All of them by default: then they are decoded once and kept.

        Raises CompactError naming a file that is not an image, and when the images would not fit in MEMORY_LIMIT.
        """
        if index is None:
            return self._all
        return self._all[index] if "_all" in self.__dict__ else self.read(self.index[index])

    def subset(self, index: Tensor, name: str | None = None) -> "Split":
        """The images at `index` of this split, in that order."""
        labels = None if self.labels is None else self.labels[index]
        return replace(self, name=name or self.name, labels=labels, index=self.index[index])

    @cached_property
    def _all(self) -> Tensor:
        with torch.inference_mode(False):  # they outlive the evaluation that may have asked first
            return self.read(self.index)


@dataclass(frozen=True, eq=False)
class Dataset:
    """What `--data` names."""

    name: str  # "digits", "cifar10", or the folder's bare name
    named: bool  # True: anyone can get it by this name, so a file may remember it
    classes: tuple[str, ...] | None
    train: Split | None
    test: Split | None
    flip: bool = True  # a mirrored image is still one of its class


def split_validation(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """(the rest, `share` of the images), each class divided alike. Raises CompactError if either would be empty."""
    count = round(share * len(split))
    if not 0 < count < len(split):
        raise CompactError(f"{share:.3g} of {len(split)} training images is {count}: too few to train and to validate on")
    held_out = choose(split.labels, len(split), count, seed)
    rest = torch.ones(len(split), dtype=torch.bool)
    rest[held_out] = False
    return split.subset(rest.nonzero().flatten()), split.subset(held_out, name="val")


def training_images(dataset: Dataset) -> Split:
    """All of them. Raises CompactError if there are none."""
    if dataset.train is None:
        raise CompactError(f"the data {dataset.name} has no training images; wanted train/ with a folder per class")
    return dataset.train


def training_parts(dataset: Dataset, share: float, limit: int, seed: int) -> tuple[Split, Split]:
    """(training, validation) images, both from the training images: that share of them, at most `limit`, are held out.

    Raises CompactError if there are no training images or labels, or too few.
    """
    images = training_images(dataset)
    labels_of(images)
    training, validation = split_validation(images, min(share, limit / len(images)), seed)
    least = 2 * world_size()
    if len(training) < least:
        count = f"{len(training)} image{'s' * (len(training) != 1)}"
        raise CompactError(f"the data {dataset.name} leaves {count} to train on; wanted {least} or more, for batch-norm")
    return training, validation


def sample(split: Split, count: int, seed: int) -> Tensor:
    """`count` images (all, if there are fewer), uint8 (n, c, h, w), evenly over the classes where there are labels."""
    return split.images(choose(split.labels, len(split), min(count, len(split)), seed))


def digest(split: Split, seed: int) -> str:
    """What tells a split from another of its name and size: its labels, and SEEN of its images."""
    told = hashlib.sha256(b"" if split.labels is None else split.labels.contiguous().numpy().data)
    index = choose(split.labels, len(split), min(SEEN, len(split)), seed)
    for part in torch.split(index, 16):  # many large ones are never held at once
        told.update(split.images(part).contiguous().numpy().data)
    return told.hexdigest()


def choose(labels: Tensor | None, size: int, count: int, seed: int) -> Tensor:
    """`count` of `size` positions, drawn at random, ascending; every class gives its share.

    Image number r of a class of m, in random order, is given the rank (r + 1/2) / m; the lowest ranks are taken. So a
    smaller count with the same seed gives a subset.
    """
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    if labels is not None:
        order = order[labels[order].argsort(stable=True)]
        classes, counts = labels[order], labels.bincount()
        number = torch.arange(size) - (counts.cumsum(0) - counts)[classes]
        order = order[((number + 0.5) / counts[classes].double()).argsort(stable=True)]
    return order[:count].sort().values


def check_classes(dataset: Dataset, num_classes: int) -> None:
    """Raises CompactError unless the network's `num_classes` outputs are the dataset's classes."""
    labels = [split.labels for split in (dataset.train, dataset.test) if split is not None and split.labels is not None]
    found = max((int(own.max()) + 1 for own in labels), default=0) if dataset.classes is None else len(dataset.classes)
    # Where classes have no names, the last ones may just have no images.
    if found > num_classes or (dataset.classes is not None and found < num_classes):
        hint = "" if dataset.classes is None or found > num_classes else "; a class without images may be an empty folder"
        raise CompactError(
            f"the data {dataset.name} has {found} class{'es' if found != 1 else ''}, the network {num_classes}{hint}"
        )


def as_named(dataset: Dataset, classes: Sequence[str] | None, log: Callable[[str], None] = lambda line: None) -> Dataset:
    """The dataset with its classes in the order in which a network has them; `log` is told where they have other names.

    Folders are in the order of their names, which need not be that of the data that a network was trained on.
    """
    own = dataset.classes
    if classes is None or own is None or tuple(classes) == own:
        return dataset
    if len(set(own)) != len(own) or sorted(own) != sorted(classes):
        if len(own) == len(classes):
            first = next(n for n, (a, b) in enumerate(zip(classes, own, strict=True)) if a != b)
            named = f"class {first} is {short(own[first])} there, {short(classes[first])} in what it was trained on"
            log(f"warning: {dataset.name} has classes of other names than the network: {named}")
        return dataset
    place = torch.tensor([tuple(classes).index(name) for name in own])

    def moved(split: Split | None) -> Split | None:
        return split if split is None or split.labels is None else replace(split, labels=place[split.labels])

    return replace(dataset, classes=tuple(classes), train=moved(dataset.train), test=moved(dataset.test))


def normalise(images: Tensor, preprocessing: Preprocessing, dtype: torch.dtype = torch.float32) -> Tensor:
    """(images / 255 - mean) / std, (n, c, h, w) of `dtype`, in the memory format of `images`.

    Raises CompactError if mean or std has neither one value nor one per channel.
    """
    scaled = images.to(torch.float32).div_(255)
    for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
        if len(values) not in (1, images.shape[1]):
            raise CompactError(f"{len(values)} values of {name} for images with {images.shape[1]} channels; try --{name}")
        per_channel = torch.tensor(values, device=images.device).view(-1, 1, 1)
        scaled = scaled.sub_(per_channel) if name == "mean" else scaled.div_(per_channel)
    return scaled.to(dtype)


def feed(split: Split, batches: Sequence[Tensor], workers: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """(positions in the split, their images uint8 (m, c, h, w)) of every batch, in order.

    The images are decoded once and held where they fit into a quarter of the memory. Where they do not, or `workers` says
    so, that many threads (two) decode each batch anew while the ones before it are used.
    """
    if workers == 0 or (workers is None and len(split) * prod(split.shape) <= _holdable()):
        images = split.images()
        yield from ((batch, images[batch]) for batch in batches)
        return
    workers = workers or 2
    pool = ThreadPoolExecutor(workers)
    try:
        ahead = deque(pool.submit(split.images, batch) for batch in batches[: workers + 1])
        for number, batch in enumerate(batches):
            images = ahead.popleft().result()
            if number + workers + 1 < len(batches):
                ahead.append(pool.submit(split.images, batches[number + workers + 1]))
            yield batch, images
    finally:
        pool.shutdown(cancel_futures=True)


def _holdable() -> int:
    """Bytes of decoded images that each process may hold while it trains."""
    memory = 4 * MEMORY_LIMIT
    with contextlib.suppress(AttributeError, ValueError, OSError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(MEMORY_LIMIT, memory // 4) // world_size()


def batches(
    split: Split, preprocessing: Preprocessing, batch_size: int, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    """(input (n, c, h, w) channels last, labels (n,)) on `device`, in the split's order; the last batch may be shorter.

    What was decoded is kept for the next pass up to KEEP_LIMIT bytes. Raises CompactError if there are no labels.
    """
    labels = labels_of(split)
    if len(split) * prod(split.shape) <= KEEP_LIMIT:
        split.images()
    for index in torch.split(torch.arange(len(split)), min(batch_size, len(split))):
        images = split.images(index).to(device).contiguous(memory_format=torch.channels_last)
        yield normalise(images, preprocessing), labels[index].to(device)


def labels_of(split: Split) -> Tensor:
    """The labels, int64 (n,). Raises CompactError if there are none."""
    if split.labels is None:
        raise CompactError("these images have no labels; put them in one folder per class")
    return split.labels


def from_tensors(images: Tensor, labels: Tensor | None, name: str) -> Split:
    """A split of images in memory, uint8 (n, c, h, w), taken as they are."""
    shape = (images.shape[1], images.shape[2], images.shape[3])
    return Split(name, labels, shape, torch.arange(len(images)), lambda index: images[index])
