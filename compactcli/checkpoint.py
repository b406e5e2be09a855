"""Reads a checkpoint of any common format into named tensors. Nothing from the file is imported or run.

A pickle is read as data (`pickles.py`): only the tensors that are wanted are built from the calls in it, each checked against the
bytes that are there. A file may thus hold any class beside its tensors, and optimizer state costs nothing.
"""

import functools
import hashlib
import io
import json
import math
import os
import struct
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .errors import CompactError, damage, short
from .peel import NeedsTrustError, peel
from .pickles import Call, Global, Pickle, Storage
from .vision import cured

# Limits, all far above what a real network needs.
HEADER_BYTES = 100_000_000  # of a safetensors header; the format's own limit
CONFIG_BYTES = 16 << 20
ZIP_ENTRIES = 100_000
SHARED_RATIO = 256  # bytes named by all tensors together / bytes of the file (23 in a ResNet-56 with CSG)
DIMENSIONS = 8
ELEMENTS = 1 << 48
EXPANDED = 1 << 20  # numbers of a tensor that repeats those that it holds

FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a timm or Hugging Face folder, the first of them that is there

_DTYPES = {
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


_File = io.BufferedReader | io.BytesIO


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


def _read_file(file: _File, name: str, folder: Path | None, config: dict[str, Any] | None, trust_pickle: bool) -> Checkpoint:
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
    elif head.startswith(b"PK\x03\x04"):
        tensors, notes = _from_pickle(_zip(file, size), file, size, trust_pickle)
    elif head.startswith(b"\x80"):
        tensors, notes = _from_pickle(_legacy(file, size), file, size, trust_pickle)
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


def _bytes(stream: io.BufferedIOBase, count: int) -> Tensor:
    """The next `count` bytes of a stream as uint8; the caller knows that the file is as large."""
    data = torch.empty(count, dtype=torch.uint8)
    buffer: Any = data.numpy()
    if stream.readinto(buffer) != count:
        raise CompactError("the file is cut short; download or copy it again")
    return data


def _safetensors(file: _File, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
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
        tensors[name] = _bytes(file, end - begin).view(dtype).reshape(shape)
    return tensors, metadata


def _entry(name: str, value: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """dtype, shape, first byte and last byte plus one of a tensor, from its place in the header."""
    match value:
        case {"dtype": str() as code, "shape": list() as shape, "data_offsets": [int() as begin, int() as end]}:
            pass
        case _:
            raise CompactError(f"{short(name)} is not described as safetensors does (dtype, shape, data_offsets)")
    if code not in _DTYPES:
        raise _unsupported(name, f"of type {short(code)}")
    dtype = _DTYPES[code]
    _check_shape(name, shape)
    if not 0 <= begin <= end <= 1 << 62 or end - begin != math.prod(shape) * dtype.itemsize:
        raise CompactError(f"{short(name)} is {code} {shape}, which is not what the header's offsets leave for it")
    return dtype, tuple(shape), begin, end


def _check_shape(name: str, shape: Sequence[Any]) -> None:
    """Raises CompactError unless torch can hold a tensor of this shape without overflow."""
    whole = len(shape) <= DIMENSIONS and all(type(n) is int and 0 <= n <= ELEMENTS for n in shape)
    if not whole or math.prod(max(n, 1) for n in shape) > ELEMENTS:
        raise CompactError(f"{short(name)} has an impossible shape; the file is damaged or hostile")


def _json(text: bytes, part: str) -> dict[str, Any]:
    with damage(part):
        value = json.loads(text.decode())
    if not isinstance(value, dict):
        raise CompactError(f"the {part} is not a JSON object")
    return value


@dataclass
class _Content:
    """What a torch file says, and how to get at the bytes of a storage by its key."""

    tree: Any
    load: Callable[[str], Tensor]
    objects: list[str]  # classes and functions the pickle names and that stay unread


def _zip(file: _File, size: int) -> _Content:
    """A file of torch.save since 1.6: a zip archive with data.pkl and data/<key>, nothing compressed."""
    if _count(file, b"PK\x01\x02") > ZIP_ENTRIES:
        raise CompactError(f"the zip archive has more than {ZIP_ENTRIES} entries; no checkpoint has as many")
    broken = (zipfile.BadZipFile, struct.error, NotImplementedError, RuntimeError, OverflowError, OSError)
    with damage("zip archive", *broken):
        archive = zipfile.ZipFile(file)
    entries = {info.filename: info for info in archive.infolist()}
    if any(name.rpartition("/")[2] == "constants.pkl" for name in entries):
        raise CompactError("this is a TorchScript archive, which holds code; save model.state_dict() with torch.save instead")
    if any(name.rpartition("/")[2] == "archive_format" for name in entries):
        raise CompactError(
            "this is a program of torch.export, which holds no network to change; give the checkpoint it was made of"
        )
    if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
        raise CompactError("the zip archive is compressed, which torch.save never does; unpack it first")
    if sum(info.file_size for info in archive.infolist()) > size:
        raise CompactError("the zip archive declares more bytes than the file has; it is damaged or hostile")
    for info in entries.values():
        if info.CRC == 0:  # torch.serialization.set_crc32_options(False) leaves the checksums out
            del info.CRC
    root = next((name.removesuffix("data.pkl") for name in entries if name.rpartition("/")[2] == "data.pkl"), None)
    if root is None:
        raise CompactError("a zip archive without data.pkl, so not one of torch.save; unpack it, or save model.state_dict()")

    def content(name: str) -> Tensor:
        if name not in entries:
            raise CompactError(f"the zip archive has no {short(name)}, which the pickle refers to; it is damaged")
        with damage("zip archive", *broken), archive.open(entries[name]) as stream:
            return _bytes(cast(zipfile.ZipExtFile, stream), entries[name].file_size)

    if f"{root}byteorder" in entries and bytes(content(f"{root}byteorder").numpy()) != b"little":
        raise CompactError("the file was saved on a big-endian machine; load and save it on a little-endian one")
    pickled = Pickle(io.BytesIO(content(f"{root}data.pkl").numpy().tobytes()))
    return _Content(pickled.tree, functools.cache(lambda key: content(f"{root}data/{key}")), list(pickled.objects))


def _count(file: _File, mark: bytes) -> int:
    """How often the bytes `mark` occur in a file. Leaves it at its start."""
    count, tail = 0, b""
    file.seek(0)
    while block := file.read(1 << 20):
        count += (tail + block).count(mark)
        tail = block[1 - len(mark) :]
    file.seek(0)
    return count


def _legacy(file: _File, size: int) -> _Content:
    """A file of torch.save before 1.6: five pickles, then each storage as its length and its elements."""
    if Pickle(file).tree != 0x1950A86A20F9469CFC6C:
        raise CompactError("a pickle that torch.save did not write; load it and save the state_dict with torch.save")
    if Pickle(file).tree != 1001:
        raise CompactError("a format of torch.save that this compactcli does not know; wanted version 1001")
    system = Pickle(file).tree
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise CompactError("the file was saved on a big-endian machine; load and save it on a little-endian one")
    pickled = Pickle(file)
    keys = Pickle(file).tree
    places: dict[str, tuple[int, int]] = {}
    position = file.tell()
    for key in keys if isinstance(keys, list) else []:
        if not isinstance(key, str) or key not in pickled.storages:
            raise CompactError("a storage in the file belongs to no tensor; the file is damaged")
        file.seek(position)
        count = int.from_bytes(file.read(8), "little") * pickled.storages[key].dtype.itemsize
        places[key] = (position + 8, count)
        position += 8 + count
        if position > size:
            raise CompactError(f"the storages should end at byte {position} or later, the file has {size}; it is cut short")

    def content(key: str) -> Tensor:
        if key not in places:
            raise CompactError(f"the bytes of storage {short(key)} are missing; the file is damaged")
        file.seek(places[key][0])
        return _bytes(file, places[key][1])

    return _Content(pickled.tree, functools.cache(content), list(pickled.objects))


def _from_pickle(content: _Content, file: _File, size: int, trust_pickle: bool) -> tuple[dict[str, Tensor], list[str]]:
    try:
        entries, notes = peel(content.tree)
    except NeedsTrustError:
        if not trust_pickle:
            raise
        entries, notes = peel(_unpickled(file))
        notes.insert(0, "unpickled the file (--trust-pickle), which ran code from it")
    else:
        if content.objects:
            names = ", ".join(short(name) for name in content.objects[:3])
            notes.append(f"left {len(content.objects)} pickled classes unread and unrun: {names}")
    tensors = {
        name: _plain(name, value) if isinstance(value, Tensor) else _build(name, value, content)
        for name, value in entries.items()
    }
    named = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    if named > SHARED_RATIO * size:
        raise CompactError(
            f"its tensors name {named} bytes, more than {SHARED_RATIO} times the {size} of the file; it is hostile"
        )
    return tensors, notes


def _unpickled(file: _File) -> Any:
    """What torch.load makes of the file, running its code. Modules become their state_dicts."""

    def load() -> Any:
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=False)

    try:
        tree = cured(load)
    except Exception as problem:  # foreign code raises what it likes
        detail = " ".join(str(problem).split())[:160]
        raise CompactError(f"unpickling failed: {detail}; run where its classes can be imported (PYTHONPATH)") from problem
    return _modules_apart(tree)


def _modules_apart(tree: Any) -> Any:
    """Tables with the state_dicts of modules, and with arrays of numpy as tensors."""
    if isinstance(tree, nn.Module):
        return tree.state_dict()
    if isinstance(tree, np.ndarray) and tree.dtype.kind in "fiub":
        return torch.from_numpy(tree.copy())
    return {key: _modules_apart(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _unsupported(name: str, kind: str) -> CompactError:
    return CompactError(
        f"{short(name)} is {kind}; only dense tensors of real numbers are read; "
        "convert it (.dequantize(), .to_dense(), .real) and save again"
    )


def _plain(name: str, tensor: Tensor) -> Tensor:
    """A tensor that unpickling made, without its gradient."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        raise _unsupported(name, f"a {type(tensor).__name__} with layout {tensor.layout} on {tensor.device}")
    if tensor.dtype not in _DTYPES.values():
        raise _unsupported(name, f"of type {tensor.dtype}")
    return tensor.detach()


def _build(name: str, call: Call, content: _Content) -> Tensor:
    """The tensor that a call would make, as a view of its storage."""
    storage, dtype, offset, size, stride = _view(name, call)
    if dtype not in _DTYPES.values():
        raise _unsupported(name, f"of type {dtype}")
    _check_shape(name, size)
    if len(stride) != len(size) or not all(type(n) is int and 0 <= n <= ELEMENTS for n in (*stride, offset)):
        raise CompactError(f"{short(name)} has impossible strides; the file is damaged or hostile")
    count = math.prod(size)
    if count == 0:
        return torch.empty(size, dtype=dtype)
    data = content.load(storage.key)
    begin = storage.start * storage.dtype.itemsize
    end = begin + storage.length * storage.dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    held = (last + 1) if 0 in stride and count <= EXPANDED else max(count, last + 1)
    if begin % dtype.itemsize or not 0 <= begin <= end <= len(data) or held * dtype.itemsize > end - begin:
        raise CompactError(
            f"{short(name)} {size} does not fit in its storage of {len(data)} bytes; the file is damaged or hostile"
        )
    typed = data[begin : begin + (end - begin) // dtype.itemsize * dtype.itemsize].view(dtype)
    return typed.as_strided(size, stride, typed.storage_offset() + offset)


def _view(name: str, call: Call, depth: int = 0) -> tuple[Storage, torch.dtype, Any, tuple[Any, ...], tuple[Any, ...]]:
    """Storage, dtype, offset, shape and strides of the tensor that a call would make."""
    if depth > 4 or len(call.arguments) > 16:
        raise _unsupported(name, "wrapped in other tensors too often")
    match call.function.rpartition(".")[2], call.arguments, call.state:
        case "_rebuild_tensor" | "_rebuild_tensor_v2", (Storage() as storage, offset, size, stride, *rest), _:
            if len(rest) == 3 and rest[2]:
                raise _unsupported(name, "a conjugated or negated view")
            return storage, storage.dtype, offset, _sizes(size), _sizes(stride)
        case "_rebuild_tensor_v3", (Storage() as storage, offset, size, stride, _, _, Global(name=kind), *_), _:
            dtype = next((dtype for dtype in _DTYPES.values() if str(dtype) == kind), None)
            if dtype is None:
                raise _unsupported(name, f"of type {short(kind)}")
            return storage, dtype, offset, _sizes(size), _sizes(stride)
        case "_rebuild_from_type" | "_rebuild_from_type_v2", (Global(name=function), _, tuple() as arguments, *_), _:
            return _view(name, Call(function, arguments), depth + 1)
        case (
            "_rebuild_parameter" | "_rebuild_parameter_with_state" | "_rebuild_device_tensor_from_cpu_tensor" | "Parameter",
            (Call() as inner, *_),
            _,
        ):
            return _view(name, inner, depth + 1)
        # torch before 0.4: a tensor's state is its view, a parameter's begins with its tensor.
        case _, _, (Storage() as storage, offset, size, stride):
            return storage, storage.dtype, offset, _sizes(size), _sizes(stride)
        case _, _, (Call() as inner, _, _, _, _):
            return _view(name, inner, depth + 1)
        case function, _, _:
            raise _unsupported(name, f"a tensor made by {short(function)}")


def _sizes(value: Any) -> tuple[Any, ...]:
    """A shape, which old files wrap in a torch.Size."""
    if isinstance(value, Call) and value.function == "torch.Size" and value.arguments:
        value = value.arguments[0]
    return tuple(value) if isinstance(value, (tuple, list)) else (None,)
