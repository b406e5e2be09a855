"""Networks that csg's edits make have the parameters of the paper's: PAPERS.md 4.4, to the last digit.

All is on the meta device: shapes alone decide.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from compactcli import cifar, kernels, measure, surgery
from compactcli.methods import get
from compactcli.recipe import Replace, Share

get("csg")  # its layers


def build(name: str) -> nn.Module:
    with torch.device("meta"):
        return cifar.NETWORKS[name](**{"keys": "csg"} if name.startswith("resnet") else {})


def coded(name: str, side: int, code: int, kernel: int, chosen: Callable[[str], bool]) -> nn.Module:
    """The network with the chosen convolutions of one kernel size made from codes, in the order of the authors' files."""
    model, cut = build(name), {"outputs": side, "inputs": side, "code": code}
    size = (kernel, kernel)
    found = [path for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == size]
    generator = Share(f"csg_{kernel}x{kernel}", "csg.generator", cut | {"height": kernel, "width": kernel})
    surgery.apply_(model, [generator, *(Replace(path, "csg.coded", cut | {"rows": 1}) for path in found if chosen(path))])
    return model


def in_a_block(path: str) -> bool:
    return "." in path


def counts(model: nn.Module) -> tuple[int, int]:
    """Parameters; and without the generator, as where it is known already."""
    whole = measure.params(model)
    return whole, whole - sum(measure.params(generator) for generator in kernels.shared(model).values())


@pytest.mark.parametrize(
    ("name", "plain", "large", "small"),
    [
        ("resnet20", 269_722, (312_218, 17_306), (115_426, 22_114)),
        ("resnet56", 853_018, (347_162, 52_250), (160_450, 67_138)),
        ("resnet110", 1_727_962, (399_578, 104_666), (227_986, 134_674)),
        ("densenet_bc40_36", 1_542_682, (1_059_994, 765_082), (842_842, 749_530)),
        ("densenet_bc40_48", 2_733_130, (1_617_994, 1_323_082), (1_416_394, 1_323_082)),
    ],
)
def test_the_3x3_convolutions_of_blocks_from_codes(name, plain, large, small):
    """Slices of 16 x 16 from 128 numbers; of 12 x 12 from 72."""
    assert measure.params(build(name)) == plain
    assert counts(coded(name, 16, 128, 3, in_a_block)) == large
    assert counts(coded(name, 12, 72, 3, in_a_block)) == small


def test_the_file_called_rn20_1616_128_has_codes_of_72():
    assert measure.params(coded("resnet20", 16, 72, 3, in_a_block)) == 176_698


@pytest.mark.parametrize(
    ("name", "chosen", "plain", "count"),
    [
        ("mobilenet_v2", lambda path: path.startswith("layers.") and path.endswith(".conv1"), 2_296_922, 1_595_322),
        ("shufflenet_v2_x0_5", lambda path: path == "conv2", 352_042, 171_818),
    ],
)
def test_1x1_convolutions_from_codes(name, chosen, plain, count):
    assert measure.params(build(name)) == plain
    assert measure.params(coded(name, 16, 16, 1, chosen)) == count


@pytest.mark.parametrize(
    ("name", "side", "rows"),
    [("resnet20", 16, 116), ("resnet56", 16, 368), ("resnet56", 12, 861), ("densenet_bc40_36", 12, 648)],
)
def test_codes_are_as_many_as_in_the_authors_files(name, side, rows):
    """PAPERS.md 4.3."""
    model = coded(name, side, 72, 3, in_a_block)
    assert sum(len(layer.code) for layer in kernels.layers(model).values()) == rows


@pytest.mark.parametrize(("name", "side", "code"), [("resnet20", 16, 128), ("densenet_bc40_48", 12, 72)])
def test_materialised_each_is_the_plain_network(name, side, code):
    assert measure.params_materialised(coded(name, side, code, 3, in_a_block)) == measure.params(build(name))
