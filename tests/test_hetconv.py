"""Layers in parts equal their plain convolution; the fit is the best there is; and what hetconv chooses is what it costs."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from networks import AWKWARD, SHAPE, conv, head, named, outputs, randomise_
from test_compress import own
from test_search import images, settings, small
from torch import Tensor, nn

from compactcli import data, kernels, law, measure, surgery
from compactcli.artefact import Network
from compactcli.budget import Budget, Of
from compactcli.compress import Calibration, Search, Target, compress
from compactcli.errors import CompactError
from compactcli.methods import get, hetconv, parse_options
from compactcli.methods._arrange import arrange_, balanced
from compactcli.methods._errors import Metrics
from compactcli.methods.hetconv import Parts, fit
from compactcli.moments import Moments, gather
from compactcli.plain import plain_
from compactcli.plan import plan
from compactcli.recipe import Replace

HetConv = get("hetconv")
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"padding": 1},
    "strides": {"stride": (2, 1), "padding": 1},
    "dilated": {"dilation": 2, "padding": "same"},
    "dilated and strided": {"dilation": (1, 2), "padding": (1, 2), "stride": 3},
    "reflect": {"padding": 1, "padding_mode": "reflect", "stride": 2},
    "circular": {"padding": "same", "padding_mode": "circular", "kernel_size": (3, 5)},
    "5x5": {"kernel_size": 5, "padding": 2},
    "3x1": {"kernel_size": (3, 1), "padding": (1, 0), "stride": 2},
}
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES)
every_parts = pytest.mark.parametrize("parts", [2, 3, 4, 12])


def chosen(*options: str) -> Any:
    return HetConv(parse_options(HetConv, options))


def divided(parts: int, geometry: str = "plain", bias: bool = True) -> Parts:
    """A layer of random numbers in float64."""
    plain = nn.Conv2d(12, 24, **{"kernel_size": 3, "bias": bias, **GEOMETRIES[geometry]})
    layer = randomise_(Parts(plain, parts)).double()
    assert isinstance(layer, Parts)
    return layer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# A layer, its plain equal, and what it is run as


@every_geometry
@every_parts
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_equals_its_plain_convolution_and_those_it_is_run_as(geometry, parts, bias):
    layer, x = divided(parts, geometry, bias), random(2, 12, 9, 10)
    expected = layer.dense()(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.folded()(x), expected, rtol=1e-12, atol=1e-12)
    assert str(layer.dense()) == str(nn.Conv2d(12, 24, **{"kernel_size": 3, "bias": bias, **GEOMETRIES[geometry]}))


@every_parts
def test_a_filter_reads_its_own_part_with_k_x_k_and_the_others_with_their_centre(parts):
    kernel = divided(parts).kernel()
    for out, into in itertools.product(range(24), range(12)):
        own = out // (24 // parts) == into // (12 // parts)
        assert int(kernel[out, into].count_nonzero()) == (9 if own else 1)
        assert own or kernel[out, into, 1, 1] != 0


@every_parts
def test_what_overlaps_has_no_parameter_and_no_gradient(parts):
    layer = divided(parts, bias=False)
    assert sum(each.numel() for each in layer.parameters()) == int(layer.kernel().count_nonzero())
    layer(random(2, 12, 5, 5)).square().sum().backward()
    assert all(each.grad is not None and each.grad.all() for each in layer.parameters())


@every_parts
def test_gradients_are_those_of_the_plain_kernel(parts):
    layer, x = divided(parts), random(2, 12, 5, 5)
    layer(x).square().sum().backward()
    theirs = {name: parameter.grad for name, parameter in layer.named_parameters() if name != "bias"}
    dense = layer.dense()
    dense(x).square().sum().backward()
    for name, gradient in hetconv._tensors(dense.weight.grad, parts).items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-10, atol=1e-10)


@every_parts
@pytest.mark.parametrize("geometry", ["plain", "circular", "3x1"])
def test_a_kernel_is_made_of_what_it_is_taken_apart_into(parts, geometry):
    first, second = divided(parts, geometry), divided(parts, geometry)
    with torch.no_grad():
        second.grouped.zero_()
        second.pointwise.zero_()
    second.load_state_dict({**hetconv._tensors(first.kernel().detach(), parts), "bias": first.bias.detach()})
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor)
    assert torch.equal(first.kernel(), second.kernel())


@every_parts
def test_what_it_says_it_costs_is_what_it_is_run_as(parts):
    model = nn.Sequential(conv(12, 24))
    surgery.apply_(model, [Replace("0", "hetconv.parts", {"parts": parts})])
    layer = model[0]
    assert isinstance(layer, Parts)
    assert measure.macs(model, (12, 4, 4)) == 24 * 16 * layer.executed
    assert measure.params(model) == 24 * layer.used + 24
    assert layer.synthesis_macs == layer.synthesis_sums == 0


def test_a_network_is_folded_and_all_else_is_shared():
    model = nn.Sequential(conv(3, 8), conv(8, 12), conv(12, 12), *head(12))
    surgery.apply_(model, [Replace("1", "hetconv.parts", {"parts": 4}), Replace("2", "hetconv.parts", {"parts": 2})])
    randomise_(model).eval()
    plain, x = kernels.folded(model), torch.randn(2, *SHAPE)
    assert not kernels.layers(plain)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernels.folded(model, dense="always")(x), model(x), rtol=1e-5, atol=1e-5)
    assert plain[0].weight is model[0].weight
    assert plain[1].grouped.bias is model[1].bias
    assert not any(module.training for module in plain.modules())
    assert plain[2].pointwise.weight.numel() == 72  # half of the inputs: with two parts what overlaps is skipped


@pytest.mark.parametrize(
    ("layer", "parts"),
    [
        (conv(12, 24), 5),
        (conv(12, 25), 3),
        (conv(12, 24), 0),
        (conv(12, 24), 1),
        (conv(12, 24), -2),
        (conv(12, 24), 1 << 40),
        (conv(12, 24, 1), 2),
        (nn.Conv2d(12, 24, 2), 2),
        (nn.Conv2d(12, 24, 3), 2),
        (nn.Conv2d(12, 24, 3, padding=2), 2),
        (nn.Conv2d(12, 24, 3, padding="valid"), 2),
        (nn.Conv2d(12, 24, 4, padding="same"), 2),
        (conv(12, 24, groups=2), 2),
    ],
    ids=str,
)
def test_what_cannot_be_divided_is_refused(layer, parts):
    with pytest.raises(CompactError, match=r"^the recipe divides a layer [\dx]+ into -?\d+ parts, which cannot be$"):
        surgery.apply_(nn.Sequential(layer), [Replace("0", "hetconv.parts", {"parts": parts})])


def test_what_is_no_convolution_is_refused():
    with pytest.raises(CompactError, match=r"^the recipe makes the kernel of a Linear, which has none$"):
        surgery.apply_(nn.Sequential(nn.Linear(4, 4)), [Replace("0", "hetconv.parts", {"parts": 2})])


# The fit


def moments(count: int, seed: int = 1) -> Tensor:
    """The second moments of what a layer reads, correlated."""
    rows = random(3 * count, count, seed=seed) @ random(count, count, seed=seed + 1)
    return rows.T @ rows / len(rows)


def error(weight: Tensor, fitted: Tensor, inputs: Tensor) -> float:
    missed = (weight - fitted).flatten(1)
    return float(((missed @ inputs) * missed).sum())


@every_parts
def test_the_fit_is_that_of_least_squares_in_every_row(parts):
    weight, rows = random(24, 12, 3, 3), random(400, 108, seed=1) @ random(108, 108, seed=2)
    gram = rows.T @ rows
    rows = torch.cat([rows, (hetconv.RIDGE * gram.trace()).sqrt() * torch.eye(108)])
    fitted, kept = fit(weight, gram, parts).flatten(1), hetconv._support(weight.shape, parts).flatten(1)
    for wanted, found, there in zip(weight.flatten(1), fitted, kept, strict=True):
        torch.testing.assert_close(found[there], torch.linalg.lstsq(rows[:, there], rows @ wanted).solution, rtol=1e-8, atol=1e-8)
        assert not found[~there].any()


@every_parts
def test_nothing_near_the_fit_costs_less(parts):
    weight, inputs = random(24, 12, 3, 3), moments(108)
    inputs.diagonal().add_(0.1)
    ridged = inputs.clone()
    ridged.diagonal().add_(hetconv.RIDGE * float(inputs.trace()))
    fitted, kept = fit(weight, inputs, parts), hetconv._support(weight.shape, parts)
    least = error(weight, fitted, ridged)
    for seed in range(10):
        moved = fitted + 1e-3 * random(24, 12, 3, 3, seed=seed) * kept
        assert error(weight, moved, ridged) > least
    assert error(weight, torch.where(kept, weight, 0.0), inputs) > least


def test_fewer_parts_lose_less():
    weight, inputs = random(24, 12, 3, 3), moments(108)
    errors = [error(weight, fit(weight, inputs, parts), inputs) for parts in (2, 4, 12)]
    assert 0 < errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("inputs", [None, moments(108), torch.zeros(108, 108)], ids=["alike", "images", "silence"])
def test_what_is_in_parts_stays_as_it_is(inputs):
    weight = divided(4).kernel().detach()
    before = None if inputs is None else inputs.clone()
    torch.testing.assert_close(fit(weight, inputs, 4), weight, rtol=1e-8, atol=1e-8)
    assert inputs is None or torch.equal(inputs, before)


def test_moments_of_few_images_suffice():
    """Of lower rank than there are inputs, in float32."""
    rows = random(20, 108).float()
    fitted = fit(random(24, 12, 3, 3), rows.T @ rows / float(rows.square().sum()), 4)
    assert fitted.isfinite().all()
    assert float(fitted.abs().max()) < 100


# What is chosen


def network() -> nn.Module:
    """Convolutions that can be divided into many numbers of parts, of several kernels, and some that cannot."""
    body = [conv(16, 32, 5, stride=2), nn.ReLU(), conv(32, 32, 1), nn.Conv2d(32, 48, 3, 1, 2, 2, bias=False)]
    tail = [
        nn.BatchNorm2d(48),
        nn.ReLU(),
        conv(48, 24),
        nn.ReLU(),
        nn.Conv2d(24, 24, (3, 1), padding=(1, 0)),
        conv(24, 24, groups=4),
    ]
    return randomise_(nn.Sequential(conv(3, 16), nn.ReLU(), *body, *tail, *head(24))).eval()


def planned(model: nn.Module, ratio: float = 0.5, of: Of = "macs", shape: tuple[int, ...] = SHAPE, nearest: bool = False) -> Any:
    plain_(model, shape)
    graph, channels = plan(model, shape, lambda line: None)
    return channels, Budget(graph, channels, model, ratio=ratio, of=of, nearest=nearest)


@pytest.mark.parametrize("of", ["macs", "params"])
def test_every_candidate_costs_what_the_network_costs_that_it_becomes(of):
    count = {"macs": lambda model: measure.macs(model, SHAPE), "params": measure.params}[of]
    _, budget = planned(network(), of=of)
    seen = 0
    for layer in hetconv._eligible(network(), budget.layers):
        for parts in chosen("width=1")._parts(layer):
            model = network()
            saved = hetconv._cost(layer, 1, budget) - hetconv._cost(layer, parts, budget)
            surgery.apply_(model, [Replace(layer.name, "hetconv.parts", {"parts": parts})])
            assert count(model) == budget.original - saved
            seen += 1
    assert seen > 20


def divisions(model: nn.Module) -> dict[str, int]:
    return {name: layer.parts for name, layer in kernels.layers(model).items() if isinstance(layer, Parts)}


def test_parts_that_are_given_are_those_of_every_layer_that_they_divide():
    model, settings = network(), Target(0.01, nearest=True)
    found = compress(own(model), "hetconv", chosen("parts=4"), settings).module
    assert divisions(found) == {"2": 4, "5": 4, "8": 4, "10": 4}
    assert divisions(compress(own(network()), "hetconv", chosen("parts=3"), settings).module) == {"8": 3, "10": 3}


def test_no_part_is_narrower_than_it_may_be():
    found = compress(own(network()), "hetconv", chosen("width=8"), Target(0.01, nearest=True)).module
    widths = {name: layer.in_channels // layer.parts for name, layer in kernels.layers(found).items()}
    assert widths
    assert min(widths.values()) >= 8


def test_layers_become_as_many_parts_as_suits_each():
    found = compress(own(network()), "hetconv", chosen(), Target(0.5)).module
    assert len(set(divisions(found).values())) > 1


@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8])
def test_what_is_kept_is_the_share_asked_for(of, ratio):
    """As near as the forms allow: no single layer could take its next larger form."""
    count = {"macs": lambda model: measure.macs(model, SHAPE), "params": measure.params}[of]
    _, budget = planned(network(), ratio, of)
    found = compress(own(network()), "hetconv", chosen(), Target(ratio, of)).module
    cost, parts = count(found), divisions(found)
    assert cost <= ratio * count(network())
    for layer in budget.layers:
        if layer.name in parts:
            forms = [hetconv._cost(layer, each, budget) for each in (1, *chosen()._parts(layer))]
            now = hetconv._cost(layer, parts[layer.name], budget)
            assert cost + min(form for form in forms if form > now) - now > budget.target


def test_out_of_reach_names_the_nearest():
    with pytest.raises(
        CompactError, match=r"--ratio 0.1 of macs is out of reach: .* try --ratio (0\.\d+), or --nearest"
    ) as caught:
        compress(own(network()), "hetconv", chosen(), Target(0.1))
    nearest = float(str(caught.value).partition("try --ratio ")[2].split(",")[0])
    reached = measure.macs(compress(own(network()), "hetconv", chosen(), Target(nearest)).module, SHAPE)
    taken = measure.macs(compress(own(network()), "hetconv", chosen(), Target(0.1, nearest=True)).module, SHAPE)
    assert nearest - 0.001 < taken / measure.macs(network(), SHAPE) <= reached / measure.macs(network(), SHAPE) <= nearest


def test_a_network_that_nothing_can_be_divided_in_is_told():
    model = randomise_(nn.Sequential(conv(3, 8, 1), nn.ReLU(), conv(8, 8, groups=2), *head(8)))
    with pytest.raises(CompactError, match="there are no convolutions here that hetconv could compute with fewer products"):
        compress(own(model), "hetconv", chosen(), Target(0.5))


@pytest.mark.parametrize("option", ["parts=1", "parts=-2", "width=0"])
def test_options_that_cannot_be_are_refused(option):
    with pytest.raises(CompactError, match=f"--set {option}: it is"):
        chosen(option)


# With images


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def change(given: Network) -> float:
    """Of the outputs on images that were not calibrated on, from those of the network that was given."""
    x = data.normalise(pictures(64, seed=1), given.recipe.preprocessing)
    return measure.relative_change(outputs(given.module, x)[0], outputs(small(width=8), x)[0])


def given() -> Network:
    return own(small(width=8), (3, 32, 32))


@pytest.mark.parametrize("options", [(), ("parts=4",), ("arrange=contiguous",)])
def test_images_make_good_what_is_lost(options):
    target, images_ = Target(0.6, nearest=True), Calibration(pictures(128), "noise")
    blind = compress(given(), "hetconv", chosen(*options), target)
    seen = compress(given(), "hetconv", chosen(*options), target, calibration=images_)
    assert divisions(seen.module)
    assert change(seen) < 0.6 * change(blind)


def test_a_search_trains_what_there_is_of_the_kernels():
    images_ = Calibration(pictures(36), "noise")
    search = Search(images(36), settings(epochs=1))
    before = compress(given(), "hetconv", chosen(), Target(0.6), calibration=images_)
    after = compress(given(), "hetconv", chosen(), Target(0.6), calibration=images_, search=search)
    assert divisions(after.module) == divisions(before.module)
    for name, layer in kernels.layers(after.module).items():
        assert isinstance(layer, Parts)
        first = before.module.get_submodule(name)
        assert not torch.equal(layer.grouped, first.grouped)
        assert not torch.equal(layer.pointwise, first.pointwise)
        assert int(layer.kernel().count_nonzero()) <= layer.grouped.numel() + layer.pointwise.numel()


# The order of channels


def known(model: nn.Module, budget: Budget) -> dict[str, Moments]:
    images = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(0))
    return gather(model, [layer.name for layer in budget.layers], images.split(16))


def narrow(model: nn.Module, budget: Budget, parts: int = 0) -> dict[str, int]:
    """So many parts, or the most there can be, in every layer that may have them."""
    found = {layer.name: chosen("width=1", f"parts={parts}")._parts(layer) for layer in hetconv._eligible(model, budget.layers)}
    return {name: own[-1] for name, own in found.items() if own}


ORDERED = {**AWKWARD, "network": network, "resnet": lambda: named("cifar:resnet8", width=8)}


@pytest.mark.parametrize("name", ORDERED)
def test_an_order_changes_nothing_else(name):
    """Arranging is its own judge, but not this one."""
    torch.manual_seed(0)
    model = randomise_(ORDERED[name]()).eval()
    channels, budget = planned(model)
    before, x = law.run_double(model, random(2, *SHAPE)), random(2, *SHAPE)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    arrange_(model, channels, budget, Metrics(model, channels, budget, None), narrow(model, budget))
    assert law.difference(law.run_double(model, x), before) < 1e-12
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes


CHANGED = ("gate", "shuffled", "prelu", "neighbours", "instance_norm", "network", "resnet")


@pytest.mark.parametrize("name", CHANGED)
def test_channels_between_two_layers_are_put_in_order(name):
    torch.manual_seed(0)
    model = randomise_(ORDERED[name]()).eval()
    channels, budget = planned(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arrange_(model, channels, budget, Metrics(model, channels, budget, None), narrow(model, budget))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    for key in changed:
        assert torch.equal(model.state_dict()[key].flatten().sort().values, before[key].flatten().sort().values)


@pytest.mark.parametrize("name", ["tied_parameter", "depthwise", "grouped", "flattened", "concatenation", "functional"])
def test_channels_stay_where_something_else_knows_their_places(name):
    torch.manual_seed(0)
    model = randomise_(AWKWARD[name]()).eval()
    channels, budget = planned(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arrange_(model, channels, budget, Metrics(model, channels, budget, None), narrow(model, budget))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", CHANGED)
def test_moments_go_with_the_channels(name):
    """They are what is measured in the new order."""
    torch.manual_seed(0)
    model = randomise_(ORDERED[name]()).eval()
    channels, budget = planned(model)
    metrics = Metrics(model, channels, budget, known(model, budget))
    found, wanted = arrange_(model, channels, budget, metrics, narrow(model, budget)), known(model, budget)
    assert found.keys() == wanted.keys()
    for layer, each in found.items():
        torch.testing.assert_close(each.inputs, wanted[layer].inputs, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(each.worth, wanted[layer].worth, rtol=1e-3, atol=1e-5 * float(each.worth.abs().max()))


@pytest.mark.parametrize("missing", ["2", "5", "8", "10", "all"])
def test_layers_without_moments_are_ordered_by_their_weights(missing):
    model = network()
    channels, budget = planned(model)
    moments = {} if missing == "all" else {name: own for name, own in known(model, budget).items() if name != missing}
    before, x = law.run_double(model, random(2, *SHAPE)), random(2, *SHAPE)
    found = arrange_(model, channels, budget, Metrics(model, channels, budget, moments), narrow(model, budget))
    assert found.keys() == moments.keys()
    assert law.difference(law.run_double(model, x), before) < 1e-12


def lost(model: nn.Module, moments: dict[str, Moments] | None, parts: int, *options: str) -> float:
    """What the network loses that has so many parts in every layer that may have them."""
    channels, budget = planned(model, 0.01, nearest=True)
    layers = {layer.name: layer for layer in budget.layers}
    before = law.run_double(model, random(4, *SHAPE))
    edits = chosen(f"parts={parts}", "width=1", *options).start(model, channels, budget, moments)
    metrics = Metrics(model, channels, budget, None)
    kernels_ = {edit.module: hetconv._support(layers[edit.module].shape, parts) for edit in edits}
    assert law.difference(law.run_double(model, random(4, *SHAPE)), before) < 1e-12
    weights = {name: hetconv._weight(model, layers[name]) for name in kernels_}
    return sum(metrics.of(layers[name]).cost((weights[name] * ~kept).flatten(1)) for name, kept in kernels_.items())


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("name", ["network", "resnet"])
def test_an_order_never_loses_more_than_none(name, parts):
    assert lost(ORDERED[name](), None, parts) < lost(ORDERED[name](), None, parts, "arrange=contiguous")


def scattered(parts: int, seed: int) -> nn.Module:
    """Three layers in parts, each of whose channels are put in another order."""
    generator = torch.Generator().manual_seed(seed)
    model = randomise_(nn.Sequential(conv(3, 12, 1), nn.ReLU(), conv(12, 24), nn.ReLU(), conv(24, 12), *head(12)), seed)
    order = [torch.randperm(count, generator=generator) for count in (12, 24)]
    with torch.no_grad():
        for path in ("2", "4"):
            weight = model.get_submodule(path).weight
            weight.mul_(hetconv._support(weight.shape, parts))
        model[0].weight.copy_(model[0].weight[order[0]])
        model[0].bias.copy_(model[0].bias[order[0]])
        model[2].weight.copy_(model[2].weight[:, order[0]][order[1]])
        model[2].bias.copy_(model[2].bias[order[1]])
        model[4].weight.copy_(model[4].weight[:, order[1]])
    return model.eval()


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_parts_that_are_there_are_found(parts, seed):
    """The outputs of the last layer are in place; what lies before it follows."""
    assert lost(scattered(parts, seed), None, parts, "arrange=contiguous") > 0.1
    assert lost(scattered(parts, seed), None, parts) < 1e-12


def total(gains: Any, groups: Any) -> float:
    return float(gains[np.arange(len(gains)), groups].sum())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("count", "groups"), [(6, 2), (6, 3), (8, 2), (8, 4)])
def test_balanced_groups_are_as_good_as_the_best(count, groups, seed):
    gains = np.random.default_rng(seed).exponential(size=(count, groups))
    found = balanced(gains)
    assert np.bincount(found, minlength=groups).tolist() == [count // groups] * groups
    every = set(itertools.permutations(np.repeat(np.arange(groups), count // groups).tolist()))
    assert total(gains, found) >= 0.97 * max(total(gains, np.array(each)) for each in every)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_groups_are_balanced_where_nothing_tells(value):
    assert np.bincount(balanced(np.full((12, 4), value))).tolist() == [3] * 4


def test_many_groups_take_no_time():
    gains = np.random.default_rng(0).exponential(size=(512, 64))
    assert np.bincount(balanced(gains)).tolist() == [8] * 64
