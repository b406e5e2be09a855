"""One pass over a graph that carries channel ids: what a rule may do with them."""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import fx, nn

from ..graph import Graph, operation, per_image
from ..recipe import COUNTS

Ids = np.ndarray[Any, np.dtype[np.int64]]
Axis = tuple[str, int]  # (parameter or buffer, axis)
NONE = 0  # the id of positions that belong to no channel
SOFT = "; they may go with --set soft=true"  # how a reason ends that the user may overrule, if it is the only one
INPUT, OUTPUT = "reads the network's input", "the network's output"  # why the ends of a network stay


@dataclass(frozen=True)
class Slot:
    """A number in a module's code that counts channels: it becomes how many of `sets` are kept."""

    module: str
    attribute: str
    sets: Ids


@dataclass(frozen=True)
class Channels:
    """The coupled sets of a network. A set is a number; `axes` says where its positions are."""

    axes: dict[Axis, Ids]  # the set of every position along the axis
    locked: dict[int, str]  # set -> why it may not be removed
    consumed: frozenset[Axis]  # axes that contract with activations: where a removed channel is read
    slots: tuple[Slot, ...]
    count: int

    def free(self) -> list[int]:
        """The sets that may be removed, in the order in which their parameters are registered."""
        return [number for number in range(self.count) if number not in self.locked]

    def reason(self, axis: Axis) -> str | None:
        """Why no channel along the axis may go; None if one may, or if there is no such axis."""
        numbers = set(self.axes[axis].tolist()) if axis in self.axes else set()
        if not numbers or any(number not in self.locked for number in numbers):
            return None
        return self.locked[min(numbers)]


class Label(NamedTuple):
    """The channel of every position along one axis of a tensor."""

    axis: int
    ids: Ids


@dataclass
class Walk:
    """One pass over the graph. Rules give nodes labels, tie ids together, and lock them."""

    graph: Graph
    model: nn.Module
    soft: bool = False  # channels may go that a normalisation takes its statistics over
    labels: dict[fx.Node, list[Label]] = field(default_factory=dict)
    pieces: dict[fx.Node, list[list[Label]]] = field(default_factory=dict)  # of nodes with several values
    axes: dict[Axis, Ids] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    ties: list[tuple[Ids, Ids]] = field(default_factory=list)
    locks: dict[str, list[Ids]] = field(default_factory=lambda: defaultdict(list))  # reason -> ids
    consumed: set[Axis] = field(default_factory=set)
    slots: dict[tuple[str, str], Ids] = field(default_factory=dict)
    moving: set[fx.Node] = field(default_factory=set)  # the nodes whose value depends on the images
    first_ids: list[int] = field(default_factory=list)  # of every run of fresh ids, ascending
    made_for: list[Axis | None] = field(default_factory=list)  # what that run labels
    next_id: int = 1

    def fresh(self, count: int, axis: Axis | None = None) -> Ids:
        """New ids, of a parameter's axis or of padding."""
        self.first_ids.append(self.next_id)
        self.made_for.append(axis)
        ids = np.arange(self.next_id, self.next_id + count)
        self.next_id += count
        return ids

    def tie(self, a: Ids, b: Ids) -> None:
        """Positions of a and b (broadcastable) go together; those without a channel pair with nothing."""
        a, b = np.broadcast_arrays(a, b)
        both = (a != NONE) & (b != NONE) & (a != b)
        self.ties.append((a[both], b[both]))

    def lock(self, labels: Iterable[Label], reason: str) -> None:
        self.locks[reason] += [label.ids[label.ids != NONE] for label in labels]

    def along(self, node: Any, axis: int) -> list[Ids]:
        """The ids that run along an axis of the node's value; none for what is not a node."""
        return [label.ids for label in self.of(node) if label.axis == axis]

    def of(self, tree: Any) -> list[Label]:
        """The labels of every node in nested arguments."""
        return [label for node in nodes_in(tree) for label in self.labels.get(node, [])]

    def consume(self, ids: Ids) -> None:
        """Note the parameter axes that the ids were made for as contracted with activations."""
        runs = np.unique(np.searchsorted(self.first_ids, ids[ids != NONE], side="right") - 1)
        self.consumed.update(axis for run in runs if (axis := self.made_for[run]) is not None)

    def slot(self, module: str, attribute: str, ids: Ids) -> None:
        """Let the attribute count the ids. What else it counts goes with them, position by position."""
        self.tie(self.slots.setdefault((module, attribute), ids), ids)

    def held(self, node: fx.Node, attribute: str, number: int) -> bool:
        """Whether the module that issued the operation has the number as that attribute."""
        own = vars(self.model.get_submodule(self.graph.owners[node])).get(attribute)
        return type(own) is int and own == number  # an attribute that can be set, no property

    def counted(self, node: fx.Node, ids: Ids) -> bool:
        """Let the issuing module's number of these ids follow how many are kept; False if it has none."""
        attribute = next((name for name in COUNTS if self.held(node, name, len(ids))), None)
        if attribute is not None:
            self.slot(self.graph.owners[node], attribute, ids)
        return attribute is not None

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder" and node in self.graph.tensors:
            name = self.graph.tensors[node]
            shape = node.meta["val"].shape
            if (name, 0) not in self.axes:  # not known from another graph
                self.axes.update({(name, axis): self.fresh(size, (name, axis)) for axis, size in enumerate(shape)})
            self.labels[node] = [Label(axis, self.axes[name, axis]) for axis in range(len(shape))]
        elif node.op == "output":
            self.lock(self.of(node.args), OUTPUT)
        elif node.op == "call_function" and node.target is operator.getitem:
            source, index = argument(node, 0), node.args[1]
            assert isinstance(index, int)
            own = self.labels.get(source, []) if index == 0 else []
            self.labels[node] = self.pieces[source][index] if source in self.pieces else own
        elif node.op == "call_function":
            self.reached.update(self.graph.tensors[n] for n in nodes_in(node.args) if n in self.graph.tensors)
            known = RULES.get(operation(node))
            if _has_out(node):
                self.lock(self.of((node.args, node.kwargs)), f"written into a given tensor by {operation(node)}")
            elif known is not None:
                self.labels[node] = known(self, node)
            else:
                self.lock(self.of((node.args, node.kwargs)), f"no rule for the operation {operation(node)}")

    def run(self) -> None:
        """Visit every node of the graph."""
        self.moving = per_image(self.graph)
        for node in self.graph.nodes:
            self.visit(node)

    def unreached(self) -> list[Axis]:
        """Axes of parameters and buffers that no operation used."""
        return [axis for axis in self.axes if axis[0] not in self.reached]

    def result(self) -> Channels:
        for axis in self.unreached():
            self.lock([Label(0, self.axes[axis])], "not reached by any operation")
        roots = _components(self.next_id, self.ties)
        used = np.unique(np.concatenate([roots[ids] for ids in [*self.axes.values(), *self.slots.values()]]))
        number = np.full(len(roots), -1)
        number[used] = np.arange(len(used))
        locked: dict[int, str] = {}
        told = sorted(reversed(self.locks.items()), key=lambda lock: not lock[0].endswith(SOFT))
        for reason, ids in told:  # the first reason is the one that is told, and any before one that ends in SOFT
            locked.update(dict.fromkeys(np.unique(number[roots[np.concatenate([*ids, [NONE]])]]).tolist(), reason))
        locked.pop(-1, None)  # ids that no parameter has
        return Channels(
            axes={axis: number[roots[ids]] for axis, ids in self.axes.items()},
            locked=locked,
            consumed=frozenset(self.consumed),
            slots=tuple(Slot(*place, number[roots[ids]]) for place, ids in self.slots.items()),
            count=len(used),
        )


