"""Squeeze layers compute some filters of some inputs in the width of the whole, and stand only where that is faster."""

import copy
from typing import Any

import pytest
import torch
from networks import named, outputs, randomise_
from test_fcf import CIFAR, begun, chosen, given_, images, left
from test_kernels import GEOMETRIES
from torch import Tensor, nn

from compactcli import artefact, channels, counters, kernels, law, measure, surgery
from compactcli.artefact import Wishes
from compactcli.compress import Calibration, Target, compress
from compactcli.errors import CompactError
from compactcli.graph import run_fake, trace
from compactcli.methods import _squeeze, get
from compactcli.methods._squeeze import Squeeze, Squeezed
from compactcli.methods.fcf import Way, _best
from compactcli.recipe import Replace

UNGROUPED = [name for name, geometry in GEOMETRIES.items() if "groups" not in geometry]


@pytest.fixture
def free(monkeypatch):
    """Gathers and scatters take no time: narrow networks have squeeze layers as well."""
    monkeypatch.setattr(_squeeze, "MOVED_TIME", 0.0)


def layer(geometry: str = "plain", bias: bool = True, filters: int = 5, inputs: int = 4) -> Squeeze:
    """Of 12 filters and 6 inputs, in float64."""
    plain = nn.Conv2d(6, 12, **{"kernel_size": 3, "bias": bias, **GEOMETRIES[geometry]})
    made = Squeeze(plain, filters, inputs)
    nn.init.normal_(made.weight)
    made.written.copy_(torch.randperm(12, generator=torch.Generator().manual_seed(0))[:filters].sort().values)
    made.read.copy_(torch.randperm(6, generator=torch.Generator().manual_seed(1))[:inputs].sort().values)
    return made.double()


def network(width: int = 8) -> artefact.Network:
    one = artefact.fresh(Wishes("cifar:resnet8", {"width": width, "num_classes": 3}), 0)
    randomise_(one.module)
    return one


def squeezed(one: artefact.Network, *options: str, ratio: float = 0.5, calibrated: bool = False) -> artefact.Network:
    calibration = Calibration(images().train.images()[:64], "colours") if calibrated else None
    return compress(one, "fcf", chosen("residual=squeeze", *options), Target(ratio), calibration=calibration)


def layers(model: nn.Module) -> dict[str, Squeeze]:
    return {name: each for name, each in kernels.layers(model).items() if isinstance(each, Squeeze)}


