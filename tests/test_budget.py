"""The cost of a candidate is that of the network it becomes, and the search lands on the target without building any."""

import copy
import itertools
import re
from dataclasses import replace

import networks
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import AWKWARD, SHAPE, named, random_network
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compactcli import channels, surgery
from compactcli.budget import Budget
from compactcli.dials import Dial, State, solve
from compactcli.errors import CompactError
from compactcli.graph import trace
from compactcli.layers import layers
from compactcli.methods import get
from compactcli.recipe import Replace

get("hinge")  # registers the decomposed layer
CIFAR_SHAPE = (3, 32, 32)


def counted(model: nn.Module, shape: tuple[int, ...], of: str) -> int:
    """What the network costs by torch's own counters."""
    if of == "params":
        return sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    return counter.get_total_flops() // 2


def plan(model: nn.Module, shape: tuple[int, ...], **options: object) -> tuple[Budget, channels.Channels]:
    graph = trace(model, shape)
    sets = channels.find(graph, model)
    return Budget(graph, sets, model, **{"ratio": 0.5, **options}), sets


def built(model: nn.Module, sets: channels.Channels, task: Budget, widths: dict[int, int], ranks: dict[int, int]) -> nn.Module:
    """The network with that many sets of each family, and layers of that rank."""
    removed = [int(number) for index, count in widths.items() for number in task.families[index].sets[count:]]
    edits = channels.edits(sets, removed, model)
    edits += [Replace(task.layers[index].name, "hinge.decomposed", {"rank": rank}) for index, rank in ranks.items()]
    small = copy.deepcopy(model)
    surgery.apply_(small, edits)
    return small


def candidate(model: nn.Module, sets: channels.Channels, task: Budget, seed: int) -> tuple[float, nn.Module]:
    """A random candidate: its cost as the budget has it, and the network it is."""
    chance = np.random.default_rng(seed)
    along, ranks_at = task.along(), task.ranks()
    widths = {}
    for index, family in enumerate(task.families):
        step = along - task.per_set[index] * len(family.sets)  # what other families have left along each axis
        most = len(family.sets) if (step[task.per_set[index] > 0] > 0).all() else len(family.sets) - 1
        widths[index] = len(family.sets) - int(chance.integers(0, most + 1)) if most else len(family.sets)
        along -= task.per_set[index] * (len(family.sets) - widths[index])
    ranks = {}
    for index, layer in enumerate(task.layers):
        module = model.get_submodule(layer.name)
        if layer.called and layer.groups == 1 and isinstance(module, nn.Conv2d | nn.Linear) and chance.random() < 0.4:
            limit = min(along[task._out[index]], along[task._in[index]] * layer.kernel)
            ranks[index] = ranks_at[index] = int(chance.integers(1, limit + 1))
    return float(task.cost(along, ranks_at)), built(model, sets, task, widths, ranks)


NETWORKS = [
    ("cifar:resnet20", {"shortcut": "pad"}, CIFAR_SHAPE),
    ("cifar:resnet8", {"shortcut": "conv"}, CIFAR_SHAPE),
    ("cifar:resnext20", {}, CIFAR_SHAPE),
    ("cifar:densenet_bc40_36", {}, CIFAR_SHAPE),
    ("mobilenet_v2", {}, (3, 64, 64)),
    ("squeezenet1_1", {}, (3, 64, 64)),
    ("vgg11_bn", {}, (3, 64, 64)),
]


@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize(("name", "kwargs", "shape"), NETWORKS, ids=[name for name, _, _ in NETWORKS])
def test_the_cost_of_a_candidate_is_the_built_networks(name, kwargs, shape, of):
    model = named(name, **kwargs)
    task, sets = plan(model, shape, of=of)
    assert task.original == counted(model, shape, of)
    for seed in range(2):
        cost, small = candidate(model, sets, task, seed)
        assert cost == counted(small, shape, of)
        assert cost < task.original


