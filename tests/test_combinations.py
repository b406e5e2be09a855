"""Filters as combinations, kernels as slices, and forms within a budget: as good as it gets, and no worse than the start."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compactcli import artefact, surgery
from compactcli.allocate import Choice, allocate
from compactcli.methods import _linear_layers
from compactcli.methods._combinations import Combination, Curves, Form, fit, pivots
from compactcli.methods._csg_plans import Curve
from compactcli.methods._errors import Metric
from compactcli.methods._slices import Sliced, Slicing, directions, made, refine, scored, solve_codes, solve_generator

OUTPUTS, READS = 14, 27  # of the layer (14, 3, 3, 3)
SEEDS = range(6)
METRICS = ("plain", "weighted", "images")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def definite(size: int, seed: int) -> Tensor:
    """A positive definite matrix, far from the identity."""
    factor = random(size, size, seed=seed) * torch.logspace(0, -1.5, size, dtype=torch.float64)
    return factor @ factor.T + 1e-3 * torch.eye(size, dtype=torch.float64)


def metric(kind: str, seed: int = 0, outputs: int = OUTPUTS, reads: int = READS) -> Metric:
    """That of the weights alone, of a batch normalisation behind the layer, of images."""
    if kind == "plain":
        return Metric(torch.eye(outputs, dtype=torch.float64), None)
    if kind == "weighted":
        return Metric(torch.diag(random(outputs, seed=seed + 10).square() + 0.05), None)
    return Metric(definite(outputs, seed + 20), definite(reads, seed + 30))


def diagonal(kind: str, seed: int = 0) -> Metric:
    """The same, with outputs that count each for itself: where the curves are exact."""
    whole = metric(kind, seed)
    return Metric(torch.diag(whole.outputs.diagonal()), whole.inputs)


def cost(weight: Tensor, measure: Metric, form: Form) -> float:
    return measure.cost(weight - fit(weight, measure, form).kernel())


# Forms within a budget


def choices(seed: int, layers: int = 4, forms: int = 5, *, convex: bool = False) -> list[Choice]:
    generator = np.random.default_rng(seed)
    result = []
    for _ in range(layers):
        costs = np.arange(forms, dtype=float) if convex else generator.uniform(1, 10, forms)
        saved = np.sort(generator.uniform(0, 1, forms - 1))[::-1]
        errors = saved.sum() - np.concatenate([[0.0], saved.cumsum()]) if convex else generator.uniform(0, 5, forms)
        result.append(Choice(costs, errors))
    return result


def spent(given: list[Choice], forms: Any) -> tuple[float, float]:
    """(cost, error) of forms."""
    pairs = list(zip(given, forms, strict=True))
    return sum(float(each.costs[form]) for each, form in pairs), sum(float(each.errors[form]) for each, form in pairs)


def best(given: list[Choice], target: float) -> float:
    """The least error of all that cost no more, by trying all."""
    every = (spent(given, forms) for forms in itertools.product(*(range(len(each.costs)) for each in given)))
    return min((error for paid, error in every if paid <= target + 1e-9), default=float("inf"))


@pytest.mark.parametrize("seed", range(20))
def test_equal_steps_that_help_ever_less_are_chosen_best(seed):
    given = choices(seed, convex=True)
    for target in range(17):
        paid, error = spent(given, allocate(given, target + 0.5))
        assert paid <= target + 0.5
        assert error == pytest.approx(best(given, target), abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_any_others_are_chosen_best_but_for_one_layers_step(seed):
    """What is left over is less than one layer's forms differ by."""
    given = choices(seed)
    step = max(float(np.ptp(each.costs)) for each in given)
    least = sum(float(each.costs.min()) for each in given)
    for target in np.linspace(least, 40, 8):
        chosen = allocate(given, float(target))
        paid, error = spent(given, chosen)
        assert paid <= target + 1e-9
        assert best(given, float(target)) - 1e-9 <= error <= best(given, float(target) - step)
        for index, form in itertools.product(range(4), range(5)):  # nothing better is left that one layer could be
            other = [form if i == index else kept for i, kept in enumerate(chosen)]
            assert spent(given, other)[0] > target or spent(given, other)[1] >= error


def test_what_is_out_of_reach_gives_the_cheapest():
    given = [Choice(np.array([3.0, 2.0, 2.0]), np.array([0.0, 5.0, 4.0])), Choice(np.array([7.0]), np.array([0.0]))]
    assert allocate(given, 8.5) == [2, 0]
    assert allocate([], 1.0) == []


def test_there_is_no_price_where_all_may_be_whole():
    given = choices(3)
    chosen = allocate(given, 1e9)
    assert chosen == [int(each.errors.argmin()) for each in given]


