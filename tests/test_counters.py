"""Counters count what their authors count: by module, once for each time that it runs, and nothing else."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from networks import Code, conv
from test_csg_arithmetic import coded, in_a_block
from test_linearconv_arithmetic import COLUMNS, FULL, HALF, RANK_1, RANK_10, SPARSE, Variant, build, edit, replaced
from torch import Tensor, nn

from compactcli import cifar, counters, kernels, measure, surgery
from compactcli.errors import UsageError
from compactcli.methods import register_layers
from compactcli.recipe import Replace

register_layers(["hetconv.parts"])

SHAPE = (3, 8, 8)
CONV, LINEAR = 8 * 3 * 9 * 64, 8 * 5  # MACs of the layers of `network`, without biases
ELEMENTS = 8 * 64  # of what its convolution makes


def network(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(conv(3, 8), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


@pytest.mark.parametrize(
    ("layer", "hinge", "fcf"),
    [
        (nn.Identity(), 0, 0),
        (nn.BatchNorm2d(8), 2, 1),
        (nn.ReLU(), 1, 1),
        (nn.ReLU(inplace=True), 1, 1),
        (nn.ReLU6(), 0, 0),
        (Code(lambda s, x: F.relu(x)), 0, 0),
        (Code(lambda s, x: s.relu(x + x), relu=nn.ReLU()), 1, 0),
        (Code(lambda s, x: s.relu(s.relu(x) + x), relu=nn.ReLU()), 2, 1),
        (nn.MaxPool2d(3, 1, 1), 0, 9),
        (nn.Sequential(nn.AvgPool2d((2, 1)), nn.Upsample(scale_factor=(2.0, 1.0))), 0, 1),
    ],
    ids=str,
)
def test_what_a_layer_counts_for_each_element(layer: nn.Module, hinge: int, fcf: int) -> None:
    model = network(layer)
    assert measure.macs(model, SHAPE) == CONV + LINEAR
    assert counters.hinge(model, SHAPE) == CONV + LINEAR + hinge * ELEMENTS
    assert counters.fcf(model, SHAPE) == CONV + LINEAR + 5 + fcf * ELEMENTS + ELEMENTS  # a bias, and the pooling at the end
    assert counters.linearconv(model, SHAPE) == CONV + LINEAR + 3 * ELEMENTS  # a bias for each input, and nothing else
    assert counters.hetconv(model, SHAPE) == CONV + LINEAR + ELEMENTS  # a bias, and nothing else


def flat(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(2), layer, nn.Unflatten(2, (8, -1)))


def deep(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (4, 2)), layer, nn.Flatten(1, 2))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("build", "inputs", "places"),
    [
        (lambda bias: nn.Conv2d(8, 8, 3, groups=2, padding=1, bias=bias), 4, 64),
        (lambda bias: flat(nn.Conv1d(8, 8, 3, padding=1, bias=bias)), 8, 64),
        (lambda bias: deep(nn.Conv3d(4, 4, 3, padding=1, bias=bias)), 4, 64),
        (lambda bias: flat(nn.ConvTranspose1d(8, 8, 2, stride=2, bias=bias)), 8, 128),
        (lambda bias: nn.ConvTranspose2d(8, 8, 3, stride=2, groups=4, bias=bias), 2, 17 * 17),
        (lambda bias: deep(nn.ConvTranspose3d(4, 4, 1, bias=bias)), 4, 64),
    ],
    ids=["grouped", "1d", "3d", "transposed 1d", "transposed 2d", "transposed 3d"],
)
def test_convolutions_of_every_kind_are_counted(build: Callable[[bool], nn.Module], inputs: int, places: int, bias: bool) -> None:
    """As torch counts their products; a bias once for each output, or for each input of it."""
    model, outputs = network(build(bias)), 8 * places
    macs = measure.macs(model, SHAPE)
    assert macs > CONV + LINEAR
    assert counters.hinge(model, SHAPE) == macs
    assert counters.linearconv(model, SHAPE) == macs + 3 * ELEMENTS + (inputs * outputs if bias else 0)
    assert counters.hetconv(model, SHAPE) == macs + ELEMENTS + outputs  # as if each had one


def on_values(code: Code, x: Tensor) -> Tensor:
    return code.relu(x) if float(x.sum()) > 0 else code.relu(-x)


def test_code_that_depends_on_values_is_counted_once() -> None:
    model = network(nn.BatchNorm2d(8), Code(on_values, relu=nn.ReLU()))
    assert counters.hinge(model, SHAPE) == CONV + LINEAR + 3 * ELEMENTS


# PAPERS.md 2.3. Those of 1.8 are in test_hinge_arithmetic.py.
@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet20", 41_120_394), ("resnet32", 69_603_978), ("resnet56", 126_571_146), ("resnet110", 254_747_274)],
)
def test_fcf_counts_as_the_paper(name: str, count: int) -> None:
    with torch.device("meta"):
        model = cifar.NETWORKS[name](shortcut="conv")
    assert counters.fcf(model, (3, 32, 32)) == count


# PAPERS.md 3.2, the last column.
@pytest.mark.parametrize(
    ("name", "plain", "full", "lowrank"),
    [
        ("base", 0.017, 0.060, 0.025),
        ("vgg11", 0.171, 2.398, 0.350),
        ("allconv", 0.315, 0.440, 0.344),
        ("resnet18", 0.558, 3.004, 0.775),  # 3.074 is printed, which no reading of the rest explains
        ("resnext29_2x64d", 1.424, 5.089, 1.691),
        ("mobilenet_v2", 0.098, 16.398, 0.931),
    ],
)
def test_linearconv_counts_as_the_paper(name: str, plain: float, full: float, lowrank: float) -> None:
    models = [build(name), replaced(name, FULL), replaced(name, RANK_10)]
    assert [counters.linearconv(model, (3, 32, 32)) / 1e9 for model in models] == pytest.approx([plain, full, lowrank], abs=0.02)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("variant", "making"),
    [
        (FULL, (2 * 4 - 1) * 4 * 36),
        (RANK_1, (2 * 4 - 1) * 36 + 4 * 36),
        (HALF, (2 * 4 - 1) * 2 * 36 + (2 * 2 - 1) * 4 * 36),
        (SPARSE, (2 * 12 - 4) * 36),
    ],
    ids=["full", "rank 1", "rank 2", "sparse"],
)
def test_what_making_a_kernel_counts(variant: Variant, making: int, bias: bool) -> None:
    """4 of 8 filters are made, in 2 groups that read 2 of 4 channels each, as if they read all; 12 of 16 coefficients."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, bias=bias))
    surgery.apply_(model, [edit("0", model[0], variant)])
    assert counters.linearconv(model, (4, 6, 6)) == 8 * 4 * 4 * 2 * (9 + bias) + making


