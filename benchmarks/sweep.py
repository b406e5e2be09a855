"""Five methods by three ratios on ResNet-56 in one command, killed once: `python -m benchmarks sweep`.

`compactcli sweep` of the ResNet-56 on CIFAR-10 (JPEG images), all methods at 90, 70 and 50 %, calibrated on 1,024 training
images, no training, all 10,000 test images. It is killed (SIGKILL) when it has written its eighth row, and goes on with --resume.
Required: less than 15 minutes in all, and after the kill the rows that there were.

benchmarks/results/sweep.json holds the document of the sweep, in `sweep`.

    python -m benchmarks sweep [--ratios 0.9,0.7,0.5] [--limit 1024]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ._common import checkpoint, images, provenance, write

KILLED_AT = 8  # rows
MOST_SECONDS = 15 * 60.0


def main(arguments: list[str]) -> None:
    """Run, kill, resume, and write benchmarks/results/sweep.json."""
    parser = argparse.ArgumentParser(prog="sweep")
    parser.add_argument("--ratios", default="0.9,0.7,0.5")
    parser.add_argument("--limit", type=int, default=1024, help="images to calibrate on")
    options = parser.parse_args(arguments)
    command = " ".join(["python -m benchmarks sweep", *arguments])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "sweep.json"
        given = ["--data", str(images()), "--ratios", options.ratios, "--limit", str(options.limit), "-o", str(output)]
        own = [sys.executable, "-m", "compactcli", "sweep", str(checkpoint("resnet56-cifar10jpeg.th")), *given]
        start = time.perf_counter()
        before = _killed(own, output)
        subprocess.run([*own, "--resume"], check=True)
        seconds = time.perf_counter() - start
        tree = json.loads(output.read_text(encoding="utf-8"))
    after = [_figures(row) for row in tree["rows"]]
    lost = [row for row in before if row not in after]
    met = seconds < MOST_SECONDS and not lost
    required = {"seconds": seconds, "at_most": MOST_SECONDS, "lost_rows": len(lost), "met": met}
    write("sweep", {**provenance(command), "killed_at_row": KILLED_AT, "required": required, "sweep": tree})
    _show(tree, seconds)


def _killed(command: list[str], output: Path) -> list[dict[str, Any]]:
    """Run until there are rows enough, and kill: the rows."""
    process = subprocess.Popen(command)
    rows: list[dict[str, Any]] = []
    while len(rows) < KILLED_AT:
        if process.poll() is not None:
            raise SystemExit(f"the sweep ended before it had {KILLED_AT} rows")
        time.sleep(0.2)
        rows = json.loads(output.read_text(encoding="utf-8"))["rows"] if output.exists() else []
    process.kill()
    process.wait()
    return [_figures(row) for row in rows]


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    """A row but for its marks, which other rows change."""
    return {name: value for name, value in row.items() if name != "pareto"}


def _show(tree: dict[str, Any], seconds: float) -> None:
    table = Table(
        "method", "ratio", "parameters", "MACs", "latency", "accuracy", "best at", caption=f"{seconds / 60:.1f} minutes"
    )
    for row in tree["rows"]:
        figures = (f"{row['params']:,}", f"{row['macs']:,}", f"{row['latency_ratio']:.2f}", f"{row['accuracy']:.2f}")
        table.add_row(row["method"] or "original", f"{row['ratio'] or 1:g}", *figures, ", ".join(row["pareto"]))
    Console(width=110).print(table)
