"""Opens damaged files in forked children. The only outcomes allowed are a network and a CompactError of one line.

python -m tests.fuzz --count 20000 --format artefact [--save counts.json]
"""

import argparse
import contextlib
import functools
import io
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

sys.path.append(str(Path(__file__).parent))  # for `python -m tests.fuzz`; pytest has put it there
import mutations
from mutations import Mutation

from compactcli import architectures, artefact, kernels, methods
from compactcli import data as images_of
from compactcli.artefact import Wishes
from compactcli.commands import command_line
from compactcli.compress import Target as Ratio
from compactcli.compress import compress
from compactcli.errors import CompactError
from compactcli.finetune import kept_run
from compactcli.history import Watch
from compactcli.optim import Settings
from compactcli.train import fit_

SECONDS = 5  # of the CPU, for one input
PATIENCE = 10  # times as long it may take on a busy machine
MEMORY = 1 << 30  # of address space beyond what the parent has
FILE_BYTES = 16 << 20
INPUTS_OF_A_CHILD = 250
PIXELS = 1 << 14  # of the input of a network that is run as well

Target = Callable[[bytes], object]

# What reading a file must never do, by the names of Python's audit events.
FORBIDDEN = frozenset(
    {
        *(
            "os.system",
            "os.exec",
            "os.fork",
            "os.forkpty",
            "os.posix_spawn",
            "os.spawn",
            "os.kill",
            "subprocess.Popen",
            "pty.spawn",
        ),
        *("pickle.find_class", "socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request", "webbrowser.open"),
        *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"),
    }
)


@dataclass(frozen=True)
class Outcome:
    """What became of one input: read, refused with a line, or a failure (traceback, signal, memory, time, something run)."""

    kind: Literal["read", "refused", "failed"]
    detail: str = ""


@dataclass(frozen=True)
class Format:
    """How files of one format are opened, small real ones, and ways to damage them."""

    target: Target
    seeds: Callable[[], list[bytes]]
    mutations: Sequence[Mutation]


class ForbiddenError(BaseException):
    """Something was done that reading a file must not do."""


def run(target: Target, data: bytes) -> Outcome:
    """The outcome of `target(data)` in a child process with little memory and time."""
    return next(run_all(target, lambda _: data, range(1)))


def run_all(target: Target, make: Callable[[int], bytes], numbers: range) -> Iterator[Outcome]:
    """The outcomes of `target(make(number))`, in children that take many inputs each, up to one that fails."""
    while numbers:
        count = 0
        for outcome in _child(target, make, numbers[:INPUTS_OF_A_CHILD]):
            yield outcome
            count += 1
        numbers = numbers[count:]


def _child(target: Target, make: Callable[[int], bytes], numbers: range) -> Iterator[Outcome]:
    """The outcomes in one child; the last is that of the input at which it ended."""
    receiving, sending = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of other threads, whose locks the child could wait for; the time limit covers that.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(receiving)
        _run_child(target, make, numbers, sending)
    os.close(sending)
    told = 0
    with os.fdopen(receiving, "rb") as pipe:
        for line in pipe:
            told += 1
            yield Outcome(*json.loads(line))
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        yield Outcome("failed", f"killed by {signal.Signals(os.WTERMSIG(status)).name}")
    elif not told or status:
        yield Outcome("failed", f"exit status {status}")


