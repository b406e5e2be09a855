"""The groups of hinge's matrices: what may go together, and where its weights are.

A matrix A is what a layer's kernel W = A W' is made with (`Product`), or a 1x1 convolution or linear layer that is one
already. A group is all that belongs to one thing that may go: a row of A, which reads one dimension of the layer's rank; a
column of A, which makes a channel, with the weights that read the channel behind it. (Behind a batch normalisation the column
alone would tell nothing: the network would not feel it shrink until it is gone.) Where a grouped convolution ties channels, all
that makes and reads them is one group, and of the channels of a bottleneck's 3x3 what reads them is.
Li et al., CVPR 2020 (Hinge), section 3.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..budget import Budget
from ..channels import Channels
from ..layers import Layer
from ._layers import unparametrize_
from ._widths import numbered

Init = Literal["svd2", "svd", "p-identity", "p-random", "disturbed-uniform", "disturbed-normal"]

NOISE = 0.05  # of the disturbed starts
SHORTEST = 0.1  # spectral norm of a factor from which on its other learns no faster: it may grow while the paces stay


class Product(nn.Module):
    """A kernel as a product: weight (o, i, k, k) = A (o, r) times W' (r, i, k, k)."""

    def __init__(self, init: Init, generator: torch.Generator) -> None:
        super().__init__()
        self.init, self.generator = init, generator

    def forward(self, matrix: Tensor, filters: Tensor) -> Tensor:
        with torch.autocast(matrix.device.type, enabled=False):
            return (matrix @ filters.flatten(1)).view(len(matrix), *filters.shape[1:])

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A and W' for a kernel: with every start their product is the kernel.

        svd2: W' = the right singular vectors, A = U S, so that the rows of A are as long as the singular values. svd: W' =
        S V, A = U. p-identity: A = 1. p-random: A is Xavier normal. disturbed: A = 1 + noise, its columns of length 1.
        """
        matrix = weight.flatten(1).double()  # (o, i*k*k)
        o = len(matrix)
        if self.init in ("svd2", "svd"):
            U, S, V = torch.linalg.svd(matrix, full_matrices=False)
            A, filters = (U * S, V) if self.init == "svd2" else (U, S[:, None] * V)
        else:
            normal = torch.randn(o, o, generator=self.generator, dtype=torch.float64)
            uniform = 2 * torch.rand(o, o, generator=self.generator, dtype=torch.float64) - 1
            identity = torch.eye(o, dtype=torch.float64)
            noisy = identity + NOISE * (uniform if self.init == "disturbed-uniform" else normal)
            disturbed = noisy / noisy.norm(dim=1, keepdim=True)
            A = {"p-identity": identity, "p-random": normal / o**0.5}.get(self.init, disturbed).to(weight.device)
            filters = torch.linalg.solve(A, matrix)
        return A.to(weight.dtype), filters.view(-1, *weight.shape[1:]).to(weight.dtype)


@dataclass(frozen=True)
class Carrier:
    """One axis of a parameter, along which its slices belong to groups."""

    parameter: str
    axis: int
    of: Tensor  # the number of each position's group; the count of groups where it is in none
    is_matrix: bool  # rather than what reads the channels that a matrix makes
    is_outer: bool  # whether its layer makes what other layers make as well: the last of a residual block
    is_normed: bool  # whether batch normalisations behind its layer undo any scaling of all of it


@dataclass(frozen=True)
class Groups:
    """What may go from one family of alike channels, or of one layer's rank."""

    count: int
    carriers: tuple[Carrier, ...]
    family: int | None = None  # index into the budget's families
    layer: int | None = None  # index into the budget's layers

    @property
    def outer(self) -> bool:
        """Whether its matrix, or the first of them, is the last of a residual block."""
        return self.carriers[0].is_outer

    def norms(self, model: nn.Module) -> Tensor:
        """The norm of every group (count,)."""
        energy = torch.zeros(())
        for carrier in self.carriers:
            weight = model.get_parameter(carrier.parameter).detach()
            energy = energy.to(weight.device) + self._energies(weight, carrier)
        return energy.sqrt()

    def slopes(self, model: nn.Module) -> Tensor:
        """The norm of every group's gradient in the matrices (count,)."""
        energy = torch.zeros(self.count)
        for carrier in (carrier for carrier in self.carriers if carrier.is_matrix):
            gradient = model.get_parameter(carrier.parameter).grad
            if gradient is not None:
                energy = energy.to(gradient.device) + self._energies(gradient, carrier)
        return energy.sqrt()

    def _energies(self, weight: Tensor, carrier: Carrier) -> Tensor:
        energy = weight.float().square().transpose(0, carrier.axis).flatten(1).sum(1)
        return energy.new_zeros(self.count + 1).index_add_(0, carrier.of.to(energy.device), energy)[:-1]

    def regrown(self, norms: Tensor, scales: Tensor) -> Tensor | float:
        """What restores the length of all groups together; 1 unless a batch normalisation undoes what that does.

        Behind one, lengths mean nothing: were they to fall, no loss would resist, and all groups would go alike, where it is
        those that go which the network needs least.
        """
        left = (norms * scales).norm()
        return torch.where(left > 0, norms.norm() / left, 1.0) if all(carrier.is_normed for carrier in self.carriers) else 1.0

    def scale_(self, model: nn.Module, scales: Tensor, length: Tensor | float = 1.0) -> None:
        """Multiply every group with its scale (count,), and the whole parameters with `length`, in place."""
        every = torch.cat([scales, scales.new_ones(1)]) * length
        for carrier in self.carriers:
            weight = model.get_parameter(carrier.parameter).data
            shape = [-1 if axis == carrier.axis else 1 for axis in range(weight.ndim)]
            weight.mul_(every[carrier.of.to(weight.device)].to(weight.dtype).view(shape))


