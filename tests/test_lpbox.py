"""Projections onto the box and the sphere are the nearest points, and ADMM between them ends at zeros and ones."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compactcli.lpbox import Admm, Penalty, onto_box, onto_sphere

# PAPERS.md 2.1.
POINT = (0.9, 0.6, 0.4, -0.2)
IN_BOX = (0.9333, 0.6333, 0.4333, 0.0)
ON_SPHERE = (0.98868, 0.62217, 0.37783, -0.35518)


def rows(*points: Any, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(points filled up with NaN, their sizes): what lies behind a row's end must not matter."""
    sizes = torch.tensor([len(each) for each in points])
    filled = torch.full((len(points), int(sizes.max())), torch.nan, dtype=dtype)
    for row, each in zip(filled, points, strict=True):
        row[: len(each)] = torch.as_tensor(each, dtype=dtype)
    return filled, sizes


def box(point: Any, count: int, dtype: torch.dtype = torch.float64) -> Any:
    filled, sizes = rows(point, dtype=dtype)
    return onto_box(filled, torch.tensor([count]), sizes)[0].double().numpy()


def bisected(point: Any, count: int) -> Any:
    """The same by bisection on t, where the sum of clip(x - t, 0, 1) is the count."""
    x = np.asarray(point, dtype=np.float64)
    low, high = x.min() - 2, x.max() + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(x - middle, 0, 1).sum() > count else (low, middle)
    return np.clip(x - high, 0, 1)


def random_rows(count: int = 60) -> list[tuple[Any, int]]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 70, count)
    return [(generator.normal(0.5, generator.choice([0.1, 1, 30]), n), int(generator.integers(0, n + 1))) for n in lengths]


TIED = [
    ((1.0, 1.0, 1.0, 1.0), 2),
    ((0.3, 0.3, 0.7, 0.7, 0.7), 3),
    ((0.0, 1.0, 0.0, 1.0), 1),
    ((2.0, 1.0, 0.0, -1.0), 2),
    ((5.0,), 1),
    ((5.0,), 0),
    (POINT, 0),
    (POINT, 4),
    ((1e6, -1e6, 1e6, 0.25, 0.5), 3),
    ((-1e6, -1e6, -1e6), 2),
    ((1e6, 1e6 - 0.5, 1e6 - 3), 1),
]


def test_the_published_vectors():
    filled, sizes = rows(POINT)
    assert onto_box(filled, torch.tensor([2]), sizes)[0].tolist() == pytest.approx(IN_BOX, abs=5e-5)
    assert onto_sphere(filled, sizes)[0].tolist() == pytest.approx(ON_SPHERE, abs=1e-5)


@pytest.mark.parametrize(("point", "count"), [*random_rows(), *TIED])
def test_onto_the_box_equals_bisection(point, count):
    found = box(point, count)
    assert found == pytest.approx(bisected(point, count), abs=1e-9)
    assert found.sum() == pytest.approx(count, abs=1e-9)


@pytest.mark.parametrize(("point", "count"), random_rows(20))
def test_float32_is_as_good_as_it_can_be(point, count):
    assert box(point, count, torch.float32) == pytest.approx(bisected(np.float32(point), count), abs=1e-4)


@pytest.mark.parametrize(("point", "count"), [*random_rows(20), *TIED[:4]])
def test_no_random_point_of_the_box_is_nearer(point, count):
    x = np.asarray(point)
    nearest = np.linalg.norm(box(x, count) - x)
    generator = np.random.default_rng(1)
    for spread in (0.01, 0.3, 3.0):
        for _ in range(50):
            other = bisected(box(x, count) + generator.normal(0, spread, len(x)), count)
            assert np.linalg.norm(other - x) >= nearest - 1e-9


def test_rows_together_equal_each_alone():
    given = random_rows()
    filled, sizes = rows(*(point for point, _ in given))
    together = onto_box(filled, torch.tensor([count for _, count in given]), sizes)
    sphere = onto_sphere(filled, sizes)
    for place, (point, count) in enumerate(given):
        alone, size = rows(point)
        n = len(point)
        assert torch.equal(together[place, :n], onto_box(alone, torch.tensor([count]), size)[0])
        torch.testing.assert_close(sphere[place, :n], onto_sphere(alone, size)[0], rtol=1e-12, atol=1e-12)
        assert not together[place, n:].any()
        assert not sphere[place, n:].any()


