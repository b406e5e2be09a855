"""CSG: one generator makes a network's kernels from short codes (Omidvar et al., AISTATS 2021).

Kernels are cut into slices of outputs x inputs x k x k. A linear map without bias, the generator (numbers of a slice x d),
makes each slice from its code of d numbers; there is one for each kernel size (section 3). Kernels are made once: a layer
that is run costs what it did before.

The paper trains from scratch. From a checkpoint, generator and codes begin as the truncated SVD of all slices, and are
then refined in turn, in the metric of what an error does to the network's outputs. The size of the codes, and which layers
stay plain, follow from the error per parameter.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..allocate import Choice
from ..budget import Budget, Of
from ..channels import Channels
from ..errors import CompactError, UsageError, shape_text
from ..kernels import KernelLayer, layers, shared
from ..layers import Layer
from ..recipe import Edit, Replace, Share
from ..surgery import LAYERS, LayerKind, Regression
from . import Foreign, Method, _csg_files
from ._csg_files import Given, generators
from ._csg_plans import Curve, Plan, curves
from ._errors import Metric, Metrics
from ._layers import dense, eligible, like, meet
from ._slices import REFITS, Sliced, Slicing, directions, made, name_of, refine, solve_codes

if TYPE_CHECKING:
    from ..moments import Moments

MOST_FILLED = 10**8  # numbers of slices that may be filled up as far as a user likes
SHORTEST = 0.01  # squared spectral norm of a factor from which on the other learns no faster: it may grow while the paces stay


@dataclass(frozen=True)
class Options:
    """How csg cuts kernels and chooses."""

    slice: Annotated[str, "outputs x inputs of a slice (the paper: 16x16, and 12x12)"] = "8x8"
    code: Annotated[int, "numbers in a code; 0: as many as the ratio allows"] = 0
    order: Annotated[
        Literal["auto", "tiled", "rows"],
        "slices as tiles of filters by inputs, or as runs of numbers, as in the authors' files; auto: tiled, but as a "
        "generator from a file was made for",
    ] = "auto"
    generator: Annotated[str, "file to take the generators from: another artefact, or one of the authors'"] = ""
    frozen: Annotated[Literal["auto", "yes", "no"], "train codes alone; auto: where the generators are from a file"] = "auto"

    def __post_init__(self) -> None:
        self.shape  # noqa: B018  # raises where it is none
        if self.code < 0:
            raise ValueError(f"code={self.code}: it is 0 or more")

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs) of a slice. Raises ValueError where the text says none."""
        parts = self.slice.split("x")
        if not 1 <= len(parts) <= 2 or not all(part.isdecimal() and 1 <= int(part) <= 4096 for part in parts):
            raise ValueError(f"slice={self.slice}: give it as OUTPUTSxINPUTS, e.g. 16x16")
        return int(parts[0]), int(parts[-1])

    @property
    def freezes(self) -> bool:
        """Whether the generators stay as they are."""
        return self.frozen == "yes" or (self.frozen == "auto" and self.generator != "")


Groups = dict[tuple[int, ...], list[tuple[Layer, Sliced]]]  # kernel size -> its layers


