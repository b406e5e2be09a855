"""Calibration: moments are what they say, regression finds what can be found, and nothing is changed that was right."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import Code, conv, head, randomise_
from test_compress import own
from torch import nn

from compactcli import artefact, budget, calibrate, cifar, data, law, measure, moments, regression, replay, surgery
from compactcli.channels import edits as channel_edits
from compactcli.channels import find
from compactcli.compress import Calibration, Target, compress
from compactcli.errors import CompactError
from compactcli.graph import trace
from compactcli.layers import layers
from compactcli.methods import _errors, get
from compactcli.methods._decomposed import decompose
from compactcli.methods.hinge import Hinge, Options, rank_errors
from compactcli.recipe import Preprocessing, Replace

SHAPE = (3, 16, 16)
PREPROCESSING = Preprocessing((0.5,) * 3, (0.25,) * 3)


def resnet(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return randomise_(cifar.NETWORKS["resnet8"](width=8, **kwargs)).eval()


def batches(count: int = 64, seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)).split(16))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("padding", "dilation"), [(0, 1), (1, 1), (2, 2), ((2, 0), 1), ("valid", 1)])
@pytest.mark.parametrize("kernel", [1, 3, (3, 2)])
def test_patches_are_what_the_kernel_meets(kernel, padding, dilation, stride):
    layer = nn.Conv2d(4, 5, kernel, stride, padding, dilation, bias=False)
    image = torch.randn(3, 4, 11, 9)
    output = layer(image).flatten(2)
    at = torch.randperm(output.shape[2])[:7]
    weight = layer.weight.flatten(1)
    torch.testing.assert_close(moments.patches(layer, image) @ weight.T, output.transpose(1, 2))
    torch.testing.assert_close(moments.patches(layer, image, at) @ weight.T, output[:, :, at].transpose(1, 2))


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 5), (150, 140)], ids=["whole", "sketched"])
@pytest.mark.parametrize("positions", [1, 16])
def test_the_moments_predict_what_a_change_of_the_weight_does(positions, inputs, outputs):
    """Where all that follows is linear, and the positions of an image alike, first order and the product are exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.Flatten(), nn.Linear(outputs * positions, 7)).eval()
    images = 2 + torch.randn(256, inputs, 1, 1).expand(-1, -1, positions, 1) @ torch.ones(1, 1)
    known = moments.gather(model, ["0"], list(images.split(64)))["0"]
    assert known.inputs.shape == (inputs, inputs)
    assert known.worth.shape == (outputs, outputs)
    change = torch.randn(outputs, inputs)
    with torch.no_grad():
        logits = model(images)
        model[0].weight += change[:, :, None, None]
        moved = model(images) - logits
    moved -= moved.mean(0)  # an intercept makes it good
    deviation = (logits - logits.mean(0)).square().sum()
    predicted = float((known.worth @ change @ known.inputs * change).sum())
    assert predicted == pytest.approx(float(moved.square().sum() / deviation), rel=0.25)  # 256 random directions


