"""A budget of latency: what a table says, and that it drives what MACs would where time is MACs."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from networks import named
from test_compress import own

from compactcli import budget, timing
from compactcli.artefact import Wishes, fresh
from compactcli.budget import Budget
from compactcli.channels import find
from compactcli.compress import Target, compress
from compactcli.errors import CompactError
from compactcli.graph import trace
from compactcli.layers import Layer, layers
from compactcli.methods import fcf, get
from compactcli.timing import SHARES, Table, Timed


def proportional(found: list[Layer], whole: float) -> Table:
    """Of a machine on which time is multiply-accumulates, and nothing else takes any."""

    def points(first: int, second: int, each: float) -> tuple[timing.Point, ...]:
        return tuple((int(a * first), int(b * second), int(a * first) * int(b * second) * each) for a in SHARES for b in SHARES)

    layers = tuple(
        Timed(
            layer.name,
            layer.shape,
            points(*layer.shape[:2], layer.positions * layer.kernel),
            points(layer.shape[0], layer.shape[0], layer.positions),
            (),
        )
        for layer in found
    )
    return Table("own", (3, 32, 32), 1, 1, "cpu", "none", "2", "contiguous", whole, layers)


@pytest.mark.parametrize("terms", [(0.0, 1.0, 2.0, 3.0), (5.0, 0.0, 0.0, 0.1), (1.0, 0.0, 2.0, 0.0)])
def test_a_curve_is_what_it_was_measured_on(terms):
    a, b, c, d = terms
    points = [(out, into, a + b * out + c * into + d * out * into) for out in (64, 32, 16) for into in (48, 24, 12)]
    assert np.allclose(timing._fitted(points), terms, rtol=1e-4, atol=1e-6)


def test_a_curve_never_falls():
    """Whatever noise says, more channels never take less time."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        points = [(out, into, float(generator.uniform(0.1, 1))) for out in (64, 32, 16) for into in (48, 24, 12)]
        found = timing._fitted(points)
        assert (found >= 0).all()
        assert found.any()
    assert not timing._fitted([]).any()


def test_where_time_is_macs_latency_is_macs():
    model = named("cifar:resnet8", width=16)
    graph = trace(model, (3, 32, 32))
    channels, found = find(graph, model), layers(graph)
    macs = Budget(graph, channels, model, ratio=0.5)
    table = proportional(found, macs.original)
    latency = Budget(graph, channels, model, ratio=0.5, of="latency", times=table.times(found))
    generator = np.random.default_rng(0)
    for _ in range(20):
        along, ranks = macs.along(), macs.ranks()
        for family, per_set in zip(macs.families, macs.per_set, strict=True):
            along -= generator.integers(0, len(family.sets)) * per_set
        for index in generator.choice(len(ranks) - 1, 3, replace=False):
            ranks[index] = generator.integers(1, 8)
        assert latency.cost(along, ranks) == pytest.approx(float(macs.cost(along, ranks)), rel=1e-3)
        out, into = along[latency._out], along[latency._in] * latency._kernel
        assert np.allclose(latency.most_ranks(along), out * into / (out + into), rtol=1e-3)  # where both take as long


def test_at_its_most_rank_a_layer_takes_as_long_decomposed_as_whole():
    """Of layers that take any time to begin, to read, to write and to compute."""
    model = named("cifar:resnet8", width=16)
    graph = trace(model, (3, 32, 32))
    channels, found, chance = find(graph, model), layers(graph), np.random.default_rng(0)
    terms = [budget.LayerTime(chance.uniform(1, 2, 4), chance.uniform(0, 0.1, 4), chance.uniform(0, 0.1, 4)) for _ in found]
    times = budget.Times(dict(zip((layer.name for layer in found), terms, strict=True)), 1e6)
    task = Budget(graph, channels, model, ratio=0.5, of="latency", times=times)
    along, whole = task.along(), float(task.cost(task.along(), task.ranks()))
    for index, most in enumerate(task.most_ranks(along)):
        ranks = task.ranks()
        ranks[index] = most
        assert task.cost(along, ranks) == pytest.approx(whole, rel=1e-12)
        ranks[index] = 0.9 * most
        assert task.cost(along, ranks) < whole - 1e-6