class CSG(Method):
    """A generator for each kernel size, and codes for the slices of as many layers as the ratio needs."""

    Options = Options
    of: ClassVar[tuple[Of, ...]] = ("params",)
    rounds = False

    @classmethod
    def recognise(cls, tensors: Mapping[str, Tensor]) -> Foreign | None:
        """The network in one of the authors' files."""
        return _csg_files.recognise(tensors)

    @property
    def files(self) -> tuple[str, ...]:
        return (self.options.generator,) if self.options.generator else ()

    def recorded(self) -> dict[str, Any]:
        """The options, and of the generator's file the bare name."""
        return asdict(replace(self.options, generator=Path(self.options.generator).name))

    def start(
        self,
        model: nn.Module,
        channels: Channels,
        budget: Budget,
        moments: Mapping[str, "Moments"] | None = None,
        *,
        trains: bool = False,
    ) -> list[Edit]:
        """The generators, and the layers that are made by them, so that the budget is met.

        Raises UsageError for a wish that a generator from a file does not leave open.
        """
        plain = Options()
        idle = [name for name in ("slice", "code") if getattr(self.options, name) != getattr(plain, name)]
        if self.options.generator and idle:
            raise UsageError(f"--set {idle[0]}: the generator from a file says that; leave it out")
        metrics = Metrics(model, channels, budget, moments)
        given = generators(self.options.generator) if self.options.generator else {}
        groups: Groups = {}
        for layer in eligible(model, budget.layers):
            kernel = layer.shape[2:]
            if not given or kernel in given:
                slicing = Slicing(layer.shape, *self._cut(given.get(kernel)))
                weight = model.get_parameter(layer.weight).detach().float()
                groups.setdefault(kernel, []).append((layer, Sliced(weight, metrics.of(layer), slicing)))
        _check_size([sliced for found in groups.values() for _, sliced in found])
        known = {
            kernel: list(curves(found, self.options.code, given[kernel].weight if given else None))
            for kernel, found in groups.items()
        }
        shares = {layer.name: 1.0 for layer in budget.layers}
        plans, lost = self._chosen(model, budget, groups, known, shares)
        if moments is not None:
            shares = {layer.name: float(share) for layer, share in zip(budget.layers, budget.left(lost), strict=True)}
            groups = {kernel: [_counted(each, shares) for each in found] for kernel, found in groups.items()}
            plans, _ = self._chosen(model, budget, groups, known, shares)
        edits: list[Edit] = []
        for kernel, plan in plans.items():
            edits += self._edits(model, kernel, plan.coded(groups[kernel]), plan, given, shares)
        return edits

    def _cut(self, given: Given | None) -> tuple[int, int, bool]:
        """(outputs, inputs, by rows) of the slices: as the generator from a file makes them, unless an order is asked for."""
        outputs, inputs = given.shape if given else self.options.shape
        rows = given.by_rows if given and self.options.order == "auto" else self.options.order == "rows"
        return outputs, inputs, rows

    def _chosen(
        self,
        model: nn.Module,
        budget: Budget,
        groups: Groups,
        known: Mapping[tuple[int, ...], Sequence[Curve]],
        shares: Mapping[str, float],
    ) -> tuple[dict[tuple[int, ...], Plan], float]:
        """What becomes of each kernel size of which anything is coded; the summed error. A layer's counts by its share."""
        choices, plans, free = [], [], not self.options.generator and not self.options.code
        for kernel, found in groups.items():
            sizes = [math.prod(layer.shape) for layer, _ in found]
            costs, errors, own = [float(sum(sizes))], [0.0], [Plan(0, frozenset(layer.name for layer, _ in found))]
            for curve in known[kernel]:
                for cost, error, plan in curve.plans(shares, between=free):
                    costs.append(cost)
                    errors.append(error)
                    own.append(plan)
            choices.append(Choice(np.array(costs), np.array(errors)))
            plans.append(own)
        chosen = meet(budget, choices, "csg")
        result = {kernel: own[form] for kernel, own, form in zip(groups, plans, chosen, strict=True) if form}
        if free:
            fixed = sum(each.numel() for each in model.parameters()) - sum(float(each.costs[0]) for each in choices)
            spent = sum(float(each.costs[form]) for each, form in zip(choices, chosen, strict=True))
            _fill(result, groups, budget.target - fixed - spent)
        return result, sum(float(each.errors[form]) for each, form in zip(choices, chosen, strict=True))

    def _edits(
        self,
        model: nn.Module,
        kernel: tuple[int, ...],
        found: Sequence[tuple[Layer, Sliced]],
        plan: Plan,
        given: Mapping[tuple[int, ...], Given],
        left: Mapping[str, float],
    ) -> Iterator[Edit]:
        """The generator of one kernel size, and the layers that are made by it. `left` is how much of its error each counts."""
        slices, first = [sliced for _, sliced in found], found[0][1].slicing
        start = given[kernel].weight if given else directions(slices)[:, : plan.size]
        generator, codes = refine(slices, start, frozen=bool(given))
        for (layer, sliced), own in zip(found, codes, strict=True):
            self.losses[layer.name] = sliced.cost(sliced.weight - made(sliced, generator, own)) / left[layer.name]
        cut = {"outputs": first.outputs, "inputs": first.inputs, "code": generator.shape[1]}
        dtype = model.get_parameter(found[0][0].weight).dtype
        yield Share(
            name_of(kernel),
            "csg.generator",
            cut | {"height": kernel[0], "width": kernel[1]},
            {"weight": generator.to(dtype).contiguous()},
        )
        for (layer, _), own in zip(found, codes, strict=True):
            module = model.get_submodule(layer.name)
            assert isinstance(module, nn.Conv2d)
            tensors = {"code": own.to(dtype).contiguous()}
            if module.bias is not None:
                tensors["bias"] = module.bias.detach()
            yield Replace(layer.name, "csg.coded", cut | {"rows": int(first.by_rows)}, tensors)

    def attach(self, model: nn.Module, edits: Sequence[Edit]) -> None:
        """Freeze the generators that the edits made, if they are to stay."""
        there = shared(model)
        for edit in edits:
            if isinstance(edit, Share) and edit.name in there:
                there[edit.name].requires_grad_(not self.options.freezes)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        """Codes and generators, each at the pace at which a step moves the kernels no farther than it would plain ones.

        With the slices Z G^T a step against their gradient D moves them by D G G^T + Z Z^T D.
        """
        groups: list[dict[str, Any]] = []
        for generator in _generators(model):
            own = [layer for layer in layers(model).values() if isinstance(layer, Coded) and layer.generator is generator]
            with torch.no_grad():
                gram = sum((layer.code.float().T @ layer.code.float() for layer in own), torch.zeros(()))
                lengths = [
                    float(torch.linalg.matrix_norm(each.float(), 2)) for each in (generator.weight.T @ generator.weight, gram)
                ]
            groups.append({"params": [layer.code for layer in own], "pace": 1 / max(lengths[0], SHORTEST)})
            groups.append({"params": [generator.weight], "pace": 1 / max(lengths[1], SHORTEST)})
        return groups