def test_errors_of_neighbours_add_up():
    """The same power at 16 positions moves a sum of them 16 times as much when it is of one sign as when it is noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
    alike, noise = torch.randn(256, 3, 1, 1).expand(-1, -1, 4, 4).clone(), torch.randn(256, 3, 4, 4)
    worth = []
    for images in (alike, noise):
        known = moments.gather(model, ["0"], [images])["0"]
        with torch.no_grad():
            worth.append(float(known.worth.trace()) * float((model(images) - model(images).mean(0)).square().sum()))
    assert worth[0] / worth[1] == pytest.approx(16, rel=0.3)


@pytest.mark.parametrize("alike", [0, 1, 5])
@pytest.mark.parametrize("exponent", [-50, -20, 20, 70])
def test_moments_do_not_depend_on_the_unit_of_the_outputs(exponent, alike):
    """A share of their deviation is the same of small outputs and large ones, bit for bit where no square is lost."""
    known = []
    given = [batches()[0][:1].repeat(alike, 1, 1, 1)] if alike else batches()
    for unit in (1.0, 2.0**exponent):
        model = resnet()
        with torch.no_grad():
            model.linear.weight.mul_(unit)
            model.linear.bias.mul_(unit)
        known.append(moments.gather(model, ["layer1.0.conv1", "layer3.0.conv2"], given))
    for name, own_ in known[0].items():
        assert float(own_.worth.trace()) > 0
        assert torch.equal(known[1][name].inputs, own_.inputs)
        assert torch.equal(known[1][name].worth, own_.worth)


def test_moments_leave_the_network_as_it_was():
    model = resnet().train()
    before = copy.deepcopy(model.state_dict())
    names = [layer.name for layer in layers(trace(model, SHAPE))]
    moments.gather(model, names, batches())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_moments_do_not_depend_on_how_a_layer_is_given_its_input():
    torch.manual_seed(0)
    layers_ = {"layer": conv(3, 4), "last": nn.Linear(4, 5)}
    by_place = Code(lambda s, x: s.last(s.layer(x).mean((2, 3))), **layers_)
    by_name = Code(lambda s, x: s.last(input=s.layer(input=x).mean((2, 3))), **layers_)
    wanted, got = (moments.gather(model, list(layers_), batches()) for model in (by_place, by_name))
    assert set(got) == set(layers_)
    assert all(torch.equal(got[name].inputs, wanted[name].inputs) for name in got)
    assert all(torch.equal(got[name].worth, wanted[name].worth) for name in got)


@pytest.mark.parametrize("first", [nn.Identity(), nn.ReLU(inplace=True)], ids=["plain", "in place"])
def test_moments_leave_the_images_as_they_were(first):
    """Given as plain tensors, whatever the network does to its input."""
    model = nn.Sequential(first, nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    given = batches()
    before = [batch.clone() for batch in given]
    moments.gather(model, ["1"], given)
    assert not any(batch.requires_grad or batch.grad is not None for batch in given)
    assert all(torch.equal(batch, old) for batch, old in zip(given, before, strict=True))


def full_rank(model: nn.Module, name: str) -> Replace:
    graph = trace(model, SHAPE)
    layer = next(layer for layer in layers(graph) if layer.name == name)
    return decompose(model, find(graph, model), layer, 10**6, [])


@pytest.mark.parametrize("shortcut", ["pad", "conv"])
def test_where_nothing_was_removed_the_logits_stay(shortcut):
    """The first layer is decomposed at full rank, so that every layer after it is regressed."""
    target = resnet(shortcut=shortcut)
    model = copy.deepcopy(target)
    edits = [full_rank(model, "layer1.0.conv1")]
    surgery.apply_(model, edits)
    error = calibrate.refit_(model, target, edits, batches())
    image = torch.randn(8, *SHAPE)
    with torch.no_grad():
        difference = (model(image) - target(image)).abs().max() / target(image).abs().max()
    assert error < 1e-4
    assert float(difference) < 1e-4


def of_another_geometry() -> nn.Module:
    """Code that applies a layer's weight with numbers that are not the layer's."""
    run = Code(lambda s, x: F.conv2d(x, s.layer.weight, s.layer.bias, 2, 2, 2), layer=conv(6, 8))
    return nn.Sequential(conv(3, 6), nn.ReLU(), run, nn.ReLU(), *head(8))


def turned() -> nn.Module:
    """Code that multiplies with a linear layer's weight the other way round."""
    run = Code(lambda s, x: x.mean((2, 3)) @ s.layer.weight, layer=nn.Linear(7, 6, bias=False))
    return nn.Sequential(conv(3, 6), nn.ReLU(), run, nn.ReLU(), nn.Linear(7, 5))


def without_its_bias() -> nn.Module:
    run = Code(lambda s, x: F.conv2d(x, s.layer.weight, padding=1) + 1, layer=conv(6, 8))
    return nn.Sequential(conv(3, 6), nn.ReLU(), run, nn.ReLU(), *head(8))


def patch_tokens() -> nn.Module:
    """A linear layer over tokens that do not lie together: its bias is added after the product."""
    run = Code(lambda s, x: torch.relu(s.layer(x.flatten(2).transpose(1, 2))).mean(1), layer=nn.Linear(6, 8))
    return nn.Sequential(conv(3, 6), nn.ReLU(), run, nn.Linear(8, 5))