@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("name", AWKWARD)
def test_the_cost_of_a_candidate_of_an_awkward_network(name, of):
    model = AWKWARD[name]()
    task, sets = plan(model, SHAPE, of=of)
    assert task.original == counted(model, SHAPE, of)
    for seed in range(4):
        cost, small = candidate(model, sets, task, seed)
        assert cost == counted(small, SHAPE, of)


blocks = st.lists(st.tuples(st.integers(0, len(networks.BLOCKS) - 1), st.integers(0, 41)), min_size=1, max_size=4)


@settings(max_examples=25)
@given(blocks=blocks, flat=st.booleans(), of=st.sampled_from(["macs", "params"]), seed=st.integers(0, 99))
def test_the_cost_of_a_candidate_of_a_random_network(blocks, flat, of, seed):
    model = random_network(blocks, flat)
    task, sets = plan(model, SHAPE, of=of)
    cost, small = candidate(model, sets, task, seed)
    assert cost == counted(small, SHAPE, of)


def test_layers_are_named_once_in_the_order_in_which_they_run():
    model = nn.Sequential(networks.conv(3, 8), networks.twice()[1], networks.conv(8, 6, stride=2), *networks.head(6))
    found = layers(trace(model, SHAPE))
    assert [(layer.name, layer.positions) for layer in found] == [("0", 64), ("1.layer", 128), ("2", 16), ("5", 1)]
    assert [layer.macs for layer in found] == [64 * 8 * 27, 128 * 8 * 72, 16 * 6 * 72, 6 * 5]
    assert [layer.kernel for layer in found] == [9, 9, 9, 1]
    assert sum(layer.macs for layer in found) == counted(model, SHAPE, "macs")


@pytest.mark.parametrize("last", ["normed", "plain"])
def test_a_layer_is_normed_only_if_it_is_each_time_that_it_is_called(last):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls = [lambda x: self.norm(self.conv(x)), lambda x: self.conv(x).sigmoid()]
            for call in calls if last == "plain" else reversed(calls):
                x = call(x)
            return x.mean((2, 3))

    (layer,) = layers(trace(Twice().eval(), SHAPE))
    assert not layer.normed


def test_families_hold_every_free_set_once():
    model = named("cifar:densenet_bc40_36")
    task, sets = plan(model, CIFAR_SHAPE)
    members = [int(number) for family in task.families for number in family.sets]
    assert sorted(members) == sorted({int(n) for ids in sets.axes.values() for n in ids} - set(sets.locked))
    for family in task.families:
        for axis, positions in family.axes:
            assert [int((sets.axes[axis] == number).sum()) for number in family.sets] == [positions] * len(family.sets)


# The search


def dials_of(task: Budget, seed: int, floor: int = 1) -> list[Dial]:
    """A dial for every family and every plain layer, with random falling errors."""
    chance = np.random.default_rng(seed)

    def falling(full: int) -> np.ndarray:
        return np.append(np.sort(chance.exponential(size=full).cumsum())[::-1] / full, 0.0)

    widths = [Dial(falling(len(f.sets)), task.step(len(f.sets)), floor, family=i) for i, f in enumerate(task.families)]
    ranks = [
        Dial(falling(min(layer.shape[0], layer.shape[1] * layer.kernel)), task.step(layer.shape[0]), floor, layer=i)
        for i, layer in enumerate(task.layers)
        if layer.groups == 1 and not layer.transposed
    ]
    return widths + ranks


def cost_of(task: Budget, dials: list[Dial], values: list[int]) -> float:
    along, ranks = task.along(), task.ranks()
    for dial, value in zip(dials, values, strict=True):
        if dial.family is not None:
            along -= task.per_set[dial.family] * (dial.full - value)
        elif value < dial.full:
            ranks[dial.layer] = value
    return float(task.cost(along, ranks))


