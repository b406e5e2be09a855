"""Networks that hinge's edits make have the parameters and FLOPs of the paper's: PAPERS.md 1.1 and 1.8, to the last digit.

FLOPs are those of the authors' counter. All is on the meta device: shapes alone decide.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Code
from torch import nn

from compactcli import channels, cifar, counters, measure, surgery
from compactcli.graph import trace
from compactcli.layers import layers
from compactcli.methods import get
from compactcli.methods._two_slope import replacements
from compactcli.recipe import Replace

get("hinge")  # its layers

SHAPE = (3, 32, 32)
KWARGS: dict[str, dict[str, Any]] = {
    "resnet20": {"shortcut": "pool", "stem_bias": True},
    "resnet56": {"shortcut": "pool", "stem_bias": True},
    "wrn16_10": {"num_classes": 100},
}
FUNCTIONAL = ("resnext20", "resnext164", "wrn16_10")  # networks whose ReLUs are functions there, so not counted


def build(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        model = cifar.NETWORKS[name](**{**KWARGS.get(name, {}), **kwargs})
    for path in [path for path, module in model.named_modules() if isinstance(module, nn.ReLU) and name in FUNCTIONAL]:
        model.set_submodule(path, Code(lambda _, x: F.relu(x)))
    return model


def counts(model: nn.Module) -> tuple[int, int]:
    """(FLOPs, parameters)."""
    return counters.hinge(model, SHAPE), measure.params(model)


def percent(model: nn.Module, name: str) -> tuple[str, str]:
    """Both as shares of the network that it was, as printed."""
    flops, params = (100 * now / before for now, before in zip(counts(model), counts(build(name)), strict=True))
    return f"{flops:.2f}", f"{params:.2f}"


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Those that may have a matrix: all but the stem."""
    return dict([(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)][1:])


def decompose_(model: nn.Module, ranks: Mapping[str, int]) -> None:
    surgery.apply_(model, [Replace(name, "hinge.decomposed", {"rank": rank}) for name, rank in ranks.items()])


def full_ranks(model: nn.Module) -> dict[str, int]:
    return {name: min(len(layer.weight), layer.weight[0].numel()) for name, layer in convolutions(model).items()}


def two_slopes_(model: nn.Module) -> None:
    graph = trace(model, SHAPE)
    surgery.apply_(model, replacements(model, graph, channels.find(graph, model), layers(graph)))


def fifth(count: int) -> int:
    """The floor of the authors' scripts (`remain_percentage`)."""
    return count // 5


def prune_(model: nn.Module, layers: list[str]) -> None:
    """Leave a fifth of what each layer makes, in whole sets."""
    sets = channels.find(trace(model, SHAPE), model)
    removed: list[int] = []
    for name in layers:
        own = np.unique(sets.axes[f"{name}.weight", 0])
        removed += own[fifth(len(own)) :].tolist()
    surgery.apply_(model, channels.edits(sets, removed, model))


@pytest.mark.parametrize(
    ("name", "kwargs", "conv_macs", "macs", "flops", "params"),
    [
        ("resnet20", {}, 40_550_400, 40_551_040, 41_116_288, 269_738),
        ("resnet56", {}, 125_485_056, 125_485_696, 127_083_136, 853_034),
        ("resnet56", {"stem_bias": False}, 125_485_056, 125_485_696, 127_083_136, 853_018),
        ("resnet20", {"num_classes": 100}, 40_550_400, 40_556_800, 41_122_048, 275_588),
        ("resnet164", {}, 247_644_160, 247_646_720, 257_325_568, 1_704_154),
        ("resnet164", {"num_classes": 100}, 247_644_160, None, None, 1_727_284),
        ("vgg16_linear3", {}, 313_196_544, 313_725_952, 314_555_392, 15_253_578),
        ("vgg16", {}, 313_196_544, 313_201_664, 314_031_104, 14_728_266),
        ("densenet12_40", {}, 282_912_768, 282_917_328, 290_105_808, 1_059_298),
        ("resnext20", {}, 35_520_512, 35_523_072, 36_817_408, 211_850),
        ("resnext164", {}, 251_002_880, 251_005_440, 259_639_808, 1_713_546),
        ("resnext20", {"num_classes": 100}, 35_520_512, None, None, 234_980),
        ("resnext164", {"num_classes": 100}, 251_002_880, None, None, 1_736_676),
        ("wrn16_10", {}, 3_119_955_968, 3_120_019_968, 3_123_083_776, 17_179_940),
    ],
)
def test_the_networks_to_start_from(name, kwargs, conv_macs, macs, flops, params):
    model = build(name, **kwargs)
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    assert measure.macs(model, SHAPE) - linear == conv_macs
    assert measure.params(model) == params
    assert macs in (None, conv_macs + linear)
    assert flops in (None, counters.hinge(model, SHAPE))