def test_what_layers_do_not_take_goes_by_their_outputs():
    model = named("cifar:resnet8", width=16)
    graph = trace(model, (3, 32, 32))
    channels, found = find(graph, model), layers(graph)
    macs = Budget(graph, channels, model, ratio=0.5)
    times = proportional(found, 3 * macs.original).times(found)
    latency = Budget(graph, channels, model, ratio=0.5, of="latency", times=times)
    assert latency.original == pytest.approx(3 * macs.original)
    half = latency.along()
    half[latency._out] /= 2
    kept = float(latency.cost(half, latency.ranks())) - float(macs.cost(half, macs.ranks()))
    assert kept == pytest.approx(macs.original, rel=1e-3)
    short = Budget(graph, channels, model, ratio=0.5, of="latency", times=proportional(found, 0.5 * macs.original).times(found))
    assert short.original == pytest.approx(0.5 * macs.original)  # layers that take longer alone than together


def test_estimates_are_in_the_unit_of_the_budget():
    """What an estimate says is saved, in milliseconds where these are what is counted: of all that is computed, all."""
    model = named("cifar:resnet8", width=16)
    graph = trace(model, (3, 32, 32))
    channels, found = find(graph, model), layers(graph)
    plain = Budget(graph, channels, model, ratio=0.5)
    whole = float(plain.time(plain.along(), plain.ranks()))
    latency = Budget(graph, channels, model, ratio=0.5, of="latency", times=proportional(found, 7.0).times(found))
    assert plain.taken(whole) == whole
    assert latency.taken(whole) == pytest.approx(float(latency.time(latency.along(), latency.ranks())))


def test_no_way_of_fcf_saves_more_than_the_network_takes(monkeypatch):
    """What squeezing saves is taken from milliseconds: it was multiply-accumulates, so that it always won."""
    model = named("cifar:resnet20")
    graph = trace(model, (3, 32, 32))
    channels, ways, best = find(graph, model), [], fcf._best
    task = Budget(graph, channels, model, ratio=0.6, of="latency", times=proportional(layers(graph), 5.0).times(layers(graph)))
    monkeypatch.setattr(fcf, "_best", lambda found, *others: ways.extend(found) or best(found, *others))
    fcf.FCF(fcf.FCF.Options(residual="auto")).start(model, channels, task)
    assert len(ways) == 3
    assert all(0 < way.time < 5.0 for way in ways)