@pytest.mark.parametrize("round_to", [None, 4])
@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.83, 0.99])
def test_the_search_lands_within_one_step_below_the_target(ratio, of, round_to):
    for name, kwargs, shape in (NETWORKS[0], NETWORKS[1]):
        task, _ = plan(named(name, **kwargs), shape, ratio=ratio, of=of, round_to=round_to)
        for seed in range(2):
            dials = dials_of(task, seed)
            values = solve(task, dials)
            cost = cost_of(task, dials, values)
            assert cost <= ratio * task.original
            for index, (dial, value) in enumerate(zip(dials, values, strict=True)):
                assert value in dial.settings
                assert value == dial.full or value % dial.step == 0
                above = dial.settings[dial.settings > value]
                for larger in above[:1]:  # no dial could be one step larger
                    assert cost_of(task, dials, [*values[:index], int(larger), *values[index + 1 :]]) > ratio * task.original


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("ratio", [0.35, 0.45, 0.55, 0.65, 0.75, 0.85])
def test_between_coarse_steps_the_search_takes_the_dearest_state_it_finds(ratio, step):
    """Of layers so narrow that no channel count comes near to the target."""
    model = nn.Sequential(networks.conv(3, 8), nn.ReLU(), networks.conv(8, 8), nn.ReLU(), networks.conv(8, 8), *networks.head(8))
    task, _ = plan(model, SHAPE, ratio=ratio)
    dials = [Dial(np.linspace(1, 0, len(f.sets) + 1) ** 2, step, 1, family=i) for i, f in enumerate(task.families)]
    values = solve(task, dials)
    assert cost_of(task, dials, values) <= task.target
    loose = [index for index, value in enumerate(values) if value % step]
    assert len(loose) <= 1
    for index in loose or range(len(dials)):
        if values[index] < 8:
            more = [*values[:index], values[index] + 1, *values[index + 1 :]]
            assert cost_of(task, dials, more) > task.target


@pytest.mark.parametrize("share", [0.003, 0.03])
@pytest.mark.parametrize("seed", range(4))
def test_landing_takes_the_least_error_near_the_target_of_what_one_dial_or_two_can_reach(seed, share):
    """One dial goes up by less than its step; or by a step, and another comes down by as little as fits."""
    task, _ = plan(named("cifar:resnet8"), CIFAR_SHAPE)
    dials = [replace(dial, step=8) for dial in dials_of(task, seed)]
    chance = np.random.default_rng(seed)
    state = State(task, dials, task.cost)
    state.set(start := [int(chance.choice(dial.settings[:-1])) for dial in dials])
    task.target = cost_of(task, dials, start) + share * task.original

    def changed(values: list[int], index: int, value: int) -> list[int]:
        return [*values[:index], value, *values[index + 1 :]]

    def pays(values: list[int], index: int) -> bool:
        """Whether the dial's layer is decomposed into what is no slower, or is whole."""
        layer, along = dials[index].layer, task.along()
        for dial, value in zip(dials, values, strict=True):
            if dial.family is not None:
                along -= task.per_set[dial.family] * (dial.full - value)
        return layer is None or values[index] == dials[index].full or values[index] <= task.most_rank(layer, along)

    reached = [start]
    for index, dial in enumerate(dials):
        ups = [int(up) for up in dial.settings[dial.settings > start[index]] if pays(changed(start, index, int(up)), index)]
        for up in ups[:1]:
            ways = {index: [changed(start, index, value) for value in range(start[index] + 1, up)]}
            for other in set(range(len(dials))) - {index}:
                down = range(int(dials[other].settings[0]), start[other])
                ways[other] = [changed(changed(start, index, up), other, value) for value in down]
            for moved, way in ways.items():
                fits = [each for each in way if cost_of(task, dials, each) <= task.target and pays(each, moved)]
                reached += [max(fits, key=lambda each: cost_of(task, dials, each))] if fits else []
    near = [each for each in reached if cost_of(task, dials, each) >= task.target - 0.01 * task.original]
    state.land()
    assert state.values in (near or reached)
    if near:
        assert state.error(state.values) == pytest.approx(min(map(state.error, near)))
    else:
        assert cost_of(task, dials, state.values) == max(cost_of(task, dials, each) for each in reached)