@pytest.mark.parametrize(("filters", "inputs"), [(5, 4), (12, 4), (5, 6), (12, 6), (1, 1)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("geometry", UNGROUPED)
def test_it_equals_its_dense_form_and_what_it_is_run_as(geometry, bias, filters, inputs):
    made, image = layer(geometry, bias, filters, inputs), torch.randn(2, 6, 9, 8, dtype=torch.float64)
    for given in (image, image.contiguous(memory_format=torch.channels_last)):
        wanted = made.dense()(given)
        torch.testing.assert_close(made(given), wanted)
        torch.testing.assert_close(made.folded()(given), wanted)
    assert made.kernel().count_nonzero() == made.weight.numel()


def test_channels_last_stays():
    image = torch.randn(2, 6, 9, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    made = layer().to(memory_format=torch.channels_last)
    assert made(image).is_contiguous(memory_format=torch.channels_last)


def test_all_of_it_learns():
    made = layer()
    made(torch.randn(2, 6, 9, 8, dtype=torch.float64)).square().sum().backward()
    assert made.weight.grad.all()
    assert made.bias.grad.all()


def test_a_filter_left_out_gives_its_bias():
    made = layer()
    out = [n for n in range(12) if n not in made.written.tolist()]
    made_of = made(torch.randn(2, 6, 9, 8, dtype=torch.float64))[:, out]
    assert torch.equal(made_of, made.bias[out][:, None, None].expand_as(made_of))


@pytest.mark.parametrize(("filters", "inputs"), [(5, 4), (12, 4), (5, 6)])
def test_it_counts_what_it_computes(filters, inputs):
    model = nn.Sequential(layer(filters=filters, inputs=inputs).float(), nn.Flatten(), nn.Linear(12 * 9 * 8, 2))
    convolved, linear = filters * inputs * 9 * 9 * 8, 12 * 9 * 8 * 2
    assert measure.macs(model, (6, 9, 8)) == convolved + linear
    assert counters.fcf(model, (6, 9, 8)) == convolved + linear + 2
    assert measure.params(model[0]) == filters * inputs * 9 + 12


@pytest.mark.parametrize(
    ("old", "filters", "inputs"), [(nn.Conv2d(4, 4, 3, groups=2), 2, 2), (nn.Conv2d(4, 4, 3), 5, 2), (nn.Conv2d(4, 4, 3), 2, 0)]
)
def test_a_recipe_that_does_not_fit_is_refused(old, filters, inputs):
    with pytest.raises(CompactError, match=f"the recipe asks for {filters} filters of {inputs} inputs in a layer 4x"):
        surgery.apply_(nn.Sequential(old), [Replace("0", "fcf.squeeze", {"filters": filters, "inputs": inputs})])


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("select", ["error", "identical", "global"])
def test_the_budget_is_met_and_the_file_is_the_network(select, calibrated):
    before = measure.macs(network().module, CIFAR)
    one = squeezed(network(), f"select={select}", calibrated=calibrated)
    assert 0.4 * before < measure.macs(one.module, CIFAR) <= 0.5 * before
    assert layers(one.module)
    again, image = artefact.open_model(artefact.dumps(one)), torch.randn(2, *CIFAR)
    assert torch.equal(outputs(again.module, image)[0], outputs(one.module, image)[0])
    plain = kernels.folded(one.module)
    assert not kernels.layers(plain)
    assert any(isinstance(each, Squeezed) for each in plain.modules())
    torch.testing.assert_close(outputs(plain, image)[0], outputs(one.module, image)[0])
    torch.export.export(plain.eval(), (image,))
    run_fake(one.module, CIFAR, train=True)


@pytest.mark.usefixtures("free")
def test_identical_gives_each_layer_the_same_share_of_filters_and_inputs():
    plain = artefact.fresh(Wishes("cifar:resnet8", {"width": 8, "num_classes": 3, "shortcut": "conv"}), 0)
    one = squeezed(plain, "select=identical", ratio=0.4)
    blocks = [name for name in layers(one.module) if ".conv" in name]
    shares = {len(layers(one.module)[name].written) / layers(one.module)[name].outputs for name in blocks if "conv2" in name}
    shares |= {len(layers(one.module)[name].read) / layers(one.module)[name].in_channels for name in blocks if "conv1" in name}
    assert len(blocks) >= 4
    assert max(shares) - min(shares) <= 1 / 8


def test_none_stands_where_it_would_be_slower():
    """Narrow layers move as many values as they save products."""
    assert not layers(squeezed(network()).module)


def test_in_wide_layers_each_is_faster_by_the_estimate():
    one = squeezed(network(64), ratio=0.3)
    found = layers(one.module)
    assert found
    for each in found.values():
        stride = each.stride[0] * each.stride[1]
        saved = each.outputs * each.in_channels * 9 - each.weight.numel()
        moved = each.outputs * each.scatters + each.in_channels * stride * each.gathers
        assert saved * (64 + 120) / 64 > 100 * moved  # 64 positions are the fewest


@pytest.mark.usefixtures("free")
def test_what_is_left_out_in_a_search_is_gone():
    """A scalar of zero behind the normalisation, or on what is read: the squeeze layer computes the same without."""
    model = randomise_(named("cifar:resnet8", width=8, num_classes=3)).eval()
    method, sets, budget = begun(model, "residual=squeeze", ratio=0.5)
    image = torch.randn(2, *CIFAR)
    wanted = outputs(copy.deepcopy(model), image)[0]
    assert any(family in method.sides for family in method.scalars)
    given_(method)
    method.kept = {family: full - len(range(0, full, 2)) for family, full in left(method, budget).items()}
    gated = outputs(model, image)[0]
    assert (gated - wanted).abs().max() > 1e-3
    method.end(model)
    torch.testing.assert_close(outputs(model, image)[0], gated)
    law.apply_checked_(model, method.finish(model, sets, budget, {}), sets.consumed, CIFAR)
    each, norm = model.layer1[0].conv2, model.layer1[0].bn2
    gone = [n for n in range(each.outputs) if n not in each.written.tolist()]
    assert gone
    assert not norm.weight[gone].any()
    assert not norm.bias[gone].any()
    assert (outputs(model, image)[0] - gated).norm() <= 1e-5 * gated.norm()


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("second", ["fcf", "hinge"])
def test_a_later_method_makes_it_plain(second):
    first = squeezed(network())
    count, kept, lines = len(layers(first.module)), measure.macs(first.module, CIFAR), []
    small = compress(first, second, get(second)(), Target(0.8), log=lines.append)
    assert f"{second}: made {count} layers of an earlier step plain: what it had saved there is undone" in lines
    assert measure.macs(small.module, CIFAR) <= 0.8 * kept


def test_auto_takes_the_least_error_and_of_like_ones_the_fastest():
    def way(error: float, time: float, cost: float = 1.0) -> Any:
        return Way([], {}, error, cost, time)

    ways = [way(1.0, 5.0), way(1.05, 4.0), way(2.0, 1.0), way(0.1, 0.1, cost=3.0)]
    assert _best(ways, 1.0, 1.1) is ways[1]
    assert _best(ways, 1.0, 1.0) is min((way for way in ways if way.cost <= 1.0), key=lambda way: way.error)
    assert _best(ways[2:], 2.0, 1.1) is ways[2]
    assert _best(ways[3:], 2.0, 1.1) is ways[3]


def test_refitting_is_least_squares_on_what_is_read():
    made, generator = layer(), torch.Generator().manual_seed(2)
    x = torch.randn(400, 54, dtype=torch.float64, generator=generator) @ torch.randn(54, 54, dtype=torch.float64)
    weight = torch.randn(12, 54, dtype=torch.float64, generator=generator)
    surgery.LAYERS["fcf.squeeze"].refit(made, surgery.Regression(weight, x.T @ x / 400, torch.ones(12)))
    columns = (made.read[:, None] * 9 + torch.arange(9)).flatten()
    best: Tensor = torch.linalg.lstsq(x[:, columns], x @ weight[made.written].T).solution.T

    def error(kernel: Tensor) -> float:
        return float((x[:, columns] @ kernel.T - x @ weight[made.written].T).square().sum())

    assert error(made.weight.detach().flatten(1)) <= error(best) * (1 + 1e-3)


def test_sets_are_the_channels_of_its_sides():
    """`channels.find` goes through a network with such layers as they are run."""
    one = artefact.fresh(Wishes("cifar:resnet8", {"width": 64, "num_classes": 3}), 0)
    plain = kernels.folded(squeezed(one, ratio=0.3).module)
    assert channels.find(trace(plain, CIFAR), plain).free()