@pytest.mark.parametrize(("point", "count"), random_rows(20))
def test_onto_the_sphere_keeps_the_direction(point, count):
    filled, sizes = rows(point)
    away = onto_sphere(filled, sizes)[0].numpy() - 0.5
    assert (away**2).sum() == pytest.approx(len(point) / 4)
    assert away @ (point - 0.5) == pytest.approx(np.linalg.norm(away) * np.linalg.norm(point - 0.5))


def test_from_the_middle_of_the_sphere_it_goes_to_ones():
    """The authors divide by zero there."""
    filled, sizes = rows((0.5, 0.5, 0.5), (0.5,), (1.0, 0.5, 0.5, 0.5))
    assert onto_sphere(filled, sizes)[:2].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert onto_sphere(filled, sizes)[2].tolist() == [1.5, 0.5, 0.5, 0.5]


def test_onto_the_box_equals_osqp():
    osqp, sparse = pytest.importorskip("osqp"), pytest.importorskip("scipy.sparse")
    for point, count in [*random_rows(12), *TIED[:4]]:
        n = len(point)
        solver = osqp.OSQP()
        bounds = sparse.vstack([sparse.eye(n), np.ones((1, n))], format="csc")
        precise = {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 100_000, "verbose": False}
        lower, upper = np.array([*[0.0] * n, count]), np.array([*[1.0] * n, count])
        solver.setup(sparse.eye(n, format="csc"), -np.asarray(point, dtype=float), bounds, lower, upper, **precise)
        assert box(point, count) == pytest.approx(solver.solve(raise_error=True).x, abs=1e-6)


# ADMM


def drawn(admm: Admm, v: Tensor, steps: int, rate: float = 0.1) -> Tensor:
    for _ in range(steps):
        v = v - rate * admm.gradient(v)
        admm.step(v)
    return v


def started(counts: tuple[int, ...] = (3, 1, 5, 0), sizes: tuple[int, ...] = (8, 4, 5, 6), seed: int = 0) -> tuple[Admm, Tensor]:
    """ADMM, and random vectors."""
    v = torch.rand(len(sizes), max(sizes), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor(sizes)
    v[torch.arange(max(sizes)) >= lengths[:, None]] = 0.0
    return Admm(torch.tensor(counts), lengths, max(sizes), Penalty()), v


@pytest.mark.parametrize("seed", range(5))
def test_alone_it_ends_at_zeros_and_as_many_ones_as_asked_for(seed):
    admm, v = started(seed=seed)
    v = drawn(admm, v, 1500)
    for row, count, size in zip(v, admm.counts.tolist(), admm.sizes.tolist(), strict=True):
        assert torch.minimum(row.abs(), (row - 1).abs()).max() < 0.02
        assert int((row > 0.5).sum()) == count
        assert not row[size:].any()


def test_the_gradient_is_that_of_the_penalty():
    """y1 (v - z1) + y2 (v - z2) + rho / 2 (|v - z1|^2 + |v - z2|^2)."""
    admm, v = started()
    v = drawn(admm, v, 20)
    v.requires_grad_()
    gradient = admm.gradient(v.detach())
    first, second = v - admm.z1, v - admm.z2
    ((admm.y1 * first).sum() + (admm.y2 * second).sum() + admm.rho / 2 * (first**2 + second**2).sum()).backward()
    torch.testing.assert_close(gradient, v.grad * (gradient != 0), rtol=1e-5, atol=1e-6)


def test_the_penalty_grows_up_to_its_most():
    """In 643 steps, as the paper's constants have it."""
    admm, v = started()
    drawn(admm, v, 642)
    assert admm.rho < 6
    admm.step(v)
    assert admm.rho == 6
    admm.step(v)
    assert admm.rho == 6


def test_it_goes_on_where_another_left_off():
    admm, v = started()
    v = drawn(admm, v, 100)
    state = {name: tensor.clone() for name, tensor in admm.state_dict().items()}
    whole = drawn(admm, v, 100)
    other, _ = started()
    other.load_state_dict(state)
    assert torch.equal(drawn(other, v, 100), whole)
    assert other.rho == admm.rho
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in admm.state_dict().items())