def padded(mode: str) -> nn.Module:
    return nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 8, padding_mode=mode, stride=2), nn.ReLU(), *head(8))


OWN_WAYS = {each.__name__: each for each in (of_another_geometry, turned, without_its_bias, patch_tokens)}


@pytest.mark.parametrize("name", ["reflect", "replicate", "circular", *OWN_WAYS])
def test_where_nothing_was_removed_the_logits_stay_however_a_weight_is_applied(name):
    target = randomise_(OWN_WAYS[name]() if name in OWN_WAYS else padded(name)).eval()
    model = copy.deepcopy(target)
    edits = [full_rank(model, "0")]
    surgery.apply_(model, edits)
    assert calibrate.refit_(model, target, edits, batches()) < 1e-4


def test_a_filter_that_the_others_can_replace_is_replaced():
    """A channel that copies another: cutting it loses nothing once its consumer is refitted."""
    torch.manual_seed(0)
    target = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    ).eval()  # fmt: skip
    with torch.no_grad():
        target[0].weight[7], target[0].bias[7] = 2 * target[0].weight[3], 2 * target[0].bias[3]
    model = copy.deepcopy(target)
    channels = find(trace(model, SHAPE), model)
    edits = channel_edits(channels, [int(channels.axes["0.weight", 0][7])], model)
    law.apply_checked_(model, edits, channels.consumed, SHAPE)
    with torch.no_grad():
        image = torch.randn(16, *SHAPE)
        cut = float((model(image) - target(image)).norm() / target(image).norm())
        refitted = calibrate.refit_(model, target, edits, batches(1024))
        after = float((model(image) - target(image)).norm() / target(image).norm())
    assert cut > 0.01
    assert after < 0.02 * cut
    assert refitted < 1e-2


@pytest.mark.parametrize("mode", ["auto", "prune", "decompose"])
def test_refitting_brings_the_logits_closer(mode):
    target = resnet()
    graph = trace(target, SHAPE)
    channels = find(graph, target)
    plan = budget.Budget(graph, channels, target, ratio=0.6)
    known = moments.gather(target, [layer.name for layer in plan.layers], batches())
    model = copy.deepcopy(target)
    edits = Hinge(Options(mode=mode)).finish(model, channels, plan, known)
    law.apply_checked_(model, edits, channels.consumed, SHAPE)
    held_out = torch.cat(batches(seed=1))
    with torch.no_grad():
        wanted = target(held_out)
        cut = float((model(held_out) - wanted).norm())
        calibrate.refit_(model, target, edits, batches(256))
        assert float((model(held_out) - wanted).norm()) < 0.7 * cut


def test_the_error_that_is_reported_is_the_outputs():
    target, model = resnet(), resnet()
    edits = [full_rank(model, "layer2.0.conv2")]
    surgery.apply_(model, edits)
    with torch.no_grad():
        model.layer2[0].conv2[0].weight.mul_(0.5)  # refitted away
        images = batches()
        error = calibrate.refit_(model, target, edits, images)
        wanted, got = target(torch.cat(images)), model(torch.cat(images))
    assert error == pytest.approx(float((got - wanted).norm() / (wanted - wanted.mean(0)).norm()), abs=1e-5)


def test_more_images_join_when_memory_allows_and_change_nothing_else(monkeypatch):
    """Batches that join late go through the same operations: with room for all or for one, the last layer sees all."""
    target = resnet()
    monkeypatch.setattr(replay, "LIVE_BYTES", 1)
    streams = []
    original = replay.Streams.__init__

    def noted(self, *args) -> None:
        original(self, *args)
        streams.append(self)

    monkeypatch.setattr(replay.Streams, "__init__", noted)
    model = copy.deepcopy(target)
    edits = [full_rank(model, "layer1.0.conv1")]
    surgery.apply_(model, edits)
    calibrate.refit_(model, target, edits, batches())
    assert len(streams[0].target.values) == 1
    streams[0]._join()
    late, early = streams[0].target.values[-1], streams[0].target.values[0]
    assert len(streams[0].target.values) == 2
    assert set(late) == set(early)
    logits = late[streams[0].target.graph.nodes[-1].all_input_nodes[0]]
    with torch.no_grad():
        torch.testing.assert_close(logits, target(batches()[1]), rtol=1e-4, atol=1e-5)


