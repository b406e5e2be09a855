"""What goes with a layer's channels when they are cut, and why some may not go."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .artefact import Network
from .channels import Axis, Channels
from .errors import printable
from .layers import Layer, layers, no_such
from .plain import plained
from .plan import plan
from .tables import words

Together = tuple[str | None, tuple[tuple[Axis, int], ...]]  # (why locked, what one set takes along each axis)


def explanation(network: Network, name: str) -> dict[str, Any]:
    """The sets that a convolution or linear layer makes and reads: schema compactcli/explanation/1.

    Sets that take the same with them are given together. Raises UsageError, with what comes nearest,
    for a layer that the network does not have.
    """
    graph, channels = plan(plained(network.module, network.input_shape), network.input_shape)
    found = {layer.name: layer for layer in layers(graph)}
    if name not in found:
        raise no_such("--explain", name, found)
    layer = found[name]
    sides = {axis: side for each in found.values() for axis, side in _sides(each)}
    return {
        "schema": "compactcli/explanation/1",
        "layer": name,
        "outputs": _groups(channels, (layer.weight, layer.out_axis), sides),
        "inputs": _groups(channels, (layer.weight, layer.in_axis), sides),
    }


def _sides(layer: Layer) -> list[tuple[Axis, str]]:
    return [((layer.weight, layer.out_axis), "outputs"), ((layer.weight, layer.in_axis), "inputs")]


def _groups(channels: Channels, axis: Axis, sides: Mapping[Axis, str]) -> list[dict[str, Any]]:
    """The sets on one axis, alike ones as one entry."""
    where: dict[int, Counter[Axis]] = {number: Counter() for number in channels.axes[axis].tolist()}
    for other, numbers in channels.axes.items():
        for number in numbers.tolist():
            if number in where:
                where[number][other] += 1
    alike = Counter[Together]((channels.locked.get(number), tuple(sorted(axes.items()))) for number, axes in where.items())
    return [
        {
            "sets": count,
            "locked": reason,
            "together": [
                {"tensor": tensor, "side": sides.get((tensor, at), "channels"), "channels": positions}
                for (tensor, at), positions in axes
            ],
        }
        for (reason, axes), count in alike.items()
    ]


def explanation_tables(tree: Mapping[str, Any]) -> RenderableType:
    """The explanation as Rich tables: one for what the layer makes, one for what it reads."""
    return Group(*(_table(tree["layer"], side, tree[side]) for side in ("outputs", "inputs")))


def _table(layer: str, side: str, groups: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=words(f"{layer}: {side}"), title_justify="left")
    table.add_column("sets", justify="right")
    table.add_column("one set takes")
    table.add_column("locked")
    for group in groups:
        taken = [f"{each['tensor']} ({each['channels']} of its {each['side']})" for each in group["together"]]
        table.add_row(f"{group['sets']:,}", Text("\n".join(map(printable, taken))), words(group["locked"] or ""))
    return table