# Primary filters


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(14, 27), (20, 5), (8, 8)])
def test_pivots_are_those_of_qr(seed, shape):
    linalg = pytest.importorskip("scipy.linalg")
    weight = random(*shape, seed=seed)
    count = min(shape)
    assert pivots(weight @ weight.T, count).tolist() == linalg.qr(weight.T.numpy(), pivoting=True)[2][:count].tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_no_row_is_taken_twice(seed):
    """Even where those that are left are combinations of those that were taken."""
    weight = random(12, 3, seed=seed) @ random(3, 20, seed=seed + 1)
    order = pivots(weight @ weight.T, 12).tolist()
    assert sorted(order) == list(range(12))


# The best combinations


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("variant", ["full", "lowrank", "sparse"])
def test_the_chosen_filters_are_primary_and_the_others_made(kind, variant):
    found = fit(random(OUTPUTS, READS), metric(kind), Form(variant, 5, {"full": 0, "lowrank": 2, "sparse": 20}[variant]))
    kernel = found.kernel()
    assert torch.equal(kernel[found.chosen], found.primary)
    torch.testing.assert_close(kernel[found.others], found.coefficients @ found.primary)
    assert torch.equal(found.chosen, found.chosen.unique())
    assert found.chosen.tolist() + found.others.tolist() != list(range(OUTPUTS))
    assert sorted(found.chosen.tolist() + found.others.tolist()) == list(range(OUTPUTS))


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_kernel_of_that_rank_is_met_exactly(kind, seed):
    weight = random(OUTPUTS, 5, seed=seed) @ random(5, READS, seed=seed + 1)
    scale = metric(kind, seed).cost(weight)
    for form in (Form("full", 5), Form("lowrank", 5, 5), Form("sparse", 5, 5 * 9)):
        assert cost(weight, metric(kind, seed), form) < 1e-6 * scale


@pytest.mark.parametrize("kind", METRICS)
def test_as_many_primary_filters_as_inputs_are_enough(kind):
    weight = random(OUTPUTS, 6)
    measure = metric(kind, reads=6)
    assert cost(weight, measure, Form("full", 6)) < 1e-8 * measure.cost(weight)


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("seed", SEEDS)
def test_full_is_the_best_matrix_of_the_rank_as_the_curve_says(kind, seed):
    weight, measure = random(OUTPUTS, READS, seed=seed), metric(kind, seed)
    curves, whole = Curves(weight, measure), measure.cost(weight)
    left = torch.linalg.cholesky(measure.outputs).T
    right = torch.eye(READS, dtype=torch.float64) if measure.inputs is None else torch.linalg.cholesky(measure.inputs)
    energy = torch.linalg.svdvals(left @ weight @ right).square()
    for p in range(1, OUTPUTS):
        assert cost(weight, measure, Form("full", p)) == pytest.approx(float(energy[p:].sum()), rel=1e-3, abs=1e-5 * whole)
        assert curves.full(p) == pytest.approx(float(energy[p:].sum()), rel=1e-3, abs=1e-5 * whole)


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_fit_is_no_worse_than_its_start(kind, seed):
    """Filters as they are, coefficients by least squares, of those the best of the rank or the largest."""
    weight, measure = random(OUTPUTS, READS, seed=seed), diagonal(kind, seed)
    curves = Curves(weight, measure)
    for p in (2, 5, 8):
        for rank in (1, 2, p):
            error = cost(weight, measure, Form("lowrank", p, rank))
            assert error <= curves.lowrank(p)[min(rank, OUTPUTS - p)] * (1 + 1e-6)
        counts = np.array([1, 10, (OUTPUTS - p) * p])
        for count, start in zip(counts.tolist(), curves.sparse(p, counts), strict=True):
            assert cost(weight, measure, Form("sparse", p, count)) <= start * (1 + 1e-6)


def started(weight: Tensor, measure: Metric, p: int) -> Combination:
    """Pivoted QR and least squares, by numpy."""
    scaled = measure.outputs.diagonal().sqrt()[:, None] * weight
    chosen = pivots(measure.read(scaled) @ scaled.T, p).sort().values
    others = torch.tensor([row for row in range(len(weight)) if row not in chosen.tolist()])
    root = np.eye(READS) if measure.inputs is None else np.linalg.cholesky(measure.inputs.numpy())
    solved = np.linalg.lstsq((weight[chosen].numpy() @ root).T, (weight[others].numpy() @ root).T, rcond=None)[0]
    return Combination(chosen, weight[chosen], torch.from_numpy(solved.T))


