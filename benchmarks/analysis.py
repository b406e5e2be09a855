"""Time and memory of an analysis without data: `python -m benchmarks analysis`.

torchvision networks with random weights, as state_dicts: `compactcli analyze FILE --json` in a process of its own, one thread,
from start to end. Required: under 8 s, and a peak of memory under 3 times the checkpoint plus 600 MB. The processor's seconds
stand beside those of the clock, which other programs make longer.

    python -m benchmarks analysis [--networks resnet50 densenet121 efficientnet_b0 vgg16_bn]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from compactcli import artefact

from ._common import write

NETWORKS = ("resnet50", "densenet121", "efficientnet_b0", "vgg16_bn")
MOST_SECONDS = 8.0
MOST_TIMES, MOST_BYTES = 3, 600_000_000


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/analysis.json."""
    parser = argparse.ArgumentParser(prog="analysis")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    options = parser.parse_args(arguments)
    rows = [_row(name) for name in options.networks]
    write("analysis", {"command": " ".join(["python -m benchmarks analysis", *arguments]), "rows": rows})


def _row(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.pt"
        torch.save(artefact.fresh(artefact.Wishes(name), 0).module.state_dict(), path)
        size = path.stat().st_size
        start = time.perf_counter()
        command = [sys.executable, "-m", "compactcli", "analyze", "-q", "--json", str(path)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"analyze of {name} failed")
    peak, processor = 1024 * used.ru_maxrss, used.ru_utime + used.ru_stime
    met = seconds < MOST_SECONDS and peak < MOST_TIMES * size + MOST_BYTES
    row = {
        "network": name,
        "seconds": seconds,
        "processor_seconds": processor,
        "peak_bytes": peak,
        "file_bytes": size,
        "met": met,
    }
    print(row, flush=True)
    return row
