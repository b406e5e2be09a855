"""The networks of FCF's authors have the parameters and counts of PAPERS.md 2.3, to the last digit.

They keep normalisations, shortcuts and the stem at full width: a filter that goes takes its own weights, and what the next
layer of the chain reads of it. All is on the meta device: shapes alone decide.
"""

import math
from typing import Any

import pytest
from torch import nn

from compactcli import architectures, counters, measure
from compactcli.graph import trace
from compactcli.layers import Layer, layers

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)


def build(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    kwargs: dict[str, Any] = {"shortcut": "conv"} if name.startswith("cifar:") else {}
    return architectures.get(name, kwargs).build(device="meta"), CIFAR if kwargs else IMAGENET


def chain(model: nn.Module, shape: tuple[int, ...]) -> list[Layer]:
    """The convolutions that lose filters, one after another: those in blocks that are no shortcuts."""
    found = layers(trace(model, shape))
    return [layer for layer in found if layer.name.rpartition(".")[2] in ("conv1", "conv2", "conv3") and "layer" in layer.name]


def kept(layers: list[Layer], rate: float) -> list[tuple[int, int]]:
    """(filters kept, channels read) of each; the first reads all."""
    filters = [int(layer.shape[0] * (1 - rate)) for layer in layers]
    return list(zip(filters, [layers[0].shape[1], *filters[:-1]], strict=True))


def saved(layers: list[Layer], rate: float) -> tuple[int, int]:
    """(parameters, multiply-accumulates) of the convolutions that are gone."""
    weights = [
        (layer.shape[0] * layer.shape[1] - out * read) * layer.kernel
        for layer, (out, read) in zip(layers, kept(layers, rate), strict=True)
    ]
    return sum(weights), sum(layer.positions * own for layer, own in zip(layers, weights, strict=True))


def counted(model: nn.Module, shape: tuple[int, ...]) -> int:
    """By their counter. At the end of a block their networks for ImageNet have a ReLU that is a module, so it is counted."""
    return counters.fcf(model, shape) + (counters._rectified_sums(model, shape) if shape == IMAGENET else 0)


def down(name: str, rate: float) -> tuple[str, str, str]:
    """Percent less of the parameters, of the count, of the multiply-accumulates of the convolutions that lose filters."""
    model, shape = build(name)
    layers = chain(model, shape)
    params, macs = saved(layers, rate)
    whole = measure.params(model), counted(model, shape), sum(layer.macs for layer in layers)
    params_down, *rest = (100 * gone / of for gone, of in zip((params, macs, macs), whole, strict=True))
    return f"{params_down:.2f}", *(f"{each:.2f}" for each in rest)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("name", "params", "macs", "count"),
    [
        ("resnet20", 272_474, 40_812_544, 41_120_394),
        ("resnet32", 466_906, 69_124_096, 69_603_978),
        ("resnet56", 855_770, 125_747_200, 126_571_146),
        ("resnet110", 1_730_714, 253_149_184, 254_747_274),
    ],
)
def test_the_networks_to_start_from(name, params, macs, count):
    model, shape = build(f"cifar:{name}")
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    assert (measure.params(model), measure.macs(model, shape) - linear, counters.fcf(model, shape)) == (params, macs, count)


@pytest.mark.parametrize(
    ("name", "params", "count"),
    [
        ("resnet20", 155_978, 24_015_498),
        ("resnet32", 265_738, 40_112_778),
        ("resnet56", 485_258, 72_307_338),
        ("resnet110", 979_178, 144_745_098),
    ],
)
def test_a_quarter_of_the_filters_less(name, params, count):
    model, shape = build(f"cifar:{name}")
    gone, macs = saved(chain(model, shape), 0.25)
    assert (measure.params(model) - gone, counters.fcf(model, shape) - macs) == (params, count)


@pytest.mark.parametrize(
    ("name", "rate", "params", "count"),
    [
        ("resnet20", 0.25, "42.75", "41.60"),
        ("resnet32", 0.25, "43.09", "42.37"),
        ("resnet56", 0.25, "43.30", "42.87"),
        ("resnet110", 0.25, "43.42", "43.18"),
        ("resnet20", 0.5, "73.35", "71.72"),
        ("resnet32", 0.5, "73.90", "72.88"),
        ("resnet56", 0.5, "74.24", "73.63"),
        ("resnet110", 0.5, "74.45", "74.09"),
    ],
)
def test_what_rates_save_on_cifar(name, rate, params, count):
    assert down(f"cifar:{name}", rate)[:2] == (params, count)


@pytest.mark.parametrize(
    ("rate", "count", "pruned"),
    [(0.15, "26.84", "27.96"), (0.25, "41.41", "43.14"), (0.35, "55.11", "57.40"), (0.45, "66.47", "69.24")],
)
def test_what_rates_save_of_resnet34(rate, count, pruned):
    """Their README prints 26.83, 41.37, 54.87 and 66.05 %, of 27.95, 43.10, 57.16 and 68.80."""
    assert down("resnet34", rate)[1:] == (count, pruned)


def test_what_a_rate_saves_of_resnet50():
    assert down("resnet50", 0.31)[:2] == ("42.50", "46.14")


def test_kept_filters_at_a_quarter_less():
    """The first reads all 16 channels of the stem, as nothing before it loses filters."""
    model, shape = build("cifar:resnet20")
    layers = chain(model, shape)
    assert len(layers) == 18
    assert kept(layers, 0.25) == [(12, 16), *[(12, 12)] * 5, (24, 12), *[(24, 24)] * 5, (48, 24), *[(48, 48)] * 5]
    assert all(layer.macs == layer.positions * math.prod(layer.shape) for layer in layers)
