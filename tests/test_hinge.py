"""Hinge from weights alone: what it may do in each mode, that its errors are true, and its pairs of layers are the layer."""

import copy

import networks
import numpy as np
import pytest
import torch
from networks import AWKWARD, named, outputs, randomise_
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from compactcli import channels, law, surgery
from compactcli.budget import Budget
from compactcli.dials import Dial
from compactcli.errors import CompactError, UsageError
from compactcli.graph import trace
from compactcli.kernels import VECTOR
from compactcli.methods import get, parse_options
from compactcli.methods._errors import worths
from compactcli.recipe import Edit, Keep, Replace, Set
from compactcli.surgery import LAYERS

Hinge = get("hinge")
CIFAR_SHAPE = (3, 32, 32)


def plan(
    model: nn.Module, ratio: float, shape: tuple[int, ...] = CIFAR_SHAPE, **options: object
) -> tuple[Budget, channels.Channels]:
    graph = trace(model, shape)
    sets = channels.find(graph, model)
    return Budget(graph, sets, model, ratio=ratio, **options), sets


def edits_of(model: nn.Module, ratio: float, mode: str, shape: tuple[int, ...] = CIFAR_SHAPE, **options: object) -> list[Edit]:
    task, sets = plan(model, ratio, shape, **options)
    return Hinge(parse_options(Hinge, [f"mode={mode}"])).finish(model, sets, task, None)


def macs(model: nn.Module, shape: tuple[int, ...] = CIFAR_SHAPE) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    return counter.get_total_flops() // 2


def depthwise(model: nn.Module) -> dict[str, int]:
    """The channels of depthwise layers, by path."""
    found = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    return {path: layer.groups for path, layer in found.items() if layer.groups == layer.out_channels > 1}


def low_rank_(layer: nn.Conv2d | nn.Linear, rank: int) -> None:
    """Leave the layer with a kernel of that rank."""
    with torch.no_grad():
        U, S, V = torch.linalg.svd(layer.weight.flatten(1).double(), full_matrices=False)
        layer.weight.copy_(((U[:, :rank] * S[:rank]) @ V[:rank]).view_as(layer.weight))


def weak_(layer: nn.Conv2d, norm: nn.BatchNorm2d, count: int) -> None:
    """Make the last filters next to nothing."""
    with torch.no_grad():
        layer.weight[-count:] *= 1e-4
        norm.weight[-count:] *= 1e-4
        norm.bias[-count:] *= 1e-4


def test_both_kinds_of_edit_where_both_pay():
    """Blocks with filters that do nothing, and a transition of low rank: pruned here, decomposed there."""
    model = named("cifar:resnet20")
    weak_(model.layer1[0].conv1, model.layer1[0].bn1, 12)
    weak_(model.layer2[1].conv1, model.layer2[1].bn1, 24)
    low_rank_(model.layer3[1].conv2, 6)
    low_rank_(model.layer3[2].conv1, 6)
    edits = edits_of(model, 0.74, "auto")
    replaced = {edit.module for edit in edits if isinstance(edit, Replace)}
    pruned = {edit.module for edit in edits if isinstance(edit, Keep) and edit.axis == 0}
    assert {"layer3.1.conv2", "layer3.2.conv1"} <= replaced
    assert {"layer1.0.conv1", "layer2.1.conv1"} <= pruned


@pytest.mark.parametrize("name", ["resnet20", "vgg11", "densenet_bc40_36"])
def test_the_mode_decides_the_kind_of_edit(name):
    model = named(f"cifar:{name}")
    prune, decompose, auto = (edits_of(model, 0.7, mode) for mode in ("prune", "decompose", "auto"))
    assert all(isinstance(edit, Keep | Set) for edit in prune)
    assert all(isinstance(edit, Replace) for edit in decompose)
    assert prune != decompose
    assert prune
    assert decompose
    results = []
    for edits in (prune, decompose, auto):
        small = copy.deepcopy(model)
        surgery.apply_(small, edits)
        results.append(macs(small))
        assert 0.65 * macs(model) < results[-1] <= 0.7 * macs(model)


def test_the_default_is_auto():
    model = named("cifar:resnet8")
    task, sets = plan(model, 0.5)
    assert Hinge().finish(model, sets, task, None) == edits_of(model, 0.5, "auto")


