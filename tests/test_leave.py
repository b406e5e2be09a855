"""Layers that the user wants left keep their filters and stay what they are, whatever the method."""

import json

import pytest
import torch
from networks import SHAPE, Code, conv, head, outputs, randomise_
from test_cli import one_line, run
from test_compress import own
from test_search import images
from torch import nn

from compactcli import artefact, data, measure
from compactcli.artefact import Network, Wishes
from compactcli.commands import command_line
from compactcli.compress import Calibration, Search, Target, compress, planned
from compactcli.errors import CompactError, UsageError
from compactcli.graph import trace
from compactcli.layers import layers, matching
from compactcli.methods import get, names
from compactcli.optim import Settings
from compactcli.plan import plan

CIFAR = (3, 32, 32)
LEFT = ["layer1.0.conv1", "layer2.0", "layer3.1.conv[12]"]
KEPT = ["layer1.0.conv1", "layer2.0.conv1", "layer2.0.conv2", "layer3.1.conv1", "layer3.1.conv2"]


LEAST = Target(0.01, nearest=True)  # whatever may change does


def resnet(classes: int = 10) -> Network:
    network = artefact.fresh(Wishes("cifar:resnet14", {"width": 8, "num_classes": classes}), 0)
    randomise_(network.module)
    return network


def kept_as_they_are(small: nn.Module, before: nn.Module) -> bool:
    """Of the same kind, with all their filters."""
    pairs = [(small.get_submodule(path), before.get_submodule(path)) for path in KEPT]
    return all(type(now) is type(was) and len(now.weight) == len(was.weight) for now, was in pairs)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("method", names())
