"""What `--data` names: a dataset of torchvision's, the embedded digits, a folder of images, or a function of the user's."""

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import usercode
from .data import Dataset, Shape, Split, choose
from .errors import CompactError, brief
from .folders import from_folder
from .images import Form, form_of, from_array
from .recipe import Preprocessing, Recipe
from .vision import torchvision

MANY_CLASSES = 10**6  # what a label stays below

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

    With `skip_corrupt` every file of a folder is decoded at once, and those that cannot be are left out. `log` is told
    what is left out, files that are not named as images among it.

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
        dataset = from_folder(Path(spec), form, skip_corrupt=skip_corrupt, log=log)
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