@pytest.mark.parametrize(("least", "way"), [(1.0, "makes nothing smaller here; try another --method"), (0.62, "--ratio 0.62")])
def test_what_is_out_of_reach_names_a_way_out(least, way):
    task, _ = plan(named("cifar:resnet20"), CIFAR_SHAPE, ratio=0.5)
    assert way in str(task.out_of_reach(least * task.original))


@pytest.mark.parametrize("step", [5, 8, 64])
def test_steps_that_leave_the_target_out_of_reach_are_given_up(step):
    model = nn.Sequential(networks.conv(3, 12), nn.ReLU(), networks.conv(12, 10), *networks.head(10))
    task, _ = plan(model, SHAPE, ratio=0.2)
    dials = [Dial(np.arange(len(f.sets), -1, -1.0), step, 1, family=i) for i, f in enumerate(task.families)]
    smallest = [int(dial.settings[0]) for dial in dials]
    assert cost_of(task, dials, smallest) > task.target
    values = solve(task, dials)
    assert task.target / 2 < cost_of(task, dials, values) <= task.target
    rounded, _ = plan(model, SHAPE, ratio=0.2, round_to=step)
    with pytest.raises(CompactError, match="out of reach"):
        solve(rounded, dials)


@pytest.mark.parametrize("threshold", [1e-9, 1e-8, 1e-7])
def test_where_a_threshold_settles_no_dial_would_rather_have_another_setting(threshold):
    task, _ = plan(named("cifar:resnet20"), CIFAR_SHAPE)
    for seed in range(4):
        dials = dials_of(task, seed)
        state = State(task, dials, task.cost)
        state.settle(threshold)
        for index, dial in enumerate(dials):
            values = [[*state.values[:index], int(other), *state.values[index + 1 :]] for other in dial.settings]
            scores = [state.error(each) + threshold * cost_of(task, dials, each) for each in values]
            assert scores[dial.settings.tolist().index(state.values[index])] == pytest.approx(min(scores), rel=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_what_is_left_of_the_budget_goes_where_it_saves_most_error_for_its_cost(seed):
    """Of each dial the next setting, or all that there is, where that may be cheaper."""
    task, _ = plan(named("cifar:resnet20"), CIFAR_SHAPE, round_to=4)
    dials = dials_of(task, seed)
    state = State(task, dials, task.cost)
    chance = np.random.default_rng(seed)
    state.set([int(chance.choice(dial.settings)) for dial in dials])
    start, before = list(state.values), float(task.cost(state.along, state.ranks))
    moves = []
    for index, dial in enumerate(dials):
        for other in {*dial.settings[dial.settings > start[index]][:1].tolist(), dial.full} - {start[index]}:
            values = [*start[:index], int(other), *start[index + 1 :]]
            extra, saved = cost_of(task, dials, values) - before, state.error(start) - state.error(values)
            if saved > 0 and not (
                dial.layer is not None and other < dial.full and other > task.most_rank(dial.layer, state.along)
            ):
                moves.append((saved / max(extra, 1e-9), extra, values))
    best, extra, values = max(moves)
    found = [move for index in range(len(dials)) if (move := state.raise_(index, np.inf)) is not None]
    assert max(found)[0] == pytest.approx(best)
    task.target, made, move = before + max(extra, 0.0) + 1e-6, [], state.move
    state.move = lambda index, value: made.append((index, value)) or move(index, value)
    state.fill()
    assert made[0] == next((index, now) for index, (old, now) in enumerate(zip(start, values, strict=True)) if now != old)


def test_the_search_builds_nothing(monkeypatch):
    task, _ = plan(named("cifar:resnet20"), CIFAR_SHAPE)
    dials = dials_of(task, 0)

    def no_module(*_args: object, **_options: object) -> None:
        raise AssertionError("a module was made")

    monkeypatch.setattr(nn.Module, "__init__", no_module)
    monkeypatch.setattr(surgery, "apply_", no_module)
    monkeypatch.setattr(copy, "deepcopy", no_module)
    solve(task, dials)


def test_the_search_is_near_the_best_of_all_combinations():
    """Least important first, so that errors grow ever faster: two widths, every combination tried out."""
    model = nn.Sequential(networks.conv(3, 8), nn.ReLU(), networks.conv(8, 6), *networks.head(6))
    task, _ = plan(model, SHAPE, ratio=0.6)
    hits = 0
    for seed in range(20):
        chance = np.random.default_rng(seed)
        shares = [np.sort(chance.dirichlet(np.ones(len(family.sets)))) for family in task.families]
        dials = [Dial(np.append(np.cumsum(s)[::-1], 0.0), 1, 1, family=i) for i, s in enumerate(shares)]
        values = solve(task, dials)
        combinations = [[a, b] for a in range(1, 9) for b in range(1, 7)]
        errors = [[dial.errors[v] for dial, v in zip(dials, pair, strict=True)] for pair in combinations]
        fitting = [sum(e) for e, c in zip(errors, combinations, strict=True) if cost_of(task, dials, c) <= task.target]
        error = sum(dial.errors[v] for dial, v in zip(dials, values, strict=True))
        assert error <= 1.4 * min(fitting)
        hits += error <= 1.0001 * min(fitting)
    assert hits >= 15


def test_what_is_left_of_an_error_falls_with_the_layers_behind_and_with_how_much_is_lost():
    task, _ = plan(named("cifar:resnet20"), CIFAR_SHAPE)
    assert (task.left(0.0) == 1).all()
    assert task.left().tolist() == pytest.approx([1 / count for count in range(len(task.layers), 0, -1)])
    assert (task.left(5.0) == task.left()).all()
    for less, more in itertools.pairwise(task.left(lost) for lost in (0.01, 0.03, 0.1)):
        assert (np.diff(less) > 0).all()
        assert less[-1] == more[-1] == 1
        assert (more[:-1] < less[:-1]).all()


@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_layers_that_are_refitted_are_cut_the_earlier_the_worse_the_cut(scale):
    """Dials alike: where next to nothing is lost they are set alike, with refitting or without."""
    task, _ = plan(named("cifar:resnet20"), CIFAR_SHAPE, ratio=0.5)
    ranks = [index for index, layer in enumerate(task.layers) if layer.shape[:3] == (16, 16, 3)]
    dials = [Dial(scale * np.linspace(1, 0, 17) ** 2, 1, 1, layer=index) for index in ranks]
    task.target = 0.8 * task.original
    plain, refitted = solve(task, dials), solve(task, dials, refitted=True)
    assert cost_of(task, dials, refitted) <= task.target
    assert max(plain) - min(plain) <= 1
    if scale < 1:
        assert refitted == plain
    else:
        assert refitted[0] < plain[0] < refitted[-1]
        assert refitted == sorted(refitted)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "densenet_bc40_36"])
