"""Time of large networks by all five methods, in PyTorch and ONNX Runtime: `python -m benchmarks runtimes`.

resnet34 and resnet50 at 224 x 224 and VGG-16 with batch norm at 32 x 32, random weights, on which time does not depend, at half
the MACs (hinge, fcf, hetconv) or parameters (linearconv, csg, which compute the same), from the weights alone. The compressed
network is timed beside the dense one, in turn, at batch 1 and 16: in PyTorch as `load` gives it, each in the better of both
memory formats; in ONNX Runtime as `export --to onnx --fold-bn` writes both, by the clock and by the processor's time. Medians.

No figure is required: the times are told beside the MACs and parameters kept.
A row is written to benchmarks/results/runtimes.json the moment it is there, under network and method; --resume keeps those
there are.

    python -m benchmarks runtimes [--networks resnet34 resnet50 cifar:vgg16] [--methods hinge fcf ...] [--repeats 9] [--resume]
"""

import argparse
import copy
from importlib.metadata import version

from rich.console import Console
from rich.table import Table

from compactcli import artefact, kernels, latency, measure
from compactcli.compress import Target, compress
from compactcli.errors import CompactError
from compactcli.export import export
from compactcli.methods import get, names

from ._common import Row, add, provenance, rows
from .export import timed

NETWORKS = ("resnet34", "resnet50", "cifar:vgg16")
RATIO = 0.5
BATCHES = (1, 16)


def main(arguments: list[str]) -> None:
    """Time each, write benchmarks/results/runtimes.json after each."""
    parser = argparse.ArgumentParser(prog="runtimes")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", default=names(), choices=names())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--resume", action="store_true", help="keep the rows there are")
    options = parser.parse_args(arguments)
    command = " ".join(["python -m benchmarks runtimes", *arguments])
    for network in options.networks:
        for method in options.methods:
            key = f"{network} {method}"
            if not (options.resume and key in rows("runtimes")):
                print(key, flush=True)
                row = {**provenance(command), **_row(network, method, options.repeats)}
                add("runtimes", {key: row})
    _show()


def _row(name: str, method: str, repeats: int) -> Row:
    """One compressed network beside its dense one; `failed` says what was refused."""
    dense = artefact.fresh(artefact.Wishes(name), 0)
    try:
        small = compress(copy.deepcopy(dense), method, get(method)(), Target(RATIO))
        whole_onnx, small_onnx = (export(network, "onnx", fold_bn=True).data for network in (dense, small))
    except CompactError as problem:
        return {"failed": str(problem)}
    shape = dense.input_shape
    kept = {
        "macs_kept": measure.macs(small.module, shape) / measure.macs(dense.module, shape),
        "params_kept": measure.params(small.module) / measure.params(dense.module),
    }
    modules = [dense.module, kernels.folded(small.module)]
    pytorch = []
    for batch in BATCHES:
        whole, now = latency.of(modules, shape, batch=batch, repeats=repeats)
        own = {"batch": batch, "threads": whole.threads, "original_ms": whole.median_ms, "original_iqr_ms": whole.iqr_ms}
        own |= {"compressed_ms": now.median_ms, "compressed_iqr_ms": now.iqr_ms, "share_ms": now.median_ms / whole.median_ms}
        pytorch.append(own)
    onnx = [timed(whole_onnx, small_onnx, shape, batch, repeats) for batch in BATCHES]
    libraries = {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
    return kept | {"repeats": repeats, "libraries": libraries, "pytorch": pytorch, "onnx": onnx}


def _show() -> None:
    table = Table("network and method", "MACs kept", "parameters kept", "PyTorch, batch 1", "16", "ONNX Runtime, batch 1", "16")
    for key, row in rows("runtimes").items():
        if "failed" in row:
            table.add_row(key, row["failed"])
            continue
        shares = (f"{own['share_ms']:.2f}" for own in (*row["pytorch"], *row["onnx"]))
        table.add_row(key, f"{row['macs_kept']:.3f}", f"{row['params_kept']:.3f}", *shares)
    Console(width=130).print(table)