@pytest.mark.parametrize("mode", ["auto", "prune", "decompose"])
@pytest.mark.parametrize("of", ["macs", "params"])
def test_a_smaller_ratio_never_keeps_more(mode, of):
    model = named("cifar:resnet20")
    costs = []
    for ratio in (0.3, 0.4, 0.5, 0.6, 0.75, 0.9):
        small = copy.deepcopy(model)
        surgery.apply_(small, edits_of(model, ratio, mode, of=of))
        cost = macs(small) if of == "macs" else sum(p.numel() for p in small.parameters())
        whole = macs(model) if of == "macs" else sum(p.numel() for p in model.parameters())
        assert cost <= ratio * whole
        assert cost > (ratio - 0.02) * whole
        costs.append(cost)
    assert costs == sorted(costs)


@pytest.mark.parametrize("step", [4, 8])
@pytest.mark.parametrize("name", ["resnet20", "vgg11", "mobilenet_v2"])
def test_rounding_gives_multiples(name, step):
    model = named(f"cifar:{name}")
    small = copy.deepcopy(model)
    surgery.apply_(small, edits_of(model, 0.5, "auto", round_to=step))
    assert macs(small) <= 0.5 * macs(model)
    whole = dict(model.named_modules())
    for path, module in small.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            width = module.weight.shape[0]
            assert width % step == 0 or (path in whole and width == len(whole[path].weight)), path


# The errors it weighs


def captured(monkeypatch: pytest.MonkeyPatch, model: nn.Module, shape: tuple[int, ...], mode: str) -> tuple[Budget, list[Dial]]:
    """The dials that hinge would have the budget turn."""
    dials: list[Dial] = []

    def whole(budget: Budget, given: list[Dial], price: str, *, refitted: bool) -> list[int]:
        dials.extend(given)
        return [dial.full for dial in given]

    monkeypatch.setattr("compactcli.methods.hinge.solve", whole)
    task, sets = plan(model, 0.5, shape)
    assert Hinge(parse_options(Hinge, [f"mode={mode}"])).finish(model, sets, task, None) == []
    return task, dials


@pytest.mark.parametrize("method", ["hinge", "fcf"])
@pytest.mark.parametrize("name", ["mnasnet0_5", "shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_depthwise_layers_keep_whole_vectors_of_channels(name, method):
    model, shape = randomise_(named(name)), (3, 64, 64)
    small, full = copy.deepcopy(model), depthwise(model)
    task, sets = plan(model, 0.5, shape)
    own = get(method)()
    surgery.apply_(small, [*own.start(model, sets, task), *own.finish(model, sets, task, None)])
    cut = {path: groups for path, groups in depthwise(small).items() if groups != full[path]}
    least = 0 if method == "hinge" else 64  # hinge goes by time, without images
    assert any(full[path] > least for path in cut)
    for path, groups in cut.items():
        assert groups % VECTOR == 0 or full[path] <= least, path


def test_the_error_of_a_rank_is_minus_the_logarithm_of_the_share_of_energy_that_it_keeps(monkeypatch):
    """A kernel of known singular values 8, 4, 2, 1, and one behind whose rows a batch normalisation scales."""
    model = nn.Sequential(
        *(networks.conv(3, 4), networks.conv(4, 4, 1), networks.conv(4, 6), nn.BatchNorm2d(6)), *networks.head(6)
    )
    randomise_(model)
    left, right = (torch.linalg.qr(torch.randn(4, 4)).Q for _ in range(2))
    model[1].weight.data = (left @ torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0])) @ right)[:, :, None, None]
    task, dials = captured(monkeypatch, model, networks.SHAPE, "decompose")
    errors = {task.layers[dial.layer].name: dial.errors for dial in dials}
    assert set(errors) == {"1", "2"}  # neither the stem nor the classifier
    np.testing.assert_allclose(errors["1"][1:], -np.log(np.array([64, 80, 84, 85]) / 85), atol=1e-6)
    assert errors["1"][0] > 10  # nothing is left: finite, and out of reach

    norm = model[3]
    scale = norm.weight.detach().abs().double() / (norm.running_var.double() + norm.eps).sqrt()
    matrix = scale[:, None] * model[2].weight.detach().flatten(1).double()
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    for rank in range(1, 7):
        kept = ((U[:, :rank] * S[:rank]) @ V[:rank]).square().sum() / matrix.square().sum()
        assert errors["2"][rank] == pytest.approx(-float(kept.log()), abs=1e-12)


