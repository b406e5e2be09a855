"""Batch norms folded into layers: the same function in float64, wherever it can be done, and nowhere else."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import AWKWARD, SHAPE, Code, conv, head, named, outputs, random_network, randomise_
from test_artefact import assert_same, image, network
from test_compress import own
from test_search import images
from torch import Tensor, nn

from compactcli import surgery
from compactcli.artefact import Wishes, dumps, fresh, open_model
from compactcli.errors import CompactError
from compactcli.export import simplify_
from compactcli.finetune import finetune
from compactcli.folding import fold_, norms
from compactcli.history import Watch
from compactcli.optim import Settings
from compactcli.precision import cast_
from compactcli.recipe import Replace


def folded(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> int:
    """How many batch norms are folded; outputs must stay as they are, by our own arithmetic and not the library's."""
    model.eval()
    before = copy.deepcopy(model).double()
    edits = fold_(model, shape)
    example = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for now, then in zip(outputs(copy.deepcopy(model).double(), example), outputs(before, example), strict=True):
        torch.testing.assert_close(now, then, rtol=1e-4, atol=1e-5)  # folded numbers are rounded to float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert norms(model) == norms(before) - len(edits) // 2
    return len(edits) // 2


def pair(*layers: nn.Module, width: int = 8) -> nn.Module:
    """Layers from 4 channels to `width`, in a network."""
    return randomise_(nn.Sequential(conv(3, 4), nn.SiLU(), *layers, nn.SiLU(), *head(width)))


FOLDED = {
    "conv": [conv(4, 8), nn.BatchNorm2d(8)],
    "no bias": [conv(4, 8, bias=False), nn.BatchNorm2d(8)],
    "not affine": [conv(4, 8), nn.BatchNorm2d(8, affine=False)],
    "grouped": [conv(4, 8, groups=2), nn.BatchNorm2d(8)],
    "depthwise": [conv(4, 4, groups=4), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8, eps=0.1)],
    "depthwise multiplier": [conv(4, 8, groups=4), nn.BatchNorm2d(8)],
    "circular": [conv(4, 8, padding_mode="circular"), nn.BatchNorm2d(8)],
    "dilated": [nn.Conv2d(4, 8, 3, dilation=2, stride=2), nn.BatchNorm2d(8)],
    "transposed": [nn.ConvTranspose2d(4, 8, 3, 2, output_padding=1), nn.BatchNorm2d(8)],
    "transposed grouped": [nn.ConvTranspose2d(4, 8, 2, groups=2), nn.BatchNorm2d(8)],
    "transposed depthwise": [nn.ConvTranspose2d(4, 4, 2, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1)],
    "one to one": [nn.Conv2d(4, 1, 1), nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.Conv2d(1, 8, 1)],
    "by another name": [Code(lambda s, x: s.bn(s.shift(x)), bn=conv(4, 8), shift=nn.BatchNorm2d(4)), nn.BatchNorm2d(8)],
    "linear": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Unflatten(1, (8, 1, 1))],
    "linear, bias": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Unflatten(1, (8, 1, 1))],
    "one axis": [nn.Flatten(2), nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.Unflatten(2, (2, -1))],
}
KEPT = {
    "layer twice": [conv(4, 4), Code(lambda s, x: s.bn(s.a(torch.tanh(s.a(x)))), a=conv(4, 4), bn=nn.BatchNorm2d(4)), conv(4, 8)],
    "norm twice": [Code(lambda s, x: s.bn(s.b(s.bn(s.a(x)))), a=conv(4, 8), b=conv(8, 8), bn=nn.BatchNorm2d(8))],
    "another reader": [Code(lambda s, x: (y := s.a(x)) + s.bn(y), a=conv(4, 8), bn=nn.BatchNorm2d(8))],
    "two norms": [Code(lambda s, x: s.p(y := s.a(x)) + s.q(y), a=conv(4, 8), p=nn.BatchNorm2d(8), q=nn.BatchNorm2d(8))],
    "activation between": [conv(4, 8), nn.ReLU(), nn.BatchNorm2d(8)],
    "activation in place": [conv(4, 8), nn.ReLU(inplace=True), nn.BatchNorm2d(8)],
    "statistics of the images": [conv(4, 8), nn.BatchNorm2d(8, track_running_stats=False)],
    "norm first": [nn.BatchNorm2d(4), conv(4, 8)],
    "weight norm": [nn.utils.parametrizations.weight_norm(conv(4, 8)), nn.BatchNorm2d(8)],
    "weight read again": [Code(lambda s, x: s.bn(s.a(x)) * s.a.weight.mean(), a=conv(4, 8), bn=nn.BatchNorm2d(8))],
}


def positional() -> nn.Module:
    """A linear layer along one axis, a batch norm along another, as wide."""
    return pair(nn.Flatten(2), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Unflatten(2, (2, 2)), nn.Conv2d(4, 8, 1))


