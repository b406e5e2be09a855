"""Ways to damage a file: its bytes, the JSON in it, its tensors, its recipe, its archive and its pickles."""

import io
import json
import random
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from compactcli import artefact, methods, surgery
from compactcli.errors import CompactError
from compactcli.recipe import SETTABLE, Recipe, Replace, Share

Mutation = Callable[[bytes, Sequence[bytes], random.Random], bytes]
Tree = dict[str, Any]

LARGEST_FITTED = 1 << 18  # numbers of a network that `fitted` makes tensors for
TRICKS = (
    *(
        "",
        ".",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "C:\\con",
        "a/b",
        "a\0b",
        "\n",
        "\x1b[2J",
        "é" * 300,
        "x" * 5000,
        "%s%n",
        "{}",
    ),
    *(
        "__class__",
        "__init__",
        "_parameters",
        "forward",
        "training",
        "weight",
        "compactcli_shared",
        "compactcli_shared.x",
        "-",
        "~",
    ),
    *("file:///etc/passwd", "hf-hub:a/b", "timm:hf-hub:a/b", "os:system", "evil.py:factory", "cifar:", "timm:", ":"),
)
STRANGE: tuple[object, ...] = (
    *(None, True, False, 0, 1, -1, 2, 1 << 31, 1 << 63, 10**400, 1.5, 1e308, -0.0, "", "F32", "\n", "0", "0-1048575", "5-2"),
    *([], [0], [1 << 40] * 3, [0] * 70, {}, {"dtype": "F32"}, [[]], {"": {}}),
)
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "I32", "I16", "I8", "U64", "U16", "U8", "BOOL", "C64", "F4", "")
# Each runs a command where a pickle is unpickled.
COMMANDS = (
    b"cos\nsystem\n(S'true'\ntR0",
    b"c__builtin__\neval\n(S'1'\ntR0",
    b"csubprocess\ncall\n((lS'true'\natR0",
    b"(S'true'\nios\nsystem\n0",
    b"\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R0",
    b"ctorch.hub\nload\n(S'a/b'\nS'c'\ntR0",
)


def flip(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 4, 32))):
        if changed:
            changed[_position(changed, chance)] ^= chance.choice((1, 2, 4, 8, 16, 32, 64, 128, 255))
    return bytes(changed)


