"""How alike filters and activations are, by hand and against definitions."""

import numpy as np
import pytest
import torch

from compactcli import redundancy

HADAMARD = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])[1:]  # orthogonal, of mean zero


def test_orthogonal_filters_are_not_redundant():
    found = redundancy.of(HADAMARD.reshape(3, 1, 2, 2))
    assert found.max_abs_corr == pytest.approx(0, abs=1e-12)
    assert found.mean_abs_corr == pytest.approx(0, abs=1e-12)
    assert found.effective_rank == pytest.approx(3)
    assert found.rank_ratio_99 == 1


@pytest.mark.parametrize("factor", [1.0, -2.0, 0.001])
def test_copies_are_redundant(factor):
    """Of any size and sign: a correlation does not see them."""
    weight = torch.randn(1, 8, 3, 3).repeat(5, 1, 1, 1)
    weight[0] *= factor
    found = redundancy.of(weight)
    assert found.max_abs_corr == pytest.approx(1, abs=1e-6)
    assert found.mean_abs_corr == pytest.approx(1, abs=1e-6)
    assert found.effective_rank == pytest.approx(1, abs=1e-2)
    assert found.rank_ratio_99 == 1 / 5


def test_a_pair_of_copies_among_orthogonal_filters():
    weight = torch.cat([HADAMARD, 3 * HADAMARD[:1]])
    found = redundancy.of(weight)
    assert found.max_abs_corr == pytest.approx(2 / 4)  # two of four filters have a twin
    assert found.mean_abs_corr == pytest.approx(2 / 12)


def test_the_rank_that_holds_the_energy():
    """Singular values 10, 1, 1, ...: 100 of 102 is less than 99 %, 101 of 102 is more."""
    left, right = torch.linalg.qr(torch.randn(3, 3)).Q, torch.linalg.qr(torch.randn(7, 3)).Q
    found = redundancy.of(left @ torch.diag(torch.tensor([10.0, 1.0, 1.0])) @ right.T)
    assert found.rank_ratio_99 == pytest.approx(2 / 3)
    share = torch.tensor([10.0, 1.0, 1.0]) / 12
    assert found.effective_rank == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-4)


@pytest.mark.parametrize("shape", [(20, 3, 1, 1), (3, 20, 1, 1)])
def test_tall_and_wide_weights_give_the_same_rank(shape):
    weight = torch.randn(shape)
    values = torch.linalg.svdvals(weight.flatten(1).double())
    share = values / values.sum()
    assert redundancy.of(weight).effective_rank == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-6)


KINDS = [
    (torch.nn.Linear(4, 6), (3, 4)),
    (torch.nn.Conv1d(4, 6, 3), (4, 9)),
    (torch.nn.Conv2d(4, 6, 3), (4, 5, 6)),
    (torch.nn.Conv3d(4, 6, (1, 3, 3)), (4, 2, 5, 6)),
    (torch.nn.ConvTranspose1d(4, 6, 3), (4, 9)),
    (torch.nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 6)),
    (torch.nn.ConvTranspose3d(4, 6, 3), (4, 2, 3, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), KINDS, ids=lambda value: type(value).__name__)
def test_activations_are_alike_along_the_channels(layer, shape):
    """Of any number of dimensions: as the correlations of numpy say, of the channels' values."""
    images = torch.randn(8, *shape)
    (found,) = redundancy.of_activations(torch.nn.Sequential(layer), ["0"], [images]).values()
    with torch.no_grad():
        made = layer(images)
    values = made.movedim(-1 if isinstance(layer, torch.nn.Linear) else 1, 0).flatten(1)
    alike = abs(np.corrcoef(values.double().numpy())) - np.eye(6)
    assert found.max_abs_corr == pytest.approx(alike.max(1).mean(), abs=1e-4)
    assert found.mean_abs_corr == pytest.approx(alike.sum() / 30, abs=1e-4)


def test_what_has_no_redundancy():
    assert redundancy.of(torch.randn(1, 4, 3, 3)) is None
    assert redundancy.of(torch.full((3, 4), float("nan"))) is None
    assert redundancy.of(torch.tensor([[1.0, float("inf")], [1.0, 2.0]])) is None
    assert redundancy.of(torch.zeros(3, 4)) == redundancy.Redundancy(0.0, 0.0, 0.0, 0.0)