def attach_(
    model: nn.Module, channels: Channels, budget: Budget, eligible: Sequence[int], mode: str, init: Init
) -> tuple[list[str], list[Groups]]:
    """Give the layers that need one a matrix of their own; (those layers, all groups).

    `eligible` are the layers that may be decomposed, as indices into the budget's.
    """
    products: dict[str, Layer] = {}
    matrices: set[str] = set()  # the layers that are one themselves
    sides: dict[int, list[tuple[Layer, int]]] = {}  # of each family: what makes its channels and what reads them
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    eligible = [index for index in eligible if holders[id(model.get_parameter(budget.layers[index].weight))] == 1]  # none is tied
    decomposable = {budget.layers[index].name for index in eligible}
    for index, family in enumerate(budget.families if mode != "decompose" else ()):
        makers, readers = budget.makers(family), [layer for layer in budget.readers(family) if layer.groups == 1]
        single = [layer for layer in makers if layer.groups == 1]
        if len(single) != 1 or len(family.sets) < 2:
            continue
        maker, pointwise = single[0], [layer for layer in readers if layer.shape[2:] == (1, 1)]
        sides[index] = [(maker, maker.out_axis), *((layer, layer.in_axis) for layer in readers)]
        if len(makers) > 1:  # with what a grouped convolution makes of them
            matrices |= {maker.name, *(layer.name for layer in pointwise)}
        elif maker.kernel > 1 and readers and len(pointwise) == len(readers):
            matrices |= {layer.name for layer in pointwise}
            del sides[index][0]
        elif maker.kernel > 1 and maker.name in decomposable:
            products[maker.name] = maker
        else:
            matrices.add(maker.name)
    divided = [index for index in (eligible if mode != "prune" else ()) if budget.layers[index].name not in matrices]
    products |= {budget.layers[index].name: budget.layers[index] for index in divided}
    outer = _outer(channels, budget)
    found: list[Groups] = []
    for index, own in sides.items():
        carriers = {}
        for layer, axis in own:
            name = layer.weight if layer.name not in products else factors(layer.name)[0 if axis == layer.out_axis else 1]
            of = numbered(channels, channels.axes[layer.weight, axis], budget.families[index].sets)
            is_matrix = layer.name in matrices or (layer.name in products and axis == layer.out_axis)
            carriers[name, axis] = Carrier(name, axis, of, is_matrix, layer.name in outer, layer.normed)
        found.append(Groups(len(budget.families[index].sets), tuple(carriers.values()), family=index))
    for index in divided:
        layer = budget.layers[index]
        rank = min(layer.shape[0], layer.shape[1] * layer.kernel) if init.startswith("svd") else layer.shape[0]
        carrier = Carrier(factors(layer.name)[0], 1, torch.arange(rank), True, layer.name in outer, layer.normed)
        found.append(Groups(rank, (carrier,), layer=index))
    generator = torch.Generator().manual_seed(0)
    for name in products:
        parametrize.register_parametrization(model.get_submodule(name), "weight", Product(init, generator))
    return list(products), found


def detach_(model: nn.Module, layers: Sequence[str]) -> None:
    """Leave the layers plain, with the kernels that they had."""
    for name in layers:
        module = model.get_submodule(name)
        unparametrize_(module, ["weight", *module._parameters])


def paces(matrix: Tensor, filters: Tensor) -> tuple[float, float]:
    """Learning rates of A (o, r) and W' (r, i, k, k) at which a step moves A W' about as far as it would a plain kernel."""
    one, other = (float(torch.linalg.matrix_norm(factor.detach().flatten(1).float(), 2)) for factor in (matrix, filters))
    return 1 / max(other, SHORTEST) ** 2, 1 / max(one, SHORTEST) ** 2


def factors(layer: str) -> tuple[str, str]:
    """The names of A and W' of a layer's product."""
    return f"{layer}.parametrizations.weight.original0", f"{layer}.parametrizations.weight.original1"


def _outer(channels: Channels, budget: Budget) -> set[str]:
    """The layers that make what other layers make as well."""
    made = {layer.name: set(channels.axes[layer.weight, layer.out_axis].tolist()) for layer in budget.layers}
    makers = Counter(number for layer in budget.layers if layer.groups == 1 for number in made[layer.name])
    return {layer.name for layer in budget.layers if any(makers[number] > (layer.groups == 1) for number in made[layer.name])}