def truncate(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    return data[: _position(data, chance)]


def delete(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    begin = _position(data, chance)
    return data[:begin] + data[begin + chance.choice((1, 2, 8, 100)) :]


def insert(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    begin = _position(data, chance)
    return data[:begin] + chance.randbytes(chance.choice((1, 2, 8, 100))) + data[begin:]


def zero(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    begin, length = _position(data, chance), chance.choice((1, 8, 100))
    return data[:begin] + bytes(len(data[begin : begin + length])) + data[begin + length :]


def splice(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    other = chance.choice(seeds)
    begin = _position(other, chance)
    return data[: _position(data, chance)] + other[begin : begin + chance.choice((4, 40, 4000))] + data[_position(data, chance) :]


def number(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """Puts an extreme number where a length, a size or an offset may be; the first eight bytes are one in safetensors."""
    value = chance.choice((0, 1, 0x7F, 0xFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 64) - 1, len(data)))
    width = chance.choice(("<Q", "<I", "<H", "B"))
    packed = struct.pack(width, value % (1 << 8 * struct.calcsize(width)))
    begin = chance.choice((0, _position(data, chance)))
    return data[:begin] + packed + data[begin + len(packed) :]


def digits(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """Replaces one run of digits, in JSON or in the text of a pickle."""
    runs = list(re.finditer(rb"\d+", data[:100_000]))
    if not runs:
        return data
    run = chance.choice(runs)
    return data[: run.start()] + chance.choice((b"0", b"-1", b"7", b"99999999999", b"1e400", b"9" * 5000)) + data[run.end() :]


def header(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """Changes one value in the JSON header of a safetensors file and puts its length right."""
    return _with_header(data, lambda tree, body: (_changed(tree, chance), body))


def tensor(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """Another type, shape, name or place for one tensor, where possible such that the header is still sound."""

    def change(tree: Tree, body: bytes) -> tuple[Tree, bytes]:
        name = chance.choice([key for key in tree if key != "__metadata__"])
        entry = tree[name]
        begin, end = entry["data_offsets"]
        match chance.randrange(9):
            case 0:
                entry["dtype"] = chance.choice(DTYPES)
            case 1:  # the same bytes, as other numbers
                entry["dtype"], size = chance.choice(
                    (("U8", 1), ("I8", 1), ("F16", 2), ("BF16", 2), ("I32", 4), ("F64", 8), ("I64", 8))
                )
                entry["shape"] = [(end - begin) // size]
            case 2:
                entry["shape"] = entry["shape"][::-1]
            case 3:
                entry["shape"] = [1] * chance.randrange(12) + entry["shape"]
            case 4:
                entry["shape"] = [chance.choice((0, 1 << 20, 1 << 47, 1 << 62)) for _ in range(chance.randrange(1, 5))] + [0]
            case 5:  # two names for the same bytes
                tree[f"{name}.again"] = dict(entry)
            case 6:
                tree[chance.choice((*TRICKS, *tree))] = tree.pop(name)
            case 7:  # a tensor more, of no bytes
                tree[chance.choice(TRICKS)] = {"dtype": "F32", "shape": [0], "data_offsets": [begin, begin]}
            case _:  # a tensor less, and its bytes
                del tree[name]
                for other in tree.values():
                    if "data_offsets" in other and other["data_offsets"][0] >= end:
                        other["data_offsets"] = [offset - (end - begin) for offset in other["data_offsets"]]
                body = body[:begin] + body[end:]
        return tree, body

    return _with_header(data, change)


def places(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """Changes a number of a tensor of integers, which may be positions of something, and at times all."""

    def change(tree: Tree, body: bytes) -> tuple[Tree, bytes]:
        sizes = {"I64": 8, "I32": 4, "U8": 1}
        found = [
            entry
            for entry in tree.values()
            if entry.get("dtype") in sizes and entry["data_offsets"][1] > entry["data_offsets"][0]
        ]
        if not found:
            return tree, body
        entry = chance.choice(found)
        (begin, end), size = entry["data_offsets"], sizes[entry["dtype"]]
        own = body[begin:end]
        value = chance.choice((-1, 0, 1, 127, 1_000_000, -(1 << 31), (1 << 63) - 1)) % (1 << 8 * size)
        first = size * chance.randrange(len(own) // size)
        count = chance.choice((1, 1, 1, len(own) // size - first // size))
        own = own[:first] + count * value.to_bytes(size, "little") + own[first + count * size :]
        return tree, body[:begin] + own + body[end:]

    return _with_header(data, change)


def duplicate(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """A name that stands twice in the JSON header."""
    length, tree, body = _parts(data)
    if not tree:
        return flip(data, seeds, chance)
    name = chance.choice(list(tree))
    text = data[8 : 8 + length].strip()
    return _joined(text[:-1] + b"," + json.dumps(name).encode() + b":" + json.dumps(tree[name]).encode() + b"}", body)


def deep(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """JSON that is nested deeply or very long, as the header, inside it, or in the recipe."""
    depth = chance.choice((100, 5000, 200_000))
    nested = chance.choice(("[" * depth + "]" * depth, '{"a":' * depth + "0" + "}" * depth, "[" * depth, "9" * depth))
    _length, tree, body = _parts(data)
    if not tree:
        return data + nested.encode()
    name = chance.choice(list(tree))
    where = chance.randrange(3)
    if where == 0:
        return _joined(b"{" + nested.encode() + b"}", body)
    if where == 1 or "compactcli" not in tree.get("__metadata__", {}):
        text = json.dumps({**tree, name: "HERE"}).replace('"HERE"', nested)
        return _joined(text.encode(), body)
    recipe = tree["__metadata__"]["compactcli"]
    place = chance.choice([match.start() for match in re.finditer("[:,]", recipe)] or [0])
    tree["__metadata__"]["compactcli"] = recipe[: place + 1] + nested + recipe[place + 1 :]
    return _joined(json.dumps(tree).encode(), body)


def recipe(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """Changes one value of the recipe."""
    return _with_recipe(data, lambda tree, _: _changed(tree, chance))


def standing(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """Changes one value of what a run's file says of where it stands."""
    return _with_recipe(data, lambda tree, _: {**tree, "standing": _changed(tree.get("standing"), chance)}, "compactcli_run")


def edits(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """Makes, changes, moves, repeats or drops an edit of the recipe; half the time with tensors that fit what results."""

    def change(tree: Tree, names: list[str]) -> Tree:
        steps = tree.get("steps") or [{"command": "compress", "options": {}, "edits": [], "measures": {}, "version": "0"}]
        tree["steps"] = steps
        for _ in range(chance.choice((1, 1, 2, 5))):
            own = chance.choice(steps)["edits"]
            match chance.randrange(5) if own else 0:
                case 0:
                    own.insert(chance.randrange(len(own) + 1), _edit(names, chance))
                case 1:
                    own.insert(chance.randrange(len(own) + 1), dict(chance.choice(own)))
                case 2:
                    own.pop(chance.randrange(len(own)))
                case 3:
                    chance.shuffle(own)
                case _:
                    edit = chance.choice(own)
                    edit.update({key: value for key, value in _edit(names, chance).items() if key in edit})
        return tree

    changed = _with_recipe(data, change)
    return fitted(changed) if chance.random() < 0.5 else changed


def fitted(data: bytes) -> bytes:
    """The file with arbitrary tensors of the shapes that its recipe makes, where it makes any."""
    _, tree, _ = _parts(data)
    try:
        found = Recipe.loads(tree["__metadata__"]["compactcli"])
        module = artefact.first_architecture(found).build()
        if sum(each.numel() for each in module.parameters()) > LARGEST_FITTED:
            return data
        methods.register_layers([edit.layer for edit in found.edits if isinstance(edit, Replace | Share)])
        surgery.apply_(module, found.edits)
        return artefact.dumps(artefact.Network(module, found, "fitted"))
    except (CompactError, KeyError):
        return data


def text(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """Changes one value in a file that is JSON."""
    try:
        return json.dumps(_changed(json.loads(data), chance)).encode()
    except (ValueError, RecursionError):
        return flip(data, seeds, chance)


def archive(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """Renames, repeats, drops, compresses or damages an entry of a zip file whose checksums are right again."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as original:
            entries = [(name, original.read(name)) for name in original.namelist()]
    except (zipfile.BadZipFile, zlib.error, struct.error, OSError, ValueError, EOFError, RuntimeError):  # damaged before
        return flip(data, seeds, chance)
    place = chance.randrange(len(entries)) if entries else 0
    compression = zipfile.ZIP_STORED
    match chance.randrange(7) if entries else 0:
        case 0:
            entries.append((chance.choice(TRICKS) or "x", chance.choice(seeds)[:100]))
        case 1:
            entries[place] = (f"{chance.choice(TRICKS)}/{entries[place][0]}", entries[place][1])
        case 2:
            entries.append(entries[place])
        case 3:
            entries.pop(place)
        case 4:
            compression = zipfile.ZIP_DEFLATED
            entries.append(("archive/data/bomb", bytes(1 << 22)))
        case 5:
            entries[place] = (entries[chance.randrange(len(entries))][0], entries[place][1])
        case _:
            damage = chance.choice((flip, truncate, delete, insert, zero, number, digits, command))
            entries[place] = (entries[place][0], damage(entries[place][1], [entries[place][1]], chance))
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", compression) as written:
        warnings.simplefilter("ignore", UserWarning)  # of a name that stands twice
        for name, content in entries:
            written.writestr(name, content)
    return file.getvalue()


def command(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """Puts a call of something that runs a command between two operations of a pickle, or anywhere."""
    ends = [match.end() for match in re.finditer(rb"q[\0-\xff]|\x94|\x80\x02", data[:100_000])]
    begin = chance.choice(ends) if ends and chance.random() < 0.8 else _position(data, chance)
    return data[:begin] + chance.choice(COMMANDS) + data[begin:]


BYTES: tuple[Mutation, ...] = (flip, truncate, delete, insert, zero, splice, number, digits)
SAFETENSORS: tuple[Mutation, ...] = (*BYTES, header, header, tensor, tensor, tensor, duplicate, deep)
ARTEFACT: tuple[Mutation, ...] = (*SAFETENSORS, places, places, *(recipe,) * 4, *(edits,) * 8)
RUN: tuple[Mutation, ...] = (*SAFETENSORS, *(standing,) * 12)
PICKLE: tuple[Mutation, ...] = (*BYTES, command)
ZIP: tuple[Mutation, ...] = (*PICKLE, *(archive,) * 9)
JSON: tuple[Mutation, ...] = (*BYTES, *(text,) * 12, deep)


def mutated(data: bytes, seeds: Sequence[bytes], mutations: Sequence[Mutation], chance: random.Random) -> bytes:
    """One to three of the mutations of `data`."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        data = chance.choice(mutations)(data, seeds, chance)
    return data


def _parts(data: bytes) -> tuple[int, Tree, bytes]:
    """(length of the header, header, data) of a safetensors file; an empty header where there is none."""
    length = int.from_bytes(data[:8], "little")
    try:
        tree = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        tree = None
    return length, tree if isinstance(tree, dict) else {}, data[8 + length :]


def _joined(text: bytes, body: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + body


def _with_header(data: bytes, change: Callable[[Tree, bytes], tuple[object, bytes]]) -> bytes:
    _, tree, body = _parts(data)
    try:
        changed, body = change(tree, body)
        return _joined(json.dumps(changed).encode(), body)
    except (
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ):  # an earlier mutation has left too little
        return data


def _with_recipe(data: bytes, change: Callable[[Tree, list[str]], object], key: str = "compactcli") -> bytes:
    def within(tree: Tree, body: bytes) -> tuple[Tree, bytes]:
        modules = sorted({name.rpartition(".")[0] for name in tree if name != "__metadata__"} | set(tree))
        found = json.loads(tree["__metadata__"][key])
        tree["__metadata__"][key] = json.dumps(change(found, modules))
        return tree, body

    return _with_header(data, within)


def _changed(tree: object, chance: random.Random) -> object:
    """The tree with one value of it replaced, by a strange one or by another of the same tree, or dropped."""
    places = list(_places(tree))
    if not places:
        return chance.choice(STRANGE)
    container, key = chance.choice(places)
    kind = chance.random()
    if kind < 0.15:
        del container[key]
    elif kind < 0.35:
        other, name = chance.choice(places)
        container[key] = json.loads(json.dumps(other[name])) if name in other or isinstance(other, list) else None
    elif kind < 0.6:
        container[key] = chance.choice(TRICKS)
    else:
        container[key] = chance.choice(STRANGE)
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


def _edit(names: Sequence[str], chance: random.Random) -> Tree:
    """An edit of any kind, with a layer of any kind and options from those of all layers."""
    methods.register_layers([f"{name}.any" for name in methods.names()])
    module = chance.choice(names) if chance.random() < 0.9 else chance.choice(TRICKS)
    if chance.random() < 0.1:
        module = chance.choice((f"{module}.weight", f"{module}.bias", "compactcli_shared.csg_3x3.weight"))
    layer = chance.choice((*surgery.LAYERS, chance.choice(TRICKS)))
    known = ("rank", "filters", "inputs", "outputs", "primary", "kept", "height", "width", "code", "rows", "parts", "size")
    sides = ("left", "right", "top", "bottom")
    options = {name: _whole(chance) for name in (*known, *sides) if chance.random() < 0.5}
    match chance.choice(("keep", "set", "replace", "replace", "share")):
        case "keep":
            index = chance.choice(("0", "0-1", "0-2", "1,3", "0-7", "2-5", "0-1048575", "3-1", "", "a"))
            return {"kind": "keep", "module": module, "axis": chance.choice((0, 1, 1, 2)), "index": index}
        case "set":
            return {"kind": "set", "module": module, "attribute": chance.choice(sorted(SETTABLE)), "value": _whole(chance)}
        case "replace":
            return {"kind": "replace", "module": module, "layer": layer, "options": options}
    name = chance.choice(("csg_3x3", "csg_1x1", "kernel", *TRICKS))
    return {"kind": "share", "name": name, "layer": layer, "options": options}


def _whole(chance: random.Random) -> int:
    return chance.choice((0, 1, 1, 2, 2, 3, 4, 5, 7, 8, 9, 16, 64, 1000, 1 << 20, 1 << 31))


def _position(data: bytes | bytearray, chance: random.Random) -> int:
    """An offset into data: anywhere, or near an end, where headers and directories are."""
    whole = len(data)
    near = (chance.randrange(whole + 1), chance.randrange(65), chance.randrange(4097), max(0, whole - chance.randrange(257)))
    return min(chance.choice(near), max(whole - 1, 0))