@pytest.mark.parametrize("kind", METRICS)
def test_the_curves_tell_the_error_of_the_start(kind):
    weight, measure = random(OUTPUTS, READS), diagonal(kind)
    curves = Curves(weight, measure)
    for p in (2, 5, 8):
        error = measure.cost(weight - started(weight, measure, p).kernel())
        assert curves.lowrank(p)[-1] == pytest.approx(error, rel=1e-3)
        assert curves.sparse(p, np.array([p * (OUTPUTS - p)]))[0] == pytest.approx(error, rel=1e-3)
        assert curves.lowrank(p)[0] == pytest.approx(
            measure.cost(torch.where(torch.isin(torch.arange(OUTPUTS), curves.order[:p])[:, None], 0, weight)), rel=1e-3
        )


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("seed", SEEDS)
def test_more_numbers_lose_less(kind, seed):
    weight, measure = random(OUTPUTS, READS, seed=seed), metric(kind, seed)
    curves = Curves(weight, measure)
    assert np.all(np.diff([curves.full(p) for p in range(1, OUTPUTS)]) < 0)
    assert np.all(np.diff(curves.lowrank(6)) <= 0)
    assert np.all(np.diff(curves.sparse(6, np.array([1, 8, 24, 48]))) < 0)
    assert np.all(np.diff([cost(weight, measure, Form("full", p)) for p in range(1, OUTPUTS)]) < 0)
    for variant, numbers in (("lowrank", (1, 2, 4, 6)), ("sparse", (1, 8, 24, 48))):
        assert np.all(np.diff([cost(weight, measure, Form(variant, 6, n)) for n in numbers]) < 0), variant


@pytest.mark.parametrize("kind", METRICS)
def test_a_fit_has_the_rank_and_the_count_that_were_asked_for(kind):
    weight, measure = random(OUTPUTS, READS), metric(kind)
    for size in (1, 3):
        assert torch.linalg.matrix_rank(fit(weight, measure, Form("lowrank", 6, size)).coefficients) == size
    for size in (1, 7, 48):
        assert int((fit(weight, measure, Form("sparse", 6, size)).coefficients != 0).sum()) == size


@pytest.mark.parametrize("kind", METRICS)
def test_the_metric_matters(kind):
    """In its own metric a fit is better than that for another."""
    weight, measure = random(OUTPUTS, READS), metric(kind)
    for form in (Form("full", 5), Form("lowrank", 5, 2), Form("sparse", 5, 20)):
        for other in METRICS:
            if other != kind:
                foreign = measure.cost(weight - fit(weight, metric(other), form).kernel())
                assert cost(weight, measure, form) < foreign


# What is stored