@pytest.mark.parametrize("name", ["cifar:resnet20", "cifar:densenet_bc40_36", "squeezenet1_1"])
def test_errors_fall_from_all_to_nothing(monkeypatch, name):
    shape = (3, 64, 64) if ":" not in name else CIFAR_SHAPE
    task, dials = captured(monkeypatch, model := named(name), shape, "auto")
    worth = worths(model, channels.find(trace(model, shape), model), task)
    assert any(dial.family is not None for dial in dials)
    assert any(dial.layer is not None for dial in dials)
    for dial in dials:
        assert (np.diff(dial.errors) <= 1e-15).all()
        assert dial.errors[-1] == 0
        if dial.layer is not None:
            assert dial.errors[0] == pytest.approx(worth[task.layers[dial.layer].name] * -np.log(1e-6))


def test_what_is_added_on_a_shortcut_counts_by_its_share_of_the_power():
    """Worths of the layers that are added up sum to one; a layer before them has the worth of the one it feeds."""
    model = named("cifar:resnet8", shortcut="conv")
    randomise_(model)
    task, sets = plan(model, 0.5)
    worth = worths(model, sets, task)
    for stage in (2, 3):
        both = [f"layer{stage}.0.conv2", f"layer{stage}.0.shortcut.0"]
        power = [float((norm.weight.square() + norm.bias.square()).mean().detach()) for norm in _norms(model, stage)]
        assert [worth[name] for name in both] == pytest.approx([part / sum(power) for part in power])
        assert worth[f"layer{stage}.0.conv1"] == worth[both[0]]
    assert worth["linear"] == 1


def _norms(model: nn.Module, stage: int) -> list[nn.BatchNorm2d]:
    block = model.get_submodule(f"layer{stage}.0")
    return [block.bn2, block.shortcut[1]]


@pytest.mark.parametrize(("favour", "shared"), [("speed", True), ("accuracy", False)])
def test_channels_that_a_shortcut_shares_are_offered_for_speed_alone(monkeypatch, favour, shared):
    dials: list[Dial] = []
    prices: list[str] = []

    def whole(budget: Budget, given: list[Dial], price: str, *, refitted: bool) -> list[int]:
        dials.extend(given)
        prices.append(price)
        return [dial.full for dial in given]

    monkeypatch.setattr("compactcli.methods.hinge.solve", whole)
    model = named("cifar:resnet8", shortcut="conv")
    task, sets = plan(model, 0.5)
    Hinge(parse_options(Hinge, [f"favour={favour}"])).finish(model, sets, task, None)
    trunk = {("layer2.0.conv2.weight", 0), ("layer2.0.shortcut.0.weight", 0)}
    offered = [{axis for axis, _ in task.families[dial.family].axes} for dial in dials if dial.family is not None]
    assert any(trunk <= axes for axes in offered) == shared
    assert prices == ["time" if shared else "cost"]


def test_the_filters_that_matter_least_go_first():
    model = named("cifar:resnet8", shortcut="conv")
    weak_(model.layer2[0].conv1, model.layer2[0].bn1, 10)
    edits = edits_of(model, 0.9, "prune")
    kept = next(edit.index for edit in edits if edit.module == "layer2.0.conv1" and edit.axis == 0)
    removed, weak = set(range(32)) - set(kept), set(range(22, 32))
    assert removed <= weak or removed >= weak


def test_the_error_is_the_outputs_where_the_cut_is_linear(monkeypatch):
    """Two convolutions of one position and independent channels: the share kept is what the output keeps."""
    model = nn.Sequential(networks.conv(3, 8, 1, bias=False), networks.conv(8, 6, 1, bias=False), *networks.head(6))
    with torch.no_grad():
        model[0].weight.zero_()
        for i in range(8):  # channel i is (i + 1) times one of three independent inputs
            model[0].weight[i, i % 3] = i + 1
        model[1].weight.copy_(torch.linalg.qr(torch.randn(8, 8)).Q[:6, :, None, None])
    task, dials = captured(monkeypatch, model, networks.SHAPE, "prune")
    (errors,) = [dial.errors for dial in dials if ("0.weight", 0) in dict(task.families[dial.family].axes)]
    energy = np.arange(1, 9.0) ** 2 * model[1].weight.detach().double().square().sum(0).flatten().numpy()
    kept = 1 - np.append(np.cumsum(np.sort(energy))[::-1], 0.0) / energy.sum()
    np.testing.assert_allclose(errors[1:], -np.log(kept[1:]), atol=1e-6)


