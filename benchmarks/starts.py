"""Accuracy that methods start from, calibrated, beside plain starts: `python -m benchmarks starts`.

CIFAR-10 ResNets (JPEG images), calibrated on 1,024 unlabelled training images, no training, all 10,000 test images, at 90, 70,
50 and 30 % of the parameters (linearconv, csg) or MACs (hetconv, fcf), beside a plain start at as many:

- linearconv: every layer the nearest kernel of rank p in the sum of squares, p the same share of its filters everywhere;
- csg: generator and codes from the truncated SVD of all slices, of the method's own shape, nothing weighted;
- hetconv: layers in the parts that the method chose, channels in their order, the centres of the kernels that go;
- fcf: as many filters in each layer as the method keeps, those of the largest mean |w|, refitted to the same images.

The others are not refitted. Required of the ResNet-56 at 70 %: linearconv at most 2 points lost, csg and hetconv at most half of
what their plain start loses; of both networks, fcf above its plain start; each in less than 40 s.

A row is written to benchmarks/results/starts-NETWORK.json the moment it is there; --resume keeps those there are.

    python -m benchmarks starts [--networks resnet56 resnet20] [--methods linearconv csg hetconv fcf]
                                [--ratios 0.9 0.7 0.5 0.3] [--resume]
"""

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from compactcli import artefact, budget, data, kernels, measure, report, sources
from compactcli.artefact import Network
from compactcli.channels import Channels, Ids
from compactcli.compress import Calibration, Target, compress
from compactcli.graph import trace
from compactcli.layers import Layer, layers
from compactcli.methods import get
from compactcli.methods._errors import Metric
from compactcli.methods._layers import eligible
from compactcli.methods._reconstruct import choose
from compactcli.methods._slices import Sliced, Slicing, directions
from compactcli.methods.csg import Options
from compactcli.methods.fcf import FCF, _means
from compactcli.methods.hetconv import Parts, fit

from ._common import add, checkpoint, images, provenance, rows

IMAGES = 1024  # to calibrate on
RATIOS = (0.9, 0.7, 0.5, 0.3)
REQUIRED_AT = 0.7
MOST_LOST = 2.0  # points, by linearconv
MOST_OF_PLAIN = 0.5  # of what the plain start loses, by the others
MOST_SECONDS = 40.0