@pytest.mark.parametrize("name", FOLDED)
def test_what_can_be_folded_is(name):
    model = pair(*copy.deepcopy(FOLDED[name]))
    before = norms(model)
    assert folded(model) == 1
    assert norms(model) == before - 1


@pytest.mark.parametrize("name", [*KEPT, "positional"])
def test_what_cannot_be_folded_is_left(name):
    model = positional() if name == "positional" else pair(*copy.deepcopy(KEPT[name]))
    state = copy.deepcopy(model.state_dict())
    assert folded(model) == 0
    assert norms(model) > 0
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_layer_with_two_names_is_left():
    layer = conv(4, 8)
    assert folded(pair(Code(lambda s, x: s.norm(s.alias(x)), layer=layer, alias=layer, norm=nn.BatchNorm2d(8)))) == 0


def test_the_awkward_networks_stay_what_they_are():
    models = {name: randomise_(make()) for name, make in AWKWARD.items()}
    found = {name: folded(model) for name, model in models.items() if norms(model)}
    assert {name: found[name] for name in ("gate_linear", "depthwise", "grouped", "transposed")} == {
        **{"gate_linear": 1, "depthwise": 2, "grouped": 1, "transposed": 1}
    }
    assert found["concatenation"] == found["reads_its_input"] == 0


@settings(max_examples=8)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 5, 9]), st.integers(0, 100)), min_size=1, max_size=5), st.booleans())
def test_random_networks_lose_every_batch_norm(numbers, flat):
    """In all of these blocks one follows a convolution that nothing else reads."""
    model = randomise_(random_network(numbers, flat))
    expected = norms(model)
    assert folded(model) == expected


@pytest.mark.parametrize("name", ["cifar:resnet20", "mobilenet_v3_small"])
def test_known_networks_lose_every_batch_norm(name):
    model = named(name)
    every = norms(model)
    assert folded(model, (3, 32, 32)) == every > 18


def test_networks_that_normalise_first_keep_what_they_read_together():
    model = named("cifar:densenet_bc40_36")
    every = norms(model)
    assert 0 < folded(model, (3, 32, 32)) < every


def test_the_activation_in_a_batch_norm_of_timm_stays(timm):
    model = pair(conv(4, 8), timm.layers.BatchNormAct2d(8, act_layer=nn.Hardswish))
    assert folded(model) == 1
    assert any(isinstance(module, nn.Hardswish) for module in model.modules())


def test_a_wrong_fold_is_refused(monkeypatch):
    def wrong(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
        return layer.weight.double() * 1.0001, norm.bias.double()

    monkeypatch.setattr("compactcli.folding._folded", wrong)
    with pytest.raises(CompactError, match=r"differs from the original by \S+; nothing was written"):
        folded(pair(conv(4, 8), nn.BatchNorm2d(8)))


def test_a_file_rebuilds_what_was_folded():
    given_ = network(width=8)
    before = outputs(given_.module, image(given_))[0]
    lines: list[str] = []
    assert simplify_(given_, fold_bn=True, log=lines.append) is given_
    step = given_.recipe.steps[-1]
    assert (step.command, step.method, step.options) == ("export", None, {"fold_bn": True})
    assert {edit.layer for edit in step.edits} == {"folding.layer", "folding.norm"}
    assert step.error < 1e-5
    found = open_model(dumps(given_))
    assert_same(found.module, given_.module, image(given_))
    torch.testing.assert_close(outputs(found.module, image(given_))[0], before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    assert norms(found.module) == 0
    assert lines == [f"folded {len(step.edits) // 2} of {len(step.edits) // 2} batch norms"]
    assert dumps(found) == dumps(given_)


def test_what_is_folded_is_stored_in_float32():
    """Else the file would hold other numbers than those that were checked."""
    given_ = cast_(network(width=8), "float16")
    lines: list[str] = []
    found = open_model(dumps(simplify_(given_, fold_bn=True, log=lines.append)))
    assert "random: no longer stored in float16, but in float32; --dtype rounds what comes of it" in lines
    assert found.recipe.dtype is None
    assert_same(found.module, given_.module, image(given_))


def test_edits_of_a_file_that_fit_nothing_are_refused():
    model = own(pair(conv(4, 8), nn.BatchNorm2d(8))).module
    for edit in (Replace("1", "folding.layer", {}), Replace("0", "folding.norm", {})):
        with pytest.raises(CompactError, match=r"the recipe folds a"):
            surgery.apply_(model, [edit])


def test_training_on_without_batch_norms_is_told_of():
    """Nothing keeps the scale of what goes on in the network then."""
    lines: list[str] = []
    small = fresh(Wishes("cifar:resnet8", {"width": 4, "num_classes": 3}), 0)
    for folds in (False, True):
        if folds:
            simplify_(small, fold_bn=True)
        lines.clear()
        finetune(small, images(), Settings(epochs=1, batch_size=36, lr=0.001), watch=Watch(log=lines.append))
        assert any("its batch norms are folded" in line for line in lines) == folds
