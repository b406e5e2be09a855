"""The ReLU with two slopes: where it stands, that it changes nothing at the start, and that all else goes on around it."""

import copy

import pytest
import torch
from networks import SHAPE, Code, conv, head, named, outputs, randomise_
from test_artefact import network
from torch import nn

from compactcli import artefact, calibrate, channels, law, measure, surgery
from compactcli.budget import Budget
from compactcli.compress import Calibration, Target, compress
from compactcli.errors import CompactError
from compactcli.graph import trace
from compactcli.methods import get, parse_options
from compactcli.methods._decomposed import decompose
from compactcli.methods._two_slope import TwoSlope, replacements
from compactcli.recipe import Recipe, Replace
from compactcli.surgery import LAYERS

Hinge = get("hinge")
CIFAR_SHAPE = (3, 32, 32)


def hinge(*pairs: str) -> object:
    return Hinge(parse_options(Hinge, [*pairs]))


def found(model: nn.Module, shape: tuple[int, ...] = CIFAR_SHAPE) -> list[Replace]:
    graph = trace(model, shape)
    sets = channels.find(graph, model)
    return replacements(model, graph, sets, Budget(graph, sets, model, ratio=0.5).layers)


def with_units(name: str = "cifar:resnet8", slopes: tuple[float, float] = (1.0, 0.0), **kwargs: object) -> nn.Module:
    model = randomise_(named(name, **kwargs)).eval()
    surgery.apply_(model, found(model))
    for unit in units(model).values():
        unit.positive.data.fill_(slopes[0])
        unit.negative.data.fill_(slopes[1])
    return model


def units(model: nn.Module) -> dict[str, TwoSlope]:
    return {name: module for name, module in model.named_modules() if isinstance(module, TwoSlope)}


def test_the_slopes_are_of_either_side():
    unit = TwoSlope()
    x = torch.tensor([-2.0, 0.0, 3.0])
    assert torch.equal(unit(x), x.relu())
    unit.load_state_dict({"positive": torch.tensor(0.5), "negative": torch.tensor(-0.25)})
    assert unit(x).tolist() == [-0.5, 0.0, 1.5]
    unit(x).sum().backward()
    assert (unit.positive.grad.item(), unit.negative.grad.item()) == (3.0, 2.0)


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("cifar:resnet20", [f"layer{stage}.{block}.relu" for stage in (1, 2, 3) for block in range(3)]),
        ("cifar:wrn16_10", [f"layer{stage}.{block}.relu2" for stage in (1, 2, 3) for block in range(2)]),
        ("cifar:resnext20", [f"layer{s}.{b}.relu{n}" for s in (1, 2, 3) for b in range(2) for n in (1, 2)]),
    ],
)
def test_it_stands_inside_residual_blocks(name, inside):
    """Not behind the stem, and not behind an addition."""
    assert [edit.module for edit in found(named(name))] == inside


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "two_slope: layer1.0.relu is one ReLU in 2 places, which would share slopes; leave it out"),
        ("cifar:vgg11", "two_slope: the network has no residual block with a ReLU module inside; leave it out"),
        ("cifar:densenet_bc40_36", "no residual block"),
    ],
)
def test_a_network_without_such_a_relu_is_refused(name, message):
    with pytest.raises(CompactError, match=message):
        found(named(name), (3, 64, 64) if ":" not in name else CIFAR_SHAPE)


def test_what_another_reads_before_the_relu_stays():
    def run(s: Code, x: torch.Tensor) -> torch.Tensor:
        inner = s.first(x)
        return x + s.second(s.relu(inner)) + inner.mean((2, 3), keepdim=True)

    block = Code(run, first=conv(8, 8), relu=nn.ReLU(), second=conv(8, 8))
    with pytest.raises(CompactError, match="no residual block"):
        found(nn.Sequential(conv(3, 8), block, *head(8)), SHAPE)


@pytest.mark.parametrize("images", [0, 64])
def test_the_smaller_network_is_the_one_without_it(images):
    """At first the function is the same, of the same edits."""
    calibration = Calibration(torch.randint(0, 256, (images, *CIFAR_SHAPE), dtype=torch.uint8), "noise") if images else None
    options = {"target": Target(0.6), "calibration": calibration}
    plain, other = (compress(network(width=8), "hinge", hinge(*pairs), **options) for pairs in ((), ("two_slope=true",)))
    assert list(units(other.module)) == ["layer1.0.relu", "layer2.0.relu", "layer3.0.relu"]
    assert not units(plain.module)
    edits = [edit for edit in other.recipe.edits if getattr(edit, "layer", None) != "hinge.two_slope"]
    assert edits == list(plain.recipe.edits)
    assert measure.params(other.module) == measure.params(plain.module) + 6
    assert measure.macs(other.module, CIFAR_SHAPE) == measure.macs(plain.module, CIFAR_SHAPE)
    image = torch.randn(2, *CIFAR_SHAPE)
    assert torch.equal(outputs(other.module, image)[0], outputs(plain.module, image)[0])