def test_they_stay_and_the_rest_is_smaller(method, calibrated):
    given, before = resnet(), resnet().module
    noise = torch.randint(0, 256, (16, *CIFAR), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    calibration = Calibration(noise, "noise") if calibrated else None
    compress(given, method, get(method)(), LEAST, calibration=calibration, leave=LEFT)
    assert kept_as_they_are(given.module, before)
    assert measure.params(given.module) < 0.95 * measure.params(before)
    again = artefact.open_model(artefact.dumps(given)).module
    image = torch.randn(2, *CIFAR)
    for ours, theirs in zip(outputs(again, image), outputs(given.module, image), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("method", names())
def test_without_being_asked_they_are_changed(method):
    """The test above would notice."""
    given, before = resnet(), resnet().module
    compress(given, method, get(method)(), LEAST)
    assert not kept_as_they_are(given.module, before)


@pytest.mark.parametrize("method", ["hinge", "fcf"])
def test_a_search_leaves_them(method):
    given, before, dataset = resnet(3), resnet(3).module, images()
    assert dataset.train is not None
    calibration = Calibration(data.sample(dataset.train, 64, 0), "colours")
    search = Search(dataset, Settings(epochs=1, batch_size=36, precision="float32"))
    compress(given, method, get(method)(), Target(0.7, nearest=True), calibration=calibration, search=search, leave=LEFT)
    assert kept_as_they_are(given.module, before)
    assert measure.macs(given.module, CIFAR) < 0.75 * measure.macs(before, CIFAR)


def test_what_is_tied_to_a_layer_that_is_left_stays_as_well():
    body = Code(lambda s, x: x + s.b(torch.relu(s.a(x))), a=conv(8, 12), b=conv(12, 8))
    given = own(randomise_(nn.Sequential(conv(3, 8), body, *head(8))))
    compress(given, "fcf", get("fcf")(), Target(0.5, nearest=True), leave=["1.b"])
    assert len(given.module[0].weight) == len(given.module[1].b.weight) == 8
    assert len(given.module[1].a.weight) < 12


PATTERNS = (("layer1.0.conv1", 1), ("layer2", 4), ("*.conv1", 6), ("linear", 1), ("*", 14), ("layer[12].0.conv?", 4))


def test_names_patterns_and_modules():
    found = layers(trace(resnet().module, CIFAR))
    for pattern, count in PATTERNS:
        assert len(matching(found, [pattern])) == count, pattern
    with pytest.raises(UsageError, match=r"^--leave layer1.0.conv3: no such .* layer; did you mean layer"):
        matching(found, ["layer2", "layer1.0.conv3"])
    with pytest.raises(UsageError, match="see analyze"):
        matching(found, ["??"])


def test_the_plan_says_that_it_was_asked_for():
    told = planned(resnet(), "hinge", get("hinge")(), Target(0.9, nearest=True), leave=LEFT)["layers"]
    rows = {row["name"]: row for row in told}
    assert rows["layer1.0.conv1"]["why"] == "left: --leave says so"
    for name in KEPT:
        (shape,) = rows[name]["after"]["weight_shapes"]
        assert shape[0] == rows[name]["before"]["weight_shapes"][0][0]


def test_the_history_tells_the_command():
    given = compress(resnet(), "hinge", get("hinge")(), Target(0.9), leave=["layer2.0", "layer1.0.*"])
    step = json.loads(given.recipe.dumps())["steps"][-1]
    assert command_line(step) == "compactcli compress --method hinge --ratio 0.9 --leave layer2.0 --leave 'layer1.0.*'"


def test_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fresh = ("--arch", "cifar:resnet8", "--fresh", "--method", "fcf", "--ratio", "0.9")
    run("compress", *fresh, "--leave", "layer3", "--leave", "layer2.0.conv1", "-o", "small.safetensors")
    small = artefact.open_model("small.safetensors").module
    assert len(small.layer3[0].conv1.weight) == 64
    assert len(small.layer2[0].conv1.weight) == 32
    line = one_line(run("compress", "-q", *fresh, "--leave", "layer9", "-o", "other.safetensors"), 2)
    assert line == "compactcli: --leave layer9: no such convolution or linear layer; see analyze"
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize("method", names())
def test_where_nothing_may_change_it_says_so(method):
    with pytest.raises(CompactError, match=r"; or name less with --leave$"):
        compress(resnet(), method, get(method)(), Target(0.5), leave=["*"])


@pytest.mark.parametrize("method", ["hinge", "fcf"])
def test_with_nearest_nothing_is_written_that_is_no_smaller(method):
    with pytest.raises(CompactError, match=rf"^{method} could make nothing here smaller; .*; or name less with --leave$"):
        compress(resnet(), method, get(method)(), Target(0.5, nearest=True), leave=["*"])


@pytest.mark.parametrize("groups", [2, 16])
def test_transposed_groups_are_left(groups):
    """Their outputs lie along both axes of the weight."""
    up = nn.ConvTranspose2d(16, 16, 2, stride=2, groups=groups)
    rest = nn.Sequential(nn.ReLU(), conv(16, 12), nn.ReLU(), conv(12, 10), *head(10))
    given = own(randomise_(nn.Sequential(conv(3, 16), nn.ReLU(), up, *rest)))
    _, sets = plan(given.module, SHAPE, leave=["2"])
    assert sets.reason(("2.weight", 0)) == sets.reason(("0.weight", 0)) == "tied to what --leave names"
    compress(given, "fcf", get("fcf")(), LEAST, leave=["2", "4"])
    assert given.module[2].weight.shape == up.weight.shape
    assert len(given.module[6].weight) < 10


def test_a_layer_of_computed_weight_keeps_all_of_it():
    halved = Code(lambda s, x: x @ (s.weight * 0.5), weight=nn.Parameter(torch.randn(8, 12)))
    given = own(randomise_(nn.Sequential(conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), halved, nn.Linear(12, 5))))
    with pytest.raises(CompactError, match="or name less with --leave"):
        compress(given, "fcf", get("fcf")(), Target(0.5, nearest=True), leave=["3"])
    assert given.module[3].weight.shape == (8, 12)


def test_activations_in_blocks_that_are_left_stay():
    given, kind = resnet(), get("hinge")
    compress(given, "hinge", kind(kind.Options(two_slope=True)), Target(0.8, nearest=True), leave=["layer1", "layer2"])
    made = {edit.module for edit in given.recipe.steps[-1].edits if getattr(edit, "layer", "") == "hinge.two_slope"}
    assert {path.partition(".")[0] for path in made} == {"layer3"}


def test_a_run_goes_on_only_with_the_same_layers_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--arch", "cifar:resnet8", "--arch-kwargs", "in_channels=1", "--fresh", "--input-shape", "1x32x32")
    train = ("--method", "fcf", "--ratio", "0.8", "--data", "digits", "--limit", "64", "--epochs", "50", "--time-limit", "0.01")
    for others in ((), ("--leave", "layer1")):
        left = run("compress", *flags, *train, *others, "-o", "small.safetensors")
        assert left.exit_code == 0, left.stderr
        given = () if others else ("--leave", "layer1")
        line = one_line(run("compress", "-q", *flags, *train, *given, "--resume", "-o", "small.safetensors"))
        assert "the run there has leave" in line
