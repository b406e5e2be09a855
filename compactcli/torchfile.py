"""Files of torch.save, read as data: a zip archive since torch 1.6, a row of pickles before.

A pickle is read by `pickles.py`: only the tensors that are wanted are built from the calls in it, each checked against the
bytes that are there. A file may thus hold any class beside its tensors, and optimizer state costs nothing.
"""

import functools
import io
import math
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .errors import CompactError, damage, short
from .foreign import DTYPES, ELEMENTS, File, check_shape, taken, unsupported
from .peel import NeedsTrustError, peel
from .pickles import Call, Global, Pickle, Storage
from .vision import cured

ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # what they begin with

# Limits far above what a real network needs.
ZIP_ENTRIES = 100_000
SHARED_RATIO = 256  # bytes named by all tensors together / bytes of the file (23 in a ResNet-56 with CSG)
EXPANDED = 1 << 20  # numbers of a tensor that repeats those that it holds


def read(file: File, size: int, *, trust_pickle: bool) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file of `size` bytes that begins with ZIP or PICKLE, and what was peeled or dropped, a line each.

    Only with `trust_pickle`, and only if the tensors cannot be had otherwise, is it unpickled, which runs code from it.
    Raises CompactError for what is damaged, hostile or no checkpoint.
    """
    zipped = file.read(len(ZIP)) == ZIP
    file.seek(0)
    content = _zip(file, size) if zipped else _legacy(file, size)
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


@dataclass
class _Content:
    """What a torch file says, and how to get at the bytes of a storage by its key."""

    tree: Any
    load: Callable[[str], Tensor]
    objects: list[str]  # classes and functions the pickle names and that stay unread


def _zip(file: File, size: int) -> _Content:
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
            return taken(cast(zipfile.ZipExtFile, stream), entries[name].file_size)

    if f"{root}byteorder" in entries and bytes(content(f"{root}byteorder").numpy()) != b"little":
        raise CompactError("the file was saved on a big-endian machine; load and save it on a little-endian one")
    pickled = Pickle(io.BytesIO(content(f"{root}data.pkl").numpy().tobytes()))
    return _Content(pickled.tree, functools.cache(lambda key: content(f"{root}data/{key}")), list(pickled.objects))


def _count(file: File, mark: bytes) -> int:
    """How often the bytes `mark` occur in a file. Leaves it at its start."""
    count, tail = 0, b""
    file.seek(0)
    while block := file.read(1 << 20):
        count += (tail + block).count(mark)
        tail = block[1 - len(mark) :]
    file.seek(0)
    return count


def _legacy(file: File, size: int) -> _Content:
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
        return taken(file, places[key][1])

    return _Content(pickled.tree, functools.cache(content), list(pickled.objects))


def _unpickled(file: File) -> Any:
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


def _plain(name: str, tensor: Tensor) -> Tensor:
    """A tensor that unpickling made, without its gradient."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        raise unsupported(name, f"a {type(tensor).__name__} with layout {tensor.layout} on {tensor.device}")
    if tensor.dtype not in DTYPES.values():
        raise unsupported(name, f"of type {tensor.dtype}")
    return tensor.detach()


def _build(name: str, call: Call, content: _Content) -> Tensor:
    """The tensor that a call would make, as a view of its storage."""
    storage, dtype, offset, size, stride = _view(name, call)
    if dtype not in DTYPES.values():
        raise unsupported(name, f"of type {dtype}")
    check_shape(name, size)
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
        raise unsupported(name, "wrapped in other tensors too often")
    match call.function.rpartition(".")[2], call.arguments, call.state:
        case "_rebuild_tensor" | "_rebuild_tensor_v2", (Storage() as storage, offset, size, stride, *rest), _:
            if len(rest) == 3 and rest[2]:
                raise unsupported(name, "a conjugated or negated view")
            return storage, storage.dtype, offset, _sizes(size), _sizes(stride)
        case "_rebuild_tensor_v3", (Storage() as storage, offset, size, stride, _, _, Global(name=kind), *_), _:
            dtype = next((dtype for dtype in DTYPES.values() if str(dtype) == kind), None)
            if dtype is None:
                raise unsupported(name, f"of type {short(kind)}")
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
            raise unsupported(name, f"a tensor made by {short(function)}")


def _sizes(value: Any) -> tuple[Any, ...]:
    """A shape, which old files wrap in a torch.Size."""
    if isinstance(value, Call) and value.function == "torch.Size" and value.arguments:
        value = value.arguments[0]
    return tuple(value) if isinstance(value, (tuple, list)) else (None,)
