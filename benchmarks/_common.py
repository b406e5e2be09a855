"""What the benchmarks share: where checkpoints and images are, and one JSON per run."""

import json
import os
import platform
import tarfile
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
RESULTS = ROOT / "benchmarks" / "results"


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


def machine() -> dict[str, Any]:
    """What a figure depends on beside the code."""
    versions = {name: version(name) for name in ("torch", "torchvision", "numpy", "compactcli")}
    cpu = next((line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return {"cpu": cpu, "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write(name: str, result: dict[str, Any]) -> None:
    """One run's JSON, at once."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