def _check_size(slices: Sequence[Sliced]) -> None:
    """Raise CompactError where nearly all numbers of the slices would be the zeros that they are filled up with."""
    filled = sum(each.slicing.count * each.slicing.size for each in slices)
    if filled > max(MOST_FILLED, 4 * sum(each.weight.numel() for each in slices)):
        first = slices[0].slicing
        largest = "x".join(str(max(each.weight.shape[axis] for each in slices)) for axis in (0, 1))
        raise CompactError(
            f"slices of {first.outputs}x{first.inputs} are far larger than any kernel here, the largest of which is {largest}; "
            f"try --set slice={largest}, or another generator"
        )


def _counted(each: tuple[Layer, Sliced], shares: Mapping[str, float]) -> tuple[Layer, Sliced]:
    """A layer whose errors count by that share of them."""
    layer, sliced = each
    return layer, replace(sliced, metric=replace(sliced.metric, outputs=sliced.metric.outputs * shares[layer.name]))


def _fill(plans: dict[tuple[int, ...], Plan], groups: Groups, slack: float) -> None:
    """Spend what is left of the budget on longer codes."""
    for kernel, plan in plans.items():
        coded = [sliced for _, sliced in plan.coded(groups[kernel])]
        count, numbers = sum(each.slicing.count for each in coded), coded[0].slicing.size
        more = max(0, min(int(slack // (count + numbers)), min(count, numbers) - plan.size))
        plans[kernel], slack = replace(plan, size=plan.size + more), slack - more * (count + numbers)


class Generator(nn.Module):
    """Slices (n, numbers) from codes (n, d)."""

    def __init__(self, options: Mapping[str, int]) -> None:
        super().__init__()
        outputs, inputs, height, width, code = (options.get(n, 0) for n in ("outputs", "inputs", "height", "width", "code"))
        numbers = outputs * inputs * height * width
        if not (1 <= numbers <= 1 << 24 and 1 <= code <= 1 << 16 and numbers * code <= 1 << 28):
            raise CompactError(f"the recipe has a generator of slices {outputs}x{inputs}x{height}x{width} from {code} numbers")
        self.kernel, self.slice = (height, width), (outputs, inputs)
        self.weight = nn.Parameter(torch.empty(numbers, code))

    def forward(self, codes: Tensor) -> Tensor:
        slices: Tensor = codes @ self.weight.to(codes.dtype).T
        return slices


class Coded(KernelLayer):
    """A convolution whose kernel a generator, which it shares with others, makes from `code` (slices, d)."""

    def __init__(self, like: nn.Conv2d, slicing: Slicing, size: int) -> None:
        super().__init__(like)
        self.slicing = slicing
        self.code = nn.Parameter(like.weight.new_empty(slicing.count, size))
        self._shared: tuple[Generator, ...] = ()  # in a tuple: it is the root's, not this layer's

    @property
    def generator(self) -> Generator:
        return self._shared[0]

    @property
    def shares(self) -> tuple[str, ...]:
        return (name_of(self.shape[2:]),)

    @property
    def synthesis_macs(self) -> int:
        return self.code.numel() * self.slicing.size

    @property
    def synthesis_sums(self) -> int:
        return self.slicing.count * self.slicing.size

    def bind(self, shared: Mapping[str, nn.Module]) -> None:
        generator = shared.get(self.shares[0])
        wanted = (self.slicing.size, self.code.shape[1])
        if not isinstance(generator, Generator) or generator.weight.shape != wanted:
            raise CompactError(f"the recipe has no generator of {shape_text(wanted)} for a kernel {shape_text(self.shape)}")
        self._shared = (generator,)

    def kernel(self) -> Tensor:
        return self.slicing.paste(self.generator(self.code))


def _generators(model: nn.Module) -> list[Generator]:
    return [each for each in shared(model).values() if isinstance(each, Generator)]


def _build(old: nn.Module, options: Mapping[str, int]) -> nn.Module:
    plain = like(old)
    outputs, inputs, code = (options.get(name, 0) for name in ("outputs", "inputs", "code"))
    if not (1 <= outputs <= 1 << 16 and 1 <= inputs <= 1 << 16 and 1 <= code <= 1 << 16):
        raise CompactError(f"the recipe cuts slices of {outputs}x{inputs} with {code} numbers each")
    return Coded(plain, Slicing(tuple(plain.weight.shape), outputs, inputs, bool(options.get("rows", 0))), code)


def _refit(layer: nn.Module, regression: Regression) -> None:
    """The codes that come nearest, with the generator as it is."""
    assert isinstance(layer, Coded)
    metric = Metric(torch.diag(regression.scale.square()).float(), regression.inputs.float())
    wanted = Sliced(regression.weight.float().view(layer.shape), metric, layer.slicing)
    layer.code.data.copy_(solve_codes(wanted, layer.generator.weight.detach().float(), layer.code.detach().float(), REFITS))


LAYERS["csg.generator"] = LayerKind(lambda place, options: Generator(options), lambda layer: layer)
LAYERS["csg.coded"] = LayerKind(_build, dense, _refit)
