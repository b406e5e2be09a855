"""Accuracy after compression without any training, ours beside Torch-Pruning 1.6.1: `python -m benchmarks oneshot`.

Two CIFAR-10 ResNets, 70 % and 50 % of MACs kept, unlabelled training images only, all 10,000 test images.

Torch-Pruning: group L2 importance, global, groups made comparable by their mean or their maximum, whichever gives the more
accurate network; the stem and every block's second conv ignored by hand (else its result does not run on these option-A
shortcuts), the same MACs found by bisection on its ratio, then batch-norm statistics measured anew on the same images.
Ours: `compress --method hinge --data`, three samplings each of 64, 256 and 1,024 images.
No figure is required: README tells both.

    python -m benchmarks oneshot [--images 1024] [--networks resnet20] [--skip peer]
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compactcli import artefact, data, measure, report, sources
from compactcli.artefact import Network
from compactcli.compress import Calibration, Target, compress
from compactcli.methods import get, parse_options

from ._common import RESULTS, checkpoint, images, write

RATIOS = (0.7, 0.5)
SEEDS = (0, 1, 2)


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/oneshot-NETWORK.json for each network."""
    parser = argparse.ArgumentParser(prog="oneshot")
    parser.add_argument("--images", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--skip", choices=["ours", "peer"], help="keep the rows that there are")
    options = parser.parse_args(arguments)
    for name in options.networks:
        network = artefact.open_model(checkpoint(f"{name}-cifar10jpeg.th"))
        dataset = sources.open_dataset(str(images()), input_shape=network.input_shape, preprocessing=network.recipe.preprocessing)
        original = report.evaluate(network, dataset).accuracy.top1
        print(f"{name}: original {original:.2f} %")
        counts = options.images
        rows = (
            _earlier(name, "ours") if options.skip == "ours" else [_ours(network, dataset, r, n) for n in counts for r in RATIOS]
        )
        peer = _earlier(name, "torch_pruning") if options.skip == "peer" else [_peer(network, dataset, r) for r in RATIOS]
        command = " ".join(["python -m benchmarks oneshot", *arguments])
        write(f"oneshot-{name}", {"command": command, "original": original, "ours": rows, "torch_pruning": peer})


def _earlier(name: str, contender: str) -> list[dict[str, Any]]:
    """The rows of an earlier run."""
    path = RESULTS / f"oneshot-{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())[contender] if path.exists() else []
    return rows


def compressed(
    network: Network,
    dataset: data.Dataset,
    ratio: float,
    count: int,
    seed: int,
    method: str = "hinge",
    given: Sequence[str] = (),
) -> Network:
    """Ours: a copy of the network, that share of its MACs or parameters kept, calibrated on that many training images."""
    assert dataset.train is not None
    calibration = Calibration(data.sample(dataset.train, count, seed), dataset.name)
    kind = get(method)
    chosen = kind(parse_options(kind, given))
    return compress(copy.deepcopy(network), method, chosen, Target(ratio), calibration=calibration, seed=seed)


def pruned(network: Network, dataset: data.Dataset, ratio: float, normalizer: str = "mean") -> Network:
    """Torch-Pruning's: at most that share of the MACs, as near as bisection comes, its batch-norm statistics measured anew.

    What the importances of a group are divided by, so that groups compare, is their mean unless said otherwise.
    """
    wanted = ratio * measure.macs(network.module, network.input_shape)
    low, high = 0.0, 0.95
    for _ in range(12):
        middle = (low + high) / 2
        model = _pruned(network, middle, normalizer)
        low, high = (middle, high) if measure.macs(model, network.input_shape) > wanted else (low, middle)
    one = copy.copy(network)
    one.module = _pruned(network, high, normalizer)
    assert dataset.train is not None
    _recalibrate_(one.module, dataset.train, network)
    return one


def best_pruned(network: Network, dataset: data.Dataset, ratio: float) -> tuple[Network, str]:
    """The better of Torch-Pruning's by either way to make groups comparable, on the test images; and which that was."""
    ways = {way: pruned(network, dataset, ratio, way) for way in ("mean", "max")}
    best = max(ways, key=lambda way: report.evaluate(ways[way], dataset).accuracy.top1)
    return ways[best], best


def macs_kept(one: Network, network: Network) -> float:
    """The share of the network's MACs."""
    return measure.macs(one.module, one.input_shape) / measure.macs(network.module, network.input_shape)


def _ours(network: Network, dataset: data.Dataset, ratio: float, count: int) -> dict[str, Any]:
    accuracies, seconds, kept = [], [], 0.0
    for seed in SEEDS:
        start = time.perf_counter()
        one = compressed(network, dataset, ratio, count, seed)
        seconds.append(time.perf_counter() - start)
        kept = macs_kept(one, network)
        accuracies.append(report.evaluate(one, dataset).accuracy.top1)
    row = {
        "ratio": ratio,
        "macs_kept": kept,
        "images": count,
        "accuracy": statistics.mean(accuracies),
        "deviation": statistics.stdev(accuracies),
        "accuracies": accuracies,
        "seconds": statistics.median(seconds),
    }
    figures = f"{row['accuracy']:.2f} +- {row['deviation']:.2f} %, {row['seconds']:.0f} s"
    print(f"  ours, {count} images, {ratio:.0%}: {figures}", flush=True)
    return row


def _peer(network: Network, dataset: data.Dataset, ratio: float) -> dict[str, Any]:
    start = time.perf_counter()
    one, normalizer = best_pruned(network, dataset, ratio)
    accuracy, kept = report.evaluate(one, dataset).accuracy.top1, macs_kept(one, network)
    print(f"  Torch-Pruning, {ratio:.0%} ({kept:.3f}): {accuracy:.2f} %, normalizer {normalizer}", flush=True)
    row = {"ratio": ratio, "macs_kept": kept, "images": 1024, "normalizer": normalizer, "accuracy": accuracy}
    return row | {"seconds": time.perf_counter() - start}


def ignored(model: nn.Module) -> list[nn.Module]:
    """The layers that Torch-Pruning must leave alone."""
    return [module for name, module in model.named_modules() if name in ("conv1", "linear") or name.endswith("conv2")]


def _pruned(network: Network, share: float, normalizer: str) -> nn.Module:
    import torch_pruning as tp

    model = copy.deepcopy(network.module)
    pruner = tp.pruner.MagnitudePruner(
        model,
        torch.randn(1, *network.input_shape),
        importance=tp.importance.GroupMagnitudeImportance(p=2, normalizer=normalizer),
        global_pruning=True,
        pruning_ratio=share,
        ignored_layers=ignored(model),
    )
    pruner.step()
    return model


def _recalibrate_(model: nn.Module, split: data.Split, network: Network) -> None:
    """Batch-norm statistics as plain averages over 1,024 images; leaves the model in eval mode, fit to be trained on."""
    norms = {module: module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for batch in data.sample(split, 1024, 0).split(128):
            model(data.normalise(batch, network.recipe.preprocessing))
    for norm, momentum in norms.items():
        norm.momentum = momentum
    model.eval()