Rule = Callable[[Walk, fx.Node], list[Label]]  # from a node to the labels of its value
RULES: dict[str, Rule] = {}  # by the names of operations: rules.py and moves.py register theirs


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operations, by their names without overload."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _components(size: int, ties: Sequence[tuple[Ids, Ids]]) -> Ids:
    """The smallest id reachable from each id: hooking to the smaller root, then pointer jumping."""
    parent = np.arange(size)
    a = np.concatenate([parent[:0], *(tie[0].ravel() for tie in ties)])
    b = np.concatenate([parent[:0], *(tie[1].ravel() for tie in ties)])
    while len(a):
        a, b = parent[a], parent[b]
        apart = a != b
        a, b = a[apart], b[apart]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(parent, parent[parent]):
            parent = parent[parent]
    return parent


def _has_out(node: fx.Node) -> bool:
    """Whether the operation is given the tensors that its results go into (`out=`)."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(argument.is_out for argument in schema.arguments)


def argument(node: fx.Node, index: int) -> fx.Node:
    """The node that an operation is given as an argument."""
    value = node.args[index]
    assert isinstance(value, fx.Node)
    return value


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of a node's value, of the first if there are several."""
    made = value.meta["val"]
    return tuple((made[0] if isinstance(made, (tuple, list)) else made).shape)


def axis_of(node: fx.Node, index: int, default: int) -> int:
    """The axis that an argument names, counted from the first of the tensor, or of the first one's result for a list."""
    value: Any = node.args[index] if len(node.args) > index else node.kwargs.get("dim", default)
    rank = len(shape_of(node)) if operation(node) in ("cat", "stack") else len(shape_of(argument(node, 0)))
    return int(value) % rank


def nodes_in(tree: Any) -> list[fx.Node]:
    """Every node in nested arguments, in order."""
    if isinstance(tree, fx.Node):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    return [node for item in items for node in nodes_in(item)]
