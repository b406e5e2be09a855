"""Reads a checkpoint of any common format into named tensors. Nothing from the file is imported or run."""

import hashlib
import io
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import torchfile
from .errors import CompactError, damage, short
from .foreign import DTYPES, File, check_shape, taken, unsupported
from .peel import peel

# Limits far above what a real network needs.
HEADER_BYTES = 100_000_000  # of a safetensors header; the format's own limit
CONFIG_BYTES = 16 << 20

FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a timm or Hugging Face folder, the first of them that is there


@dataclass(frozen=True)
class Checkpoint:
    """What a file held: tensors on the CPU in the file's order, wrappers and prefixes peeled off."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]  # of safetensors, else empty; a recipe is metadata["compactcli"]
    config: dict[str, Any] | None  # config.json of a folder
    name: str  # bare name of the file or folder, or "stdin"
    folder: Path | None  # where `name` lies; None for stdin
    sha256: str  # of the weights file
    size_bytes: int  # of the weights file
    notes: tuple[str, ...]  # what was peeled or dropped, a line each


def read(source: str | Path | bytes, *, trust_pickle: bool = False) -> Checkpoint:
    """The checkpoint at a path, in a folder (config.json beside its weights), on stdin ("-"), or in bytes.

    Only with `trust_pickle`, and only if the tensors cannot be had otherwise, is a pickled object
    unpickled, which runs code from the file. Raises CompactError, with the name of the file in it, for
    whatever is missing, damaged, hostile or no checkpoint.
    """
    if not isinstance(source, bytes) and str(source) == "-":
        source = sys.stdin.buffer.read()
        if not source:
            raise CompactError("no model on stdin (did the command before it fail?)")
    name = "stdin" if isinstance(source, bytes) else str(source)
    try:
        if isinstance(source, bytes):
            return _read_file(io.BytesIO(source), name, None, None, trust_pickle)
        return _read_path(Path(source), trust_pickle)
    except CompactError as problem:
        raise CompactError(f"{name}: {problem}") from None
    except OSError as problem:
        raise CompactError(f"{name}: cannot be read ({problem.strerror or problem})") from None
    except RecursionError:
        raise CompactError(f"{name}: nested too deeply for a checkpoint; the file is damaged or hostile") from None


def _read_path(path: Path, trust_pickle: bool) -> Checkpoint:
    if not path.exists():
        raise CompactError("no such file")
    absolute = Path(os.path.abspath(path))  # "." has no name; symbolic links stay as the user named them
    weights, config = _folder(path) if path.is_dir() else (path, None)
    with weights.open("rb") as file:
        if not file.seekable():  # a process substitution, <(curl ...)
            return _read_file(io.BytesIO(file.read()), absolute.name, absolute.parent, config, trust_pickle)
        before = os.fstat(file.fileno())
        found = _read_file(file, absolute.name, absolute.parent, config, trust_pickle)
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise CompactError("was written to while it was read; try again once it is whole")
        return found


def _folder(path: Path) -> tuple[Path, dict[str, Any]]:
    """The weights file and the config.json of a timm or Hugging Face folder."""
    if not (path / "config.json").is_file():
        raise CompactError("a folder without config.json; give the weights file in it instead")
    with (path / "config.json").open("rb") as file:
        text = file.read(CONFIG_BYTES + 1)
    if len(text) > CONFIG_BYTES:
        raise CompactError(f"config.json is larger than {CONFIG_BYTES} bytes")
    config = _json(text, "config.json")
    if (weights := weights_file(path)) is None:
        raise CompactError(f"the folder has config.json but neither {' nor '.join(FOLDER_WEIGHTS)} (one file, not shards)")
    return weights, config


def weights_file(path: Path) -> Path | None:
    """The file that a checkpoint's weights lie in: of a folder the one in it, if there is one."""
    if not path.is_dir():
        return path
    return next((path / name for name in FOLDER_WEIGHTS if (path / name).is_file()), None)


def _read_file(file: File, name: str, folder: Path | None, config: dict[str, Any] | None, trust_pickle: bool) -> Checkpoint:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(512)
    file.seek(0)
    metadata: dict[str, str] = {}
    # The content tells the format; .pt, .pth, .th, .t7, .bin, .ckpt and .tar are all in use for all of them.
    if head[8:9] == b"{":
        entries, metadata = _safetensors(file, size)
        # A recipe knows its tensors by the names they have.
        tensors, notes = (entries, []) if "compactcli" in metadata else peel(entries)
    elif head.startswith((torchfile.ZIP, torchfile.PICKLE)):
        tensors, notes = torchfile.read(file, size, trust_pickle=trust_pickle)
    else:
        raise CompactError(_stranger(head))
    return Checkpoint(tensors, metadata, config, name, folder, digest, size, tuple(notes))


def _stranger(head: bytes) -> str:
    """What a file is that is no checkpoint, from its first bytes."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "the file is empty"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "this is an HTML page, not a checkpoint; the download probably failed"
    if head.startswith(b"version https://git-lfs"):
        return "this is a git-lfs pointer, not the checkpoint itself; run git lfs pull"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")) or head[257:262] == b"ustar":
        return "this is a compressed file or a tar archive; unpack it first"
    if head.startswith(b"\x08") and any(maker in head for maker in (b"pytorch", b"onnx", b"torch")):
        return "this is an ONNX file, which holds no network to change; give the checkpoint that it was exported from"
    if head.startswith(b"\x89HDF"):
        return "this is an HDF5 file (Keras?); only PyTorch and safetensors checkpoints are read"
    return f"not a checkpoint (it begins with {head[:8]!r}); wanted a file of torch.save or safetensors"


def _safetensors(file: File, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, HEADER_BYTES):
        raise CompactError(
            f"the safetensors header should be {length} bytes, the file has {size} and {HEADER_BYTES} are allowed; "
            "the file is damaged or cut short"
        )
    header = _json(file.read(length), "safetensors header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CompactError("the metadata of the safetensors header is not a table of strings")
    entries = {name: _entry(name, value) for name, value in header.items()}
    position = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != position:
            raise CompactError(f"{short(name)} begins at byte {begin} of the data, not at {position} where the one before ends")
        position = end
    if position != size - 8 - length:
        raise CompactError(
            f"the tensors should take {position} bytes, the file has {size - 8 - length}; it is cut short or damaged"
        )
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        file.seek(8 + length + begin)
        tensors[name] = taken(file, end - begin).view(dtype).reshape(shape)
    return tensors, metadata


def _entry(name: str, value: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """dtype, shape, first byte and last byte plus one of a tensor, from its place in the header."""
    match value:
        case {"dtype": str() as code, "shape": list() as shape, "data_offsets": [int() as begin, int() as end]}:
            pass
        case _:
            raise CompactError(f"{short(name)} is not described as safetensors does (dtype, shape, data_offsets)")
    if code not in DTYPES:
        raise unsupported(name, f"of type {short(code)}")
    dtype = DTYPES[code]
    check_shape(name, shape)
    if not 0 <= begin <= end <= 1 << 62 or end - begin != math.prod(shape) * dtype.itemsize:
        raise CompactError(f"{short(name)} is {code} {shape}, which is not what the header's offsets leave for it")
    return dtype, tuple(shape), begin, end


def _json(text: bytes, part: str) -> dict[str, Any]:
    with damage(part):
        value = json.loads(text.decode())
    if not isinstance(value, dict):
        raise CompactError(f"the {part} is not a JSON object")
    return value
