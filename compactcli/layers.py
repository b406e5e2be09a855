"""The layers of a network that cost multiply-accumulates, and how many: those of torch's flop counter, halved."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from torch import fx, nn
from torch.utils.flop_counter import flop_registry

from .errors import UsageError
from .graph import Graph, operation, per_image

SCALED = ("cat", "relu", "relu_", "avg_pool2d", "max_pool2d_with_indices")  # what scales as its inputs do


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer as the cost sees it."""

    name: str  # module path
    weight: str  # its weight's name
    positions: int  # how many times its kernel is applied to one image
    shape: tuple[int, ...]  # of the weight
    groups: int
    transposed: bool
    called: bool  # by its own module's forward, not by another that borrows the weight
    norm: str | None  # the batch normalisation that alone reads its output
    normed: bool  # whether batch normalisations are all that reads its output, be it through the likes of a concatenation
    fixed: bool = False  # it keeps its filters and stays what it is: the user asked for that

    @property
    def out_axis(self) -> int:
        """The axis of the weight that makes outputs."""
        return int(self.transposed)

    @property
    def in_axis(self) -> int:
        """The axis of the weight that reads inputs (within a group)."""
        return 1 - int(self.transposed)

    @property
    def kernel(self) -> int:
        """Kernel positions: k * k; 1 for a linear layer."""
        return int(np.prod(self.shape[2:], dtype=int))

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return self.positions * int(np.prod(self.shape, dtype=int))


def layers(graph: Graph) -> list[Layer]:
    """The layers that cost multiply-accumulates, in the order in which they run, each once."""
    return costs(graph)[0]


def labels(found: Sequence[Layer]) -> list[str]:
    """What to call each layer: its module, or its weight where the module has several."""
    count = Counter(layer.name for layer in found)
    return [layer.name if count[layer.name] == 1 else layer.weight for layer in found]


def matching(found: Sequence[Layer], patterns: Sequence[str]) -> list[Layer]:
    """The layers of these names, or in modules of these names; names may hold `*`, `?` and `[...]`.

    Raises UsageError, with what comes nearest, for one that no layer has.
    """
    names, result = labels(found), []
    for pattern in patterns:
        own = [layer for layer, name in zip(found, names, strict=True) if _named(name, pattern)]
        if not own:
            raise no_such("--leave", pattern, names)
        result += own
    return result


def no_such(flag: str, name: str, known: Iterable[str]) -> UsageError:
    """What to raise for a layer that there is not, with the name that comes nearest."""
    near = get_close_matches(name, known, 1)
    return UsageError(
        f"{flag} {name}: no such convolution or linear layer; " + (f"did you mean {near[0]}?" if near else "see analyze")
    )


def _named(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def single(found: Sequence[Layer]) -> list[str]:
    """The modules that are run as one layer each, and hold no other: what goes in and out of them is that layer's."""
    count = Counter(layer.name for layer in found)
    return [layer.name for layer in found if layer.called and count[layer.name] == 1]


def stored(model: nn.Module, layer: Layer, label: str) -> int:
    """Parameters of what a layer is called: of its module itself, or of its weight alone."""
    if label == layer.name:
        return sum(parameter.numel() for parameter in model.get_submodule(layer.name).parameters(recurse=False))
    weight = dict(model.named_parameters(remove_duplicate=False)).get(layer.weight)
    return 0 if weight is None else weight.numel()


def macs(graph: Graph) -> int:
    """Multiply-accumulates of one image: what torch.utils.flop_counter counts, halved."""
    found, elsewhere = costs(graph)
    return sum(layer.macs for layer in found) + elsewhere


def costs(graph: Graph) -> tuple[list[Layer], int]:
    """(the layers, multiply-accumulates for one image of all else)."""
    found: dict[str, Layer] = {}
    elsewhere = 0
    moving, images = per_image(graph), graph.image.meta["val"].shape[0]
    for node in graph.nodes:
        each = _macs(node) // (images if node in moving or _per_image(node, images) else 1)
        weight, direct = _weight(graph, node, moving) if each else (None, False)
        if weight is None:
            elsewhere += each
            continue
        name, shape = graph.tensors[weight], tuple(weight.meta["val"].shape)
        module, positions = name.rpartition(".")[0], each // math.prod(shape)
        arguments: Any = node.args
        convolution = operation(node) == "convolution"
        transposed = bool(arguments[6]) if convolution else direct and weight in arguments[-1:]
        norm = norm_behind(graph, node)
        found[name] = Layer(
            name=module,
            weight=name,
            positions=positions + (found[name].positions if name in found else 0),
            shape=shape,
            groups=arguments[8] if convolution else 1,
            transposed=transposed,
            called=direct and graph.owners[node] == module and (name not in found or found[name].called),
            norm=norm and norm[0],
            normed=_normed(node) and (name not in found or found[name].normed),  # each time that it is called
        )
    return list(found.values()), elsewhere


def _per_image(node: fx.Node, images: int) -> bool:
    """Whether a convolution that no image goes into is computed for each all the same: of positions, as EdgeNeXt's."""
    source: Any = node.args[0] if operation(node) == "convolution" else None
    return source is not None and source.meta["val"].shape[0] == images


def _macs(node: fx.Node) -> int:
    """Multiply-accumulates of an operation."""
    count = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if count is None:
        return 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
    return int(count(*args, **kwargs, out_val=node.meta["val"])) // 2


def _weight(graph: Graph, node: fx.Node, moving: set[fx.Node]) -> tuple[fx.Node | None, bool]:
    """(the parameter that an operation multiplies with, whether it is read as it is); None where there is none.

    A weight that is computed is known by the parameter of the same shape that it comes from, or by the matrix with its filters
    for rows.
    """
    direct = weight_of(graph, node)
    if direct is not None:
        return direct, True
    arguments: Any = node.args
    product = operation(node) == "mm"
    seen = (
        [arguments[1]]
        if operation(node) == "convolution"
        else [each for each in node.all_input_nodes if each.op != "placeholder" or product]  # addmm's may be the bias
    )
    seen = [each for each in seen if each not in moving]
    shapes = [tuple(each.meta["val"].shape) for each in seen]
    known = [*shapes, *(shape[::-1] for shape in shapes)]
    if operation(node) == "convolution":
        known += [(shape[0], math.prod(shape[1:])) for shape in shapes]
    for each in seen:
        if each in graph.parameters and tuple(each.meta["val"].shape) in known:
            return each, False
        seen += [used for used in each.all_input_nodes if used not in seen]
    return None, False


def weight_of(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The parameter that a convolution or matrix product multiplies with, where it is one; a buffer is a constant of the code."""
    at = {"convolution": 1, "addmm": 2, "mm": 1}.get(operation(node))
    weight: Any = None if at is None else node.args[at]
    if weight is not None and weight not in graph.tensors and operation(weight) == "t":
        weight = weight.args[0]
    return weight if weight in graph.parameters else None


def norm_behind(graph: Graph, node: fx.Node) -> tuple[str, fx.Node] | None:
    """The batch normalisation that alone reads the node, and the node of its operation; None if there is none."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is None or "batch_norm" not in operation(reader):
        return None
    mean: Any = reader.args[3]
    return (graph.tensors[mean].rpartition(".")[0], reader) if mean in graph.tensors else None


def _normed(node: fx.Node) -> bool:
    """Whether all that reads a value undoes its scaling, as batch normalisations in training do, or hands it on to such."""
    readers = list(node.users)
    for reader in readers:
        if operation(reader) in SCALED:
            readers += [each for each in reader.users if each not in readers]
        elif "batch_norm" not in operation(reader):
            return False
    return bool(readers)
