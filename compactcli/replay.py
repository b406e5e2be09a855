"""Two networks over the same images in step, one operation at a time, each value carried forward once."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .graph import Graph
from .moments import measured_by

LIVE_BYTES = 192 << 20  # of values carried forward in both networks; more images join as they shrink


class Stream:
    """A network's graph run over batches, node by node; a value lives until its last use."""

    def __init__(self, graph: Graph, model: nn.Module) -> None:
        self.graph, self.model = graph, model
        self.values: list[dict[fx.Node, Any]] = []
        self.position = {node: position for position, node in enumerate(graph.nodes)}
        self.tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.next = 0
        last = {used: node for node in graph.nodes for used in node.all_input_nodes}
        self.dead: dict[fx.Node, list[fx.Node]] = {}
        for used, node in last.items():
            self.dead.setdefault(node, []).append(used)
        self.ahead = self._ahead()

    def _ahead(self) -> list[int]:
        """The most bytes that the values of one batch will take from each node on."""
        sizes = {self.graph.image: self.graph.image.meta["val"].nbytes}
        live = []
        for node in self.graph.nodes:
            if node.users and any(used in sizes for used in node.all_input_nodes):  # the rest is the same for all batches
                value = node.meta.get("val")
                sizes[node] = value.nbytes if isinstance(value, Tensor) else 0
            live.append(sum(sizes.values()))
            for used in self.dead.get(node, ()):
                sizes[used] = 0
        return np.maximum.accumulate(live[::-1])[::-1].tolist()  # type: ignore[no-any-return]

    def join(self, batch: Tensor) -> None:
        """One more batch, brought to where the others are."""
        self.values.append({self.graph.image: batch.clone()})  # the network may work in place
        for node in self.graph.nodes[: self.next]:
            self._run(node, self.values[-1])

    def advance(self, node: fx.Node, *, through: bool) -> None:
        """Run up to the node, and with `through` the node as well."""
        end = self.position[node] + int(through)
        for each in self.graph.nodes[self.next : end]:
            for values in self.values:
                self._run(each, values)
        self.next = max(self.next, end)

    def _run(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        if node.op != "call_function":
            return
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: self.value(used, values))
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        if node.users:
            values[node] = value
        for used in self.dead.get(node, ()):
            values.pop(used, None)

    def value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node in values:
            return values[node]
        name = self.graph.tensors.get(node)
        return self.graph.constants[node] if name is None else self.tensors[name]


class Streams:
    """Both networks in step."""

    def __init__(self, target: Stream, model: Stream, batches: Sequence[Tensor]) -> None:
        self.target, self.model, self.batches = target, model, batches
        self._join()

    def _join(self) -> None:
        batch = self.batches[len(self.target.values)]
        self.target.join(batch)
        self.model.join(batch)

    def reach(self, output: fx.Node, reader: fx.Node) -> None:
        """The target's `output` and what `reader` reads in the model are there, for as many batches as memory takes."""
        self.target.advance(output, through=True)
        self.model.advance(reader, through=False)
        each = self.target.ahead[self.target.next - 1] + self.model.ahead[self.model.next - 1]
        while len(self.target.values) < len(self.batches) and (len(self.target.values) + 1) * each <= LIVE_BYTES:
            self._join()

    def error(self) -> float:
        """|difference| / |deviation of the target's outputs from their mean|, or / |outputs| where they have none."""
        ends = [_scores(stream.graph) for stream in (self.target, self.model)]
        self.target.advance(ends[0], through=True)
        self.model.advance(ends[1], through=True)
        wanted = torch.cat([values[ends[0]] for values in self.target.values])
        got = torch.cat([values[ends[1]] for values in self.model.values])
        square, deviation = (float(values.double().square().sum()) for values in (wanted, wanted - wanted.mean(0)))
        return float((got - wanted).norm()) / max(math.sqrt(measured_by(square, deviation)), 1e-30)


def _scores(graph: Graph) -> fx.Node:
    """What makes the first floating-point output."""
    return next(node for node in graph.nodes[-1].all_input_nodes if node.meta["val"].is_floating_point())
