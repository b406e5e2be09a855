"""Images of any kind and size as uint8 tensors of one: files, and arrays in memory, brought to a network's input.

Shapes: n images, c channels, h x w pixels.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .data import MEMORY_LIMIT, Shape, Split, from_tensors
from .errors import CompactError, brief
from .recipe import Preprocessing

LARGEST = 1 << 27  # pixels that an image is scaled to before its middle is taken


@dataclass(frozen=True)
class Form:
    """What every image is brought to."""

    shape: Shape
    resize: int | None  # shorter side before the centre crop
    resampling: Image.Resampling


def form_of(shape: Shape, preprocessing: Preprocessing) -> Form:
    """What a network with inputs of that shape takes. Raises CompactError where images cannot be made so."""
    if shape[0] not in (1, 3):
        raise CompactError(f"the network takes {shape[0]} channels; images have 1 or 3")
    resampling = Image.Resampling.__members__.get(preprocessing.interpolation.upper())
    if resampling is None:
        known = ", ".join(name.lower() for name in Image.Resampling.__members__)
        raise CompactError(f"unknown interpolation {brief(repr(preprocessing.interpolation))}; it must be one of {known}")
    return Form(shape, preprocessing.resize, resampling)


def from_array(images: Tensor, labels: Tensor | None, name: str, form: Form) -> Split:
    """A split of images in memory, uint8 (n, c, h, w), brought to `form`."""
    if images.shape[1:] == form.shape and form.resize is None:
        return from_tensors(images, labels, name)
    rows = images[:, 0] if images.shape[1] == 1 else images.permute(0, 2, 3, 1)
    return from_source(rows.contiguous().numpy(), labels, name, form)


def from_source(source: Sequence[Path] | np.ndarray[Any, Any], labels: Tensor | None, name: str, form: Form) -> Split:
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
                target[row] = decode(source[position], form)

        # Threads take turns in Python: on 2 cores, a second one makes 500 x 375 JPEGs 1.8 times as fast and 32 x 32 ones half.
        with ThreadPoolExecutor(1 if each <= 3 * 64 * 64 else torch.get_num_threads()) as pool:
            for _ in pool.map(fill, range(0, len(index), 64)):
                pass
        return images

    return Split(name, labels, form.shape, torch.arange(len(source)), read)


def decode(item: Path | np.ndarray[Any, Any], form: Form) -> np.ndarray[Any, Any]:
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


def _pixels(image: Image.Image, form: Form) -> np.ndarray[Any, Any]:
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
        if scaled[0] * scaled[1] > LARGEST:
            raise ValueError(f"{image.width} x {image.height} pixels, too narrow to be scaled")
        image = image if scaled == image.size else image.resize(scaled, form.resampling)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    elif image.size != (width, height):
        image = image.resize((width, height), form.resampling)
    # tobytes and not np.asarray(image), whose protocol takes as long as decoding a small image.
    return np.frombuffer(image.tobytes(), dtype=np.uint8).reshape(height, width, channels).transpose(2, 0, 1)