def calibrated(seed: int = 0) -> artefact.Network:
    network = artefact.fresh(artefact.Wishes("cifar:resnet8", {"width": 8}, SHAPE), 0)
    randomise_(network.module)
    images = torch.randint(0, 256, (96, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return compress(network, "hinge", get("hinge")(), Target(0.6), calibration=Calibration(images, "noise"), seed=seed)


def test_same_images_and_seed_give_the_same_bytes():
    assert artefact.dumps(calibrated()) == artefact.dumps(calibrated())


def test_a_calibrated_network_is_loaded_as_it_was_saved():
    network = calibrated()
    found = artefact.open_model(artefact.dumps(network))
    image = torch.randn(4, *SHAPE)
    with torch.no_grad():
        assert torch.equal(found.module(image), network.module(image))
    assert found.recipe.steps[0].options["images"] == 96
    assert measure.macs(found.module, SHAPE) <= 0.6 * measure.macs(cifar.NETWORKS["resnet8"](width=8), SHAPE)


def test_batches_are_equal_and_fit_in_memory():
    images = torch.randint(0, 256, (100, *SHAPE), dtype=torch.uint8)
    assert [len(batch) for batch in moments.Batches(images, PREPROCESSING, 1)] == [50, 50]
    small = moments.Batches(images, PREPROCESSING, moments.BATCH_BYTES // 3)
    assert {len(batch) for batch in small} == {2}
    assert len(small) == 50 == len(list(small))
    torch.testing.assert_close(small[1], data.normalise(images[2:4], PREPROCESSING))


def test_fewer_images_pull_harder_towards_the_weights_that_are_there():
    """The ridge falls with the number of images: few of them do not talk the network out of what it knows."""
    target, moved = resnet(), []
    for copies in (1, 2, 4):  # of the same images: only their number differs
        model = copy.deepcopy(target)
        with torch.no_grad():
            model.layer2[0].conv1.weight.mul_(0.5)
        edits = [full_rank(model, "layer2.0.conv1")]
        surgery.apply_(model, edits)
        calibrate.refit_(model, target, edits, batches(16) * copies, only={"layer3.0.conv1"})
        with torch.no_grad():
            moved.append(float((model.layer3[0].conv1.weight - target.layer3[0].conv1.weight).norm()))
    assert 0 < moved[0] < moved[1] < moved[2]


def test_a_layer_too_wide_for_its_covariance_is_left_alone(monkeypatch):
    target = resnet()
    monkeypatch.setattr(moments, "WIDEST", 8 * 9)  # layer1's
    names = [layer.name for layer in layers(trace(target, SHAPE))]
    known = moments.gather(target, names, batches())
    assert {"layer1.0.conv1", "layer2.0.conv1"} <= set(known)
    assert not {"layer2.0.conv2", "layer3.0.conv1"} & set(known)
    model = copy.deepcopy(target)
    edits = [full_rank(model, "layer1.0.conv1")]
    with torch.no_grad():
        model.layer1[0].conv1.weight.mul_(0.5)
    surgery.apply_(model, edits)
    calibrate.refit_(model, target, edits, batches())
    assert torch.equal(model.layer3[0].conv1.weight, target.layer3[0].conv1.weight)
    assert not torch.equal(model.layer2[0].conv1.weight, target.layer2[0].conv1.weight)


def test_worths_are_known_where_moments_are_not(monkeypatch):
    """A layer too wide for moments counts as it does from the weights alone, whatever is known of others."""
    target = resnet()
    graph = trace(target, SHAPE)
    found = find(graph, target)
    task = budget.Budget(graph, found, target, ratio=0.5)
    alone = dict(rank_errors(target, found, task, None))
    monkeypatch.setattr(moments, "WIDEST", 8 * 9)
    known = moments.gather(target, [layer.name for layer in task.layers], batches())
    for index, errors in rank_errors(target, found, task, known):
        if task.layers[index].name not in known:
            assert errors == pytest.approx(alone[index], rel=1e-9)


def test_what_a_normalisation_silences_stays_small():
    """Outputs that nobody hears make up for nothing, whatever went wrong in the shortcut behind them."""
    target = resnet()
    with torch.no_grad():
        target.layer1[0].bn2.weight[:4] = 0
    model = copy.deepcopy(target)
    edits = [full_rank(model, "layer1.0.conv1")]
    surgery.apply_(model, edits)
    with torch.no_grad():
        model.conv1.weight.mul_(0.5)  # the shortcut is of half the size
    calibrate.refit_(model, target, edits, batches(), only={"layer1.0.conv2"})
    silent, heard = model.layer1[0].conv2.weight.detach().flatten(1).norm(dim=1).split([4, 4])
    assert silent.max() < 3 * heard.max()


def test_tokens_are_sampled_as_positions_are(monkeypatch):
    rows = []
    add = regression.Sums.add
    monkeypatch.setattr(regression.Sums, "add", lambda self, x, y: rows.append((len(x), len(y))) or add(self, x, y))
    monkeypatch.setattr(calibrate, "POSITIONS", 256)
    target = randomise_(patch_tokens())
    model = copy.deepcopy(target)
    edits = [full_rank(model, "0")]
    surgery.apply_(model, edits)
    calibrate.refit_(model, target, edits, batches(64), only={"2.layer"})
    assert rows
    assert sum(x for x, _ in rows) == sum(y for _, y in rows) <= 256


def test_values_carried_forward_stay_within_the_limit(monkeypatch):
    """However many batches join, what they hold together never exceeds LIVE_BYTES (one batch is always taken)."""
    target = resnet()
    limit = 2 << 20
    monkeypatch.setattr(replay, "LIVE_BYTES", limit)
    most, joined, run = [], [], replay.Stream._run
    streams = []

    def noted(self, node, values) -> None:
        run(self, node, values)
        if self not in streams:
            streams.append(self)
        held = {}
        for stream in streams:
            for each in stream.values:
                held |= {value.untyped_storage().data_ptr(): value.nbytes for value in each.values() if hasattr(value, "nbytes")}
        most.append(sum(held.values()))
        joined.append(len(self.values))

    monkeypatch.setattr(replay.Stream, "_run", noted)
    model = copy.deepcopy(target)
    edits = [full_rank(model, "layer1.0.conv1")]
    surgery.apply_(model, edits)
    calibrate.refit_(model, target, edits, batches(256))
    assert max(most) <= limit
    assert max(joined) > 1


def small(count: int = 3) -> list[nn.Module]:
    torch.manual_seed(0)
    widths = (3, 16, 24, 24)
    return [layer for i in range(count) for layer in (conv(widths[i], widths[i + 1]), nn.ReLU())]


def errors(model: nn.Module, name: str = "hinge", **options: object) -> tuple[float, float]:
    """The relative output error of a network on images that it has not seen, compressed without images and calibrated."""
    randomise_(model).eval()
    images = torch.randint(0, 256, (256, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    held_out = data.normalise(images[128:], own(model).recipe.preprocessing)
    found = []
    for calibration in (None, Calibration(images[:128], "noise")):
        given = own(copy.deepcopy(model), SHAPE)
        method = get(name)
        made = compress(given, name, method(method.Options(**options)), Target(0.6), calibration=calibration)
        with torch.no_grad():
            wanted, got = model(held_out), made.module(held_out)
        found.append(float((got - wanted).norm() / (wanted - wanted.mean(0)).norm()))
    return found[0], found[1]


def normed() -> nn.Module:
    """One batch normalisation behind several convolutions."""

    def run(s: Code, x: torch.Tensor) -> torch.Tensor:
        for layer in s.layers:
            x = torch.relu(s.norm(layer(x)))
        return s.head(x)

    torch.manual_seed(0)
    layers_ = nn.ModuleList(conv(width, 24, bias=False) for width in (3, 24, 24))
    return Code(run, layers=layers_, norm=nn.BatchNorm2d(24), head=nn.Sequential(*head(24)))


def test_no_layer_shifts_the_mean_of_a_batch_normalisation_that_others_have_too():
    cut, after = errors(normed(), mode="decompose")
    assert after < 0.1 * cut


STRUCTURES = {
    "tuple": lambda scores: (scores, scores.softmax(1)),
    "dict": lambda scores: {"classes": scores},
    "classes first": lambda scores: (scores.argmax(1), [scores]),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_the_scores_are_what_counts_in_outputs_of_any_structure(kind):
    """Compressed, calibrated and evaluated, it is the network that gives its scores alone."""
    images = torch.randint(0, 256, (32, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels = [(batch, torch.arange(16) % 5) for batch in batches(32)]
    found = []
    for structure in (STRUCTURES[kind], lambda scores: scores):
        model = Code(lambda s, x, structure=structure: structure(s.body(x)), body=nn.Sequential(*small(), *head(24)))
        given = own(randomise_(model), SHAPE)
        compress(given, "hinge", get("hinge")(), Target(0.6), calibration=Calibration(images, "noise"))
        found.append((given.recipe.steps[-1].error, measure.accuracy(model, labels), measure.probed(model, SHAPE).tolist()))
    assert found[0] == found[1]


def test_a_network_without_scores_is_refused():
    model = Code(lambda s, x: s.body(x).argmax(1), body=nn.Sequential(*small(), *head(24)))
    with pytest.raises(CompactError, match="has no floating-point tensor"):
        errors(model)


def test_a_layer_over_positions_of_channels_that_are_gone_is_left_as_it_is():
    """Its rows are channels, of which the target has more."""

    def run(s: Code, x: torch.Tensor) -> torch.Tensor:
        return x + s.mix(x.flatten(2)).view(x.shape)

    torch.manual_seed(0)
    mixed = Code(run, mix=nn.Linear(SHAPE[1] * SHAPE[2], SHAPE[1] * SHAPE[2]))
    cut, after = errors(nn.Sequential(*small(2), mixed, conv(24, 24), nn.ReLU(), *head(24)), mode="prune")
    assert after < 0.7 * cut


def called_twice() -> nn.Module:
    torch.manual_seed(0)
    run = Code(lambda s, x: torch.relu(s.layer(torch.relu(s.layer(x)))), layer=conv(16, 16))
    return nn.Sequential(conv(3, 16), nn.ReLU(), run, conv(16, 24), nn.ReLU(), *head(24))


def test_what_follows_an_edited_layer_is_refitted_though_that_itself_cannot_be():
    """Least squares has no one set of inputs for a layer that is called twice."""
    target = randomise_(called_twice()).eval()
    model = copy.deepcopy(target)
    edits = [full_rank(model, "2.layer")]
    surgery.apply_(model, edits)
    image = torch.cat(batches())
    with torch.no_grad():
        model[2].layer[0].weight.mul_(0.5)
        cut = float((model(image) - target(image)).norm())
        calibrate.refit_(model, target, edits, batches())
        after = float((model(image) - target(image)).norm())
    assert torch.equal(model[0].weight, target[0].weight)
    assert after < 0.1 * cut


def without_gradients(parts: slice) -> nn.Module:
    """A network of which a part runs under no_grad, whoever trains it."""

    def run(s: Code, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(s.body):
            with torch.set_grad_enabled(torch.is_grad_enabled() and number not in range(10)[parts]):
                x = layer(x)
        return x

    return Code(run, body=nn.Sequential(*small(), *head(24)))


@pytest.mark.parametrize("name", ["hinge", "fcf"])
@pytest.mark.parametrize("parts", [slice(4), slice(None)], ids=["backbone", "all"])
def test_what_runs_without_gradients_is_judged_by_its_weights_and_refitted(parts, name):
    model = without_gradients(parts)
    known = moments.gather(model, [f"body.{n}" for n in (0, 2, 4, 8)], batches())
    assert set(known) == ({"body.4", "body.8"} if parts.stop else set())
    cut, after = errors(model, name)
    assert after < 0.5 * cut


def test_a_matrix_that_rounding_made_indefinite_has_a_root_all_the_same():
    matrix = torch.diag(torch.tensor([1.0, 0.5, -1e-4]))
    root = _errors.root(matrix)
    assert float((root.T @ root - matrix).abs().max()) < 0.02
