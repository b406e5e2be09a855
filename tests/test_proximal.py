"""Each operator is the minimiser that it claims to be, found by brute force; and the published test vectors."""

import math

import numpy as np
import pytest
import torch

from compactcli.proximal import OPERATORS, l0, l1, l1_minus_2, l_half, log_sum

NORMS = torch.tensor([0.01, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("operator", "norm", "factor"),
    [
        (l1, 1, 0.9),
        (l_half, 1, 0.974677),
        (l_half, 0.5, 0.926540),
        (l_half, 0.25, 0.772439),
        (l_half, 0.203581 - 1e-5, 0),
        (log_sum, 1, 0.887298),
        (log_sum, 0.7, 0.714286),
        (log_sum, 0.6, 0),
        (l0, math.sqrt(0.2) - 1e-6, 0),
        (l0, math.sqrt(0.2) + 1e-6, 1),
    ],
)
def test_the_published_vectors_at_a_step_of_a_tenth(operator, norm, factor):
    assert operator(torch.tensor([norm], dtype=torch.float64), 0.1).item() == pytest.approx(factor, abs=1e-6)


def test_the_published_vector_of_l1_minus_2():
    found = l1_minus_2(torch.tensor([1, 0.5, 0.05], dtype=torch.float64), 0.1)
    assert found.tolist() == pytest.approx([0.991381, 0.881228, 0], abs=1e-6)


def test_half_thresholding_begins_at_its_cut_off():
    cut_off = 54 ** (1 / 3) / 4 * 0.1 ** (2 / 3)
    assert cut_off == pytest.approx(0.203581, abs=1e-6)
    assert l_half(torch.tensor([cut_off * 1.0001], dtype=torch.float64), 0.1) > 0.6


@pytest.mark.parametrize(
    ("operator", "objective"),
    [
        (l1, lambda x, n, t: (x - n) ** 2 / 2 + t * x),
        (l_half, lambda x, n, t: (x - n) ** 2 + t * np.sqrt(x)),
        (l0, lambda x, n, t: (x - n) ** 2 / 2 + t * (x > 0)),
    ],
)
@pytest.mark.parametrize("t", [0.03, 0.1, 0.5])
def test_an_operator_minimises_its_objective(operator, objective, t):
    grid = np.linspace(0, 4, 400_001)
    for n, factor in zip(NORMS.tolist(), operator(NORMS, t).tolist(), strict=True):
        best = grid[np.argmin(objective(grid, n, t))]
        assert factor * n == pytest.approx(best, abs=2e-5)


@pytest.mark.parametrize("t", [0.02, 0.1, 0.5])
def test_log_sum_is_stationary_and_the_larger_root(t):
    """x - n + t / x = 0 has two roots where n^2 > 4 t."""
    for n, factor in zip(NORMS.tolist(), log_sum(NORMS, t).tolist(), strict=True):
        roots = np.roots([1, -n, t])
        expected = max(roots.real) if np.isreal(roots).all() and n * n > 4 * t else 0
        assert factor * n == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("norms", [(1.0, 0.4), (0.3, 0.25), (0.09, 0.02), (0.05, 0.01)])
def test_l1_minus_2_minimises_its_objective(norms):
    grid = np.linspace(0, 1.2, 601)
    x, y = np.meshgrid(grid, grid, indexing="ij")
    objective = ((x - norms[0]) ** 2 + (y - norms[1]) ** 2) / 2 + 0.1 * (x + y - np.hypot(x, y))
    first, second = np.unravel_index(np.argmin(objective), objective.shape)
    found = l1_minus_2(torch.tensor(norms, dtype=torch.float64), 0.1) * torch.tensor(norms)
    assert found.tolist() == pytest.approx([grid[first], grid[second]], abs=3e-3)


@pytest.mark.parametrize("name", OPERATORS)
def test_groups_only_shrink_and_the_larger_stay_larger(name):
    """Of l1-2 the length is kept, so the largest may grow; nothing is NaN where all is zero."""
    for t in (1e-4, 0.1, 10.0):
        factors = OPERATORS[name](NORMS, t)
        assert (factors >= 0).all()
        assert name == "l1-2" or (factors <= 1).all()
        assert (factors.diff() >= -1e-12).all()
        nothing = OPERATORS[name](torch.zeros(3), t)
        assert nothing.isfinite().all()
        assert (nothing * torch.zeros(3) == 0).all()


@pytest.mark.parametrize("name", OPERATORS)
def test_a_step_of_nothing_changes_nothing(name):
    torch.testing.assert_close(OPERATORS[name](NORMS, 1e-14), torch.ones_like(NORMS), rtol=0, atol=1e-6)
