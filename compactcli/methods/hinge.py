"""Hinge: group sparsity prunes filters and lowers ranks in one network (Li et al., CVPR 2020).

A convolution W (o filters over i*k*k inputs) is seen as W = A W', with W' the convolution of a few
filters and A a 1x1 convolution. Columns of A that vanish prune outputs, rows that vanish lower the
rank: pruning and decomposition are two directions of group sparsity on one matrix (section 3).
Where a shortcut ties the outputs of several layers, only the rank is free.
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..budget import Budget, Floats, Price
from ..channels import INPUT, OUTPUT, Channels, edits
from ..dials import Dial, by_layer, solve
from ..errors import CompactError
from ..layers import Layer
from ..recipe import Edit, Replace
from . import Method, Progress, _hinge_groups, _hinge_search, _two_slope
from ._decomposed import decompose, gram, parts
from ._errors import multiplied, root, row_scale, worths
from ._widths import Widths, removable

if TYPE_CHECKING:
    from ..moments import Moments


@dataclass(frozen=True)
class Options:
    """How hinge chooses."""

    mode: Annotated[
        Literal["auto", "prune", "decompose"], "prune filters, lower ranks, or whichever costs less error per layer"
    ] = "auto"
    floor: Annotated[float, "smallest share of its filters and of its rank that a layer keeps"] = 0.05
    favour: Annotated[
        Literal["auto", "accuracy", "speed"],
        "of networks of equal cost take the more accurate, or the faster, which may prune channels that shortcuts share; "
        "auto: accuracy with images, speed without",
    ] = "auto"
    by: Annotated[
        Literal["error", "norm"], "search: keep by the output error that moments tell, or by the groups' squared norms"
    ] = "error"
    soft: Annotated[bool, "prune channels, too, that layer normalisations take their statistics over"] = False
    two_slope: Annotated[bool, "give each ReLU inside a residual block a learnable slope on either side of zero"] = False
    init: Annotated[_hinge_groups.Init, "search: how a kernel is divided into a matrix and filters"] = "svd2"
    regularizer: Annotated[
        Literal["l1", "l1/2", "l1-2", "log-sum", "l0"], "search: the function of the groups' norms that draws them to zero"
    ] = "l0"
    factor: Annotated[
        float, "search: how strongly it draws, by each matrix's mean norm but for balance=none; 0: as the ratio and epochs need"
    ] = 0.0
    speed: Annotated[float, "search: most that a norm loses in a step, in the unit that `balance` gives it"] = 1e-3
    balance: Annotated[
        Literal["error", "norm", "none"],
        "search: the unit of norms: the one below which the budget would give groups up at the start, their mean, or one for all",
    ] = "error"
    others: Annotated[float, "search: learning rate of all but the matrices, as a share of theirs"] = 1.0
    pace: Annotated[bool, "search: let each factor of a kernel learn as fast as keeps the kernel's own pace"] = True
    adjust: Annotated[bool, "search: let a block's last matrices learn as fast as its first, by their gradients"] = False
    anneal: Annotated[float, "search: divide a given factor by it at each of the two lengths; 0: never"] = 0.0
    anneal_first: Annotated[float, "search: summed norms of a block's first matrix, in the mean, at which to anneal"] = 0.0
    anneal_second: Annotated[float, "search: those at which to anneal again"] = 0.0
    threshold: Annotated[float, "search: share of the mean norm at the start below which a group is taken for gone"] = 5e-3
    stop: Annotated[float, "search: end it when what is left is that share of the original above the ratio; 0: never"] = 0.0
    preset: Annotated[
        Literal["none", "resnet20", "resnet20-cifar100", "resnet56", "resnet164", "resnext20", "resnext164", "densenet", "vgg16",
                "wrn"],
        "search: the paper's constants, for what is not set otherwise",
    ] = "none"  # fmt: skip

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("floor", 0 < self.floor <= 1, "a share above 0, up to 1"),
            ("factor", self.factor >= 0, "0 or more"),
            ("others", self.others > 0, "above 0"),
            ("speed", self.speed > 0, "above 0"),
            ("anneal", self.anneal == 0 or self.anneal >= 1, "0, or 1 or more"),
            ("threshold", self.threshold > 0, "above 0"),
            ("stop", 0 <= self.stop < 1, "from 0 to below 1"),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name):g}: it is {wanted}")


Ranks = list[tuple[int, Floats]]  # (layer, error by rank)


class Hinge(Method):
    """Filters and ranks chosen over the whole network by one threshold on error per cost."""

    Options = Options
    presets = _hinge_search.PRESETS
    search: _hinge_search.Search | None = None
    pairs: tuple[tuple[nn.Conv2d | nn.Linear, nn.Conv2d | nn.Linear], ...] = ()  # decomposed layers that are trained on
    norms: list[Floats] | None = None  # of the groups that the search ended with

    def start(
        self,
        model: nn.Module,
        channels: Channels,
        budget: Budget,
        moments: Mapping[str, "Moments"] | None = None,
        *,
        trains: bool = False,
    ) -> list[Edit]:
        """For a search: matrices behind the layers, as parametrizations, and its state.

        Raises CompactError for a target that will be out of reach.
        """
        if not trains:
            return []
        widths: Widths = []
        stay: dict[tuple[int | None, int | None], int] | None = None  # how many, by family and layer
        if "error" in (self.options.by, self.options.balance):
            widths, ranks = self._candidates(model, channels, budget, moments, searches=True)
        if self.options.by == "error":
            dials, settings = self._solved(budget, widths, ranks, searches=True, refitted=moments is not None)
            if self.options.balance == "error":
                stay = {(dial.family, dial.layer): n for dial, n in zip(dials, settings, strict=True)}
        eligible = [index for index, _ in _decomposable(model, channels, budget)]
        self.divided, found = _hinge_groups.attach_(model, channels, budget, eligible, self.options.mode, self.options.init)
        if not found:
            raise CompactError("there is nothing here that a search could thin out; leave out --epochs")
        left = budget.left()  # for what is trained makes good all it can
        losses = [_losses(model, budget, each, widths, moments, left) for each in found]
        kept = None if stay is None else [stay.get((each.family, each.layer), each.count) for each in found]
        self.search = _hinge_search.Search(model, found, budget, self.options, losses, kept)
        if self.options.by == "norm":
            self._chosen(budget, *self._by_norm(self.search.norms(model)), searches=True)
        return []

    def attach(self, model: nn.Module, edits: Sequence[Edit]) -> None:
        """The layers that are decomposed still."""
        modules = dict(model.named_modules())
        found = [modules.get(edit.module) for edit in edits if isinstance(edit, Replace) and edit.layer == "hinge.decomposed"]
        plain = [
            layer for layer in found if layer is not None and all(isinstance(p, nn.Conv2d | nn.Linear) for p in layer.children())
        ]
        self.pairs = tuple(parts(layer) for layer in plain if isinstance(layer, nn.Sequential) and len(layer) == 2)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        """The factors of products, each at the pace at which a step moves the product no farther than it would a plain kernel.

        With W = A W' a step against the gradient G moves W by A A^T G + G W'^T W'.
        """
        own = [] if self.search is None else self.search.parameter_groups(model, self.divided)
        for first, second in self.pairs:
            if parametrize.is_parametrized(first) or parametrize.is_parametrized(second):
                continue  # a later search has its own parameters there
            paces = _hinge_groups.paces(second.weight, first.weight)
            own += [{"params": [layer.weight], "pace": pace} for layer, pace in zip((second, first), paces, strict=True)]
        return own

    def regularise(self, model: nn.Module, progress: Progress) -> None:
        if self.search is not None and self.options.adjust:
            self.search.adjust(model)

    def project(self, model: nn.Module, progress: Progress) -> None:
        if self.search is not None:
            self.search.step(model, progress)

    def done(self, model: nn.Module) -> bool:
        return self.search is not None and self.search.done(model)

    def end(self, model: nn.Module) -> str | None:
        """Plain layers again; how far the search came."""
        if self.search is None:
            return None
        self.norms = self.search.norms(model)
        _hinge_groups.detach_(model, self.divided)
        gone, count = sum(int((norms <= self.options.threshold).sum()) for norms in self.norms), sum(map(len, self.norms))
        left = 100 * self.search.cost(self.norms, self.options.threshold) / self.search.budget.original
        return f"hinge: {gone} of {count} groups are gone after the search; the rest has {left:.1f} % of {self.search.budget.of}"

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.search is None else self.search.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self.search is not None:
            self.search.load_state_dict(state)

    def finish(self, model: nn.Module, channels: Channels, budget: Budget, moments: Mapping[str, "Moments"] | None) -> list[Edit]:
        """The filters to remove and the layers to decompose, so that the budget is met."""
        units = _two_slope.replacements(model, budget.graph, channels, budget.layers) if self.options.two_slope else []
        if units and budget.of == "params":
            budget = copy.copy(budget)
            budget.target -= sum(len(unit.tensors) for unit in units)
        searched = self.search is not None
        if self.norms is not None and self.options.by == "norm":
            removed, chosen = self._chosen(budget, *self._by_norm(self.norms), searches=True)
        else:
            calibrated = moments is not None
            widths, ranks = self._candidates(model, channels, budget, moments, searches=searched)
            removed, chosen = self._chosen(budget, widths, ranks, searches=searched or calibrated, refitted=calibrated)
        decomposed = [decompose(model, channels, layer, rank, removed) for layer, rank in chosen]
        return [*edits(channels, removed, model), *decomposed, *units]

    def _candidates(
        self, model: nn.Module, channels: Channels, budget: Budget, moments: Mapping[str, "Moments"] | None, *, searches: bool
    ) -> tuple[Widths, Ranks]:
        """What may be removed, and the layers that may be decomposed, with the errors."""
        mode, shared = self.options.mode, self._price(images=searches or moments is not None) == "time"
        widths = removable(model, channels, budget, moments, shared=shared) if mode != "decompose" else []
        return widths, rank_errors(model, channels, budget, moments) if mode != "prune" else []

    def _chosen(
        self, budget: Budget, widths: Widths, ranks: Ranks, *, searches: bool, refitted: bool = False
    ) -> tuple[list[int], list[tuple[Layer, int]]]:
        """The sets to remove, and the ranks of the layers to decompose."""
        dials, settings = self._solved(budget, widths, ranks, searches=searches, refitted=refitted)
        self.losses = by_layer(budget, dials, settings)
        orders = [order for _, order, _ in widths]
        removed = [s for order, n in zip(orders, settings, strict=False) for s in order[: len(order) - n].tolist()]
        chosen = [(dial.layer, n) for dial, n in zip(dials, settings, strict=True) if n < dial.full]
        return removed, [(budget.layers[layer], rank) for layer, rank in chosen if layer is not None]

    def _solved(
        self, budget: Budget, widths: Widths, ranks: Ranks, *, searches: bool, refitted: bool
    ) -> tuple[list[Dial], list[int]]:
        """The dials, and their settings for the budget."""
        price = self._price(images=searches)
        dials = [self._dial(budget, price, errors, family=family) for family, _, errors in widths]
        dials += [self._dial(budget, price, errors, layer=index) for index, errors in ranks]
        return dials, solve(budget, dials, price, refitted=refitted)

    def _price(self, *, images: bool) -> Price:
        favour = self.options.favour if self.options.favour != "auto" else "accuracy" if images else "speed"
        return "time" if favour == "speed" else "cost"

    def _by_norm(self, norms: list[Floats]) -> tuple[Widths, Ranks]:
        """Widths and ranks as `removable` and `rank_errors` give them, the squares of the groups' norms for errors."""
        assert self.search is not None
        widths, ranks = [], []
        for each, own, price in zip(self.search.found, norms, self.search.prices, strict=True):
            order = np.argsort(own, kind="stable")
            errors = np.concatenate([np.cumsum(price * own[order] ** 2)[::-1], [0.0]])
            if each.family is not None:
                widths.append((each.family, self.search.budget.families[each.family].sets[order], errors))
            elif each.layer is not None:
                layer = self.search.budget.layers[each.layer]
                most = min(layer.shape[0], layer.shape[1] * layer.kernel)  # a start may have more of them
                ranks.append((each.layer, np.append(errors[:most], 0.0)))
        return widths, ranks

    def _dial(self, budget: Budget, price: Price, errors: Floats, *, family: int | None = None, layer: int | None = None) -> Dial:
        full = len(errors) - 1
        return Dial(errors, budget.step(full, price, family), int(np.ceil(self.options.floor * full)), family, layer)


