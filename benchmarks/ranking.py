"""Whether predicted errors rank the methods as accuracy does: `python -m benchmarks ranking`.

CIFAR-10 ResNets (JPEG images). Each method at 70 and 50 % of the parameters: the error that `analyze --methods --data`
predicts, without compressing anything, beside the accuracy on all 10,000 test images of the network that `compress --data`
makes, calibrated on 1,024 (--images) unlabelled training images. Kendall's tau-b between predicted errors and lost accuracy,
over both ratios; points within one of chance are left out. Required: at least 0.8.

A row is written to benchmarks/results/ranking-NETWORK.json the moment it is measured; --resume keeps those there are, and
predicts anew.

    python -m benchmarks ranking [--networks resnet20 resnet56] [--images 1024] [--resume]
"""

import argparse
import copy
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from compactcli import artefact, data, methods, predict, report, sources
from compactcli.artefact import Network
from compactcli.compress import Calibration, Target, compress
from compactcli.layers import layers
from compactcli.moments import MOMENT_IMAGES, Batches, value_bytes
from compactcli.plan import plan

from ._common import checkpoint, images, rows, write

RATIOS = (0.7, 0.5)
CHANCE = 10.0  # percent
REQUIRED = 0.8


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/ranking-NETWORK.json for each network."""
    parser = argparse.ArgumentParser(prog="ranking")
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--resume", action="store_true", help="keep the rows there are")
    parser.add_argument("--images", type=int, default=1024, help="to calibrate on")
    options = parser.parse_args(arguments)
    for name in options.networks:
        network = artefact.open_model(checkpoint(f"{name}-cifar10jpeg.th"))
        shape, preprocessing = network.input_shape, network.recipe.preprocessing
        dataset = sources.open_dataset(str(images()), input_shape=shape, preprocessing=preprocessing)
        found = rows(f"ranking-{name}") if options.resume else {}
        for ratio in RATIOS:
            for method in methods.names():
                key = f"{method} {ratio:g}"
                if key not in found:
                    found[key] = _measured(network, dataset, method, ratio, options.images)
                    write(f"ranking-{name}", {"rows": found})
        assert dataset.train is not None
        module = network.module
        graph, channels = plan(module, shape)
        names = [layer.name for layer in layers(graph)]
        sample = data.sample(dataset.train, MOMENT_IMAGES, 0)
        batches = Batches(sample, network.recipe.preprocessing, value_bytes(graph))
        known = predict.moments(network, module, graph, names, batches)
        plain = predict.Plain(module, graph, channels, known)
        for row in predict.predicted(plain, methods.names(), RATIOS, "params", lambda error: None):
            found[f"{row['method']} {row['ratio']:g}"]["predicted"] = row["error"]
        tau = _tau([row for row in found.values() if abs(row["accuracy"] - CHANCE) > 1])
        print(f"{name}: tau-b {tau:.3f} of {len(found)} points")
        command = " ".join(["python -m benchmarks ranking", *arguments])
        write(f"ranking-{name}", {"command": command, "tau_b": tau, "met": tau >= REQUIRED, "rows": found})


def _tau(rows: Sequence[Mapping[str, Any]]) -> float:
    """Kendall's tau-b between what is predicted and what is lost: pairs in one order less those in the other."""
    agree = [
        _sign(b["predicted"] - a["predicted"]) * _sign(a["accuracy"] - b["accuracy"]) for a, b in itertools.combinations(rows, 2)
    ]
    apart = [sum(a[key] != b[key] for a, b in itertools.combinations(rows, 2)) for key in ("predicted", "accuracy")]
    return float(sum(agree)) / math.sqrt(apart[0] * apart[1])


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _measured(network: Network, dataset: data.Dataset, method: str, ratio: float, count: int) -> dict[str, Any]:
    """What comes of compressing a copy of the network."""
    assert dataset.train is not None
    calibration = Calibration(data.sample(dataset.train, count, 0), dataset.name)
    start = time.perf_counter()
    target = Target(ratio, "params")
    one = compress(copy.deepcopy(network), method, methods.get(method)(), target, calibration=calibration)
    return {
        "method": method,
        "ratio": ratio,
        "images": count,
        "accuracy": report.evaluate(one, dataset).accuracy.top1,
        "error": one.recipe.steps[-1].error,
        "seconds": time.perf_counter() - start,
    }