def test_a_change_has_its_place_at_the_first_layer_that_it_changes(name):
    task, _ = plan(named(f"cifar:{name}"), CIFAR_SHAPE)
    for index in range(len(task.layers)):
        assert task.place(None, index) == index
    for index, family in enumerate(task.families):
        makers = {axis[0] for axis, _ in family.axes if axis[1] == 0}
        layer = task.layers[task.place(index, None)]
        assert layer.weight in makers
        assert not any(before.weight in makers for before in task.layers[: task.place(index, None)])


def test_more_budget_is_never_more_error():
    errors = []
    for ratio in (0.2, 0.4, 0.6, 0.8, 0.95):
        task, _ = plan(named("cifar:resnet20"), CIFAR_SHAPE, ratio=ratio)
        dials = dials_of(task, 3)
        errors.append(sum(dial.errors[value] for dial, value in zip(dials, solve(task, dials), strict=True)))
    assert errors == sorted(errors, reverse=True)


def test_out_of_reach_names_a_ratio_that_works():
    model = named("cifar:resnet20")
    task, _ = plan(model, CIFAR_SHAPE, ratio=0.02)
    dials = [dial for dial in dials_of(task, 0, floor=4) if dial.family is not None]
    with pytest.raises(CompactError, match=r"--ratio 0\.02 of macs is out of reach: this method can keep no less than") as caught:
        solve(task, dials)
    nearest = float(re.search(r"try --ratio ([\d.]+), or --nearest", str(caught.value))[1])
    reached, _ = plan(model, CIFAR_SHAPE, ratio=nearest)
    assert cost_of(reached, dials, solve(reached, dials)) <= reached.target
    least, _ = plan(model, CIFAR_SHAPE, ratio=0.02, nearest=True)
    values = solve(least, dials)
    assert nearest - 0.001 < cost_of(least, dials, values) / least.original <= nearest
    assert all(value == dial.settings[0] for dial, value in zip(dials, values, strict=True))


