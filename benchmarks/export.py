"""What `export` makes of compressed networks, and how fast ONNX Runtime runs it: `python -m benchmarks export`.

Twelve networks, every parameter and statistic drawn at random, at half their MACs by hinge from the weights; and the real
ResNet-20 by each of the five methods at half its MACs (hinge, fcf, hetconv) or parameters (linearconv, csg). Each is written
as ONNX, checked by onnx.checker and run in ONNX Runtime, and by torch.export, batch norms folded in both; `difference` is
the largest of an output at batch 1 and 3, relative to the largest output. Original and compressed network are then timed in
ONNX Runtime, in turn, at batch 1 and 16: by the clock, and by the processor's time, which other work on the machine leaves alone.
Required: what `export` itself asks of the difference, else it writes nothing; and that MACs saved are time saved.

    python -m benchmarks export [--networks resnet18 linearconv] [--rounds 15] [--resume]
"""

import argparse
import copy
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from compactcli import artefact, measure
from compactcli.artefact import Network, Wishes
from compactcli.compress import Target, compress
from compactcli.errors import CompactError
from compactcli.export import export, onnx_session
from compactcli.methods import get, names

from ._common import RESULTS, checkpoint, write

RATIO = 0.5
BATCHES = (1, 16)
SHAPE = (3, 64, 64)  # of torchvision's networks
NETWORKS = (
    *("cifar:resnet20", "cifar:resnext20", "cifar:vgg11", "squeezenet1_1", "resnet18", "shufflenet_v2_x0_5"),
    *("mobilenet_v3_small", "mnasnet0_5", "mobilenet_v2", "regnet_y_400mf", "resnet50", "densenet121"),
)

Row = dict[str, Any]


def main(arguments: list[str]) -> None:
    """Export and time each, write benchmarks/results/export.json after each."""
    parser = argparse.ArgumentParser(prog="export")
    parser.add_argument("--networks", nargs="+", default=[*NETWORKS, *names()], help="networks, and methods on ResNet-20")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--resume", action="store_true", help="keep the rows there are")
    options = parser.parse_args(arguments)
    path = RESULTS / "export.json"
    if not options.resume:
        path.unlink(missing_ok=True)
    libraries = {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
    result = {"command": "python -m benchmarks export", "libraries": libraries, "rounds": options.rounds}
    for name in options.networks:
        if name not in _rows(path):
            row = _row(name, options.rounds)
            write("export", {**result, "rows": {**_rows(path), name: row}})  # another process may have added some
    _show(_rows(path))


def _rows(path: Path) -> dict[str, Row]:
    """Those there are, in the order in which they are made."""
    found: dict[str, Row] = json.loads(path.read_text())["rows"] if path.is_file() else {}
    return {name: found[name] for name in (*NETWORKS, *names()) if name in found}


def _row(name: str, rounds: int) -> Row:
    """One compressed network beside its original; `failed` says what was refused."""
    if name in NETWORKS:
        method, original = "hinge", artefact.fresh(Wishes(name, input_shape=None if ":" in name else SHAPE), 0)
        _randomise_(original.module)
    else:
        method, original = name, artefact.open_model(checkpoint("resnet20-cifar10jpeg.th"))
    row: Row = {"architecture": original.recipe.architecture, "input_shape": list(original.input_shape), "method": method}
    try:
        small = compress(copy.deepcopy(original), method, get(method)(), Target(RATIO))
        return row | _exported(original, small, rounds)
    except CompactError as problem:
        return row | {"failed": str(problem)}


def _exported(original: Network, small: Network, rounds: int) -> Row:
    kept = measure.macs(small.module, small.input_shape) / measure.macs(original.module, small.input_shape)
    params = measure.params(small.module) / measure.params(original.module)
    start = time.perf_counter()
    pt2 = export(small, "pt2", fold_bn=True)
    pt2_seconds = time.perf_counter() - start
    whole, onnx = (export(network, "onnx", fold_bn=True) for network in (original, small))
    return {
        "macs_kept": kept,
        "params_kept": params,
        "pt2": {"difference": pt2.difference, "bytes": len(pt2.data), "seconds": pt2_seconds},
        "onnx": {"difference": onnx.difference, "bytes": len(onnx.data), "bytes_original": len(whole.data)},
        "latency": [timed(whole.data, onnx.data, small.input_shape, batch, rounds) for batch in BATCHES],
    }


def timed(whole: bytes, small: bytes, shape: tuple[int, ...], batch: int, rounds: int) -> Row:
    """Milliseconds for a batch in ONNX Runtime, the two networks in turn."""
    image = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).numpy()
    sessions = [onnx_session(data) for data in (whole, small)]
    times: list[list[tuple[float, float]]] = [[], []]
    for turn in range(2 + rounds):
        for session, own in zip(sessions, times, strict=True):
            start = time.perf_counter(), time.process_time()
            session.run(None, {"input": image})
            if turn >= 2:  # the first ones warm up
                own.append((1e3 * (time.perf_counter() - start[0]), 1e3 * (time.process_time() - start[1])))
    row: Row = {"batch": batch, "threads": torch.get_num_threads()}
    for index, unit in enumerate(("ms", "cpu_ms")):
        quartiles = [statistics.quantiles([each[index] for each in own], n=4, method="inclusive") for own in times]
        for network, (low, median, high) in zip(("original", "compressed"), quartiles, strict=True):
            row |= {f"{network}_{unit}": median, f"{network}_iqr_{unit}": high - low}
        row[f"share_{unit}"] = quartiles[1][1] / quartiles[0][1]
    return row


def _randomise_(module: nn.Module) -> None:
    """Draw the batch norms' numbers, which are all one or zero in a fresh network and would hide errors."""
    generator = torch.Generator().manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low, high in (
                *((norm.weight, 0.5, 1.5), (norm.bias, -0.2, 0.2)),
                *((norm.running_mean, -0.2, 0.2), (norm.running_var, 0.5, 1.5)),
            ):
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)


def _show(rows: dict[str, Row]) -> None:
    table = Table("network", "method", "MACs kept", "ONNX differs", "pt2 differs", "batch 1, CPU ms", "batch 16, CPU ms")
    for name, row in rows.items():
        if "failed" in row:
            table.add_row(name, row["method"], row["failed"])
            continue
        times = [f"{t['original_cpu_ms']:.2f} to {t['compressed_cpu_ms']:.2f} ({t['share_cpu_ms']:.2f})" for t in row["latency"]]
        differences = [f"{row[target]['difference']:.1e}" for target in ("onnx", "pt2")]
        table.add_row(name, row["method"], f"{row['macs_kept']:.3f}", *differences, *times)
    Console(width=120).print(table)
    told = [name for name, row in rows.items() if row.get("macs_kept", 1) < 1]
    slow = [name for name in told if any(time["share_cpu_ms"] >= 1 for time in rows[name]["latency"])]
    print(f"{len(told) - len(slow)} of {len(told)} with fewer MACs take less time" + (f"; not {', '.join(slow)}" if slow else ""))
