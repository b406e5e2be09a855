"""What the benchmarks share: where checkpoints and images are, and one JSON per run."""

import fcntl
import json
import os
import platform
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from compactcli import latency

from . import claim

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
RESULTS = Path(os.environ.get("COMPACTCLI_BENCH_RESULTS", ROOT / "benchmarks" / "results"))

Row = dict[str, Any]
Rows = dict[str, Row]  # by what was run


@cache
def images() -> Path:
    """The JPEG images of CIFAR-10 as train/ and test/ class folders, unpacked once per machine."""
    folder = Path(os.environ.get("COMPACTCLI_BENCH_DATA", Path(tempfile.gettempdir()) / "compactcli-cifar10-jpeg"))
    if not (folder / "test").is_dir():
        archive = SHARED / "data" / "cifar10-jpeg.tar.xz"
        if not archive.is_file():
            raise SystemExit("this benchmark needs ../shared/data/cifar10-jpeg.tar.xz beside the repository")
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    return folder


def checkpoint(name: str) -> Path:
    """A checkpoint of ../shared/checkpoints."""
    path = SHARED / "checkpoints" / name
    if not path.is_file():
        raise SystemExit(f"this benchmark needs ../shared/checkpoints/{name} beside the repository")
    return path


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a figure depends on beside the code."""
    versions = {name: version(name) for name in ("torch", "torchvision", "numpy", "compactcli")}
    own = {"device": device if device == "cpu" else latency.processor(device), "cpu": latency.processor("cpu")}
    return {**own, "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


def provenance(command: str, device: str = "cpu") -> dict[str, Any]:
    """How a row of one run came about; rows of one file may be of several machines."""
    return {"command": command, "machine": machine(device), "n": 1}


def rows(name: str) -> Rows:
    """Those of benchmarks/results/NAME.json, by their keys; other processes may be adding to them."""
    found: Rows = read(name).get("rows", {})
    return found


def read(name: str) -> dict[str, Any]:
    """The JSON of benchmarks/results/NAME.json; empty where there is none."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def add(name: str, new: Rows, judged: Callable[[Rows], Rows] = dict, **result: Any) -> None:
    """Put rows into benchmarks/results/NAME.json, beside those that other processes are putting there; `judged` sees them all."""
    RESULTS.mkdir(exist_ok=True)
    with open(Path(tempfile.gettempdir()) / f"compactcli-{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write(name, {**result, "rows": judged(rows(name) | new)})


def write(name: str, result: dict[str, Any]) -> None:
    """One run's JSON, at once, whole or not at all. Its name is the benchmark's, with more behind a hyphen."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    whole = json.dumps({"claim": claim(name.partition("-")[0]), "machine": machine(), **result}, indent=2) + "\n"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(whole, encoding="utf-8")
    temporary.replace(path)
    print(f"wrote {os.path.relpath(path, ROOT)}", flush=True)
