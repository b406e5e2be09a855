"""Whether a share of latency is met: `python -m benchmarks latency`.

torchvision's resnet50 at 224 x 224 and cifar:vgg16_bn at 32 x 32, random weights, one thread, one image. Each network's layers
are timed once, as `bench --threads 1 --save` does; `compress --of latency --ratio 0.5 --latency-table` then plans with that
table alone. What comes of it is measured afresh beside the whole network, in turn, in the table's memory format, medians.
Required: within 0.05 of the target. Times are those of the thread's own clock: what other programs take does not count.

    python -m benchmarks latency [--networks resnet50 cifar:vgg16_bn] [--methods hinge fcf]
"""

import argparse
import copy
from typing import Any

import torch

from compactcli import artefact, measure, timing
from compactcli.compress import Target, compress
from compactcli.methods import get

from ._common import write

RATIO = 0.5
NEAR = 0.05
SECONDS = 6.0  # of measuring, at least


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/latency.json."""
    parser = argparse.ArgumentParser(prog="latency")
    parser.add_argument("--networks", nargs="+", default=["resnet50", "cifar:vgg16_bn"])
    parser.add_argument("--methods", nargs="+", default=["hinge", "fcf"])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [_row(name, options.methods) for name in options.networks]
    write("latency", {"command": " ".join(["python -m benchmarks latency", *arguments]), "ratio": RATIO, "networks": rows})


def _row(name: str, methods: list[str]) -> dict[str, Any]:
    """One network: what each method's network takes, as a share of the whole."""
    network = artefact.fresh(artefact.Wishes(name), 0)
    table = timing.table(network, threads=1)
    shape = (table.batch, *network.input_shape)
    found = {}
    for method in methods:
        target = Target(RATIO, "latency", table=table)
        small = compress(copy.deepcopy(network), method, get(method)(), target).module
        timers = [timing.timer(module, shape, "cpu", table.memory_format) for module in (copy.deepcopy(network.module), small)]
        timing.time_in_turn(timers, SECONDS)
        whole, now = (timer.median_ms for timer in timers)
        macs = measure.macs(small, network.input_shape) / measure.macs(network.module, network.input_shape)
        row = {"share": now / whole, "whole_ms": whole, "ms": now, "runs": len(timers[0].times_ms), "macs": macs}
        found[method] = {**row, "met": abs(row["share"] - RATIO) <= NEAR}
        print(name, method, found[method], flush=True)
    return {"network": name, "memory_format": table.memory_format, "table_ms": table.whole_ms, "methods": found}
