"""What is counted and measured, against other people's counters and by hand."""

import copy
import math

import networks
import pytest
import torch
from networks import AWKWARD, SHAPE, named, randomise_
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from compactcli import architectures, measure
from compactcli.errors import CompactError

# Parameters and MACs of convolutions and linear layers at 224 x 224, as published with torchvision's weights (GFLOPS there
# are these, rounded to 10 million).
PUBLISHED = [
    ("resnet18", 11_689_512, 1.81),
    ("resnet50", 25_557_032, 4.09),
    ("vgg11_bn", 132_868_840, 7.61),
    ("mobilenet_v2", 3_504_872, 0.30),
    ("squeezenet1_1", 1_235_496, 0.35),
    ("densenet121", 7_978_856, 2.83),
    ("efficientnet_b0", 5_288_548, 0.39),
]


@pytest.mark.parametrize(("name", "params", "gigamacs"), PUBLISHED)
def test_published_counts(name, params, gigamacs):
    model = architectures.get(name).build()
    assert measure.params(model) == params
    assert measure.macs(model, (3, 224, 224)) / 1e9 == pytest.approx(gigamacs, abs=0.006)


@pytest.mark.parametrize("name", AWKWARD)
def test_macs_are_half_of_what_torch_counts(name):
    model = AWKWARD[name]()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *SHAPE))
    before = copy.deepcopy(model.state_dict())
    assert 2 * measure.macs(model, SHAPE) == counter.get_total_flops()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_shared_parameters_count_once():
    assert measure.params(AWKWARD["tied_parameter"]()) == sum(
        module.weight.numel() for module in AWKWARD["tied_parameter"]().modules() if hasattr(module, "weight")
    ) - 8 * 8 * 9 + (8 + 8 + 8 + 5 + 5)
    layer = nn.Linear(3, 3, bias=False)
    assert measure.params(nn.Sequential(layer, layer)) == 9


def test_thop_leaves_nothing_behind():
    model = named("cifar:resnet8", width=4).train()
    before = set(model.state_dict())
    assert measure.thop_macs(model, (3, 32, 32)) >= measure.macs(model, (3, 32, 32))
    assert set(model.state_dict()) == before
    assert not any(hasattr(module, "total_ops") for module in model.modules())
    assert model.training


def test_thop_counts_convolutions_and_linear_layers():
    model = nn.Sequential(networks.conv(3, 4, bias=False), nn.Flatten(), nn.Linear(256, 2, bias=False))
    assert measure.thop_macs(model, SHAPE) == measure.macs(model, SHAPE) == 64 * 4 * 27 + 512


def test_latency_is_measured_in_turn():
    """The network that does a hundred times more takes longer; every network gets its own figure."""
    small, large = networks.conv(3, 2, 1), nn.Sequential(networks.conv(3, 64), networks.conv(64, 64), networks.conv(64, 64))
    first, second, third = measure.latency_ms([small, large, small], (3, 64, 64), seconds=0.2)
    assert 0 < first < second
    assert 0 < third < second
    assert not any(module.training for module in [small, large])


class Fixed(nn.Module):
    """Gives the scores it is shown: an image of (classes, 1, 1) is its own logits."""

    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(1)


def test_accuracy_by_hand():
    logits = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6], [9.0, 1, 2, 3, 4, 5, 6], [0.0, 1, 2, 3, 4, 5, 6]])
    labels = torch.tensor([0, 3, 1])  # the best, the fifth, the sixth
    batches = [(logits[:2, :, None, None], labels[:2]), (logits[2:, :, None, None], labels[2:])]
    found = measure.accuracy(Fixed().train(), batches)
    assert found.top1 == pytest.approx(100 / 3)
    assert found.top5 == pytest.approx(200 / 3)
    assert found.images == 3
    loss = sum(
        math.log(sum(math.exp(v) for v in row)) - row[label] for row, label in zip(logits.tolist(), [0, 3, 1], strict=True)
    )
    assert found.loss == pytest.approx(loss / 3, rel=1e-5)


def test_accuracy_of_fewer_than_five_classes():
    found = measure.accuracy(Fixed(), [(torch.tensor([[1.0, 2.0]])[:, :, None, None], torch.tensor([0]))])
    assert (found.top1, found.top5) == (0, 100)


def test_accuracy_of_no_images():
    with pytest.raises(CompactError, match="there are no images to evaluate on"):
        measure.accuracy(Fixed(), [])


# Redundancy

HADAMARD = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])[1:]  # orthogonal, of mean zero


def test_orthogonal_filters_are_not_redundant():
    found = measure.redundancy(HADAMARD.reshape(3, 1, 2, 2))
    assert found.max_abs_corr == pytest.approx(0, abs=1e-12)
    assert found.mean_abs_corr == pytest.approx(0, abs=1e-12)
    assert found.effective_rank == pytest.approx(3)
    assert found.rank_ratio_99 == 1


@pytest.mark.parametrize("factor", [1.0, -2.0, 0.001])
def test_copies_are_redundant(factor):
    """Of any size and sign: a correlation does not see them."""
    weight = torch.randn(1, 8, 3, 3).repeat(5, 1, 1, 1)
    weight[0] *= factor
    found = measure.redundancy(weight)
    assert found.max_abs_corr == pytest.approx(1, abs=1e-6)
    assert found.mean_abs_corr == pytest.approx(1, abs=1e-6)
    assert found.effective_rank == pytest.approx(1, abs=1e-2)
    assert found.rank_ratio_99 == 1 / 5


def test_a_pair_of_copies_among_orthogonal_filters():
    weight = torch.cat([HADAMARD, 3 * HADAMARD[:1]])
    found = measure.redundancy(weight)
    assert found.max_abs_corr == pytest.approx(2 / 4)  # two of four filters have a twin
    assert found.mean_abs_corr == pytest.approx(2 / 12)


def test_the_rank_that_holds_the_energy():
    """Singular values 10, 1, 1, ...: 100 of 102 is less than 99 %, 101 of 102 is more."""
    left, right = torch.linalg.qr(torch.randn(3, 3)).Q, torch.linalg.qr(torch.randn(7, 3)).Q
    found = measure.redundancy(left @ torch.diag(torch.tensor([10.0, 1.0, 1.0])) @ right.T)
    assert found.rank_ratio_99 == pytest.approx(2 / 3)
    share = torch.tensor([10.0, 1.0, 1.0]) / 12
    assert found.effective_rank == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-4)


@pytest.mark.parametrize("shape", [(20, 3, 1, 1), (3, 20, 1, 1)])
def test_tall_and_wide_weights_give_the_same_rank(shape):
    weight = torch.randn(shape)
    values = torch.linalg.svdvals(weight.flatten(1).double())
    share = values / values.sum()
    assert measure.redundancy(weight).effective_rank == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-6)


def test_what_has_no_redundancy():
    assert measure.redundancy(torch.randn(1, 4, 3, 3)) is None
    assert measure.redundancy(torch.full((3, 4), float("nan"))) is None
    assert measure.redundancy(torch.tensor([[1.0, float("inf")], [1.0, 2.0]])) is None
    assert measure.redundancy(torch.zeros(3, 4)) == measure.Redundancy(0.0, 0.0, 0.0, 0.0)


def test_a_network_of_convolutions_only():
    assert measure.macs(randomise_(networks.convolution_as_classifier()), SHAPE) == 64 * 8 * 27 + 64 * 8 * 5
