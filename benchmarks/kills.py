"""A run that is killed ends where an unbroken one does: `python -m benchmarks kills`.

kill -9 at random moments of a run of 4 epochs, from when it is first kept to its end, then --resume until it ends: the bytes
of what it writes, beside those of the run that nobody killed. Twice over: `compactcli finetune` on 2,000 images, and a search
with dual variables through the same loop (`_kills_worker`). After each kill every file there is must be one that can be
read; hidden ones, which a kill leaves in the middle of a write, are counted apart.
Required: the same bytes after every kill, and no file that can not be read.

    python -m benchmarks kills [--kills 20]
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from compactcli import architectures, resume
from compactcli.errors import CompactError

from ._common import ROOT, images, write

KINDS = ("finetune", "search")


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/kills.json."""
    parser = argparse.ArgumentParser(prog="kills")
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args(arguments)
    found = [_kind(kind, options.kills) for kind in KINDS]
    write("kills", {"command": " ".join(["python -m benchmarks kills", *arguments]), "kinds": found})


def _kind(kind: str, kills: int) -> dict[str, Any]:
    """One unbroken run, and one for each kill."""
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        whole = _folder(root / "whole")
        first, seconds = _run(kind, whole, None)[:2]
        wanted = (whole / "out.safetensors").read_bytes()
        rows = []
        for number in range(kills):
            row = _killed(kind, _folder(root / str(number)), chance.uniform(0, seconds - first), wanted)
            rows.append(row)
            print(f"{kind} {number + 1}: {row}", flush=True)
            shutil.rmtree(root / str(number))
    found = {key: sum(row[key] for row in rows) for key in ("killed", "equal", "broken_files", "hidden_files")}
    print(f"{kind}: of {kills} runs {found}")
    return {"kind": kind, "seconds": seconds, "runs": kills, **found, "rows": rows}


def _folder(path: Path) -> Path:
    """A new folder with the network that finetune begins with."""
    path.mkdir()
    torch.manual_seed(0)
    torch.save(architectures.get("cifar:resnet8", {"width": 8}).build(initialise=True).state_dict(), path / "net.pt")
    return path


def _command(kind: str, folder: Path) -> list[str]:
    if kind == "search":
        return [sys.executable, "-m", "benchmarks._kills_worker", str(folder)]
    flags = ("--epochs", "4", "--limit", "2000", "--save-every", "5", "--data", str(images()), "--resume")
    return [sys.executable, "-m", "compactcli", "finetune", str(folder / "net.pt"), *flags, "-o", str(folder / "out.safetensors")]


def _state(kind: str, folder: Path) -> Path:
    return folder / ("run.resume.safetensors" if kind == "search" else "out.resume.safetensors")


def _run(kind: str, folder: Path, after: float | None) -> tuple[float, float, int]:
    """Run, and kill so many seconds after the run was first kept; (seconds until then, seconds in all, exit status)."""
    start, state = time.perf_counter(), _state(kind, folder)
    with subprocess.Popen(_command(kind, folder), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not state.exists() and process.poll() is None:
            time.sleep(0.01)
        first = time.perf_counter() - start
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.kill()
    return first, time.perf_counter() - start, process.returncode


def _killed(kind: str, folder: Path, after: float, wanted: bytes) -> dict[str, Any]:
    """Kill a run, look at what it left, let it end."""
    _, seconds, status = _run(kind, folder, after)
    left = [path for path in folder.iterdir() if path.name != "net.pt"]
    broken = [path.name for path in left if not path.name.startswith(".") and not _readable(path, wanted)]
    state = _state(kind, folder)
    step = _step(state) if state.exists() and state.name not in broken else None
    subprocess.run(_command(kind, folder), check=True, cwd=ROOT, capture_output=True)
    return {
        "killed": status == -signal.SIGKILL,
        "after_seconds": round(seconds, 2),
        "step": step,
        "broken_files": len(broken),
        "hidden_files": sum(path.name.startswith(".") for path in left),
        "equal": (folder / "out.safetensors").read_bytes() == wanted,
    }


def _readable(path: Path, wanted: bytes) -> bool:
    """Whether a file that a kill left is whole: the state of a run, or the output itself."""
    if path.name == "out.safetensors":
        return path.read_bytes() == wanted
    try:
        return _step(path) >= 0
    except CompactError:
        return False


def _step(state: Path) -> int:
    store = resume.Store(state, {}, {}).load()
    assert store is not None
    step: int = store[1]["step"]
    return step