def rank_errors(model: nn.Module, channels: Channels, budget: Budget, moments: Mapping[str, "Moments"] | None) -> Ranks:
    """The layers that may be decomposed."""
    result = []
    worth = worths(model, channels, budget, moments)
    for index, layer in _decomposable(model, channels, budget):
        weight = model.get_parameter(layer.weight).detach().flatten(1).double()
        if moments is not None and layer.name in moments:
            known = moments[layer.name]
            narrow, wide = known.worth, known.inputs
            if len(weight) > weight.shape[1]:  # the same energies, from the shorter side
                weight, narrow, wide = weight.T, known.inputs, known.worth
            scaled = root(narrow) @ weight
            energy = torch.linalg.eigvalsh((scaled.float() @ wide).double() @ scaled.T).clamp_min(0).flip(0).numpy()
            errors = _tails(energy)
        else:
            scaled = row_scale(model, layer)[:, None] * weight
            products = gram(scaled if len(scaled) <= scaled.shape[1] else scaled.T)  # the same energies, from the shorter side
            products = products if len(products) < 256 else products.float()
            energy = torch.linalg.eigvalsh(products).clamp_min(0).flip(0).double().numpy()
            errors = worth.get(layer.name, 1.0) * multiplied(_tails(energy) / max(float(energy.sum()), 1e-30))
        result.append((index, errors))
    return result


