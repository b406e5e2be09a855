"""Tensors in files that others wrote: which there may be, and how their bytes are taken."""

import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import CompactError, short

# Limits far above what a real network needs.
DIMENSIONS = 8
ELEMENTS = 1 << 48

File = io.BufferedReader | io.BytesIO

DTYPES = {  # by the names that safetensors gives them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def taken(stream: io.BufferedIOBase, count: int) -> Tensor:
    """The next `count` bytes of a stream as uint8; the caller knows that the file is as large."""
    data = torch.empty(count, dtype=torch.uint8)
    buffer: Any = data.numpy()
    if stream.readinto(buffer) != count:
        raise CompactError("the file is cut short; download or copy it again")
    return data


def check_shape(name: str, shape: Sequence[Any]) -> None:
    """Raises CompactError unless torch can hold a tensor of this shape without overflow."""
    whole = len(shape) <= DIMENSIONS and all(type(n) is int and 0 <= n <= ELEMENTS for n in shape)
    if not whole or math.prod(max(n, 1) for n in shape) > ELEMENTS:
        raise CompactError(f"{short(name)} has an impossible shape; the file is damaged or hostile")


def unsupported(name: str, kind: str) -> CompactError:
    """The error for a tensor of a kind that is not read, and the way out."""
    return CompactError(
        f"{short(name)} is {kind}; only dense tensors of real numbers are read; "
        "convert it (.dequantize(), .to_dense(), .real) and save again"
    )
