"""Speed follows MACs: CPU latency at half the MACs, ours beside Torch-Pruning 1.6.1: `python -m benchmarks speed`.

resnet34 and resnet50 at 224 x 224 and VGG-16 with batch norm at 32 x 32, all with random weights: what is left of the
accuracy is no question here. A share is the median latency of the compressed network over that of the dense one; all
of a network's variants are timed in turn, with all threads, at batch 1 and 16, each memory format by itself.

Ours: `compress --method hinge --ratio 0.5` from the weights, with the default rounding and with `--round 16`.
Torch-Pruning: group L2 importance, global, the classifier ignored, not rounded, as near below half of the MACs as
bisection on its ratio comes; and, for orientation, 30 % of every layer's channels removed, rounded to 16.
No figure is required: README tells both.

    python -m benchmarks speed [--networks cifar:vgg16] [--repeats 5]
"""

import argparse
import copy
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from compactcli import artefact, latency, measure
from compactcli.artefact import Network
from compactcli.compress import Target, compress
from compactcli.latency import FORMATS, Latency
from compactcli.methods import get

from ._common import write

NETWORKS = ("resnet34", "resnet50", "cifar:vgg16")
RATIO = 0.5
BATCHES = (1, 16)
UNIFORM = 0.3  # share of every layer's channels that the uniform variant removes


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/speed.json."""
    parser = argparse.ArgumentParser(prog="speed")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    networks = [_timed(name, options.repeats) for name in options.networks]
    command = " ".join(["python -m benchmarks speed", *arguments])
    write("speed", {"command": command, "ratio": RATIO, "repeats": options.repeats, "networks": networks})


def _timed(name: str, repeats: int) -> dict[str, Any]:
    """One network: its variants, and the latency of each at every batch size and memory format."""
    dense = artefact.fresh(artefact.Wishes(name), 0)
    variants = _variants(dense)
    whole = measure.macs(dense.module, dense.input_shape)
    kept = {variant: measure.macs(module, dense.input_shape) / whole for variant, module in variants.items()}
    settings = []
    for batch in BATCHES:
        for memory_format in FORMATS:
            found = latency.of(
                list(variants.values()), dense.input_shape, batch=batch, repeats=repeats, memory_formats=(memory_format,)
            )
            settings.append(_setting(batch, memory_format, dict(zip(variants, found, strict=True)), kept))
    _show(name, settings)
    return {"network": name, "input_shape": list(dense.input_shape), "macs": whole, "settings": settings}


def _variants(dense: Network) -> dict[str, nn.Module]:
    """The dense network first, then every compressed one."""
    half = RATIO * measure.macs(dense.module, dense.input_shape)
    return {
        "dense": dense.module,
        "ours": _ours(dense, None),
        "ours, rounded to 16": _ours(dense, 16),
        "Torch-Pruning, global": _largest_within(half, dense),
        "Torch-Pruning, uniform, rounded to 16": _pruned(dense, UNIFORM, global_pruning=False, round_to=16),
    }


def _ours(dense: Network, round_to: int | None) -> nn.Module:
    network = copy.deepcopy(dense)
    return compress(network, "hinge", get("hinge")(), Target(RATIO, round_to=round_to)).module


def _largest_within(macs: float, dense: Network) -> nn.Module:
    """The globally pruned network with the most MACs up to that many, by bisection on the ratio of channels."""
    low, high = 0.0, 0.95
    for _ in range(12):
        middle = (low + high) / 2
        module = _pruned(dense, middle, global_pruning=True)
        low, high = (middle, high) if measure.macs(module, dense.input_shape) > macs else (low, middle)
    return _pruned(dense, high, global_pruning=True)


def _pruned(dense: Network, share: float, *, global_pruning: bool, round_to: int | None = None) -> nn.Module:
    import torch_pruning as tp

    module = copy.deepcopy(dense.module)
    pruner = tp.pruner.MagnitudePruner(
        module,
        torch.randn(1, *dense.input_shape, generator=torch.Generator().manual_seed(0)),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=global_pruning,
        pruning_ratio=share,
        ignored_layers=[[layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]],
        round_to=round_to,
    )
    pruner.step()
    return module.eval()


def _setting(batch: int, memory_format: str, found: Mapping[str, Latency], kept: Mapping[str, float]) -> dict[str, Any]:
    """The latencies at one batch size in one memory format, with their shares of the dense network's."""
    first = found["dense"].median_ms
    rows = [
        {
            "variant": variant,
            "macs_kept": kept[variant],
            "median_ms": own.median_ms,
            "iqr_ms": own.iqr_ms,
            "runs": own.runs,
            "share": own.median_ms / first,
        }
        for variant, own in found.items()
    ]
    return {"batch": batch, "memory_format": memory_format, "threads": found["dense"].threads, "variants": rows}


def _show(name: str, settings: list[dict[str, Any]]) -> None:
    table = Table("variant", "batch", "format", title=name, title_justify="left")
    for column in ("MACs kept", "median ms", "spread", "share of dense"):
        table.add_column(column, justify="right")
    for setting in settings:
        for row in setting["variants"]:
            figures = (f"{row['macs_kept']:.3f}", f"{row['median_ms']:.2f}", f"{row['iqr_ms']:.2f}", f"{row['share']:.3f}")
            table.add_row(row["variant"], str(setting["batch"]), setting["memory_format"], *figures)
        table.add_section()
    Console(width=120).print(table)
