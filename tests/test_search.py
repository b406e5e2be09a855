"""The search of hinge: it changes nothing at its start, trains everything, follows the cost without touching a weight."""

import copy
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import named, outputs, randomise_
from test_cli import one_line
from test_cli import run as command
from test_resume import DeadError
from test_train import same, weights
from torch import Tensor, nn

from compactcli import artefact, channels, data, law, measure, report, sources, surgery, train
from compactcli.architectures import get as architecture
from compactcli.budget import Budget
from compactcli.compress import Calibration, Search, Target, compress
from compactcli.errors import UsageError
from compactcli.finetune import finetune
from compactcli.graph import trace
from compactcli.history import Watch
from compactcli.methods import Progress, _hinge_groups, _hinge_search, get, parse_options
from compactcli.methods import hinge as file
from compactcli.methods._decomposed import decompose
from compactcli.methods._widths import removable
from compactcli.moments import Batches, gather, value_bytes
from compactcli.optim import Settings
from compactcli.proximal import OPERATORS, STEPS
from compactcli.recipe import Preprocessing

Hinge = get("hinge")
EXAMPLES = Path(__file__).parents[1] / "examples"
PREPROCESSING = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
INITS = ("svd2", "svd", "p-identity", "p-random", "disturbed-uniform", "disturbed-normal")
OF_THE_PAPER = ("resnet20", "resnet56", "resnet164", "resnext20", "resnext164", "densenet12_40", "vgg16")
OF_TORCHVISION = (
    *("resnet50", "mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_1"),
    *("densenet121", "googlenet", "mnasnet0_5", "regnet_x_400mf", "efficientnet_b0"),
)


def begun(model: nn.Module, *options: str, ratio: float = 0.5, shape: tuple[int, ...] = (3, 32, 32)) -> Any:
    """The method with its search begun: the layers parametrized."""
    graph = trace(model, shape)
    sets = channels.find(graph, model)
    method = Hinge(parse_options(Hinge, options))
    method.start(model, sets, Budget(graph, sets, model, ratio=ratio), trains=True)
    return method


def small(seed: int = 0, width: int = 4) -> nn.Module:
    return randomise_(architecture("cifar:resnet8", {"width": width, "num_classes": 3}).build(), seed)


