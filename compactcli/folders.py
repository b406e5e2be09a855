"""A folder of images as a dataset: splits of folders of classes, folders of classes, or images alone."""

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

from .data import Dataset, Split
from .errors import CompactError
from .images import Form, decode, from_source

NAMED = 3  # of the corrupt files, and of the endings of others, that were left out
SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"}
    | {".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)


def from_folder(root: Path, form: Form, *, skip_corrupt: bool, log: Callable[[str], None]) -> Dataset:
    """What the folder holds, as `sources.open_dataset` says; `log` is told what is left out.

    With `skip_corrupt` every file is decoded at once, and those that cannot be are left out. Raises CompactError where the
    folder holds no images, or such as are of no class.
    """
    folder = _Folder(root, form, skip_corrupt)
    dataset = folder.read(log)
    if others := folder.others:
        endings = [f"{suffix or 'no ending'} ({count:,})" for suffix, count in others.most_common()]
        files = "a file that is" if others.total() == 1 else f"{others.total():,} files that are"
        log(f"{dataset.name}: left out {files} not named as images are: {_first(endings)}")
    if corrupt := folder.corrupt:
        images, names = "image" if len(corrupt) == 1 else "images", [str(file.relative_to(root)) for file in corrupt]
        log(f"{dataset.name}: left out {len(corrupt)} corrupt {images}: {_first(names)}")
    return dataset


class _Folder:
    """A folder that is read, and what was left out of it."""

    def __init__(self, root: Path, form: Form, skip_corrupt: bool) -> None:
        self.root, self.form, self.skip_corrupt = root, form, skip_corrupt
        self.suffixes = SUFFIXES & Image.registered_extensions().keys()  # AVIF came with Pillow 11.3
        self.others: Counter[str] = Counter()  # endings of what is taken for no image
        self.corrupt: list[Path] = []

    def read(self, log: Callable[[str], None]) -> Dataset:
        root, name = self.root, self.root.resolve().name
        # A folder called "train" is a split if it holds folders; with images in it, it is a class.
        parts = [part for part in ("train", "test", "val") if (root / part).is_dir() and _folders(root / part)]
        if parts:
            if loose := [image for part in parts for image in self._images(root / part)]:
                raise CompactError(f"{loose[0]} is in no folder of a class, as others in {loose[0].parent} are; put it into one")
            for part in ("train", "test", "val"):
                if part not in parts and (root / part).is_dir() and self._images(root / part):
                    log(f"{name}: left out {part}/, whose images are in no folders of classes")
            classes = tuple(folder.name for folder in _folders(root / parts[0]))
            splits = {part: self._split(root / part, part, classes, f"{parts[0]}/") for part in parts}
            return Dataset(name, False, classes, splits.get("train"), splits.get("test", splits.get("val")))
        if _folders(root):
            classes = tuple(folder.name for folder in _folders(root))
            if loose := self._images(root):
                raise CompactError(
                    f"{loose[0]} lies beside folders, which are classes then; give {root} images or folders of images"
                )
            return Dataset(name, False, classes, self._split(root, "train", classes), None)
        files = self._sound(self._images(root))
        if not files:
            raise CompactError(f"{root} holds no images ({_endings()}) and no folders of images")
        return Dataset(name, False, None, from_source(files, None, "all", self.form), None)

    def _split(self, root: Path, name: str, classes: tuple[str, ...], among: str = "") -> Split:
        """The images of the folders `classes` in `root`, labelled by their place in that list, which is that of `among`."""
        unknown = [folder for folder in _folders(root) if folder.name not in classes]
        if unknown:
            raise CompactError(f"{unknown[0]} is a class that {among} does not have; --data {root} reads that folder alone")
        files_of = [self._sound(self._images_below(root / own)) if (root / own).is_dir() else [] for own in classes]
        labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(files) for files in files_of]))
        if len(labels) == 0:
            raise CompactError(f"the folders in {root} hold no images ({_endings()}); fill them, or remove {root}")
        return from_source([file for files in files_of for file in files], labels, name, self.form)

    def _images(self, folder: Path) -> list[Path]:
        """The image files right in `folder`, by name. Hidden files and folders within are left alone."""
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".") and (entry.is_file() or _dangles(entry))]
        images = []
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in self.suffixes:
                images.append(folder / name)
            else:
                self.others[suffix] += 1
        return images

    def _images_below(self, folder: Path) -> list[Path]:
        """The image files in `folder` and in all folders in it, by path."""
        return [*self._images(folder), *(image for inner in _folders(folder) for image in self._images_below(inner))]

    def _sound(self, files: list[Path]) -> list[Path]:
        """The files that can be decoded; all of them where corrupt ones are not to be skipped."""
        if not self.skip_corrupt:
            return files

        def decodes(file: Path) -> bool:
            try:
                decode(file, self.form)
            except CompactError:
                return False
            return True

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            good = list(pool.map(decodes, files))
        self.corrupt += [file for file, sound in zip(files, good, strict=True) if not sound]
        return [file for file, sound in zip(files, good, strict=True) if sound]


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _dangles(entry: os.DirEntry[str]) -> bool:
    """Whether it is a link to what is not there, which is told, as a file is that cannot be read."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def _first(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _endings() -> str:
    return " ".join(sorted(SUFFIXES))
