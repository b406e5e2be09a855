"""Reads damaged files in forked children. The only outcomes allowed are a result and a CompactError of one line.

python -m tests.fuzz --count 3000 [--format zip]
"""

import argparse
import io
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch

from compactcli import checkpoint
from compactcli.errors import CompactError

SECONDS = 10
MEMORY = 1 << 30  # of address space beyond what the parent has
FILE_BYTES = 16 << 20

Target = Callable[[bytes], object]


@dataclass(frozen=True)
class Outcome:
    """What became of one input: read, refused with a line, or a failure (traceback, signal, memory or time)."""

    kind: Literal["read", "refused", "failed"]
    detail: str = ""


def run(target: Target, data: bytes) -> Outcome:
    """The outcome of `target(data)` in a child process with little memory and time."""
    receiving, sending = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of other threads, whose locks the child could wait for; the time limit covers that.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(receiving)
        _run_child(target, data, sending)
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        answer = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    kind, _, detail = answer.partition("\n")
    if os.WIFSIGNALED(status):
        return Outcome("failed", f"killed by {signal.Signals(os.WTERMSIG(status)).name}")
    if kind == "read":
        return Outcome("read")
    if kind == "refused" and "\n" not in detail and len(detail) < 1000:
        return Outcome("refused", detail)
    return Outcome("failed", detail or f"exit status {status}")


def _run_child(target: Target, data: bytes, sending: int) -> None:
    """Answers through the pipe and ends the process, without the parent's clean-up."""
    try:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        warnings.simplefilter("error")
        target(data)
        answer = "read"
    except CompactError as problem:
        answer = f"refused\n{problem}"
    except BaseException:
        answer = f"failed\n{traceback.format_exc()}"
    os.write(sending, answer.encode(errors="replace")[:60_000])  # less than a pipe holds
    os._exit(0)


def campaign(target: Target, seeds: Sequence[bytes], count: int, seed: int = 0) -> Iterator[tuple[bytes, Outcome]]:
    """`count` mutations of the seeds, each with its outcome. The same seed gives the same inputs."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    for _ in range(count):
        data = mutated(chance.choice(seeds), seeds, chance)
        yield data, run(target, data)


def mutated(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """One to three random mutations of `data`."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        data = chance.choice(MUTATIONS)(data, seeds, chance)
    return data


def _flip(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 4, 32))):
        if changed:
            changed[_position(changed, chance)] ^= chance.choice((1, 2, 4, 8, 16, 32, 64, 128, 255))
    return bytes(changed)


