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


def test_a_network_of_convolutions_only():
    assert measure.macs(randomise_(networks.convolution_as_classifier()), SHAPE) == 64 * 8 * 27 + 64 * 8 * 5
