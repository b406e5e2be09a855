"""A command that is killed breaks nothing and ends where an unbroken one does: `python -m benchmarks kills`.

kill -9 at random moments, then the same command again until it ends: what it wrote, beside what the one wrote that nobody killed.

- finetune: 4 epochs on 2,000 images; search: one with dual variables through the same loop (`_kills_worker`); both with --resume,
  and killed from when they are first kept to their end;
- compress: a search of 2 epochs on the digits and calibration; sweep: two methods by two ratios; both with --resume; export: to
  ONNX; killed from their start to their end.

After each kill every file there is must be one that can be read; hidden ones, which a kill leaves in the middle of a write, are
counted apart. Required: the same bytes after every kill (of a sweep the same figures but for those of the clock), and no file
that can not be read.

A kind is in benchmarks/results/kills.json when all its kills are done; --resume keeps those that there are.

    python -m benchmarks kills [--kills 25] [--only finetune compress] [--resume]
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compactcli import architectures, resume
from compactcli.errors import CompactError

from ._common import ROOT, add, images, provenance, rows

CLOCK = {"latency_ms", "latency_ratio", "seconds", "pareto"}  # of a sweep, and what follows from them


@dataclass(frozen=True)
class Kind:
    """A command that is killed: its arguments, what it writes, and where a run of it is kept."""

    arguments: tuple[str, ...]
    output: str
    state: str | None = None
    lasts: bool = False  # whether most of its time goes by after it is first kept

    def command(self, folder: Path) -> list[str]:
        """What to run for the network in a folder."""
        if not self.arguments:
            return [sys.executable, "-m", "benchmarks._kills_worker", str(folder)]
        own = [str(folder / "net.pt"), *self.arguments[1:], "-o", str(folder / self.output)]
        return [sys.executable, "-m", "compactcli", self.arguments[0], *own]


def kinds() -> dict[str, Kind]:
    """All of them, by name."""
    cifar, digits = (("--data", name, "--resume") for name in (str(images()), "digits"))
    search = ("--epochs", "2", "--batch-size", "64", "--save-every", "2")
    return {
        "finetune": Kind(
            ("finetune", "--epochs", "4", "--limit", "2000", "--save-every", "5", *cifar),
            *("out.safetensors", "out.resume.safetensors"),
            lasts=True,
        ),
        "search": Kind((), "out.safetensors", "run.resume.safetensors", lasts=True),
        "compress": Kind(
            ("compress", "--method", "hinge", "--ratio", "0.6", *search, *digits), "out.safetensors", "out.resume.safetensors"
        ),
        "sweep": Kind(("sweep", "--methods", "hinge,csg", "--ratios", "0.8,0.6", "--limit", "64", *digits), "out.json"),
        "export": Kind(("export", "--to", "onnx"), "out.onnx"),
    }


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/kills.json."""
    parser = argparse.ArgumentParser(prog="kills")
    parser.add_argument("--kills", type=int, default=25, help="of each kind")
    parser.add_argument("--only", nargs="+", choices=list(kinds()), default=list(kinds()))
    parser.add_argument("--resume", action="store_true", help="keep the kinds there are")
    options = parser.parse_args(arguments)
    for name in options.only:
        if not (options.resume and name in rows("kills")):
            found = _kind(name, options.kills)
            add("kills", {name: {**provenance(" ".join(["python -m benchmarks kills", *arguments])), **found}})


def _kind(name: str, kills: int) -> dict[str, Any]:
    """One unbroken run, and one for each kill."""
    chance, kind = random.Random(0), kinds()[name]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        whole = _folder(root / "whole")
        first, seconds = _run(kind, whole, None)[:2]
        wanted = _written(kind, whole)
        told = []
        for number in range(kills):
            moment = chance.uniform(0, seconds - first) if kind.lasts else chance.uniform(0, seconds)
            row = _killed(kind, _folder(root / str(number)), moment, wanted)
            told.append(row)
            print(f"{name} {number + 1}: {row}", flush=True)
            shutil.rmtree(root / str(number))
    found = {key: sum(row[key] for row in told) for key in ("killed", "equal", "broken_files", "hidden_files")}
    print(f"{name}: of {kills} runs {found}")
    met = found["equal"] == kills and not found["broken_files"]
    return {"seconds": seconds, "runs": kills, **found, "met": met, "kills": told}


def _folder(path: Path) -> Path:
    """A new folder with the network that finetune begins with."""
    path.mkdir()
    torch.manual_seed(0)
    torch.save(architectures.get("cifar:resnet8", {"width": 8}).build(initialise=True).state_dict(), path / "net.pt")
    return path


def _run(kind: Kind, folder: Path, after: float | None) -> tuple[float, float, int]:
    """Run, and kill so many seconds after the start, or after the run was first kept; (when it was, seconds in all, status)."""
    start = time.perf_counter()
    with subprocess.Popen(kind.command(folder), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while kind.lasts and not (folder / str(kind.state)).exists() and process.poll() is None:
            time.sleep(0.01)
        first = time.perf_counter() - start
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.kill()
    return first, time.perf_counter() - start, process.returncode


def _killed(kind: Kind, folder: Path, after: float, wanted: Any) -> dict[str, Any]:
    """Kill a run, look at what it left, let it end."""
    _, seconds, status = _run(kind, folder, after)
    left = [path for path in folder.iterdir() if path.name != "net.pt"]
    broken = [path.name for path in left if not path.name.startswith(".") and not _readable(kind, path, wanted)]
    state = folder / str(kind.state)
    step = _step(state) if state.exists() and state.name not in broken else None
    subprocess.run(kind.command(folder), check=True, cwd=ROOT, capture_output=True)
    return {
        "killed": status == -signal.SIGKILL,
        "after_seconds": round(seconds, 2),
        "step": step,
        "broken_files": len(broken),
        "hidden_files": sum(path.name.startswith(".") for path in left),
        "equal": _written(kind, folder) == wanted,
    }


def _written(kind: Kind, folder: Path) -> Any:
    """What a run wrote: its bytes; of a sweep the figures that no clock has to do with."""
    content = (folder / kind.output).read_bytes()
    if kind.output.endswith(".json"):
        return [{name: value for name, value in row.items() if name not in CLOCK} for row in json.loads(content)["rows"]]
    return content


def _readable(kind: Kind, path: Path, wanted: Any) -> bool:
    """Whether a file that a kill left is whole: the state of a run, or the output itself (of a sweep the rows so far)."""
    try:
        if path.name == kind.output:
            found = _written(kind, path.parent)
            return bool(found == wanted or (isinstance(found, list) and all(row in wanted for row in found)))
        return path.name == kind.state and _step(path) >= 0
    except (CompactError, ValueError):
        return False


def _step(state: Path) -> int:
    store = resume.Store(state, {}, {}).load()
    assert store is not None
    step: int = store[1]["step"]
    return step
