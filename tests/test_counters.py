"""Counters count what their authors count: by module, once for each time that it runs, and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from networks import Code, conv
from torch import Tensor, nn

from compactcli import cifar, counters, measure
from compactcli.errors import UsageError

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


@pytest.mark.parametrize("count", counters.COUNTERS.values(), ids=counters.COUNTERS)
def test_a_network_is_left_as_it_was(count: counters.Counter) -> None:
    model = network(nn.BatchNorm2d(8)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count(model, SHAPE)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_counter_that_is_none_is_an_error_of_usage() -> None:
    with pytest.raises(UsageError, match="--counter thop: it is one of hinge, fcf"):
        counters.get("thop")