Kernels = dict[str, Tensor]  # layer -> its new weight


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/starts-NETWORK.json for each network."""
    parser = argparse.ArgumentParser(prog="starts")
    parser.add_argument("--networks", nargs="+", default=["resnet56", "resnet20"])
    parser.add_argument("--methods", nargs="+", choices=list(PLAIN), default=list(PLAIN))
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--resume", action="store_true", help="keep the rows there are")
    options = parser.parse_args(arguments)
    command = " ".join(["python -m benchmarks starts", *arguments])
    for name in options.networks:
        network = artefact.open_model(checkpoint(f"{name}-cifar10jpeg.th"))
        shape, preprocessing = network.input_shape, network.recipe.preprocessing
        dataset = sources.open_dataset(str(images()), input_shape=shape, preprocessing=preprocessing)
        original = report.evaluate(network, dataset).accuracy.top1
        for method in options.methods:
            for ratio in options.ratios:
                key = f"{method} {ratio:g}"
                if options.resume and key in rows(f"starts-{name}"):
                    continue
                row = {**provenance(command), "original": original, **_row(network, dataset, method, ratio)}
                add(f"starts-{name}", {key: row | _judged(name, method, ratio, row, original)})
        _show(name)


def _row(network: Network, dataset: data.Dataset, method: str, ratio: float) -> dict[str, Any]:
    """Ours and the plain start, each with its accuracy and its share of the parameters or MACs."""
    assert dataset.train is not None
    calibration = Calibration(data.sample(dataset.train, IMAGES, 0), dataset.name)
    start = time.perf_counter()
    one = compress(copy.deepcopy(network), method, get(method)(), Target(ratio), calibration=calibration)
    seconds = time.perf_counter() - start
    of = get(method).of[0]
    plain, kept = PLAIN[method](network, one, ratio, calibration)
    return {
        "of": of,
        "kept": _size(one, of) / _size(network, of),
        "accuracy": report.evaluate(one, dataset).accuracy.top1,
        "seconds": seconds,
        "images": IMAGES,
        "plain": {"kept": kept, "accuracy": report.evaluate(plain, dataset).accuracy.top1},
    }


def _size(network: Network, of: str) -> int:
    return measure.params(network.module) if of == "params" else measure.macs(network.module, network.input_shape)


def _judged(name: str, method: str, ratio: float, row: dict[str, Any], original: float) -> dict[str, Any]:
    lost, plain = original - row["accuracy"], original - row["plain"]["accuracy"]
    if ratio != REQUIRED_AT or (name != "resnet56" and method != "fcf"):
        return {}
    if method == "fcf":
        return {"required": {"lost": lost, "below": plain, "met": lost < plain and row["seconds"] < MOST_SECONDS}}
    most = MOST_LOST if method == "linearconv" else MOST_OF_PLAIN * plain
    return {"required": {"lost": lost, "at_most": most, "met": lost <= most and row["seconds"] < MOST_SECONDS}}


def _coded(network: Network) -> list[tuple[Layer, Tensor]]:
    """The layers that both methods may store otherwise, with their kernels."""
    model = network.module
    found = eligible(model, layers(trace(model, network.input_shape)))
    return [(layer, model.get_parameter(layer.weight).detach()) for layer in found]


def _combined(network: Network, ours: Network, ratio: float, calibration: Calibration) -> tuple[Network, float]:
    """Kernels of rank p, which p filters and the coefficients of the others store (full), p the largest share that fits."""
    found, whole = _coded(network), measure.params(network.module)
    fixed = whole - sum(weight.numel() for _, weight in found)

    def ranks(share: float) -> list[int]:
        return [max(1, min(len(weight) - 1, weight[0].numel(), int(share * len(weight)))) for _, weight in found]

    def stored(share: float) -> float:
        sizes = zip(ranks(share), found, strict=True)
        return fixed + sum(p * weight[0].numel() + p * (len(weight) - p) for p, (_, weight) in sizes)

    share = max(step / 256 for step in range(1, 257) if stored(step / 256) <= ratio * whole or step == 1)
    made = {layer.weight: _of_rank(weight, p) for (layer, weight), p in zip(found, ranks(share), strict=True)}
    return _with(network, made), stored(share) / whole


def _of_rank(weight: Tensor, rank: int) -> Tensor:
    U, S, V = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    return ((U[:, :rank] * S[:rank]) @ V[:rank]).view_as(weight)


def _generated(network: Network, ours: Network, ratio: float, calibration: Calibration) -> tuple[Network, float]:
    """Slices on their first principal directions, one generator for each kernel size, codes as long as fits."""
    outputs, inputs = Options().shape
    groups: dict[tuple[int, ...], list[tuple[Layer, Sliced]]] = {}
    for layer, weight in _coded(network):
        metric = Metric(torch.eye(len(weight)), None)
        sliced = Sliced(weight, metric, Slicing(layer.shape, outputs, inputs))
        groups.setdefault(layer.shape[2:], []).append((layer, sliced))
    every = [sliced for group in groups.values() for _, sliced in group]
    whole = measure.params(network.module)
    fixed = whole - sum(sliced.weight.numel() for sliced in every)
    numbers = sum(group[0][1].slicing.size for group in groups.values())
    each = numbers + sum(sliced.slicing.count for sliced in every)  # stored for one more number in a code
    size = int((ratio * whole - fixed) // each)
    made: Kernels = {}
    for group in groups.values():
        basis = directions([sliced for _, sliced in group])[:, :size]
        for layer, sliced in group:
            made[layer.weight] = sliced.slicing.paste(sliced.slicing.cut(sliced.weight) @ basis @ basis.T)
    return _with(network, made), (fixed + size * each) / whole


def _centred(network: Network, ours: Network, ratio: float, calibration: Calibration) -> tuple[Network, float]:
    """Kernels in the parts that ours has, of which nothing but the centre is kept elsewhere."""
    made = {}
    for name, layer in kernels.layers(ours.module).items():
        assert isinstance(layer, Parts)
        weight = network.module.get_parameter(f"{name}.weight").detach()
        made[f"{name}.weight"] = fit(weight, None, layer.parts)
    return _with(network, made), _size(ours, "macs") / _size(network, "macs")


class ByNorm(FCF):
    """As many filters in each layer as the method keeps: those of the largest mean |w|."""

    def _unread(
        self, model: nn.Module, channels: Channels, budget: budget.Budget, family: int, order: Ids, moments: Any
    ) -> Tensor:
        ranked = np.argsort(_means(model, channels, budget, budget.families[family]), kind="stable")
        return choose([], ranked, self.kept[family])


def _by_norm(network: Network, ours: Network, ratio: float, calibration: Calibration) -> tuple[Network, float]:
    """The method with another choice of filters."""
    plain = compress(copy.deepcopy(network), "fcf", ByNorm(), Target(ratio), calibration=calibration)
    return plain, _size(plain, "macs") / _size(network, "macs")


Plain = Callable[
    [Network, Network, float, Calibration], tuple[Network, float]
]  # (original, ours, ratio, images) -> (network, kept)
PLAIN: dict[str, Plain] = {
    "linearconv": _combined,
    "csg": _generated,
    "hetconv": _centred,
    "fcf": _by_norm,
}


def _with(network: Network, made: Kernels) -> Network:
    one = copy.deepcopy(network)
    with torch.no_grad():
        for name, kernel in made.items():
            one.module.get_parameter(name).copy_(kernel)
    return one


def _show(name: str) -> None:
    table = Table("method, ratio", title=name, title_justify="left")
    for column in ("kept", "accuracy", "seconds", "plain: kept", "accuracy", "original", "required"):
        table.add_column(column, justify="right")
    for key, row in rows(f"starts-{name}").items():
        verdict = row.get("required")
        told = (
            ""
            if verdict is None
            else f"{verdict['lost']:.2f} of {verdict.get('at_most', verdict.get('below')):.2f}{'' if verdict['met'] else ' !'}"
        )
        ours = (f"{row['kept']:.3f}", f"{row['accuracy']:.2f}", f"{row['seconds']:.0f}")
        plain = (f"{row['plain']['kept']:.3f}", f"{row['plain']['accuracy']:.2f}", f"{row['original']:.2f}")
        table.add_row(key, *ours, *plain, told)
    Console(width=130).print(table)