@pytest.mark.parametrize(
    ("name", "flops", "params", "share"),
    [
        ("resnet56", 140_980_864, 949_856, "110.94"),
        ("resnet20", 45_748_864, 302_012, "111.27"),
        ("densenet12_40", 346_249_680, 1_190_050, "119.35"),
        ("vgg16_linear3", 355_449_856, 17_059_914, "113.00"),
    ],
)
def test_a_matrix_of_full_rank_behind_each_convolution(name, flops, params, share):
    model = build(name)
    decompose_(model, full_ranks(model))
    if name.startswith("resnet"):
        two_slopes_(model)
    assert counts(model) == (flops, params)
    assert percent(model, name)[0] == share


def test_a_matrix_that_makes_channels_is_merged_again():
    """ResNet-56 "basic": the first of a block is one layer when all is done, the second keeps its matrix."""
    model = build("resnet56")
    decompose_(model, {name: rank for name, rank in full_ranks(model).items() if name.endswith("conv2")})
    two_slopes_(model)
    assert counts(model) == (133_902_976, 901_472)


@pytest.mark.parametrize(
    ("name", "ranks", "params", "flops", "shares"),
    [
        ("resnet56", (8, 16, 32), 477_536, 71_381_632, ("56.17", "55.98")),
        ("resnet56", (7, 14, 28), 418_496, 62_681_728, ("49.32", "49.06")),
        ("resnet56", (6, 12, 24), 359_456, 53_981_824, ("42.48", "42.14")),
        ("resnet56", (3, 6, 12), 182_336, 27_882_112, ("21.94", "21.37")),
        ("resnet20", (8, 16, 32), 152_252, 23_335_552, ("56.76", "56.44")),
        ("resnet20", (7, 14, 28), 133_532, 20_533_888, ("49.94", "49.50")),
        ("resnet20", (6, 12, 24), 114_812, 17_732_224, ("43.13", "42.56")),
        ("resnet20", (3, 6, 12), 58_652, 9_327_232, ("22.69", "21.74")),
    ],
)
def test_uniform_ranks(name, ranks, params, flops, shares):
    model = build(name)
    by_width = dict(zip((16, 32, 64), ranks, strict=True))
    decompose_(model, {path: by_width[len(layer.weight)] for path, layer in convolutions(model).items()})
    two_slopes_(model)
    assert counts(model) == (flops, params)
    assert percent(model, name) == shares


@pytest.mark.parametrize(
    ("name", "pruned", "decomposed", "shares"),
    [
        ("resnet164", ("conv1", "conv2"), False, ("15.05", "13.92")),
        ("resnext164", ("conv1",), False, ("21.49", "21.63")),  # with the groups of conv2 that read them
        ("densenet12_40", (), True, ("23.29", "21.35")),
        ("vgg16_linear3", ("",), True, ("7.05", "8.12")),  # all but the last: the classifier is left as it is
    ],
)
def test_the_least_that_the_floor_allows(name, pruned, decomposed, shares):
    model = build(name)
    ranks = {path: fifth(rank) for path, rank in full_ranks(model).items()}
    if pruned:
        prune_(model, [path for path in list(convolutions(model))[:-1] if path.endswith(pruned)])
    if decomposed:
        decompose_(model, ranks)
    assert percent(model, name) == shares
