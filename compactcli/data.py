"""Named datasets, image folders, the embedded digits, and batches of their images.

Shapes: n images, c channels, h x w pixels. Images are uint8 (n, c, h, w), already at the network's input size, until
`normalise` makes a batch of them the network's input.
"""

import contextlib
import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from . import usercode
from .distributed import world_size
from .errors import CompactError, brief
from .recipe import Preprocessing, Recipe
from .vision import torchvision

MEMORY_LIMIT = 8 * 10**9  # bytes of decoded images held at once
KEEP_LIMIT = 10**9  # bytes up to which `batches` keeps what it decoded for the next pass
MANY_CLASSES = 10**6  # what a label stays below
SEEN = 256  # images that tell a split from others
SKIPPED_NAMED = 3  # of the files that were left out
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

# name -> class in torchvision.datasets, and whether a mirrored image is still one of its class
_TORCHVISION = {
    "cifar10": ("CIFAR10", True),
    "cifar100": ("CIFAR100", True),
    "mnist": ("MNIST", False),
    "fashionmnist": ("FashionMNIST", True),
    "svhn": ("SVHN", False),
}
NAMES = ("digits", *_TORCHVISION)

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


def open_dataset(
    spec: str,
    *,
    input_shape: Shape,
    preprocessing: Preprocessing,
    data_dir: Path | None = None,
    download: bool = False,
    limit: int | None = None,
    seed: int = 0,
    skip_corrupt: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """The dataset `spec`, its images resized to `input_shape`; each split cut to `limit` images, evenly over the classes.

    `spec` is one of NAMES; a folder; or `module:function` (or `file.py:function`). A folder holds `train/` with `test/` or
    `val/` (`test/` wins), each with a folder per class; or a folder per class, which is training data only; or just images,
    which have no labels. The function is called with "train" and with "test" and returns (images, labels), or None where it
    has no such split: images uint8, or float from 0 to 1, (n, c, h, w); labels int64 (n,), or None.

    With `skip_corrupt` every file of a folder is decoded at once, and those that cannot be are left out; `log` is told which.

    Raises CompactError if there is no such data, or it is not downloaded, or a needed package is missing.
    """
    form = _form(input_shape, preprocessing)
    if limit is not None and limit < 1:
        raise CompactError(f"--limit is {limit}; it must be at least 1")
    if spec == "digits":
        dataset = _digits(form)
    elif spec in _TORCHVISION:
        dataset = _from_torchvision(spec, data_dir or _cache_dir(), download, form)
    elif Path(spec).is_dir():
        skipped: list[Path] = []
        dataset = _from_folder(Path(spec), form, skipped if skip_corrupt else None)
        if skipped:
            named = ", ".join(str(file.relative_to(spec)) for file in skipped[:SKIPPED_NAMED])
            more = f" and {len(skipped) - SKIPPED_NAMED} more" if len(skipped) > SKIPPED_NAMED else ""
            log(f"{dataset.name}: left out {len(skipped)} corrupt image{'s' * (len(skipped) != 1)}: {named}{more}")
    elif ":" in spec:
        dataset = _from_function(spec, form)
    else:
        raise CompactError(f"no data {spec!r}; it must be a folder of images, module:function, or one of {', '.join(NAMES)}")
    if limit is None:
        return dataset
    return replace(dataset, train=_limited(dataset.train, limit, seed), test=_limited(dataset.test, limit, seed))


def remembered(recipe: Recipe) -> str | None:
    """The dataset that a file names, for where the user gives none: only ever one of NAMES, as no file says what is run or read.

    Raises CompactError for any other.
    """
    name = recipe.dataset
    if name is not None and name not in NAMES:
        raise CompactError(f"the file names {brief(name)!r} as its data, which is none of {', '.join(NAMES)}; give --data")
    return name


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
        raise CompactError(f"the data {dataset.name} has {found} class{'es' if found != 1 else ''}, the network {num_classes}")


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


def _limited(split: Split | None, limit: int, seed: int) -> Split | None:
    if split is None or limit >= len(split):
        return split
    return split.subset(choose(split.labels, len(split), limit, seed))


@dataclass(frozen=True)
class _Form:
    """What every image is brought to."""

    shape: Shape
    resize: int | None  # shorter side before the centre crop
    resampling: Image.Resampling


def _form(shape: Shape, preprocessing: Preprocessing) -> _Form:
    if shape[0] not in (1, 3):
        raise CompactError(f"the network takes {shape[0]} channels; images have 1 or 3")
    resampling = Image.Resampling.__members__.get(preprocessing.interpolation.upper())
    if resampling is None:
        known = ", ".join(name.lower() for name in Image.Resampling.__members__)
        raise CompactError(f"unknown interpolation {preprocessing.interpolation!r}; it must be one of {known}")
    return _Form(shape, preprocessing.resize, resampling)


def _digits(form: _Form) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8 x 8: 1,296 to train and 501 to test."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise CompactError("the digits need scikit-learn; try pip install 'compactcli[digits]'") from None
    source = load_digits()
    images = torch.tensor(source.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.tensor(source.target, dtype=torch.int64)
    # The images come writer by writer, so the test images are spread over each class; by a rule and not by a seed, so that
    # no version of anything changes which they are.
    number = (labels.unsqueeze(1) == labels).tril(-1).sum(1)
    is_test = number * 7 % 18 < 5
    train = _from_array(images[~is_test], labels[~is_test], "train", form)
    test = _from_array(images[is_test], labels[is_test], "test", form)
    return Dataset("digits", True, tuple("0123456789"), train, test, flip=False)


def _from_torchvision(name: str, root: Path, download: bool, form: _Form) -> Dataset:
    class_name, flip = _TORCHVISION[name]
    make = getattr(torchvision().datasets, class_name)
    splits: dict[str, Split] = {}
    classes: tuple[str, ...] = tuple("0123456789")
    for split in ("train", "test"):
        which = {"split": split} if name == "svhn" else {"train": split == "train"}
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout may be the pipe that a model goes through
                source = make(str(root), download=download, **which)
        except ModuleNotFoundError as problem:
            raise CompactError(f"{name} needs {problem.name}; try pip install {problem.name}") from None
        except (RuntimeError, OSError) as problem:
            if download:
                raise CompactError(f"{name} cannot be downloaded to {root}: {' '.join(str(problem).split())}") from None
            raise CompactError(f"{name} is not in {root}; --download fetches it, --data-dir names another folder") from None
        images = torch.as_tensor(source.data)
        if name.startswith("cifar"):
            images = images.permute(0, 3, 1, 2)
        elif name != "svhn":
            images = images.unsqueeze(1)
        labels = torch.as_tensor(source.labels if name == "svhn" else source.targets, dtype=torch.int64)
        splits[split] = _from_array(images, labels, split, form)
        classes = tuple(getattr(source, "classes", classes))
    return Dataset(name, True, classes, splits["train"], splits["test"], flip)


def _from_folder(root: Path, form: _Form, skipped: list[Path] | None) -> Dataset:
    """What a folder holds. Files that cannot be decoded are put into `skipped` and left out; None: nothing is decoded yet."""
    name = root.resolve().name
    # A folder called "train" is a split if it holds folders; with images in it, it is a class.
    parts = [part for part in ("train", "test", "val") if (root / part).is_dir() and _folders(root / part)]
    if parts:
        classes = tuple(folder.name for folder in _folders(root / parts[0]))
        splits = {part: _from_class_folders(root / part, part, classes, form, skipped, f"{parts[0]}/") for part in parts}
        return Dataset(name, False, classes, splits.get("train"), splits.get("test", splits.get("val")))
    if _folders(root):
        classes = tuple(folder.name for folder in _folders(root))
        if loose := _images(root):
            raise CompactError(f"{loose[0]} lies beside folders, which are classes then; give {root} images or folders of images")
        return Dataset(name, False, classes, _from_class_folders(root, "train", classes, form, skipped), None)
    files = _sound(_images(root), form, skipped)
    if not files:
        raise CompactError(f"{root} holds no images and no folders of images")
    return Dataset(name, False, None, _from_source(files, None, "all", form), None)


def _from_class_folders(
    root: Path, name: str, classes: tuple[str, ...], form: _Form, skipped: list[Path] | None, among: str = ""
) -> Split:
    """The images of the folders `classes` in `root`, labelled by their place in that list, which is that of `among`."""
    unknown = [folder for folder in _folders(root) if folder.name not in classes]
    if unknown:
        raise CompactError(f"{unknown[0]} is a class that {among} does not have")
    files_of = [_sound(_images(root / own), form, skipped) if (root / own).is_dir() else [] for own in classes]
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(files) for files in files_of]))
    if len(labels) == 0:
        raise CompactError(f"the folders in {root} hold no images ({' '.join(sorted(SUFFIXES))})")
    return _from_source([file for files in files_of for file in files], labels, name, form)