@pytest.mark.parametrize(
    "form",
    [
        *(Form("full", 5), Form("full", 1), Form("full", 13)),
        *(Form("lowrank", 5, 2), Form("lowrank", 5, 5), Form("lowrank", 5, 9), Form("lowrank", 12, 10)),
        *(Form("sparse", 5, 1), Form("sparse", 5, 20), Form("sparse", 5, 45), Form("sparse", 13, 13)),
    ],
    ids=lambda form: f"{form.variant}-{form.primary}-{form.size}",
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_stores_what_was_found_in_so_many_numbers(form, bias):
    plain = nn.Conv2d(3, OUTPUTS, 3, padding=1, bias=bias).double()
    weight = plain.weight.detach().flatten(1)
    found = fit(weight, metric("images"), form)
    model = nn.Sequential(plain)
    surgery.apply_(model, [_linear_layers.edit("0", plain, form, found)])
    layer: Any = model[0]
    torch.testing.assert_close(layer.kernel().flatten(1), found.kernel(), rtol=1e-10, atol=1e-12)
    assert sum(each.numel() for each in layer.parameters()) == form.cost(OUTPUTS, READS) + OUTPUTS * bias
    assert layer.bias is None or torch.equal(layer.bias, plain.bias)


@pytest.mark.parametrize("size", [1, 7, 20, 44, 45])
def test_so_many_coefficients_are_stored_and_their_bits_set(size):
    plain = nn.Conv2d(3, OUTPUTS, 3, bias=False).double()
    found = fit(plain.weight.detach().flatten(1), metric("weighted"), Form("sparse", 5, size))
    tensors = _linear_layers.edit("0", plain, Form("sparse", 5, size), found).tensors
    bits = np.unpackbits(tensors["mask"].numpy(), bitorder="little")
    assert len(tensors["values"]) == np.count_nonzero(tensors["values"]) == bits.sum() == size
    assert np.array_equal(bits[: 9 * 5].reshape(9, 5) == 1, found.coefficients.numpy() != 0)
    assert len(tensors["mask"]) == 6  # 45 bits
    assert not bits[45:].any()


# Slices


def sliced(shapes: list[tuple[int, ...]], kind: str, slicing: tuple[int, int] = (4, 4), rows: bool = False) -> list[Sliced]:
    result = []
    for seed, shape in enumerate(shapes):
        own = metric(kind, seed, shape[0], int(np.prod(shape[1:])))
        measure = Metric(own.outputs.float(), None if own.inputs is None else own.inputs.float())
        result.append(Sliced(random(*shape, seed=seed).float(), measure, Slicing(shape, *slicing, rows)))
    return result


def total(layers: list[Sliced], generator: Tensor, codes: list[Tensor]) -> float:
    pairs = zip(layers, codes, strict=True)
    return sum(layer.cost(layer.weight - made(layer, generator, own)) for layer, own in pairs)


SHAPES = [(8, 8, 3, 3), (12, 8, 3, 3), (10, 6, 3, 3)]


def truncated(layers: list[Sliced], size: int) -> tuple[Tensor, list[Tensor]]:
    """Generator and codes by the SVD of all slices, each number as good as any other."""
    slices = [layer.slicing.cut(layer.weight) for layer in layers]
    generator = torch.linalg.svd(torch.cat(slices), full_matrices=False).Vh[:size].T
    return generator, [own @ generator for own in slices]


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("size", [1, 5, 9])
def test_refinement_is_better_than_its_start_and_than_svd(kind, rows, size):
    layers = sliced(SHAPES, kind, rows=rows)
    svd, own = truncated(layers, size)
    unweighted = total(layers, svd, own)
    start = directions(layers)[:, :size]
    before = total(layers, start, [layer.slicing.cut(layer.weight) @ start for layer in layers])
    generator, codes = refine(layers, start)
    after = total(layers, generator, codes)
    assert after <= min(before, unweighted) * (1 + 1e-4)
    assert kind == "plain" or after < 0.99 * unweighted
    torch.testing.assert_close(generator.T @ generator, torch.eye(size), rtol=1e-4, atol=1e-4)
    assert total(layers, *refine(layers, svd)) <= unweighted * (1 + 1e-4)


def test_without_a_metric_svd_is_what_is_best():
    layers = sliced([(8, 8, 3, 3), (16, 8, 3, 3)], "plain")
    expected = total(layers, *truncated(layers, 5))
    assert total(layers, *refine(layers, directions(layers)[:, :5])) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", METRICS)
def test_longer_codes_lose_less_until_nothing_is_lost(kind):
    layers = sliced(SHAPES, kind)
    every = directions(layers)
    count = sum(layer.slicing.count for layer in layers)
    errors = [total(layers, *refine(layers, every[:, :size])) for size in (1, 3, 6, 10, count)]
    assert np.all(np.diff(errors) < 0)
    assert errors[-1] < 1e-6 * errors[0]


@pytest.mark.parametrize("kind", METRICS)
def test_plans_are_scored_by_what_their_best_codes_lose(kind):
    layers = sliced(SHAPES, kind)
    for size in (1, 4, 8):
        basis = directions(layers)[:, :size]
        for layer, loss in zip(layers, scored(layers, basis), strict=True):
            best = total([layer], *refine([layer], basis, frozen=True))
            assert best * (1 - 1e-3) <= loss <= 1.3 * best


def test_a_wide_layer_is_scored_by_some_of_its_filters():
    """Those are spread over all, the last, that no block is full of, among them."""
    (layer,) = sliced([(66, 8, 3, 3)], "images")
    part, index = layer.part(12), torch.tensor([0, 1, 2, 3, 32, 33, 34, 35, 64, 65])
    assert torch.equal(part.weight, layer.weight[index])
    assert torch.equal(part.metric.outputs, layer.metric.outputs[index][:, index])
    assert part.slicing.count == 3 * 2
    assert layer.part(68) is layer
    (wide,) = sliced([(128, 8, 3, 3)], "weighted")
    basis = directions([wide])[:, :8]
    assert scored([wide], basis) == pytest.approx([total([wide], *refine([wide], basis, frozen=True))], rel=0.5)


@pytest.mark.parametrize("outputs", [8, 16])
@pytest.mark.parametrize("dead", [range(0), (*range(8), *range(56, 64)), range(24, 40), range(16), range(48)])
def test_filters_that_count_for_nothing_do_not_hide_what_others_lose(dead, outputs):
    """Not where they are those by which a layer is scored, nor where they are none of these."""
    worth = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    worth[list(dead)] = 0
    layer = Sliced(random(64, 32, 3, 3).float(), Metric(torch.diag(worth), None), Slicing((64, 32, 3, 3), outputs, 8))
    basis = directions([layer])[:, :4]
    assert scored([layer], basis) == pytest.approx([total([layer], *refine([layer], basis, frozen=True))], rel=0.1)


@pytest.mark.parametrize("kind", METRICS)
def test_a_frozen_generator_stays_and_its_codes_are_the_best(kind):
    layers = sliced(SHAPES[:1], kind)
    given = random(144, 3, seed=9).float()
    generator, (codes,) = refine(layers, given, frozen=True)
    assert torch.equal(generator, given)
    error = total(layers, given, [codes])
    better = solve_codes(layers[0], given, codes, 200)
    assert total(layers, given, [better]) <= error * (1 + 1e-5)
    for seed in range(5):
        moved = better + 0.05 * random(*codes.shape, seed=seed).float()
        assert total(layers, given, [moved]) > total(layers, given, [better])


def test_one_step_is_enough_where_every_slice_counts_alike_within():
    """However far from the identity that is, and however much more one slice counts than another."""
    shape, powers = (16, 8, 3, 3), torch.logspace(0, -2, 4, dtype=torch.float64)
    outputs = torch.block_diag(*(power * definite(4, 1) for power in powers))
    inputs = torch.block_diag(*(power * definite(36, 2) for power in powers[:2]))
    layer = Sliced(random(*shape, seed=3).float(), Metric(outputs.float(), inputs.float()), Slicing(shape, 4, 4))
    given, nothing = random(144, 5, seed=4).float(), torch.zeros(8, 5)
    best, once = (total([layer], given, [solve_codes(layer, given, nothing, steps)]) for steps in (500, 1))
    assert once - best < 1e-3 * (layer.cost(layer.weight) - best)


def test_one_step_finds_the_generator_where_every_slice_counts_alike_within():
    shape = (16, 8, 3, 3)
    outputs, inputs = torch.block_diag(*[definite(4, 1)] * 4), torch.block_diag(*[definite(36, 2)] * 2)
    layer = Sliced(random(*shape, seed=3).float(), Metric(outputs.float(), inputs.float()), Slicing(shape, 4, 4))
    codes, nothing = random(8, 5, seed=4).float(), torch.zeros(144, 5)
    best, once = (total([layer], solve_generator([layer], nothing, [codes], steps), [codes]) for steps in (500, 1))
    assert once - best < 1e-3 * (layer.cost(layer.weight) - best)


def test_losses_between_sizes_follow_their_logarithm_and_layers_count_by_their_shares():
    curve = Curve(("p",), ("a", "b"), 10, 7, np.array([1, 3]), np.array([[5.0, 1.0], [5.0, 0.01]]))
    plans = list(curve.plans({"a": 0.0, "b": 1.0}, between=True))
    assert [(cost, plan.size) for cost, _, plan in plans] == [(17.0, 1), (24.0, 2), (31.0, 3)]
    assert [loss for _, loss, _ in plans] == pytest.approx([1.0, 0.1, 0.01])


def test_a_generator_of_which_a_part_is_idle_has_codes_as_well():
    """From a file it may be any."""
    layers = sliced(SHAPES[:1], "weighted")
    given = random(144, 3, seed=9).float()
    idle = torch.cat([given, given[:, :1], torch.zeros(144, 1)], 1)
    error = total(layers, *refine(layers, given, frozen=True))
    assert total(layers, *refine(layers, idle, frozen=True)) == pytest.approx(error, rel=1e-3)


def test_refinement_gives_the_same_bits_every_time():
    layers = sliced(SHAPES, "images")
    start = directions(layers)[:, :5]
    first, *others = [refine(layers, start) for _ in range(4)]
    for generator, codes in others:
        assert torch.equal(generator, first[0])
        assert all(map(torch.equal, codes, first[1]))


def test_slices_of_depthwise_kernels_have_directions_too():
    """They are mostly zeros, of which float32 does not find the directions for every network."""
    model = artefact.fresh(artefact.Wishes("mobilenet_v2", input_shape=(3, 32, 32)), 0)
    found = [layer for layer in model.module.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)]
    layers = []
    for layer in found:
        weight = layer.weight.detach()
        layers.append(Sliced(weight, Metric(torch.eye(len(weight)), None), Slicing(tuple(weight.shape), 8, 8)))
    basis = directions(layers)
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-4)
    for layer in layers:
        rows = layer.slicing.cut(layer.weight)
        assert float((rows - rows @ basis @ basis.T).square().sum()) <= 1e-4 * float(rows.square().sum())
