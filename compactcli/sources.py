"""What `--data` names: a dataset of torchvision's, the embedded digits, a folder of images, or a function of the user's."""

import contextlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import usercode
from .data import Dataset, Shape, Split, choose
from .errors import CompactError, brief
from .images import Form, decode, form_of, from_array, from_source
from .recipe import Preprocessing, Recipe
from .vision import torchvision

MANY_CLASSES = 10**6  # what a label stays below
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
    form = form_of(input_shape, preprocessing)
    if limit is not None and limit < 1:
        raise CompactError(f"--limit is {limit}; it must be at least 1")
    if spec == "digits":
        dataset = _digits(form)
    elif spec in _TORCHVISION:
        dataset = _from_torchvision(spec, data_dir or _cache_dir(), download, form)
    elif Path(spec).is_dir():
        skipped: list[Path] = []
        dataset = _from_folder(Path(spec), form, skipped if skip_corrupt else None, log)
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


def _limited(split: Split | None, limit: int, seed: int) -> Split | None:
    if split is None or limit >= len(split):
        return split
    return split.subset(choose(split.labels, len(split), limit, seed))


def _digits(form: Form) -> Dataset:
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
    train = from_array(images[~is_test], labels[~is_test], "train", form)
    test = from_array(images[is_test], labels[is_test], "test", form)
    return Dataset("digits", True, tuple("0123456789"), train, test, flip=False)


def _from_torchvision(name: str, root: Path, download: bool, form: Form) -> Dataset:
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
        except (RuntimeError, OSError, ValueError, AssertionError, EOFError) as problem:
            if download:
                raise CompactError(f"{name} cannot be downloaded to {root}: {' '.join(str(problem).split())}") from None
            if isinstance(problem, OSError) or "download=True" in str(problem):  # of what is not there it says this
                raise CompactError(f"{name} is not in {root}; --download fetches it, --data-dir names another folder") from None
            said = brief(f"{type(problem).__name__}: {problem}")
            raise CompactError(f"{name} in {root} is damaged ({said}); remove it, and --download fetches it again") from None
        images = torch.as_tensor(source.data)
        if name.startswith("cifar"):
            images = images.permute(0, 3, 1, 2)
        elif name != "svhn":
            images = images.unsqueeze(1)
        labels = torch.as_tensor(source.labels if name == "svhn" else source.targets, dtype=torch.int64)
        splits[split] = from_array(images, labels, split, form)
        classes = tuple(getattr(source, "classes", classes))
    return Dataset(name, True, classes, splits["train"], splits["test"], flip)


def _from_folder(root: Path, form: Form, skipped: list[Path] | None, log: Callable[[str], None]) -> Dataset:
    """What a folder holds. Files that cannot be decoded are put into `skipped` and left out; None: nothing is decoded yet."""
    name = root.resolve().name
    # A folder called "train" is a split if it holds folders; with images in it, it is a class.
    parts = [part for part in ("train", "test", "val") if (root / part).is_dir() and _folders(root / part)]
    if parts:
        if loose := [image for part in parts for image in _images(root / part)]:
            raise CompactError(f"{loose[0]} is in no folder of a class, as others in {loose[0].parent} are; put it into one")
        for part in ("train", "test", "val"):
            if part not in parts and (root / part).is_dir() and _images(root / part):
                log(f"{name}: left out {part}/, whose images are in no folders of classes")
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
    return Dataset(name, False, None, from_source(files, None, "all", form), None)


def _from_class_folders(
    root: Path, name: str, classes: tuple[str, ...], form: Form, skipped: list[Path] | None, among: str = ""
) -> Split:
    """The images of the folders `classes` in `root`, labelled by their place in that list, which is that of `among`."""
    unknown = [folder for folder in _folders(root) if folder.name not in classes]
    if unknown:
        raise CompactError(f"{unknown[0]} is a class that {among} does not have; --data {root} reads that folder alone")
    files_of = [_sound(_images_below(root / own), form, skipped) if (root / own).is_dir() else [] for own in classes]
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(files) for files in files_of]))
    if len(labels) == 0:
        raise CompactError(f"the folders in {root} hold no images ({' '.join(sorted(SUFFIXES))}); fill them, or remove {root}")
    return from_source([file for files in files_of for file in files], labels, name, form)


def _from_function(spec: str, form: Form) -> Dataset:
    function = usercode.named(spec)
    if not callable(function):
        raise CompactError(f"{spec} is no function; wanted one of 'train' or 'test' that gives images and labels")
    splits: dict[str, Split] = {}
    for name in ("train", "test"):
        try:
            result = usercode.called(function, name)
        except Exception as problem:  # the user's own code
            said = brief(f"{type(problem).__name__}: {problem}")
            raise CompactError(f"{spec} failed for {name!r}: {said}; --debug shows where") from problem
        if result is not None:
            images, labels = _checked(spec, result)
            splits[name] = from_array(images, labels, name, form)
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
    labels = None if labels is None else labels.to(torch.int64)  # torch finds no extremes of uint16
    if labels is not None and (labels.shape != (len(images),) or int(labels.min()) < 0 or int(labels.max()) >= MANY_CLASSES):
        raise CompactError(
            f"{spec} gave labels of shape {tuple(labels.shape)}; wanted ({len(images)},), from 0 up to {MANY_CLASSES - 1}"
        )
    if not images.is_floating_point():
        images = images if images.dtype == torch.uint8 else images.to(torch.int64)
        if not 0 <= int(images.min()) <= int(images.max()) <= 255:
            raise CompactError(f"{spec} gave integers from {int(images.min())} to {int(images.max())}; wanted 0 to 255")
    else:
        if not 0 <= float(images.min()) <= float(images.max()) <= 1:
            raise CompactError(f"{spec} gave floats outside 0 to 1; wanted images before normalisation")
        images = images.mul(255).round()
    return images.to(torch.uint8), labels


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compactcli"


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    """The image files right in `folder`, by name. Hidden files and folders within are left alone."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and (entry.is_file() or _dangles(entry))]
    return [folder / name for name in sorted(names) if os.path.splitext(name)[1].lower() in SUFFIXES]


def _dangles(entry: os.DirEntry[str]) -> bool:
    """Whether it is a link to what is not there, which is told, as a file is that cannot be read."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def _images_below(folder: Path) -> list[Path]:
    """The image files in `folder` and in all folders in it, by path."""
    return [*_images(folder), *(image for inner in _folders(folder) for image in _images_below(inner))]


def _sound(files: list[Path], form: Form, skipped: list[Path] | None) -> list[Path]:
    """The files that can be decoded; the others go to `skipped`. All of them where that is None."""
    if skipped is None:
        return files

    def decodes(file: Path) -> bool:
        try:
            decode(file, form)
        except CompactError:
            return False
        return True

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        good = list(pool.map(decodes, files))
    skipped += [file for file, sound in zip(files, good, strict=True) if not sound]
    return [file for file, sound in zip(files, good, strict=True) if sound]
