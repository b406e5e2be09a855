"""A pickle read as data: what it says, and nothing of it is called, imported or looked up.

`torch.load(weights_only=True)` runs no foreign code either, but it calls its allow-listed constructors with whatever numbers the
file holds: `bytearray(2**40)`, a legacy storage of 2**40 elements, a view larger than its storage. Limits would need a second
reader before it, and two readers can be made to disagree. So there is one, which calls nothing: a call becomes a `Call`, a
storage a `Storage`.
"""

import io
import pickletools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Any, cast

import torch

from .errors import CompactError, damage, short

# Limits, far above what a real network needs.
OPERATIONS = 2_000_000  # about 40 per tensor; each costs at most some hundred bytes
NAME_LENGTH = 1000  # of a class

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
    "_UntypedStorage": torch.uint8,
    # Known so that their bytes can be skipped; their tensors are refused.
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
}


@dataclass(frozen=True)
class Global:
    """A name of a class or function, as "module.name". Never looked up."""

    name: str


@dataclass(eq=False)
class Call:
    """A call that the pickle asks for and nobody makes."""

    function: str
    arguments: tuple[Any, ...]
    state: Any = None  # what __setstate__ would get

    @property
    def is_tensor(self) -> bool:
        module, _, name = self.function.rpartition(".")
        return module.split(".")[0] == "torch" and (
            name.startswith("_rebuild_") or name.endswith("Tensor") or name == "Parameter"
        )


@dataclass(frozen=True)
class Storage:
    """A run of elements: `length` of them from `start`, in the bytes that the file keeps under `key`."""

    dtype: torch.dtype
    key: str
    start: int
    length: int


# Calls that say no more than their argument, or that people keep beside weights and nobody misses.
MAPPINGS = frozenset({"collections.OrderedDict", "collections.defaultdict"})
HARMLESS = frozenset(
    {
        *("torch.Size", "torch.device", "argparse.Namespace", "collections.Counter", "_codecs.encode", "pathlib.PosixPath"),
        *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "builtins.set", "__builtin__.set"),
    }
)
RECONSTRUCTORS = frozenset({"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"})


class Pickle:
    """One pickle from a stream, interpreted without calling anything. Afterwards the stream is behind it.

    No operation may cost more than its own length, or a small file could take for ever: nothing from
    the file is hashed, compared, copied or printed but strings and numbers, and names are kept short.
    """

    def __init__(self, file: io.BufferedReader | io.BytesIO) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below the marks
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.objects: dict[str, None] = {}  # an ordered set
        with damage("pickle"), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pickletools' own, over a backslash in a name
            for count, (operation, argument, _) in enumerate(pickletools.genops(cast(IO[bytes], _Bounded(file)))):
                if count >= OPERATIONS:
                    raise CompactError(f"the pickle has more than {OPERATIONS} operations; no state_dict is that long")
                self._do(operation.name, argument)
            self.tree = self.stack.pop()

    def _do(self, operation: str, argument: Any) -> None:
        """One operation of the pickle machine; `pickletools` describes each."""
        stack = self.stack
        match operation:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.outer.append(stack)
                self.stack = []
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(operation == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST" | "EMPTY_SET":  # a set would hash what the file gives it
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(operation[-1]))))
            case "TUPLE" | "LIST" | "FROZENSET":
                items = self._marked()
                self.stack.append(tuple(items) if operation == "TUPLE" else items)
            case "DICT":
                items = self._marked()
                self.stack.append({})
                self._put_items(items)
            case "APPEND":
                self._extend(self._pop(1))
            case "APPENDS" | "ADDITEMS":
                self._extend(self._marked())
            case "SETITEM":
                self._put_items(self._pop(2))
            case "SETITEMS":
                self._put_items(self._marked())
            case "POP":
                self._pop(1)
            case "POP_MARK":
                self._marked()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_name(*self._pop(2)))
            case "REDUCE" | "NEWOBJ":
                self._call(*self._pop(2))
            case "NEWOBJ_EX":
                self._call(*self._pop(3)[:2])
            case "INST":
                self._call(_name(*argument.split(" ", 1)), tuple(self._marked()))
            case "OBJ":
                function, *arguments = self._marked()
                self._call(function, tuple(arguments))
            case "BUILD":
                (state,) = self._pop(1)
                if isinstance(stack[-1], Call):  # a dictionary's attributes, such as _metadata, are left out
                    stack[-1].state = state
            case "BINPERSID":
                stack.append(self._persistent(*self._pop(1)))
            case "PERSID" | "EXT1" | "EXT2" | "EXT4" | "NEXT_BUFFER" | "READONLY_BUFFER":
                raise ValueError(f"operation {operation} has no place in a checkpoint")
            case _:  # a number or a string
                stack.append(argument)

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("stack underflow")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _marked(self) -> list[Any]:
        """What was pushed since the last mark."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def _put_items(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(_named(zip(items[::2], items[1::2], strict=True)))

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple):
            raise ValueError("a call without a tuple of arguments")
        match function:
            case Global(name=name) | Call(function=name):
                pass
            case _:
                raise ValueError("a call of something that has no name")
        if name in MAPPINGS:
            self.stack.append(_mapping(arguments))
            return
        if name in RECONSTRUCTORS and arguments and isinstance(arguments[0], Global):
            name = arguments[0].name
        call = Call(name, arguments)
        if name not in HARMLESS and not call.is_tensor:
            self.objects[name] = None
        self.stack.append(call)

    def _persistent(self, identity: Any) -> Any:
        """What torch put outside the pickle: a storage, or the class of a module (old files add its source)."""
        match identity if isinstance(identity, tuple) and len(identity) <= 6 else None:
            case ("module", Global() as module, *_):
                return module
            case ("storage", Global(name=kind), str() as key, _, int() as length, *view):
                dtype = STORAGE_DTYPES.get(kind.rpartition(".")[2])
            case _:
                raise ValueError("a persistent id that is no storage")
        if dtype is None or length < 0:
            raise ValueError(f"a storage of kind {short(kind)} with {length} elements")
        whole = Storage(dtype, key, 0, length)
        self.storages.setdefault(key, whole)
        match view:
            case [(_, int() as start, int() as part)]:  # a part of the storage, in files of torch before 0.4
                return Storage(dtype, key, start, part)
        return whole


class _Bounded:
    """A stream of which no more is asked than there is: its own buffer would be made as large as a file says."""

    def __init__(self, file: io.BufferedReader | io.BytesIO) -> None:
        self.file, self.tell, self.readline = file, file.tell, file.readline
        here = file.tell()
        self.end = file.seek(0, io.SEEK_END)
        file.seek(here)

    def read(self, count: int) -> bytes:
        return self.file.read(min(count, self.end - self.file.tell()))


def _name(module: Any, name: Any) -> Global:
    if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > NAME_LENGTH:
        raise ValueError("a class without a proper name")
    return Global(f"{module}.{name}")


def _mapping(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """What OrderedDict(*arguments) and its like would hold: nothing yet, a table, or (Python 2) a list of pairs."""
    match arguments:
        case (dict() as table,):
            return table  # not a copy: a thousand calls could share it
        case (list() as pairs,):
            table = dict(_named(pair for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2))
            pairs.clear()  # for the same reason
            return table
    return {}


def _named(pairs: Iterable[Any]) -> list[tuple[str, Any]]:
    """The pairs whose key is a string, the only ones that can name a tensor."""
    return [(key, value) for key, value in pairs if isinstance(key, str)]