def images(count: int = 120) -> data.Dataset:
    """Noise, brighter in the channel of its class."""
    labels = torch.arange(count) % 3
    pixels = torch.randint(0, 128, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels[torch.arange(count), labels] += 100
    return data.Dataset("colours", False, ("red", "green", "blue"), data.from_tensors(pixels, labels, "train"), None)


def settings(**values: Any) -> Settings:
    return Settings(**{"epochs": 2, "batch_size": 36, "lr": 0.02, "precision": "float32", "schedule": "constant", **values})


def searched(model: nn.Module, *options: str, ratio: float = 0.5, hooks: tuple[Any, ...] = (), **values: Any) -> Any:
    method = begun(model, *options, ratio=ratio)
    train.fit_(model, images(), PREPROCESSING, settings(**values), hooks=[method, *hooks], keep="last")
    return method


# The start


@pytest.mark.parametrize("name", [*(f"cifar:{name}" for name in OF_THE_PAPER), *OF_TORCHVISION])
def test_all_groups_kept_are_the_network(name):
    """Not so in the authors' bottlenecks and grouped blocks, whose weights were put back transposed."""
    model = named(name)
    shape = (3, 32, 32) if name.startswith("cifar:") else (3, 64, 64)
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    wanted, keys = outputs(model, image)[0], set(model.state_dict())
    method = begun(model, shape=shape)
    for stage in ("searching", "after"):
        if stage == "after":
            method.end(model)
            assert set(model.state_dict()) == keys
        assert (outputs(model, image)[0] - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", ["mobilenet_v2", "squeezenet1_1"])
def test_every_start_suits_layers_that_widen_and_biases(name, init):
    """More outputs than the kernel reads; parameters are in the order in which they were."""
    model = named(name)
    before = list(model.state_dict())
    method = begun(model, f"init={init}", "by=norm", shape=(3, 64, 64))
    assert all(each.norms(model).isfinite().all() for each in method.search.found)
    method.end(model)
    assert list(model.state_dict()) == before
    graph = trace(model, (3, 64, 64))
    sets = channels.find(graph, model)
    assert method.finish(model, sets, Budget(graph, sets, model, ratio=0.6), None)


@pytest.mark.parametrize("init", INITS)
def test_every_start_is_the_network_and_none_is_another(init):
    model = small()
    image = torch.randn(2, 3, 32, 32)
    wanted = outputs(model, image)[0]
    method = begun(model, f"init={init}")
    assert torch.allclose(outputs(model, image)[0], wanted, rtol=1e-3, atol=1e-4)
    matrices = [model.get_parameter(name).detach() for name in method.search.carriers(outer=False)]
    for other in set(INITS) - {init}:
        twin = small()
        others = [twin.get_parameter(name).detach() for name in begun(twin, f"init={other}").search.carriers(outer=False)]
        assert any(one.shape != two.shape or not torch.allclose(one, two) for one, two in zip(matrices, others, strict=True))


def test_row_norms_begin_as_singular_values():
    model = small()
    values = {name: torch.linalg.svdvals(layer.weight.flatten(1)) for name, layer in model.named_modules() if is_3x3(layer)}
    method = begun(model, "mode=decompose")
    for each in method.search.found:
        layer = method.search.budget.layers[each.layer]
        assert torch.allclose(each.norms(model), values[layer.name], rtol=1e-4)


def is_3x3(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)


def carriers(name: str, mode: str = "auto", **kwargs: object) -> set[tuple[str, int]]:
    """(layer, 0: columns of its matrix, 1: rows) of all matrices that carry groups."""
    model = named(name, **kwargs)
    all_of_them = [carrier for each in begun(model, f"mode={mode}").search.found for carrier in each.carriers]
    return {(c.parameter.split(".parametrizations")[0].removesuffix(".weight"), c.axis) for c in all_of_them if c.is_matrix}


def test_what_carries_groups_is_what_the_papers_networks_have():
    basic = carriers("cifar:resnet8")
    assert {("layer1.0.conv1", 0), ("layer1.0.conv1", 1), ("layer1.0.conv2", 1)} <= basic  # the shortcut ties conv2's outputs
    assert ("layer1.0.conv2", 0) not in basic
    assert {axis for _, axis in carriers("cifar:resnet8", "decompose")} == {1}
    assert {axis for _, axis in carriers("cifar:resnet8", "prune")} == {0}
    names = [name for name, layer in architecture("cifar:resnet164", {}).build().named_modules() if isinstance(layer, nn.Conv2d)]
    bottleneck = carriers("cifar:resnet164", "prune")
    first, middle, last = names[1:4]
    assert {(first, 0), (last, 1)} <= bottleneck  # its own 1x1 convolutions are the matrices
    assert middle not in {name for name, _ in bottleneck}


def test_groups_of_grouped_convolutions_are_joint():
    """The filters that make a group's channels and the weights that read them have one norm."""
    model = named("cifar:resnext20")
    search = begun(model, "mode=prune").search
    assert {each.count for each in search.found} == {32}
    assert all([carrier.axis for carrier in each.carriers] == [0, 1] for each in search.found)


@pytest.mark.parametrize("mode", ["auto", "prune"])
@pytest.mark.parametrize("name", ["resnet20", "resnext20", "mobilenet_v2", "densenet_bc40_36"])
def test_what_is_gone_is_read_no_more(name, mode):
    """Behind a batch norm a filter that is nothing still hands on its bias: whatever that is, the network does not see it."""
    model = named(f"cifar:{name}")
    sets = channels.find(trace(model, (3, 32, 32)), model)
    search = begun(model, f"mode={mode}").search
    gone = set()
    for each in search.found:
        if each.family is not None:
            gone.add(int(search.budget.families[each.family].sets[0]))
            each.scale_(model, (torch.arange(each.count) > 0).float())
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    wanted = outputs(model, image)[0]
    handed_on = 0
    for (tensor, axis), numbers in sets.axes.items():
        if axis == 0 and tensor.endswith(".bias"):
            positions = np.flatnonzero(np.isin(numbers, list(gone)))
            model.get_parameter(tensor).data[positions] += 1.0
            handed_on += len(positions)
    assert handed_on
    assert torch.allclose(outputs(model, image)[0], wanted, rtol=1e-4, atol=1e-5)


# The search trains


def test_ordinary_weights_move_in_every_epoch():
    """In the authors' search they move in the first alone: its check of the complexity puts other tensors in their place."""
    model = small()
    seen: list[dict[str, Tensor]] = []

    class Look(file.Method):
        def done(self, model: nn.Module) -> bool:
            seen.append({name: tensor.detach().clone() for name, tensor in model.named_parameters()})
            return False

    searched(model, hooks=(Look(),), epochs=3)
    for before, after in itertools.pairwise(seen):
        assert all(not torch.equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize("name", ["resnet8", "resnet164", "resnext20"])
def test_every_parameter_is_trained_once(name):
    """In the authors' search the shortcuts' convolutions are in no group of the optimizer."""
    from compactcli import optim

    model = named(f"cifar:{name}")
    groups = optim.optimizer(model, [begun(model)], settings()).param_groups
    trained = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(trained) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("regularizer", OPERATORS)
def test_each_regularizer_gets_there_in_time(regularizer):
    """What is to go is gone at the end, the rest is not, and the cut changes nothing."""
    model = small(width=8)
    method = searched(model, f"regularizer={regularizer}", "mode=decompose", "speed=1", "threshold=1e-6", epochs=4, batch_size=12)
    image = torch.randn(4, 3, 32, 32)
    method.end(model)
    relative = np.concatenate(method.norms)
    assert (relative < 1e-6).sum() > 0.2 * len(relative)
    assert (relative > 0.05).sum() > 0.2 * len(relative)
    before = outputs(model, image)[0]
    graph = trace(model, (3, 32, 32))
    sets = channels.find(graph, model)
    budget = Budget(graph, sets, model, ratio=0.52)
    law.apply_checked_(model, method.finish(model, sets, budget, None), sets.consumed, (3, 32, 32))
    assert measure.macs(model, (3, 32, 32)) <= 0.52 * budget.original
    if regularizer != "l1-2":  # its norms are of all together, so that they go one by one
        assert (outputs(model, image)[0] - before).norm() < 0.02 * before.norm()


@pytest.mark.parametrize("name", ["resnet20", "resnet164", "resnext20", "densenet_bc40_36", "vgg11"])
def test_a_batch_norm_undoes_the_lengths_that_are_restored(name):
    model = named(f"cifar:{name}").train()
    image = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = begun(model).search.found
    wanted = model(image).detach()
    restored = [each for each in found if each.regrown(torch.ones(2), torch.tensor([1.0, 0.0])) > 1]
    assert restored
    for each in restored:
        each.scale_(model, torch.ones(each.count), 3.0)
    assert (model(image) - wanted).norm() < 1e-3 * wanted.norm()


def test_where_a_batch_norm_follows_a_step_keeps_the_length():
    """Without that all groups shrink together, for no loss resists."""
    model = small()
    method = begun(model, "mode=decompose", "regularizer=l1")
    before = [each.norms(model) for each in method.search.found]
    for step in range(20):
        method.project(model, Progress(step, 0, step / 100, (0.1,)))
    for each, norms in zip(method.search.found, before, strict=True):
        now = each.norms(model)
        assert float(now.norm()) == pytest.approx(float(norms.norm()), rel=1e-3)
        assert now.argsort().tolist() == norms.argsort().tolist()
        assert (now / norms).max() > 1 > (now / norms).min()


def calibrated(model: nn.Module, ratio: float = 0.5, *options: str) -> tuple[Any, Any, Any]:
    """(hinge with its search begun, the moments of noise, the budget)."""
    graph = trace(model, (3, 32, 32))
    sets = channels.find(graph, model)
    budget = Budget(graph, sets, model, ratio=ratio)
    pixels = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batches = Batches(pixels, PREPROCESSING, value_bytes(graph))
    moments = gather(model, [layer.name for layer in budget.layers], batches)
    method = Hinge(parse_options(Hinge, options))
    method.start(model, sets, budget, moments, trains=True)
    return method, moments, budget


def test_norms_begin_as_the_error_per_cost_of_what_they_belong_to():
    """The error of a rank is that of the change of the kernel without it, by the moments; that of a channel its consumers'."""
    model = small()
    plain, graph = copy.deepcopy(model), trace(model, (3, 32, 32))
    method, moments, budget = calibrated(model)
    sets = channels.find(graph, plain)
    widths = {family: (order, errors) for family, order, errors in removable(plain, sets, budget, moments, shared=False)}
    search = method.search
    for each, norms, price in zip(search.found, search.norms(model), search.prices, strict=True):
        if each.family is not None:
            order, errors = widths[each.family]
            lost = {number: errors[len(order) - 1 - place] - errors[len(order) - place] for place, number in enumerate(order)}
            wanted = [lost[number] for number in budget.families[each.family].sets]
        else:
            layer = budget.layers[each.layer]
            A, filters = (model.get_parameter(name).detach().flatten(1) for name in _hinge_groups.factors(layer.name))
            known = moments[layer.name]
            changes = [torch.outer(A[:, rank], filters[rank]) for rank in range(each.count)]
            wanted = [float((known.worth @ change @ known.inputs * change).sum()) for change in changes]
            assert price == layer.positions * (layer.shape[0] + layer.shape[1] * layer.kernel)
        shares = norms**2 / np.array(wanted)
        assert shares == pytest.approx(float(shares[0]), rel=1e-2)


@pytest.mark.parametrize("ratio", [0.7, 0.4])
@pytest.mark.parametrize("mode", ["auto", "prune", "decompose"])
def test_one_threshold_leaves_the_network_that_the_budget_chooses(mode, ratio):
    """At the start, and when training has made all norms of each layer another so many times as long."""
    model = small(width=8)
    method, _, budget = calibrated(model, ratio, f"mode={mode}")
    search = method.search
    counts = [int((norms > 1).sum()) for norms in search.norms(model)]
    assert counts == search.kept
    assert any(count < each.count for count, each in zip(counts, search.found, strict=True))
    search.look(search.relative([each.norms(model) for each in search.found]), Progress(0, 0, 0.0, (0.1,)))
    assert search.cost(search.norms(model), search.reach) <= budget.target
    assert all(((norms > search.reach) >= (norms > 1)).all() for norms in search.norms(model))
    grown = [each.norms(model) * (number + 1) for number, each in enumerate(search.found)]
    for now, before in zip(search.relative(grown), search.norms(model), strict=True):
        assert now == pytest.approx(before, rel=1e-5)


def test_l0_takes_the_least_first_and_ever_more_until_half_of_the_search_is_over():
    model = small(width=8)
    method = begun(model, "mode=decompose", "regularizer=l0", "speed=1")
    search, counts = method.search, []
    for share in (0.0, 0.1, 0.2, 0.35, 0.5):
        before = np.concatenate(search.norms(model))
        method.project(model, Progress(round(1000 * share), 0, share, (0.1,)))
        gone = np.concatenate(search.norms(model)) == 0
        assert (gone == (before <= search.reach * share / 0.5)).all()
        counts.append(int(gone.sum()))
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert search.cost(search.norms(model), 0.0) <= search.budget.target


@pytest.mark.parametrize("step", [0, 3])
def test_no_norm_loses_more_in_a_step_than_it_may(step):
    model = small(width=8)
    method = begun(model, "mode=decompose", "speed=0.002")
    before = np.concatenate(method.search.norms(model))
    method.project(model, Progress(step, 0, 0.5, (0.1,)))
    assert not before[np.concatenate(method.search.norms(model)) == 0].max(initial=0) > 0.002 * step
    model = small(width=8)
    drawn = begun(model, "mode=decompose", "speed=0.002", "regularizer=l1")
    drawn.project(model, Progress(step, 0, 0.5, (0.1,)))
    lost = before - np.concatenate(drawn.search.norms(model))
    assert 0 < lost.max() <= 0.002 * 1.01


def test_the_factor_that_is_given_is_the_papers_step():
    """t = factor times the matrix's own mean norm at the start times the matrices' learning rate."""
    model = small()
    method = begun(model, "factor=0.3", "mode=decompose", "regularizer=l1")
    search = method.search
    before = [each.norms(model).clone() for each in search.found]
    method.project(model, Progress(1, 0, 0.5, (0.2, 0.1)))
    for each, norms, mean in zip(search.found, before, search.means.tolist(), strict=True):
        assert torch.allclose(each.norms(model), (norms - 0.3 * mean * 0.2).clamp_min(0), rtol=1e-4, atol=1e-6)


def test_without_balance_all_matrices_are_drawn_alike():
    model = small()
    method = begun(model, "factor=0.3", "mode=decompose", "balance=none", "regularizer=l1")
    before = [each.norms(model).clone() for each in method.search.found]
    method.project(model, Progress(1, 0, 0.5, (0.2, 0.1)))
    for each, norms in zip(method.search.found, before, strict=True):
        assert torch.allclose(each.norms(model), (norms - 0.06).clamp_min(0), rtol=1e-4, atol=1e-6)


def test_a_given_factor_is_annealed_as_the_norms_fall():
    model = small()
    norms = [(each, each.norms(model)) for each in begun(model).search.found]
    length = float(torch.stack([own.sum() for each, own in norms if not each.outer]).mean())
    for first, second, divided in [(0.5, 0.2, 1), (2, 0.5, 2), (3, 2, 4)]:
        options = ["factor=0.1", "anneal=2", f"anneal_first={first * length}", f"anneal_second={second * length}"]
        assert begun(small(), *options).search.annealed([own for _, own in norms]) == divided


def test_the_last_matrices_learn_by_the_ratio_of_gradients():
    """The running ratio moves by a tenth, and never leaves [5/9, 9/5]; the authors' takes the new value for nine tenths."""
    model = small()
    method = begun(model, "adjust=true", "mode=decompose")
    search = method.search
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    inner, outer = (sum(float(e.slopes(model).sum()) for e in search.found if e.outer == side) for side in (False, True))
    ratio = inner / outer
    method.regularise(model, Progress(0, 0, 0.0, (0.1, 0.1, 0.1)))
    gradient = model.get_parameter(search.carriers(outer=True)[0]).grad
    assert search.ratio == pytest.approx(ratio)
    assert float(gradient.mean()) == pytest.approx(ratio**1.35)
    for name in search.carriers(outer=False):
        assert torch.equal(model.get_parameter(name).grad, torch.ones_like(model.get_parameter(name)))
        model.get_parameter(name).grad.mul_(100)
    method.regularise(model, Progress(1, 0, 0.0, (0.1, 0.1, 0.1)))
    assert search.ratio == pytest.approx(9 / 5)


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (4, 16, 1, 1), (16, 2, 3, 3)])
@pytest.mark.parametrize("init", INITS)
def test_a_step_moves_a_product_no_farther_than_twice_a_plain_kernel(init, shape):
    """To first order, and in the norm of the gradient; without the paces some starts would move it hundreds of times as far."""
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (20 * torch.randn(shape, generator=generator) for _ in range(2))
    product = _hinge_groups.Product(init, generator)
    matrix, filters = (factor.requires_grad_() for factor in product.right_inverse(weight))
    (product(matrix, filters) * gradient).sum().backward()
    first, second = _hinge_groups.paces(matrix, filters)
    with torch.no_grad():
        moved = first * matrix.grad @ filters.flatten(1) + second * matrix @ filters.grad.flatten(1)
    assert 0.1 < float(moved.norm() / gradient.norm()) < 2


def test_decomposed_layers_are_trained_at_their_pace_and_adamw_at_none():
    from compactcli import optim
    from compactcli.methods import attached

    one = network()
    compress(one, "hinge", Hinge(parse_options(Hinge, ["mode=decompose"])), Target(0.5))
    pairs = [layer for layer in one.module.modules() if isinstance(layer, nn.Sequential) and is_3x3(layer[0]) and len(layer) == 2]
    assert pairs
    for kind, rate in (("sgd", 0.02), ("adamw", 0.02)):
        groups = optim.optimizer(one.module, attached(one.recipe, one.module), settings(optimizer=kind)).param_groups
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        assert rates.keys() == {id(parameter) for parameter in one.module.parameters()}
        for first, second in pairs:
            length = float(torch.linalg.matrix_norm(first.weight.detach().flatten(1), 2)) if kind == "sgd" else 1.0
            assert rates[id(second.weight)] == pytest.approx(rate / length**2, rel=1e-4)


def test_a_search_that_is_too_short_does_no_harm():
    """Of the demo's network on its digits: norms fall no faster than the network can follow, and the rest is cut by error."""
    one = artefact.open_model(EXAMPLES / "digits-resnet20.pt")
    digits = sources.open_dataset("digits", input_shape=one.input_shape, preprocessing=one.recipe.preprocessing, limit=700)
    before = report.evaluate(one, digits).accuracy.top1
    calibration = Calibration(digits.train.images()[:256], "digits")
    search = Search(digits, settings(epochs=1, batch_size=64), copy.deepcopy(one))
    compress(one, "hinge", Hinge(parse_options(Hinge, ["regularizer=l1"])), Target(0.2), calibration=calibration, search=search)
    assert report.evaluate(one, digits).accuracy.top1 > before - 3


def test_a_matrix_without_a_gradient_has_no_slope():
    model = small()
    method = begun(model, "adjust=true", "mode=decompose")
    assert all(not each.slopes(model).any() for each in method.search.found)
    method.regularise(model, Progress(0, 0, 0.0, (0.1,)))
    assert method.search.ratio == 0


# What it costs is followed from the norms


@pytest.mark.parametrize("mode", ["auto", "prune", "decompose"])
@pytest.mark.parametrize("name", ["resnet20", "resnext20", "densenet_bc40_36", "mobilenet_v2"])
def test_the_cost_that_norms_tell_is_that_of_the_network(name, mode):
    """Groups at random are nothing; the network without them is counted."""
    model = randomise_(architecture(f"cifar:{name}", {}).build())
    graph = trace(model, (3, 32, 32))
    sets = channels.find(graph, model)
    budget = Budget(graph, sets, model, ratio=0.5)
    method = Hinge(parse_options(Hinge, [f"mode={mode}"]))
    method.start(model, sets, budget, trains=True)
    generator, search = np.random.default_rng(0), method.search
    norms, removed, ranks = [], [], {}
    for each in search.found:
        kept = np.sort(generator.permutation(each.count)[: generator.integers(max(1, each.count // 3), each.count + 1)])
        norms.append(np.isin(np.arange(each.count), kept).astype(float))
        if each.family is not None:
            removed += np.delete(budget.families[each.family].sets, kept).tolist()
        else:
            ranks[each.layer] = len(kept)
    before = {name: parameter for name, parameter in model.named_parameters()}
    values = weights(model)
    cost = search.cost(norms, 0.0)
    assert same(values, weights(model))
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    method.end(model)
    edits = channels.edits(sets, removed, model)
    along = budget.along() - sum(
        np.isin(removed, family.sets).sum() * per for family, per in zip(budget.families, budget.per_set, strict=True)
    )
    for index, rank in ranks.items():
        if rank <= budget.most_rank(index, along):
            edits.append(decompose(model, sets, budget.layers[index], rank, removed))
    surgery.apply_(model, edits)
    assert cost == measure.macs(model, (3, 32, 32))


def test_every_family_keeps_its_floor_and_one_at_least():
    """With less than five groups a fifth of them is none in the authors' rule, whose index then does not exist."""
    model = small()
    search = begun(model, "floor=0.2").search
    nothing = [np.zeros(each.count) for each in search.found]
    least = search.cost(nothing, 1.0)
    one = [np.arange(each.count) >= each.count - max(1, math.ceil(0.2 * each.count)) for each in search.found]
    assert least == search.cost([own.astype(float) for own in one], 0.5) > 0


@pytest.mark.parametrize("operator", OPERATORS)
def test_groups_of_nothing_stay_finite(operator):
    for norms in (torch.zeros(5), torch.tensor([0.0, 1e-20, 1.0])):
        assert OPERATORS[operator](norms, 0.1).isfinite().all()


@pytest.mark.parametrize("operator", ["l1", "l1/2", "log-sum"])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.3])
def test_a_step_shortens_by_what_is_asked(operator, share):
    norm = torch.tensor([0.7], dtype=torch.float64)
    factor = float(OPERATORS[operator](norm, STEPS[operator](0.7, share * 0.7)))
    assert factor == pytest.approx(1 - share, rel=1e-6)
    assert OPERATORS[operator](norm * 0.999, STEPS[operator](0.7, 0.7)) == 0


# The whole way


def network() -> artefact.Network:
    one = artefact.fresh(artefact.Wishes("cifar:resnet8", {"width": 4, "num_classes": 3}), 0)
    randomise_(one.module)
    return one


def run(path: Path | None, *options: str, die_at: int | None = None, resume: bool = False) -> dict[str, Tensor]:
    """The weights after a compression with a search of 9 steps that may die at a step."""
    steps = 0

    def progress(done: int, total: int) -> None:
        nonlocal steps
        steps += 1
        if steps == die_at:
            raise DeadError

    one, dataset = network(), images()
    watch = Watch(progress=progress)
    chosen = settings(epochs=3, save_every=2)
    search = Search(dataset, chosen, network(), None if path is None else path / "run.safetensors", resume, watch)
    calibration = Calibration(dataset.train.images()[:64], "colours")
    compress(one, "hinge", Hinge(parse_options(Hinge, options)), Target(0.6), calibration=calibration, search=search)
    return {**weights(one.module), "edits": torch.tensor(list(one.recipe.dumps().encode()))}


@pytest.mark.parametrize(
    ("options", "every"),
    [
        ((), [(1,), (3,), (4,), (5,), (4, 1)]),
        (("adjust=true", "regularizer=l1/2", "factor=0.01"), [(4,), (5, 1)]),
        (("by=norm", "init=p-random", "others=0.3"), [(3,), (5, 1)]),
    ],
)
def test_a_resumed_search_equals_an_unbroken_one(options, every, tmp_path):
    """Killed before the first file, within epochs, at their ends, and twice."""
    whole = run(None, *options)
    for number, deaths in enumerate(every):
        folder = tmp_path / str(number)
        folder.mkdir()
        for death in deaths:
            with pytest.raises(DeadError):
                run(folder, *options, die_at=death, resume=True)
        broken = run(folder, *options, resume=True)
        assert broken.keys() == whole.keys()
        assert same(whole, broken)


def test_another_search_is_refused(tmp_path):
    with pytest.raises(DeadError):
        run(tmp_path, die_at=6)
    with pytest.raises(file.CompactError, match=r"the run there has options .*; give the same flags"):
        run(tmp_path, "regularizer=l1", resume=True)


@pytest.mark.parametrize("options", [(), ("mode=prune",), ("mode=prune", "by=norm"), ("by=norm", "floor=0.5")])
def test_what_is_out_of_reach_is_told_before_the_search(options):
    """Channels that shortcuts share, which only speed would prune, do not count."""
    one, before = network(), weights(network().module)
    chosen = Hinge(parse_options(Hinge, options))
    ratio = 0.2 if options else 0.01
    with pytest.raises(file.CompactError, match=rf"--ratio {ratio} of macs is out of reach"):
        compress(one, "hinge", chosen, Target(ratio), search=Search(images(), settings(epochs=1)))
    assert not options or "by=norm" in options or same(before, weights(one.module))


def test_tied_weights_stay_tied():
    model = named("cifar:resnet8")
    model.layer1[0].conv2.weight = model.layer1[0].conv1.weight
    method = begun(model)
    assert not any(name.startswith("layer1.0") for name in method.divided)
    method.end(model)
    assert model.layer1[0].conv2.weight is model.layer1[0].conv1.weight


def test_what_was_decomposed_twice_is_trained_on():
    one = network()
    for ratio in (0.8, 0.5):
        compress(one, "hinge", Hinge(parse_options(Hinge, ["mode=decompose"])), Target(ratio))
    finetune(one, images(), settings(epochs=1))
    assert [step.command for step in one.recipe.steps] == ["compress", "compress", "finetune"]


def test_an_option_of_the_search_without_one_is_refused(unbroken):
    told = one_line(command(*searching(unbroken, "--set", "preset=resnet20")), 2)
    assert told == "compactcli: --set preset: it is for a search; give --epochs as well"


def test_the_step_tells_how_the_search_was(tmp_path):
    one, dataset = network(), images()
    calibration = Calibration(dataset.train.images()[:64], "colours")
    lines: list[str] = []
    search = Search(dataset, settings(epochs=1))
    compress(one, "hinge", Hinge(), Target(0.6), calibration=calibration, search=search, log=lines.append)
    artefact.save(one, str(tmp_path / "small.safetensors"))
    step = artefact.open_model(tmp_path / "small.safetensors").recipe.steps[-1]
    assert (step.options["search"]["epochs"], step.options["search"]["teacher"]) == (1, None)
    assert any("groups are gone after the search" in line for line in lines)


def test_a_search_ends_when_there_is_nothing_left_to_do():
    model = small()
    method = begun(model, "stop=0.9")
    history = train.fit_(model, images(), PREPROCESSING, settings(epochs=5), hooks=[method], keep="last")
    assert len(history.epochs) == 2


def test_it_goes_on_to_its_last_epoch_unless_told_otherwise():
    """What is left when all is gone that shall go gets over it, as the learning rate falls."""
    model = small()
    method = begun(model, "speed=1", ratio=0.9)
    history = train.fit_(model, images(), PREPROCESSING, settings(epochs=4), hooks=[method], keep="last")
    assert method.search.reach < 1e-2
    assert len(history.epochs) == 5


@pytest.mark.parametrize("pair", ["factor=-1", "others=0", "speed=0", "anneal=0.5", "threshold=0", "stop=1", "init=none"])
def test_a_wrong_value_is_named(pair):
    with pytest.raises(UsageError, match=pair.partition("=")[0]):
        parse_options(Hinge, [pair])


@pytest.mark.parametrize("preset", _hinge_search.PRESETS)
def test_presets_are_the_papers_and_give_way_to_what_is_set(preset):
    options = parse_options(Hinge, [f"preset={preset}"])
    assert (options.factor, options.by) == (_hinge_search.PRESETS[preset]["factor"], "norm")
    mine = parse_options(Hinge, [f"preset={preset}", "factor=0", "regularizer=l1", "balance=error"])
    assert (mine.factor, mine.regularizer, mine.balance) == (0.0, "l1", "error")


# The command

TRAINED = ("--epochs", "2", "--finetune-epochs", "2", "--save-every", "2", "--batch-size", "100", "--precision", "float32")


def searching(folder: Path, *flags: str) -> list[str]:
    to = ("--method", "hinge", "--ratio", "0.6", "--data", "digits", "-o", str(folder / "out"))
    return ["compress", str(folder / "net.pt"), *to, *flags]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    torch.save(named("cifar:resnet8", width=4, num_classes=10).state_dict(), folder / "net.pt")
    flags = (*TRAINED, "--history", str(folder / "epochs.jsonl"))
    assert command(*searching(folder, *flags)).exit_code == 0
    return folder


def test_a_search_and_fine_tuning_in_one_command(unbroken):
    assert sorted(path.name for path in unbroken.iterdir()) == ["epochs.jsonl", "net.pt", "out"]
    epochs = [json.loads(line) for line in (unbroken / "epochs.jsonl").read_text().splitlines()]
    assert {(epoch["stage"], epoch["epoch"]) for epoch in epochs} >= {
        ("search", 0),
        ("search", 1),
        ("finetune", 0),
        ("finetune", 2),
    }
    one = artefact.open_model(unbroken / "out")
    assert [step.command for step in one.recipe.steps] == ["compress", "finetune"]
    assert one.recipe.steps[0].options["search"]["teacher"] == one.recipe.steps[1].options["teacher"] == "net.pt"
    assert one.recipe.source.measures.accuracy is not None
    assert (one.recipe.steps[0].options["search"]["lr"], one.recipe.steps[1].options["lr"]) == (0.05, 0.05)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_killed_command_goes_on_in_either_stage(stages, unbroken, tmp_path):
    (tmp_path / "net.pt").write_bytes((unbroken / "net.pt").read_bytes())
    flags = (*TRAINED, "--history", str(tmp_path / "epochs.jsonl"))
    process_of_its_own = [sys.executable, "-m", "compactcli", *searching(tmp_path, *flags)]
    with subprocess.Popen(process_of_its_own, stderr=subprocess.PIPE, text=True) as process:
        begun, epochs = 0, 0
        while begun < stages or not epochs:  # the first epoch of the stage is over, and so kept
            line = process.stderr.readline()
            begun, epochs = (begun + 1, 0) if line.startswith("before training") else (begun, epochs + line.startswith("epoch"))
        process.kill()
    if stages == 1:
        other = command(*searching(tmp_path, *flags, "--ratio", "0.5", "--resume"))
        assert (other.exit_code, "the run there has ratio 0.6, this one 0.5" in other.stderr) == (1, True)
    done = command(*searching(tmp_path, *flags, "--resume"))
    assert (done.exit_code, "resumed at step" in done.stderr) == (0, True)
    assert (tmp_path / "out").read_bytes() == (unbroken / "out").read_bytes()
    assert told(tmp_path) == told(unbroken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epochs.jsonl", "net.pt", "out"]


def test_what_is_left_of_a_decomposed_networks_run_is_enough_to_end_it(tmp_path):
    """Its learning rates are those of the weights that it began with, not of those that are left."""
    one = network()
    compress(one, "hinge", Hinge(parse_options(Hinge, ["mode=decompose"])), Target(0.5))
    artefact.save(one, str(tmp_path / "small"))
    one = artefact.open_model(tmp_path / "small")
    chosen = Settings(epochs=2, batch_size=12, precision="float32", save_every=2)
    whole = weights(finetune(artefact.open_model(tmp_path / "small"), images(), chosen).module)
    kept, steps = tmp_path / "run.safetensors", 0

    def progress(done: int, total: int) -> None:
        nonlocal steps
        steps += 1
        if steps == 14:
            raise DeadError

    with pytest.raises(DeadError):
        finetune(one, images(), chosen, kept=kept, watch=Watch(progress=progress))
    left = artefact.open_interrupted(kept)
    assert same(whole, weights(finetune(left, images(), chosen, kept=kept, resume=True).module))


def told(folder: Path) -> list[tuple[str, int, float]]:
    """Stage, epoch and accuracy of each line of the history."""
    lines = (json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines())
    return [(line["stage"], line["epoch"], line["accuracy"]) for line in lines]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--epochs", "1", "--no-calibrate"), "--epochs and --finetune-epochs need images: give --data"),
        (("--epochs", "1", "--keep", "none"), "--keep none: it is best or last"),
        (("--epochs", "1", "--schedule", "none"), "schedule is none; it must be cosine, milestones or constant"),
        (("--epochs", "1", "--state", "NET"), "that is another file of this command"),
        (("--epochs", "1", "--set", "mode=prune", "--set", "factor=-1"), "factor=-1: it is 0 or more"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message, unbroken):
    flags = tuple(str(unbroken / "net.pt") if flag == "NET" else flag for flag in flags)
    assert message in one_line(command(*searching(unbroken, *flags)), 2)


def test_nothing_to_search_is_one_line(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(file.CompactError, match="there is nothing here that this method can make smaller"):
        begun(model, "mode=decompose")
