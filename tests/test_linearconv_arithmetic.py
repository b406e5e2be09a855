"""Networks that linearconv's edits make have the parameters of the paper's: PAPERS.md 3.3, to the last digit.

All is on the meta device: shapes alone decide.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from compactcli import cifar, measure, surgery
from compactcli.methods import get
from compactcli.recipe import Replace

get("linearconv")  # its layers

PLAIN = {"allconv": "class_conv", "resnext29_2x64d": "conv1"}  # what the authors' code leaves as it is (3.1)
NETWORKS = ("base", "vgg11", "allconv", "resnet18", "resnext29_2x64d", "mobilenet_v2")

# Each variant by its kind and, from the numbers of primary and of other filters, the option beside `primary`.
Variant = tuple[str, Callable[[int, int], dict[str, int]]]
FULL: Variant = ("full", lambda p, s: {})
RANK_10: Variant = ("lowrank", lambda p, s: {"rank": 10})
RANK_1: Variant = ("lowrank", lambda p, s: {"rank": 1})
HALF: Variant = ("lowrank", lambda p, s: {"rank": int(0.5 * p)})
WHOLE: Variant = ("lowrank", lambda p, s: {"rank": p})
SPARSE: Variant = ("sparse", lambda p, s: {"kept": s * p - int(0.25 * s * p)})  # a quarter are zeros
COLUMNS = (FULL, RANK_10, RANK_1, HALF, WHOLE, SPARSE)


def build(name: str) -> nn.Module:
    with torch.device("meta"):
        return cifar.NETWORKS[name]()


def edit(path: str, layer: nn.Conv2d, variant: Variant) -> Replace:
    """Half of the filters are primary."""
    kind, options = variant
    p = layer.out_channels // 2
    return Replace(path, f"linearconv.{kind}", {"primary": p, **options(p, layer.out_channels - p)})


def replaced(name: str, variant: Variant, plain: str | None = None) -> nn.Module:
    """The network with all convolutions in a variant, but for the one that stays plain."""
    model, kept = build(name), PLAIN.get(name) if plain is None else plain
    found = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d) and path != kept}
    surgery.apply_(model, [edit(path, layer, variant) for path, layer in found.items()])
    return model


@pytest.mark.parametrize(
    ("name", "plain", "counts"),
    [
        ("base", 399_626, (227_418, 210_458, 206_138, 227_418, 249_178, 221_978)),
        ("vgg11", 9_231_114, (4_922_282, 4_649_770, 4_625_002, 4_922_282, 5_222_314, 4_847_274)),
        ("allconv", 1_369_738, (739_450, 698_938, 687_706, 739_450, 792_442, 726_202)),
        ("resnet18", 11_173_962, (6_029_546, 5_642_346, 5_599_146, 6_029_546, 6_464_746, 5_920_746)),
        ("resnext29_2x64d", 9_128_778, (6_474_570, 4_707_658, 4_594_762, 6_474_570, 8_366_922, 6_001_482)),
        ("mobilenet_v2", 2_296_922, (3_923_434, 1_347_850, 1_189_954, 3_923_434, 6_674_458, 3_235_678)),
    ],
)
def test_every_variant_of_every_network(name, plain, counts):
    """Plain; all coefficients, rank 10, rank 1, half the rank, all of it; a quarter of the coefficients zero."""
    assert measure.params(build(name)) == plain
    assert tuple(measure.params(replaced(name, variant)) for variant in COLUMNS) == counts


@pytest.mark.parametrize(("variant", "count"), [(FULL, 6_475_498), (RANK_10, 4_708_202)])
def test_the_figure_has_the_stem_of_resnext_replaced_too(variant, count):
    assert measure.params(replaced("resnext29_2x64d", variant, plain="")) == count


@pytest.mark.parametrize("name", NETWORKS)
def test_materialised_each_is_the_plain_network(name):
    whole = measure.params(build(name))
    assert {measure.params_materialised(replaced(name, variant)) for variant in COLUMNS} == {whole}