def _run_child(target: Target, make: Callable[[int], bytes], numbers: range, sending: int) -> None:
    """Answers through the pipe, a line for each input, and ends the process, without the parent's clean-up."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for late in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(late, signal.SIG_DFL)
    warnings.simplefilter("error")
    sys.addaudithook(_audit)
    with os.fdopen(sending, "wb") as pipe:
        for number in numbers:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(PATIENCE * SECONDS)
            outcome = _outcome(target, make, number)
            pipe.write(json.dumps([outcome.kind, outcome.detail]).encode() + b"\n")
            pipe.flush()
            if outcome.kind == "failed":
                break
    os._exit(0)


def _outcome(target: Target, make: Callable[[int], bytes], number: int) -> Outcome:
    try:
        target(make(number))
    except CompactError as problem:
        line = str(problem)
        return Outcome("refused" if line.isprintable() and len(line) < 1000 else "failed", line)
    except BaseException:
        return Outcome("failed", traceback.format_exc()[-20_000:])
    return Outcome("read")


_watching: list[bool] = []


@contextmanager
def watched() -> Iterator[None]:
    """While a file is read in a child: nothing may be run, sent or written meanwhile."""
    _watching.append(True)
    try:
        yield
    finally:
        _watching.clear()


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and (event in FORBIDDEN or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))):
        raise ForbiddenError(f"{event} {arguments!r}"[:200])


def campaign(form: Format, count: int, seed: int = 0, first: int = 0) -> Iterator[tuple[bytes, Outcome]]:
    """Mutations number `first` to `first + count` of the seeds, each with its outcome. The same seed gives the same inputs."""
    torch.set_num_threads(1)
    seeds = form.seeds()
    for data in seeds:
        form.target(data)  # imports what children would import again and again

    def make(number: int) -> bytes:
        chance = random.Random(f"{seed} {number}")
        return mutations.mutated(chance.choice(seeds), seeds, form.mutations, chance)

    numbers = range(first, first + count)
    for number, outcome in zip(numbers, run_all(form.target, make, numbers), strict=True):
        yield (make(number) if outcome.kind == "failed" else b""), outcome


def open_and_run(source: bytes | str) -> None:
    """All that a file goes through on its way to a network that is used: opened, told of, folded and run on an image."""
    with watched():
        network = artefact.open_model(source)
        network.recipe.dumps()
        for step in network.recipe.steps:
            command_line({"command": step.command, "method": step.method, "options": step.options})
        methods.attached(network.recipe, network.module)
        kernels.fold_(network.module)
        channels, height, width = network.input_shape
        if channels * height * width <= PIXELS:
            with torch.no_grad():
                network.module(torch.zeros(1, channels, height, width))


def _state() -> dict[str, torch.Tensor]:
    """The weights of a small network that is known."""
    architecture = architectures.get("cifar:resnet8", {"width": 4, "num_classes": 2})
    torch.manual_seed(0)
    return architecture.build(initialise=True).state_dict()


@functools.cache
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


@functools.cache
def safetensors_file() -> bytes:
    """A small plain safetensors file."""
    return safetensors.torch.save(_state(), {"format": "pt"})


# Method, its options and the share kept, a step each: files with every kind of edit and most kinds of layer.
HISTORIES: list[list[tuple[str, dict[str, Any], float]]] = [
    [("hinge", {"mode": "prune"}, 0.7), ("linearconv", {"variant": "sparse"}, 0.8)],
    [("hinge", {"mode": "decompose", "two_slope": True}, 0.8)],
    [("fcf", {"residual": "squeeze"}, 0.7)],
    [("linearconv", {"variant": "full"}, 0.7)],
    [("linearconv", {"variant": "lowrank"}, 0.7)],
    [("csg", {}, 0.7), ("fcf", {}, 0.8)],
    [("hetconv", {}, 0.85)],
]


def compressed(history: Sequence[tuple[str, dict[str, Any], float]]) -> bytes:
    """A small network after these steps, as a file."""
    network = artefact.fresh(Wishes("cifar:resnet8", {"width": 4, "num_classes": 2}), 0)
    for name, options, ratio in history:
        method = methods.get(name)
        network = compress(network, name, method(method.Options(**options)), Ratio(ratio))
    return artefact.dumps(network)


@functools.cache
def artefacts() -> list[bytes]:
    """Files of all five methods, and one that was only ever written by `compactcli`."""
    return [compressed(history) for history in ([], *HISTORIES)]


@functools.cache
def folder() -> bytes:
    """A folder as timm writes it: config.json, two NULs, and the weights."""
    network = artefact.fresh(Wishes("timm:test_resnet", {"num_classes": 2}), 0)
    config = {"architecture": "test_resnet", "num_classes": 2, "pretrained_cfg": {"mean": [0.5] * 3, "tag": "r160_in1k"}}
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in network.module.state_dict().items()
    }
    return json.dumps(config).encode() + b"\0\0" + safetensors.torch.save(state, {"format": "pt"})


def _damaged_folder(data: bytes, seeds: Sequence[bytes], chance: random.Random) -> bytes:
    config, _, weights = data.partition(b"\0\0")
    if chance.random() < 0.5:
        return chance.choice(mutations.JSON)(config, [config], chance) + b"\0\0" + weights
    return config + b"\0\0" + chance.choice(mutations.SAFETENSORS)(weights, [weights], chance)


def _open_folder(data: bytes) -> None:
    """Opens a folder whose config.json is what comes before the first NUL NUL of `data`, the weights what comes after."""
    config, _, weights = data.partition(b"\0\0")
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_bytes(config)
        (Path(name) / "model.safetensors").write_bytes(weights)
        open_and_run(name)


def _open_pickle(data: bytes) -> None:
    """Opens a zip file whose data.pkl is `data`: damage to it gets past the archive's checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(torch_file(zipped=True))) as original, zipfile.ZipFile(file, "w") as written:
        for name in original.namelist():
            written.writestr(name, data if name.endswith("data.pkl") else original.read(name))
    open_and_run(file.getvalue())