def test_a_kernel_that_is_used_twice_is_made_once() -> None:
    model = nn.Sequential(Code(lambda s, x: s.layer(s.layer(x)), layer=nn.Conv2d(4, 4, 1, bias=False)))
    surgery.apply_(model, [edit("0.layer", model[0].layer, FULL)])
    assert counters.linearconv(model, (4, 1, 1)) == 2 * 16 + (2 * 2 - 1) * 2 * 4


@pytest.mark.parametrize(("parts", "share"), [(2, 5 / 9), (4, 1 / 3), (8, 2 / 9)])
@pytest.mark.parametrize("bias", [True, False])
def test_hetconv_counts_a_bias_whether_there_is_one_or_not_by_the_share_of_the_kernel(
    parts: int, share: float, bias: bool
) -> None:
    model = nn.Sequential(conv(8, 8, bias=bias))
    surgery.apply_(model, [Replace("0", "hetconv.parts", {"parts": parts})])
    assert counters.hetconv(model, (8, 3, 3)) == round(9 * 8 * (8 * 9 + 1) * share)


def test_a_coefficient_that_is_not_there_adds_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False))
    surgery.apply_(model, [edit("0", model[0], ("sparse", lambda p, s: {"kept": 0}))])
    assert counters.linearconv(model, (4, 1, 1)) == 16


MADE = [*(partial(replaced, "base", variant) for variant in COLUMNS), partial(coded, "resnet8", 12, 72, 3, in_a_block)]


@pytest.mark.parametrize("make", MADE)
def test_kernels_that_are_made_count_as_plain_ones_beside_what_making_them_costs(make: Callable[[], nn.Module]) -> None:
    """Where nothing is in groups: multiplications and additions, of these one less for every sum."""
    model, plain = make(), make()
    kernels.fold_(plain, hollow=True)
    for count in (counters.hinge, counters.fcf, counters.hetconv):
        assert count(model, (3, 32, 32)) == count(plain, (3, 32, 32))
    sums = sum(layer.synthesis_sums for layer in kernels.layers(model).values())
    making = counters.linearconv(model, (3, 32, 32)) - counters.linearconv(plain, (3, 32, 32))
    assert making == 2 * kernels.synthesis_macs(model) - sums
    assert 0 < sums <= kernels.synthesis_macs(model)


@pytest.mark.parametrize("count", counters.COUNTERS.values(), ids=counters.COUNTERS)
def test_a_network_is_left_as_it_was(count: counters.Counter) -> None:
    model = network(nn.BatchNorm2d(8)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count(model, SHAPE)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_counter_that_is_none_is_an_error_of_usage() -> None:
    with pytest.raises(UsageError, match="--counter thop: it is one of hinge, fcf, linearconv, hetconv"):
        counters.get("thop")
