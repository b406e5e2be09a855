"""What is known of channels from weights alone, and that those that read a removed channel make it good by that."""

import pytest
import torch
from networks import outputs, randomise_
from torch import nn

from compactcli import channels, compress, measure, surgery
from compactcli.budget import Budget
from compactcli.graph import trace
from compactcli.methods import _absorb

SHAPE = (3, 8, 8)


def chain(bias: bool = False) -> nn.Module:
    """Two layers, a batch normalisation behind the second as well, or a bias in it."""
    second = [nn.Conv2d(6, 4, 1, bias=bias), *([] if bias else [nn.BatchNorm2d(4)])]
    layers = [nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), *second]
    model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return randomise_(model).eval()


def without(model: nn.Module, place: int) -> tuple[dict[str, torch.Tensor], nn.Module]:
    """What makes good a filter of the first layer, and the network without that filter."""
    graph = trace(model, SHAPE)
    sets = channels.find(graph, model)
    removed = [int(sets.axes["0.weight", 0][place])]
    values = _absorb.absorbed(model, sets, Budget(graph, sets, model, ratio=0.5), removed, ())
    surgery.apply_(model, channels.edits(sets, removed, model))
    return values, model


def test_moments_are_those_of_rectified_normal_numbers():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    root /= root.norm(dim=1, keepdim=True)
    ratio = torch.tensor([-1.0, -0.3, 0.0, 0.4, 1.5], dtype=torch.float64)
    spread = torch.tensor([1.0, 0.5, 2.0, 0.1, 1.0], dtype=torch.float64)
    samples = spread * (ratio + torch.randn(400_000, 5, generator=generator, dtype=torch.float64) @ root.T).relu()
    mean, covariance = _absorb._rectified(spread, ratio, root @ root.T)
    torch.testing.assert_close(mean, samples.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(covariance, torch.cov(samples.T), atol=0.02, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_a_constant_channel_goes_to_the_mean_behind_it(bias):
    model, image = chain(bias), torch.randn(2, *SHAPE)
    with torch.no_grad():
        model[1].weight[2], model[1].bias[2] = 0.0, 0.7
    wanted = outputs(model, image)[0]
    values, small = without(model, 2)
    assert (outputs(small, image)[0] - wanted).abs().max() > 1e-3
    compress._put_(dict([*small.named_parameters(), *small.named_buffers()]), values)
    torch.testing.assert_close(outputs(small, image)[0], wanted)


@pytest.mark.parametrize("bias", [False, True])
def test_a_filter_that_is_another_s_copy_is_made_good(bias, monkeypatch):
    monkeypatch.setattr(_absorb, "RIDGE", 0.0)
    model, image = chain(bias), torch.randn(2, *SHAPE)
    with torch.no_grad():
        for tensor in (model[0].weight, *model[1].state_dict().values()):
            if tensor.ndim:
                tensor[4] = tensor[1]
    wanted = outputs(model, image)[0]
    values, small = without(model, 4)
    assert (outputs(small, image)[0] - wanted).abs().max() > 1e-3
    compress._put_(dict([*small.named_parameters(), *small.named_buffers()]), values)
    torch.testing.assert_close(outputs(small, image)[0], wanted, rtol=0.05, atol=0.02)


def test_what_is_worse_is_not_taken():
    model = chain()
    before = measure.probed(model, SHAPE)
    with torch.no_grad():
        model[3].weight[:, 0] = 0.0
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    worse = {"3.weight": torch.zeros_like(model[3].weight)}
    error = compress._mended_(model, worse, SHAPE, before)
    assert error == measure.relative_change(measure.probed(model, SHAPE), before) > 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    right = {"3.weight": chain()[3].weight.detach()}
    assert compress._mended_(model, right, SHAPE, before) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("widths", [(6, 4), (4, 6), (4, 4)])
def test_transposed_layers_are_no_pair(widths):
    """Their filters lie along the other axis."""
    first, second = widths
    layers = [nn.Conv2d(3, first, 1), nn.BatchNorm2d(first), nn.ReLU(), nn.ConvTranspose2d(first, second, 2, 2)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(second), nn.ReLU(), nn.Conv2d(second, 2, 1))
    graph = trace(randomise_(model).eval(), SHAPE)
    assert not _absorb.pairs(graph, Budget(graph, channels.find(graph, model), model, ratio=0.5).layers)


def test_only_what_a_normalisation_and_a_relu_stand_between_is_a_pair():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    graph = trace(model.eval(), SHAPE)
    assert not _absorb.pairs(graph, Budget(graph, channels.find(graph, model), model, ratio=0.5).layers)
    graph = trace(chain(), SHAPE)
    found = _absorb.pairs(graph, Budget(graph, channels.find(graph, chain()), chain(), ratio=0.5).layers)
    assert [(pair.maker.name, pair.reader.name, pair.norm) for pair in found] == [("0", "3", "4")]