def _from_function(spec: str, form: _Form) -> Dataset:
    function = usercode.named(spec)
    if not callable(function):
        raise CompactError(f"{spec} is no function; wanted one of 'train' or 'test' that gives images and labels")
    splits: dict[str, Split] = {}
    for name in ("train", "test"):
        try:
            result = function(name)
        except Exception as problem:  # the user's own code
            said = brief(f"{type(problem).__name__}: {problem}")
            raise CompactError(f"{spec} failed for {name!r}: {said}; --debug shows where") from problem
        if result is not None:
            images, labels = _checked(spec, result)
            splits[name] = _from_array(images, labels, name, form)
    if not splits:
        raise CompactError(f'{spec} gave None for "train" and for "test"')
    return Dataset(Path(spec).name, False, None, splits.get("train"), splits.get("test"))


def _checked(spec: str, result: Any) -> tuple[Tensor, Tensor | None]:
    """What the user's function gave, as uint8 and int64. Raises CompactError if it is neither images nor labels."""
    try:
        images, labels = result
        images, labels = torch.as_tensor(images), None if labels is None else torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise CompactError(f"{spec} gave no pair of images and labels, as tensors or arrays") from None
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise CompactError(f"{spec} gave images of shape {tuple(images.shape)}; wanted (n, 1 or 3, h, w)")
    kinds = [tensor.dtype for tensor in (images, labels) if tensor is not None and tensor.is_complex()]
    kinds += [] if labels is None or not labels.is_floating_point() else [labels.dtype]
    if kinds:
        raise CompactError(f"{spec} gave {kinds[0]}; wanted images as uint8 or floats, and labels as integers")
    if labels is not None and (labels.shape != (len(images),) or int(labels.min()) < 0 or int(labels.max()) >= MANY_CLASSES):
        raise CompactError(
            f"{spec} gave labels of shape {tuple(labels.shape)}; wanted ({len(images)},), from 0 up to {MANY_CLASSES - 1}"
        )
    if not images.is_floating_point():
        images = images if images.dtype == torch.uint8 else images.to(torch.int64)  # torch finds no extremes of uint16
        if not 0 <= int(images.min()) <= int(images.max()) <= 255:
            raise CompactError(f"{spec} gave integers from {int(images.min())} to {int(images.max())}; wanted 0 to 255")
    else:
        if not 0 <= float(images.min()) <= float(images.max()) <= 1:
            raise CompactError(f"{spec} gave floats outside 0 to 1; wanted images before normalisation")
        images = images.mul(255).round()
    return images.to(torch.uint8), None if labels is None else labels.to(torch.int64)


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compactcli"


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    """The image files right in `folder`, by name. Hidden files and folders within are left alone."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    return [folder / name for name in sorted(names) if os.path.splitext(name)[1].lower() in SUFFIXES]


def _sound(files: list[Path], form: _Form, skipped: list[Path] | None) -> list[Path]:
    """The files that can be decoded; the others go to `skipped`. All of them where that is None."""
    if skipped is None:
        return files

    def decodes(file: Path) -> bool:
        try:
            _decode(file, form)
        except CompactError:
            return False
        return True

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        good = list(pool.map(decodes, files))
    skipped += [file for file, sound in zip(files, good, strict=True) if not sound]
    return [file for file, sound in zip(files, good, strict=True) if sound]


def _from_array(images: Tensor, labels: Tensor | None, name: str, form: _Form) -> Split:
    """A split of images in memory, uint8 (n, c, h, w), brought to `form`."""
    if images.shape[1:] == form.shape and form.resize is None:
        return from_tensors(images, labels, name)
    rows = images[:, 0] if images.shape[1] == 1 else images.permute(0, 2, 3, 1)
    return _from_source(rows.contiguous().numpy(), labels, name, form)


def _from_source(source: Sequence[Path] | np.ndarray[Any, Any], labels: Tensor | None, name: str, form: _Form) -> Split:
    """A split of image files, or of images uint8 (n, h, w) or (n, h, w, 3), brought to `form` when they are read."""

    def read(index: Tensor) -> Tensor:
        each = prod(form.shape)
        if len(index) * each > MEMORY_LIMIT:
            size = f"{len(index):,} images of {' x '.join(map(str, form.shape))} take {len(index) * each / 1e9:.1f} GB"
            fitting = MEMORY_LIMIT // each
            way = f"--limit {fitting}" if fitting else "a smaller --input-shape"
            raise CompactError(f"{size}, more than the {MEMORY_LIMIT / 1e9:.0f} GB held at once; try {way}")
        images = torch.empty((len(index), *form.shape), dtype=torch.uint8)
        target = images.numpy()

        def fill(first: int) -> None:
            for row, position in enumerate(index[first : first + 64].tolist(), first):
                target[row] = _decode(source[position], form)

        # Threads take turns in Python: on 2 cores, a second one makes 500 x 375 JPEGs 1.8 times as fast and 32 x 32 ones half.
        with ThreadPoolExecutor(1 if each <= 3 * 64 * 64 else torch.get_num_threads()) as pool:
            for _ in pool.map(fill, range(0, len(index), 64)):
                pass
        return images

    return Split(name, labels, form.shape, torch.arange(len(source)), read)


def _decode(item: Path | np.ndarray[Any, Any], form: _Form) -> np.ndarray[Any, Any]:
    """One file, or one image (h, w) or (h, w, 3), as uint8 (c, h, w). Raises CompactError naming a file that is no image."""
    if not isinstance(item, Path):
        return _pixels(Image.fromarray(item), form)
    try:
        with Image.open(item) as image:
            return _pixels(image, form)
    except UnidentifiedImageError:
        raise CompactError(f"{item} is not an image; remove it, or leave such files out with --skip-corrupt") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise CompactError(
            f"{item} cannot be decoded ({problem}); remove it, or leave such files out with --skip-corrupt"
        ) from None


def _pixels(image: Image.Image, form: _Form) -> np.ndarray[Any, Any]:
    """`image` as uint8 (c, h, w): luma for one channel; shorter side to `resize` and centre crop, or straight to h x w."""
    channels, height, width = form.shape
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError(f"32 bits a pixel, mode {image.mode}, of which nothing says what is white")
    if image.mode.startswith("I"):  # 16 bits; PIL's own conversion would clip them to 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    if form.resize is not None:
        short = min(image.size)
        scaled = (int(form.resize * image.width / short), int(form.resize * image.height / short))
        image = image if scaled == image.size else image.resize(scaled, form.resampling)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    elif image.size != (width, height):
        image = image.resize((width, height), form.resampling)
    # tobytes and not np.asarray(image), whose protocol takes as long as decoding a small image.
    return np.frombuffer(image.tobytes(), dtype=np.uint8).reshape(height, width, channels).transpose(2, 0, 1)