def _pickle_file() -> bytes:
    with zipfile.ZipFile(io.BytesIO(torch_file(zipped=True))) as archive:
        return archive.read("archive/data.pkl")


def _train(path: Path, *, resume: bool, steps: int | None = None) -> None:
    """A short run that is kept in a file, or goes on from it; it ends early after that many steps."""
    network = artefact.fresh(Wishes("cifar:resnet8", {"width": 4, "num_classes": 2}), 0)
    images = torch.arange(16 * 3 * 32 * 32).view(16, 3, 32, 32).remainder(251).to(torch.uint8)
    dataset = images_of.Dataset("ramps", False, None, images_of.from_tensors(images, torch.arange(16) % 2, "train"), None)
    settings = Settings(epochs=2, batch_size=4, lr=0.01, precision="float32", save_every=1)
    store = kept_run(path, network, dataset, settings, None)

    def progress(done: int, total: int) -> None:
        if done == steps:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        fit_(
            network.module,
            dataset,
            network.recipe.preprocessing,
            settings,
            store=store,
            resume=resume,
            watch=Watch(progress=progress),
        )


@functools.cache
def run_file() -> bytes:
    """What a run leaves that was broken off in its second epoch."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run.safetensors"
        _train(path, resume=False, steps=18)
        return path.read_bytes()


def _resume(data: bytes) -> None:
    """Goes on with the run that a file holds, and opens the network in it."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run.safetensors"
        path.write_bytes(data)
        with watched():
            artefact.open_interrupted(path)
        _train(path, resume=True)


FORMATS: dict[str, Format] = {
    "artefact": Format(open_and_run, artefacts, mutations.ARTEFACT),
    "safetensors": Format(open_and_run, lambda: [safetensors_file()], mutations.SAFETENSORS),
    "zip": Format(open_and_run, lambda: [torch_file(zipped=True)], mutations.ZIP),
    "pickle": Format(_open_pickle, lambda: [_pickle_file()], mutations.PICKLE),
    "legacy": Format(open_and_run, lambda: [torch_file(zipped=False)], mutations.PICKLE),
    "run": Format(_resume, lambda: [run_file()], mutations.RUN),
    "folder": Format(_open_folder, lambda: [folder()], (_damaged_folder,)),
}
if not architectures.has_timm():  # whose networks such folders are of
    del FORMATS["folder"]


@dataclass
class Counts:
    """What came of the inputs of one format so far."""

    seed: int
    inputs: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    lines: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        """One more input."""
        self.inputs += 1
        self.kinds[outcome.kind] += 1
        if outcome.kind == "refused":
            self.lines[_kind_of_line(outcome.detail)] += 1


def _kind_of_line(line: str) -> str:
    """What a line says, whatever names and numbers the file has put into it."""
    for pattern, instead in (
        (r"(b?'([^'\\]|\\.)*'?|b?\"[^\"]*\"?)", "..."),
        (r"\b(layer\d|conv|bn|linear|num_|csg_)[\w.]*", "NAME"),
        (r"-?\d[\d.,e+]*", "N"),
    ):
        line = re.sub(pattern, instead, line)
    return line[:160]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="inputs for each format")
    parser.add_argument("--format", choices=FORMATS, action="append", help="only this format; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the inputs that failed")
    parser.add_argument("--save", type=Path, help="JSON of the counts, written as they grow; where it is there, go on from it")
    options = parser.parse_args()
    saved = json.loads(options.save.read_text()) if options.save and options.save.exists() else {}
    failures = 0
    for name in options.format or FORMATS:
        counts = Counts(**saved[name]) if name in saved else Counts(options.seed)
        counts.kinds, counts.lines = Counter(counts.kinds), Counter(counts.lines)
        while counts.inputs < options.count:
            start, first = time.perf_counter(), counts.inputs
            for data, outcome in campaign(FORMATS[name], min(1000, options.count - first), counts.seed, first):
                if outcome.kind == "failed":
                    print(f"{name} {counts.inputs}: {outcome.detail}", file=sys.stderr, flush=True)
                    if options.keep:
                        (options.keep / f"{name}-{counts.inputs}").write_bytes(data)
                counts.add(outcome)
            counts.seconds += round(time.perf_counter() - start, 1)
            print(f"{name}: {counts.inputs} in {counts.seconds:.0f} s, {dict(counts.kinds)}", flush=True)
            if options.save:
                saved[name] = {**vars(counts), "kinds": dict(counts.kinds), "lines": dict(counts.lines)}
                options.save.write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n")
        failures += counts.kinds["failed"]
        print(f"{name}: {dict(counts.kinds)}, {len(counts.lines)} distinct lines")
        for line, count in counts.lines.most_common():
            print(f"  {count:6} {line}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