def _truncate(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    return data[: _position(data, chance)]


def _delete(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    begin = _position(data, chance)
    return data[:begin] + data[begin + chance.choice((1, 2, 8, 100)) :]


def _insert(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    begin = _position(data, chance)
    return data[:begin] + chance.randbytes(chance.choice((1, 2, 8, 100))) + data[begin:]


def _zero(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    begin, length = _position(data, chance), chance.choice((1, 8, 100))
    return data[:begin] + bytes(len(data[begin : begin + length])) + data[begin + length :]


def _splice(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    other = chance.choice(seeds)
    begin = _position(other, chance)
    return data[: _position(data, chance)] + other[begin : begin + chance.choice((4, 40, 4000))] + data[_position(data, chance) :]


def _number(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """Puts an extreme number where a length, a size or an offset may be; the first eight bytes are one in safetensors."""
    value = chance.choice((0, 1, 0x7F, 0xFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 64) - 1, len(data)))
    width = chance.choice(("<Q", "<I", "<H", "B"))
    packed = struct.pack(width, value % (1 << 8 * struct.calcsize(width)))
    begin = chance.choice((0, _position(data, chance)))
    return data[:begin] + packed + data[begin + len(packed) :]


def _header(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """Changes one value in the JSON header of a safetensors file and puts its length right; flips bits in other files."""
    length = int.from_bytes(data[:8], "little")
    try:
        tree = json.loads(data[8 : 8 + length])
    except ValueError:
        return _flip(data, seeds, chance)
    strange = (None, True, -1, 1 << 63, 10**400, 1.5, "", "F32", "\n", [], [0], [1 << 40] * 3, [0] * 70, {}, {"dtype": "F32"})
    place = chance.choice(list(_places(tree)) or [None])
    if place is None:
        return data
    container, key = place
    if chance.random() < 0.2:
        del container[key]
    else:
        container[key] = chance.choice(strange)
    header = json.dumps(tree).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _places(tree: object) -> Iterator[tuple[object, object]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


def _digits(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """Replaces one run of digits, in JSON or in the text of a pickle."""
    runs = list(re.finditer(rb"\d+", data))
    if not runs:
        return data
    run = chance.choice(runs)
    return data[: run.start()] + chance.choice((b"0", b"-1", b"7", b"99999999999", b"1e400", b"9" * 5000)) + data[run.end() :]


def _position(data: bytes | bytearray, chance: random.Random) -> int:
    """An offset into data: anywhere, or near an end, where headers and directories are."""
    whole = len(data)
    return min(
        chance.choice((chance.randrange(whole + 1), chance.randrange(65), max(0, whole - chance.randrange(257)))),
        max(whole - 1, 0),
    )


MUTATIONS = (_flip, _truncate, _delete, _insert, _zero, _splice, _number, _header, _digits)


def _state() -> dict[str, torch.Tensor]:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    return network.state_dict()


def torch_file(zipped: bool) -> bytes:
    """A small training checkpoint as torch.save writes it, in its zip or its older format."""
    content = {
        "state_dict": {f"module.{name}": tensor for name, tensor in _state().items()},
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
        "args": argparse.Namespace(lr=0.1),
        "half": {"a": torch.zeros(2, 3).half().T, "b": torch.zeros(3, dtype=torch.uint16)},
        "best_prec1": 93.39,
        "epoch": 3,
    }
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def safetensors_file(recipe: bool) -> bytes:
    """A small safetensors file, with or without what looks like a recipe."""
    metadata = {"format": "pt"} | ({"compactcli": '{"architecture":"cifar:resnet20","format":1,"steps":[]}'} if recipe else {})
    return safetensors.torch.save(_state(), metadata)


def _read_folder(data: bytes) -> object:
    """Reads a folder whose config.json is what comes before the first NUL NUL of `data`, the weights what comes after."""
    config, _, weights = data.partition(b"\0\0")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(config)
        (Path(folder) / "model.safetensors").write_bytes(weights)
        return checkpoint.read(folder)


def _read_pickle(data: bytes) -> object:
    """Reads a zip file whose data.pkl is `data`: damage to it gets past the archive's checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(torch_file(zipped=True))) as original, zipfile.ZipFile(file, "w") as archive:
        for name in original.namelist():
            archive.writestr(name, data if name.endswith("data.pkl") else original.read(name))
    return checkpoint.read(file.getvalue())


def _pickle_file() -> bytes:
    with zipfile.ZipFile(io.BytesIO(torch_file(zipped=True))) as archive:
        return archive.read("archive/data.pkl")


def formats() -> dict[str, tuple[Target, list[bytes]]]:
    """Format -> what reads it and small real files of it."""
    torch.manual_seed(0)
    config = b'{"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}'
    return {
        "zip": (checkpoint.read, [torch_file(zipped=True)]),
        "pickle": (_read_pickle, [_pickle_file()]),
        "legacy": (checkpoint.read, [torch_file(zipped=False)]),
        "safetensors": (checkpoint.read, [safetensors_file(recipe=False)]),
        "artefact": (checkpoint.read, [safetensors_file(recipe=True)]),
        "folder": (_read_folder, [config + b"\0\0" + safetensors_file(recipe=False)]),
        "any": (checkpoint.read, [torch_file(zipped=True), torch_file(zipped=False), safetensors_file(recipe=False)]),
    }


def main() -> int:
    known = formats()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="inputs for each format")
    parser.add_argument("--format", choices=known, action="append", help="only this format; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the inputs that failed")
    options = parser.parse_args()
    failures = 0
    for name in options.format or known:
        target, seeds = known[name]
        kinds: Counter[str] = Counter()
        lines: Counter[str] = Counter()
        for data, outcome in campaign(target, seeds, options.count, options.seed):
            kinds[outcome.kind] += 1
            if outcome.kind == "refused":
                lines[re.sub(r"\d+", "N", re.sub(r"(b?'[^']*'|\bbyte \w+)", "...", outcome.detail.partition(": ")[2]))] += 1
            elif outcome.kind == "failed":
                print(f"{name}: {outcome.detail}", file=sys.stderr)
                if options.keep:
                    (options.keep / f"{name}-{failures + kinds['failed']}").write_bytes(data)
        failures += kinds["failed"]
        print(f"{name}: {dict(kinds)}, {len(lines)} distinct lines")
        for line, count in lines.most_common():
            print(f"  {count:5} {line}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