def test_without_dials_there_is_nothing_to_choose():
    task, _ = plan(named("cifar:resnet8", width=4), CIFAR_SHAPE)
    with pytest.raises(CompactError, match="nothing here that this method can make smaller"):
        solve(task, [])


@pytest.mark.parametrize(
    ("full", "step", "floor", "settings_"),
    [
        (8, 1, 0, range(1, 9)),
        (8, 1, 3, range(3, 9)),
        (20, 8, 0, [8, 16, 20]),
        (20, 8, 9, [16, 20]),
        (20, 8, 17, [20]),
        (6, 8, 1, [6]),
        (16, 8, 16, [16]),
    ],
)
def test_settings_are_multiples_of_the_step_and_the_whole(full, step, floor, settings_):
    assert Dial(np.zeros(full + 1), step, floor, family=0).settings.tolist() == list(settings_)


@pytest.mark.parametrize(("width", "step"), [(63, 1), (64, 16), (512, 16)])
def test_time_is_priced_in_whole_vectors(width, step):
    task, _ = plan(networks.concatenation(), SHAPE, round_to=None)
    assert task.step(width, "time") == step


@pytest.mark.parametrize(("side", "each"), [(64, 100), (160, 100 + 1100 * 9 / 16), (256, 1200)])
def test_the_time_of_an_output_grows_with_the_memory_that_all_of_them_take(side, each):
    """In multiply-accumulates: 100 up to 2^24 bytes for 16 images, 1,200 from 2^25 on, and 120 for a weight."""
    network = nn.Sequential(networks.conv(3, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    task, _ = plan(network, (3, side, side))
    convolution = side**2 * (3 * 9 * 16 + each * 16) + 120 * 3 * 9 * 16
    linear = 10 * 16 + 100 * 10 + 120 * 10 * 16
    assert float(task.time(task.along(), task.ranks())) == pytest.approx(convolution + linear)


def test_a_layer_whose_weight_is_computed_is_none_that_another_may_replace():
    task, _ = plan(networks.standardised(), SHAPE)
    assert {layer.name: layer.called for layer in task.layers} == {"0": True, "2": True, "3": False, "5": True, "8": True}


@pytest.mark.parametrize(("round_to", "width", "step"), [(None, 64, 1), (None, 65, 8), (1, 512, 1), (4, 16, 4), (16, 100, 16)])
def test_small_layers_are_not_rounded(round_to, width, step):
    task, _ = plan(networks.concatenation(), SHAPE, round_to=round_to)
    assert task.step(width) == step


# Speed


@pytest.mark.parametrize("name", ["cifar:resnet20", "cifar:vgg11", "cifar:mobilenet_v2"])
def test_at_equal_cost_the_price_of_time_takes_a_candidate_that_is_no_slower(name):
    model = named(name)
    task, _ = plan(model, CIFAR_SHAPE)
    dials = toy_dials(task)
    times = {}
    for price in ("cost", "time"):
        state = State(task, dials, task.cost)
        state.set(solve(task, dials, price))
        assert task.cost(state.along, state.ranks) <= task.target
        times[price] = float(task.time(state.along, state.ranks))
    assert times["time"] <= times["cost"]


@pytest.mark.parametrize("name", ["cifar:resnet20", "cifar:vgg11", "resnet18"])
def test_no_layer_is_decomposed_into_what_is_slower(name):
    """The same network with one of its pairs merged again takes no less time, by the estimate."""
    model, shape = named(name), (3, 64, 64) if name == "resnet18" else CIFAR_SHAPE
    task, _ = plan(model, shape)
    state = State(task, dials := toy_dials(task), task.cost)
    state.set(solve(task, dials))
    assert np.isfinite(state.ranks).any()
    for layer in np.flatnonzero(np.isfinite(state.ranks)):
        merged = state.ranks.copy()
        merged[layer] = np.inf
        assert task.time(state.along, state.ranks) <= task.time(state.along, merged)
        assert state.ranks[layer] <= task.most_rank(layer, state.along)


@pytest.mark.parametrize("price", ["cost", "time"])
def test_a_rank_that_saves_macs_but_not_time_is_not_taken(price):
    """Every rank but those that save a little of the MACs does great harm; these do next to none."""
    task, _ = plan(named("cifar:resnet20"), CIFAR_SHAPE, ratio=0.95)
    dials = [Dial(np.linspace(1, 0, len(each.sets) + 1), 1, 1, family=i) for i, each in enumerate(task.families)]
    for index, layer in enumerate(task.layers[1:-1], 1):
        out, into = layer.shape[0], layer.shape[1] * layer.kernel
        errors = np.full(min(out, into) + 1, 1e-6)
        errors[: int(0.9 * out * into / (out + into))] = 9.0
        dials.append(Dial(np.append(errors, 0.0), 1, 1, layer=index))
    state = State(task, dials, task.cost)
    state.set(solve(task, dials, price))
    for layer in np.flatnonzero(np.isfinite(state.ranks)):
        assert state.ranks[layer] <= task.most_rank(layer, state.along)


def toy_dials(task: Budget) -> list[Dial]:
    """A dial for every family, and for every layer that is not grouped."""
    dials = [Dial(np.linspace(1, 0, len(each.sets) + 1), 1, 1, family=i) for i, each in enumerate(task.families)]
    for index, layer in enumerate(task.layers[1:-1], 1):
        if layer.groups == 1:
            limit = min(layer.shape[0], layer.shape[1] * layer.kernel)
            dials.append(Dial(np.append(0.1 * np.linspace(1, 0, limit + 1) ** 4, 0.0), 1, 1, layer=index))
    return dials


def test_steps_that_are_too_coarse_do_not_keep_the_search_from_its_target():
    """One dial leaves its grid, where nobody asked for one: a network of three wide layers, in sixteens of time."""
    task, _ = plan(
        nn.Sequential(networks.conv(3, 64), networks.conv(64, 64), networks.conv(64, 64), *networks.head(64)),
        (3, 8, 8),
        ratio=0.47,
        of="params",
    )
    dials = [Dial(np.linspace(1, 0, len(family.sets) + 1), 16, 1, family=index) for index, family in enumerate(task.families)]
    values = solve(task, dials)
    along = task.along() - sum((dial.full - n) * task.per_set[dial.family] for dial, n in zip(dials, values, strict=True))
    kept = float(task.cost(along, task.ranks())) / task.original
    assert 0.465 <= kept <= 0.47
    assert sum(n % 16 != 0 for n in values) <= 1