def test_the_floor_is_kept():
    model = named("cifar:resnet20")
    for floor in (0.25, 0.5):
        task, sets = plan(model, 0.01, nearest=True)
        edits = Hinge(parse_options(Hinge, [f"floor={floor}"])).finish(model, sets, task, None)
        whole = dict(model.named_modules())
        for edit in edits:
            if isinstance(edit, Keep) and edit.axis == 0 and isinstance(whole[edit.module], nn.Conv2d):
                assert len(edit.index) >= floor * len(whole[edit.module].weight)
    for floor in ("0", "1.5", "-1", "nan"):
        with pytest.raises(UsageError, match="--set floor="):
            parse_options(Hinge, [f"floor={floor}"])


# Two layers for one

GEOMETRIES = [
    nn.Conv2d(8, 7, 3),
    nn.Conv2d(8, 7, 3, padding=1, bias=False),
    nn.Conv2d(8, 7, (3, 1), stride=2, padding=(1, 0)),
    nn.Conv2d(8, 7, 3, dilation=2, padding=2),
    nn.Conv2d(8, 7, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(8, 7, 3, padding="same"),
    nn.Conv2d(8, 12, 1, stride=(1, 2)),
    nn.Conv2d(8, 12, 5, padding=2, padding_mode="circular", bias=False),
]


def pair_of(layer: nn.Module, rank: int) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS["hinge.decomposed"].build(layer, {"rank": rank}).double()


@pytest.mark.parametrize("layer", GEOMETRIES, ids=str)
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_the_dense_form_of_a_pair_is_one_layer_of_the_same_geometry(layer, rank):
    pair = pair_of(layer, rank)
    dense = LAYERS["hinge.decomposed"].dense(pair)
    image = torch.randn(2, 8, 9, 10, dtype=torch.float64)
    torch.testing.assert_close(dense(image), pair(image), rtol=1e-12, atol=1e-12)
    assert (repr(dense), dense.weight.shape) == (repr(layer), layer.weight.shape)
    assert [type(part) for part in pair] == [nn.Conv2d, nn.Conv2d]  # plain layers, for later methods and ONNX


@pytest.mark.parametrize("bias", [True, False])
def test_the_dense_form_of_a_pair_of_linear_layers(bias):
    layer = nn.Linear(8, 6, bias=bias)
    pair = pair_of(layer, 3)
    dense = LAYERS["hinge.decomposed"].dense(pair)
    rows = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(dense(rows), pair(rows), rtol=1e-12, atol=1e-12)
    assert repr(dense) == repr(layer)
    assert [type(part) for part in pair] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("layer", [*(g for g in GEOMETRIES if g.padding_mode == "zeros"), nn.Linear(8, 6)], ids=str)
def test_a_layer_of_low_rank_is_reproduced_at_its_rank(layer, monkeypatch):
    """At the rank it has, with a batch normalisation behind it that scales its filters."""
    layer, rank = copy.deepcopy(layer), 3
    low_rank_(layer, rank)
    width = len(layer.weight)
    if isinstance(layer, nn.Linear):
        middle, shape = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), layer, nn.Linear(width, 5)], (3, 9, 10)
    else:
        middle, shape = [layer, nn.BatchNorm2d(width), nn.ReLU(), *networks.head(width)], (3, 9, 10)
    model = nn.Sequential(networks.conv(3, 8), *middle)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomise_(module)
    path = next(name for name, module in model.named_modules() if module is layer)

    def at_rank(budget: Budget, dials: list[Dial], price: str, *, refitted: bool) -> list[int]:
        return [rank if budget.layers[dial.layer].name == path else dial.full for dial in dials]

    monkeypatch.setattr("compactcli.methods.hinge.solve", at_rank)
    (edit,) = edits_of(model, 0.5, "decompose", shape)
    assert (edit.module, edit.layer, dict(edit.options)) == (path, "hinge.decomposed", {"rank": rank})
    small = copy.deepcopy(model)
    surgery.apply_(small, [edit])
    image = torch.randn(2, *shape)
    torch.testing.assert_close(outputs(small, image), outputs(model, image), rtol=1e-4, atol=1e-5)