@pytest.mark.parametrize("of", ["macs", "params"])
def test_its_parameters_are_within_the_target(of):
    model = named("cifar:resnet8")
    graph = trace(model, CIFAR_SHAPE)
    sets = channels.find(graph, model)
    budget = Budget(graph, sets, model, ratio=0.5, of=of)
    edits = hinge("two_slope=true").finish(model, sets, budget, None)
    surgery.apply_(model, edits)
    spent = measure.params(model) if of == "params" else measure.macs(model, CIFAR_SHAPE)
    assert sum(len(edit.tensors) for edit in edits if isinstance(edit, Replace) and edit.layer == "hinge.two_slope") == 6
    assert 0.97 * budget.target < spent <= budget.target


def test_its_slopes_are_saved_and_stay_in_later_compressions():
    first = compress(network(width=8), "hinge", hinge("two_slope=true"), Target(0.7))
    for unit in units(first.module).values():
        unit.positive.data.fill_(0.8)
        unit.negative.data.fill_(0.1)
    image = torch.randn(2, *CIFAR_SHAPE)
    again = artefact.open_model(artefact.dumps(first))
    assert again.recipe == Recipe.loads(first.recipe.dumps())
    assert torch.equal(outputs(again.module, image)[0], outputs(first.module, image)[0])
    for pairs in ((), ("two_slope=true",)):
        smaller = compress(copy.deepcopy(again), "hinge", hinge(*pairs), Target(0.7))
        assert [unit.positive.item() for unit in units(smaller.module).values()] == pytest.approx([0.8] * 3)
        loaded = artefact.open_model(artefact.dumps(smaller)).module
        assert torch.equal(outputs(loaded, image)[0], outputs(smaller.module, image)[0])


@pytest.mark.parametrize("kwargs", [{}, {"shortcut": "conv"}])
def test_channels_are_tied_as_by_a_relu(kwargs):
    model, plain = with_units(slopes=(0.7, 0.2), **kwargs), named("cifar:resnet8", **kwargs)
    with_it, without = (channels.find(trace(each, CIFAR_SHAPE), each) for each in (model, plain))
    assert len(with_it.free()) == len(without.free())
    assert {axis: ids.tolist() for axis, ids in with_it.axes.items()} == {a: ids.tolist() for a, ids in without.axes.items()}
    assert with_it.consumed == without.consumed
    removed = with_it.free()[::3]
    assert law.apply_checked_(model, channels.edits(with_it, removed, model), with_it.consumed, CIFAR_SHAPE) < 1e-9


@pytest.mark.parametrize(("slopes", "same"), [((1.0, 0.0), nn.ReLU), ((0.9, 0.0), TwoSlope)])
def test_the_law_takes_it_for_a_relu_while_it_is_one(slopes, same):
    unit = TwoSlope()
    unit.load_state_dict(dict(zip(("positive", "negative"), map(torch.tensor, slopes), strict=True)))
    assert type(LAYERS["hinge.two_slope"].dense(unit)) is same


def test_refitting_goes_through_learnt_slopes():
    """The first layer is decomposed at full rank, so that every layer after it is regressed: the logits stay."""
    target = with_units(slopes=(0.8, 0.3), width=8)
    graph = trace(target, CIFAR_SHAPE)
    layer = next(
        layer for layer in Budget(graph, channels.find(graph, target), target, ratio=0.5).layers if "layer1" in layer.name
    )
    edits = [decompose(target, channels.find(graph, target), layer, 10**6, [])]
    model = copy.deepcopy(target)
    surgery.apply_(model, edits)
    batches = list(torch.randn(64, *CIFAR_SHAPE, generator=torch.Generator().manual_seed(0)).split(16))
    assert calibrate.refit_(model, target, edits, batches) < 1e-4


def test_only_a_relu_is_replaced():
    with pytest.raises(CompactError, match="the recipe gives a Conv2d two slopes, which it cannot have"):
        surgery.apply_(named("cifar:resnet8"), [Replace("conv1", "hinge.two_slope", {})])
