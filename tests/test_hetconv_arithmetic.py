"""Networks that hetconv's edits make have the FLOPs and parameters of the paper's: PAPERS.md 5.2 and 5.3, to the last digit.

All is on the meta device: shapes alone decide.
"""

import pytest
import torch
from test_linearconv_arithmetic import FULL
from test_linearconv_arithmetic import edit as combined
from torch import nn

from compactcli import cifar, counters, kernels, measure, surgery
from compactcli.methods import get
from compactcli.recipe import Replace

get("hetconv")  # its layers

SHAPE = (3, 32, 32)
LINEAR = 512 * 512 + 512 * 10  # MACs of the classifier
REST = 14_987_786 - 14_710_464  # parameters that are none of a convolution's weight
PARTS = (1, 2, 4, 8, 16, 32, 64)
FORMULA = (313_740_288, 175_234_503, 105_981_611, 71_355_164, 54_041_941, 45_385_330, 41_057_024)
PRINTED = (313.74, 175.23, 105.98, 71.35, 54.04, 45.38, 41.05)
PURE = (313_196_544, 174_784_512, 105_578_496, 70_975_488, 53_673_984, 45_023_232, 40_697_856)
EXECUTED = (347_799_552, 192_086_016, 114_229_248, 75_300_864, 55_836_672, 46_104_576, 41_238_528)
WEIGHTS = (14_710_464, 8_173_248, 4_904_640, 3_270_336, 2_453_184, 2_044_608, 1_840_320)
STORED = (16_344_768, 8_990_400, 5_313_216, 3_474_624, 2_555_328, 2_095_680, 1_865_856)
SIZES = (32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2)  # of what convolutions 2 to 13 make

every_row = pytest.mark.parametrize("row", range(7), ids=[f"P={parts}" for parts in PARTS])


def plain() -> nn.Module:
    with torch.device("meta"):
        return cifar.NETWORKS["vgg16_hetconv"]()


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}


def divided(parts: int) -> nn.Module:
    """The network with convolutions 2 to 13 in parts; with one part they stay as they are."""
    model = plain()
    if parts > 1:
        surgery.apply_(model, [Replace(path, "hetconv.parts", {"parts": parts}) for path in list(convolutions(model))[1:]])
    return model


def overlapping(parts: int) -> tuple[int, int]:
    """What the authors' layers have for the pointwise blocks that the k x k ones cover: (MACs, weights)."""
    blocks = [layer.in_channels * layer.out_channels // parts for layer in list(convolutions(plain()).values())[1:]]
    return sum(block * size**2 for block, size in zip(blocks, SIZES, strict=True)), sum(blocks)


@every_row
def test_the_papers_formula(row):
    assert counters.hetconv(divided(PARTS[row]), SHAPE) == FORMULA[row]
    assert int(FORMULA[row] / 1e4) / 100 == PRINTED[row]


@every_row
def test_what_is_executed(row):
    """With one part the layer stays plain, and with two it skips the blocks that overlap: then it executes the pure count."""
    assert EXECUTED[row] == PURE[row] + overlapping(PARTS[row])[0]
    assert measure.macs(divided(PARTS[row]), SHAPE) - LINEAR == (PURE if PARTS[row] <= 2 else EXECUTED)[row]


@every_row
def test_what_is_stored(row):
    """Only what is not zero."""
    assert measure.params(divided(PARTS[row])) == WEIGHTS[row] + REST
    assert STORED[row] == WEIGHTS[row] + overlapping(PARTS[row])[1]


@every_row
def test_what_is_run_holds_the_overlapping_blocks_where_it_executes_them(row):
    held = WEIGHTS if PARTS[row] <= 2 else STORED
    assert measure.params_materialised(divided(PARTS[row])) == held[row] + REST


@every_row
def test_other_counters_count_what_is_executed(row):
    model, folded = divided(PARTS[row]), divided(PARTS[row])
    kernels.fold_(folded, hollow=True)
    for count in (counters.hinge, counters.fcf):
        assert count(model, SHAPE) == count(folded, SHAPE)


def test_kernels_that_are_made_otherwise_count_as_plain_ones():
    model = plain()
    surgery.apply_(model, [combined(path, layer, FULL) for path, layer in convolutions(model).items()])
    assert counters.hetconv(model, SHAPE) == FORMULA[0]