def test_a_pruned_layer_is_decomposed_from_what_is_left_of_it(monkeypatch):
    """At the rank of what is left, cutting and decomposing is cutting alone."""
    model = named("cifar:resnet8", shortcut="conv")
    path, width, rank = "layer2.0.conv2", 12, 5
    low_rank_(model.get_submodule(path), rank)
    _, sets = plan(model, 0.5)

    def chosen(budget: Budget, dials: list[Dial], price: str, *, refitted: bool) -> list[int]:
        """Every width cut to `width`, and one layer to `rank`, where the dials are there."""
        decomposed = [budget.layers[dial.layer].name == path if dial.layer is not None else None for dial in dials]
        return [width if d is None else rank if d else dial.full for d, dial in zip(decomposed, dials, strict=True)]

    monkeypatch.setattr("compactcli.methods.hinge.solve", chosen)
    cut = copy.deepcopy(model)
    surgery.apply_(cut, edits_of(model, 0.5, "prune"))
    edits = edits_of(model, 0.5, "auto")
    (pair,) = [edit for edit in edits if isinstance(edit, Replace)]
    assert pair.tensors["0.weight"].shape == (rank, width, 3, 3)
    assert pair.tensors["1.weight"].shape[1] == rank
    law.apply_checked_(model, edits, sets.consumed, CIFAR_SHAPE)
    image = torch.randn(2, *CIFAR_SHAPE)
    torch.testing.assert_close(outputs(model, image), outputs(cut, image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("mode", ["auto", "prune", "decompose"])
def test_awkward_networks_are_made_smaller_under_the_law(name, mode):
    torch.manual_seed(0)
    model = randomise_(AWKWARD[name]())
    task, sets = plan(model, 0.8, networks.SHAPE, nearest=True)
    assert macs(model, networks.SHAPE) == task.original
    edits = Hinge(parse_options(Hinge, [f"mode={mode}"])).finish(model, sets, task, None)
    assert law.apply_checked_(model, edits, sets.consumed, networks.SHAPE) < 1e-9
    assert macs(model, networks.SHAPE) <= task.original


@pytest.mark.parametrize("name", ["tied_layers", "borrowed", "functional"])
def test_no_layer_is_decomposed_whose_weight_another_has(name):
    """Two layers would stand in for it, and its weight be there as before."""
    model = randomise_(AWKWARD[name]())
    task, sets = plan(model, 0.6, networks.SHAPE, of="params", nearest=True)
    edits = Hinge(parse_options(Hinge, ["mode=decompose"])).finish(model, sets, task, None)
    assert not any(edit.module.startswith("2.") for edit in edits)


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 8, 3), nn.BatchNorm2d(8)], ids=str)
def test_what_cannot_be_decomposed_is_refused(layer):
    with pytest.raises(CompactError, match="which cannot be"):
        LAYERS["hinge.decomposed"].build(layer, {"rank": 2})


def test_a_layer_whose_channels_are_locked_may_be_decomposed(monkeypatch):
    """Layer normalisation holds every channel, not the ranks between them; the ends of the network stay whole."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 48), nn.Linear(48, 12)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(nn.functional.softmax(self.up(self.norm(x)), -1))

    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 12), Block(), Block(), nn.Linear(12, 10))
    task, dials = captured(monkeypatch, model, (3, 8, 8), "auto")
    names = [task.layers[dial.layer].name for dial in dials if dial.layer is not None]
    assert names == [f"{block}.{layer}" for block in (2, 3) for layer in ("up", "down")]
    assert all(dial.family is None for dial in dials)


def test_the_ends_of_a_network_stay_whole_whatever_holds_their_channels(monkeypatch):
    """A stem behind arithmetic on the images, a classifier behind a softmax."""
    shifted = networks.Code(lambda s, x: s.stem((x - s.mean) / 2), stem=networks.conv(3, 8), mean=networks.parameter(3, 1, 1))
    model = nn.Sequential(shifted, nn.ReLU(), networks.conv(8, 8), *networks.head(8), nn.LogSoftmax(1))
    task, dials = captured(monkeypatch, randomise_(model), networks.SHAPE, "decompose")
    assert [task.layers[dial.layer].name for dial in dials] == ["2"]