def _losses(
    model: nn.Module,
    budget: Budget,
    group: _hinge_groups.Groups,
    widths: Widths,
    moments: Mapping[str, "Moments"] | None,
    left: Floats,
) -> Floats | None:
    """The error of giving up each set of a family, in the best order, or each rank of a product alone; None where not known."""
    share = float(left[budget.place(group.family, group.layer)])
    if group.layer is None:
        for family, order, errors in widths:
            if family == group.family:
                lost = dict(zip(order.tolist(), -np.diff(errors)[::-1], strict=True))
                return np.array([share * lost[number] for number in budget.families[family].sets.tolist()])
        return None
    layer = budget.layers[group.layer]
    known = None if moments is None else moments.get(layer.name)
    if known is None:
        return None
    A, filters = (model.get_parameter(name).detach().flatten(1).double() for name in _hinge_groups.factors(layer.name))
    written, read = (A.T @ known.worth.double() * A.T).sum(1), (filters @ known.inputs.double() * filters).sum(1)
    return np.asarray(share * written * read)


def _decomposable(model: nn.Module, channels: Channels, budget: Budget) -> list[tuple[int, Layer]]:
    """(index, layer) of the layers that may be decomposed: not the stem, not the classifier, none whose weight is another's."""
    result = []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    holders = Counter(map(id, parameters.values()))
    for index, layer in enumerate(budget.layers):
        ends = {channels.reason((layer.weight, axis)) for axis in (0, 1)} & {INPUT, OUTPUT}
        at_end = ends or index in (0, len(budget.layers) - 1)  # by what they are tied to, and by their place
        own = holders[id(parameters.get(layer.weight))] == 1
        plain = own and not layer.fixed and isinstance(model.get_submodule(layer.name), nn.Conv2d | nn.Linear)
        # Torch's encoder layers hand the weights of their own layers to one fast operation, where no gradients are wanted.
        plain = plain and not isinstance(model.get_submodule(layer.name.rpartition(".")[0]), nn.TransformerEncoderLayer)
        if plain and layer.called and layer.groups == 1 and min(layer.shape[:2]) >= 2 and not at_end:
            result.append((index, layer))
    return result


def _tails(energy: Floats) -> Floats:
    """The energy beyond each rank, of energies that descend; 0 at full rank."""
    return np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]])