@pytest.mark.parametrize(
    "model",
    [
        torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
            torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.BatchNorm2d(8),
            torch.nn.Conv2d(8, 12, 3, groups=4, stride=2), torch.nn.ConvTranspose2d(12, 6, 2, stride=2), torch.nn.BatchNorm2d(6),
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, 5),
        ),
        torch.nn.Sequential(
            torch.nn.Flatten(2), torch.nn.Conv1d(3, 8, 3, padding=1), torch.nn.BatchNorm1d(8),
            torch.nn.Unflatten(2, (1, 8, 8)), torch.nn.Conv3d(8, 6, (1, 3, 3)), torch.nn.BatchNorm3d(6),
            torch.nn.ConvTranspose3d(6, 4, 1), torch.nn.Flatten(2), torch.nn.ConvTranspose1d(4, 4, 2),
            torch.nn.Flatten(), torch.nn.Linear(148, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 5),
        ),
        named("cifar:resnet8"),
    ],
    ids=["kinds", "dimensions", "resnet"],
)  # fmt: skip
def test_every_layer_is_timed(model, monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    given = own(model)
    table = timing.table(given, threads=1)
    found = layers(trace(given.module, given.input_shape))
    assert [(timed.name, timed.shape) for timed in table.layers] == [(layer.name, layer.shape) for layer in found]
    for timed, layer in zip(table.layers, found, strict=True):
        assert max(point[:2] for point in timed.kernel) == layer.shape[:2]
        assert all(ms > 0 for part in (timed.kernel, timed.pointwise, timed.after) for _, _, ms in part)
        assert bool(timed.after) == (layer.norm is not None)
    path = tmp_path / "table.json"
    path.write_bytes(table.dumps())
    assert timing.load(path) == table
    graph = trace(given.module, given.input_shape)
    times = table.times(found)
    measured = Budget(graph, find(graph, given.module), given.module, ratio=0.5, of="latency", times=times)
    assert measured.original == pytest.approx(table.whole_ms)
    with pytest.raises(CompactError, match="of another network"):
        table.times(layers(trace(named("cifar:resnet8", width=4), (3, 32, 32))))


def test_a_layer_of_another_kind_takes_no_time_of_its_own(monkeypatch):
    """Its time is of what the network takes beside the layers that are timed."""
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    given = own(Attention())
    table = timing.table(given, threads=1)
    found = layers(trace(given.module, given.input_shape))
    timed = {timed.name: timed for timed in table.layers}
    assert timed["attention"].kernel == timed["attention"].pointwise == timed["attention"].after == ()
    assert timed["first"].kernel
    assert table.times(found).whole == table.whole_ms


class Attention(torch.nn.Module):
    """A layer whose weight is of none of torch's linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention = torch.nn.Conv2d(3, 8, 8, stride=8), torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        pixels = self.first(input=image).flatten(2).transpose(1, 2)
        return self.attention(pixels, pixels, pixels)[0].mean(1)


def test_a_table_of_a_network_with_layers_of_a_method_is_of_what_compress_makes_of_them(monkeypatch):
    """Which are plain convolutions, not the two that such a layer runs as."""
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    given = fresh(Wishes("cifar:resnet8"), 0)
    compress(given, "hetconv", get("hetconv")(), Target(0.6))
    table = timing.table(given, threads=1)
    compress(given, "hinge", get("hinge")(), Target(0.7, of="latency", table=table))
    assert [step.method for step in given.recipe.steps] == ["hetconv", "hinge"]


def test_a_table_of_other_inputs_is_refused(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    given = fresh(Wishes("cifar:resnet8"), 0)
    table = timing.table(given, input_shape=(3, 16, 16), threads=1)
    with pytest.raises(CompactError, match="the latency table is of 3x16x16 inputs, the network takes 3x32x32; measure it anew"):
        compress(given, "hinge", get("hinge")(), Target(0.7, of="latency", table=table))


def test_widths_beyond_all_sense_are_no_table():
    found = layers(trace(named("cifar:resnet8"), (3, 32, 32)))
    tree = json.loads(proportional(found, 5.0).dumps())
    assert timing.loads(json.dumps(tree), "t").whole_ms == 5.0
    for width in (10**200, -1):
        tree["layers"][0]["kernel"][0][0] = width
        with pytest.raises(CompactError, match="t is not a latency table"):
            timing.loads(json.dumps(tree), "t")


def test_layers_that_differ_by_a_bias_are_timed_apart(monkeypatch):
    """And those of other widths have the padding of the layer."""
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    made: list[tuple[bool, str]] = []

    def noted(module: torch.nn.Module, *arguments: Any) -> timing.Timer:
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            made.append((module.bias is not None, module.padding_mode))
        return timer(module, *arguments)

    timer = timing.timer
    monkeypatch.setattr(timing, "timer", noted)
    kinds = [(True, "reflect"), (False, "reflect"), (False, "zeros")]
    convs = [torch.nn.Conv2d(8, 8, 3, padding=1, bias=bias, padding_mode=mode) for bias, mode in kinds]
    timing.table(own(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), *convs, torch.nn.Flatten(), torch.nn.Linear(512, 5))))
    assert set(made) == set(kinds)
