"""FCF's search: a scalar on every filter that may go, drawn to zero or one by ADMM while the network is trained."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence

from ..budget import Budget, Family
from ..channels import Axis, Channels, Ids
from ..layers import Layer
from ..lpbox import Admm, Penalty
from . import Progress
from ._errors import norm_of
from ._layers import unparametrize_
from ._widths import Widths, numbered

if TYPE_CHECKING:
    from .fcf import Options

STEADY = 0.6  # a penalty above 2/3 by the learning rate makes steps of the scalars and of the dual variables swing up
TIES = 1e-3  # what draws the first to go of a layer's filters, of those that the loss knows no difference between
SETTLED = 0.5  # share of the search at which the penalty is as strong as it gets, where its growth is not given


class Gate(nn.Module):
    """A parameter whose positions along an axis are multiplied with the scalars of the filters that they belong to."""

    of: Tensor

    def __init__(self, scalars: nn.Parameter, of: Tensor, axis: int) -> None:
        """`of` (positions,): the number of each position's scalar; their count for none."""
        super().__init__()
        self.scalars, self.axis = scalars, axis
        self.straight = torch.equal(of, torch.arange(len(scalars)))  # each position has the scalar of its place
        self.register_buffer("of", of, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        every = self.scalars if self.straight else torch.cat((self.scalars, self.scalars.new_ones(1)))[self.of]
        return weight * every.view([-1 if axis == self.axis else 1 for axis in range(weight.ndim)])

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight itself: all scalars are one at the start."""
        return weight


class Search:
    """The scalars of a search, and where their ADMM stands."""

    def __init__(
        self,
        model: nn.Module,
        channels: Channels,
        budget: Budget,
        widths: Widths,
        kept: Mapping[int, int],
        sides: Mapping[int, tuple[Layer, int]],
        options: "Options",
    ) -> None:
        """Put a scalar on each filter that may go: on what comes out of the batch normalisations behind it, or on the filter.

        `kept` is how many sets of each family shall stay; `sides` are the families that one layer alone leaves out.
        """
        self.options = options
        self.scalars: dict[int, nn.Parameter] = {}  # by family
        self.gated: dict[str, list[str]] = {}  # module -> its parameters in their order
        # By the names as they are now: a gate renames the parameter that it stands on.
        gates = {family: _gates(model, budget, budget.families[family], sides.get(family)) for family, _, _ in widths}
        for family, order, _ in widths:
            sets = budget.families[family].sets
            self.scalars[family] = nn.Parameter(torch.ones(len(order)))
            for tensor, axis in gates[family]:
                module, _, name = tensor.rpartition(".")
                owner = model.get_submodule(module)
                self.gated.setdefault(module, list(owner._parameters))
                gate = Gate(self.scalars[family], numbered(channels, channels.axes[tensor, axis], sets), axis)
                parametrize.register_parametrization(owner, name, gate)
        self.sizes = torch.tensor([len(own) for own in self.scalars.values()])
        places = [torch.from_numpy(ranks(order, budget.families[family].sets)) for family, order, _ in widths]
        self.ties = pad_sequence([TIES * (1 - own / len(own)) for own in places], batch_first=True)
        counts = torch.tensor([kept[family] for family in self.scalars])
        self.admm = Admm(counts, self.sizes, int(self.sizes.max()), Penalty(options.rho, options.growth or 1.0, options.most))

    def descend(self, progress: Progress) -> None:
        """A plain gradient step of the scalars, as ADMM takes them: of the penalty, and for the rest of the loss (3.4).

        Their rate is their own: a schedule that ends at nothing would leave them between zero and one.
        """
        options = self.options
        if not options.growth:
            self.admm.rho = options.rho * (options.most / options.rho) ** min(progress.share / SETTLED, 1.0)
        self.admm.rho = min(self.admm.rho, STEADY / (options.alpha * options.rate))
        matrix = self.matrix()
        self.admm.to_(matrix.device)
        drawn = self.admm.gradient(matrix) + self.ties.to(matrix.device)
        for v, row, size in zip(self.scalars.values(), drawn, self.sizes.tolist(), strict=True):
            slope = torch.zeros_like(v) if v.grad is None else v.grad  # None where the network left its layers out this time
            v.data -= options.rate * (options.alpha * row[:size] + (1 - options.alpha) * slope)
            v.grad = None  # the optimizer leaves them alone

    def ascend(self) -> None:
        """Raise the dual variables."""
        self.admm.step(self.matrix())

    def matrix(self) -> Tensor:
        """All scalars (families, widest), filled up with zeros."""
        return pad_sequence([v.detach() for v in self.scalars.values()], batch_first=True)

    def end(self, model: nn.Module) -> str:
        """Plain parameters again, times their scalars; how far those came."""
        for module, names in self.gated.items():
            unparametrize_(model.get_submodule(module), names)
        values = torch.cat([v.detach() for v in self.scalars.values()])
        far = float(torch.minimum(values.abs(), (values - 1).abs()).max())
        stay = int(self.admm.counts.sum())
        return f"fcf: {stay} of {len(values)} filters stay; no scalar is farther than {far:.3f} from 0 or 1"


def _gates(model: nn.Module, budget: Budget, family: Family, side: tuple[Layer, int] | None) -> list[Axis]:
    """What the scalars of a family stand on, where one layer alone leaves it out on that layer's side."""
    if side is None:
        return _gates_of_all(model, budget, family)
    layer, axis = side
    if axis == 1:
        return [(layer.weight, layer.in_axis)]
    if norm_of(model, layer) is not None:
        return [(f"{layer.norm}.{name}", 0) for name in ("weight", "bias")]
    biased = getattr(model.get_submodule(layer.name), "bias", None) is not None
    return [(layer.weight, layer.out_axis), *([(f"{layer.name}.bias", 0)] if biased else [])]


def _gates_of_all(model: nn.Module, budget: Budget, family: Family) -> list[Axis]:
    """All parameters of batch normalisations on the family's channels.

    Where others read what a layer makes, or there is no such, the layer's own. Grouped layers that read channels and make
    them again are among them, for what these make of zeros need not be zero.
    """
    parameters, axes = dict(model.named_parameters()), [axis for axis, _ in family.axes]
    inside = {tensor: tensor.rpartition(".")[0] for tensor, _ in axes}
    norms = [
        (tensor, axis)
        for tensor, axis in axes
        if tensor in parameters and isinstance(model.get_submodule(inside[tensor]), _BatchNorm)
    ]
    again = [layer for layer in budget.readers(family) if layer.groups > 1]  # transposed
    bare = [layer for layer in [*budget.makers(family), *again] if not (layer.normed and norms)]
    weights = {(layer.weight, layer.out_axis) for layer in bare}
    biases = {(tensor, 0) for tensor, _ in axes if tensor in parameters and parameters[tensor].ndim == 1}
    biases = {(tensor, 0) for tensor, _ in biases if inside[tensor] in {layer.name for layer in bare}}
    return [*norms, *(axis for axis in axes if axis in weights | biases)]


def tied(model: nn.Module, family: Family) -> bool:
    """Whether a parameter that the family lies on is another's as well."""
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    own = dict(model.named_parameters())
    return any(holders[id(own[tensor])] > 1 for (tensor, _), _ in family.axes if tensor in own)


def ranks(order: Ids, sets: Ids) -> Ids:
    """For each of the sets its place in the order in which to give them up."""
    place = {number: rank for rank, number in enumerate(order.tolist())}
    return np.array([place[number] for number in sets.tolist()])
