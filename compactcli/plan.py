"""What of a network may be cut: its coupled sets, confirmed by running the network without some of them."""

from collections.abc import Callable, Sequence

from torch import nn

from . import surgery
from .budget import Family, families
from .channels import Axis, Channels, edits, find
from .errors import CompactError
from .graph import Graph, Numbers, run_fake, trace
from .layers import Layer, layers, matching

TIED = "tied to what --leave names"
VERBS = {
    **{"add": "add", "sub": "subtract", "rsub": "subtract from"},
    **{"mul": "multiply by", "div": "divide by", "pow": "raise to"},
}


def plan(
    module: nn.Module,
    shape: Sequence[int],
    log: Callable[[str], None] = lambda line: None,
    *,
    soft: bool = False,
    leave: Sequence[str] = (),
) -> tuple[Graph, Channels]:
    """The traced network and its coupled sets, those locked whose removal would leave a number in the network's code wrong.
    `soft`: as `channels.find` has it. `leave` names layers whose filters stay.

    Found by running the network, on fake tensors, without the first set of every family at once, and where that
    fails of fewer and fewer. `log` gets a line for each family that is locked so.
    """
    graph = trace(module, shape)
    if graph.baked:
        log("the network's code depends on the values of tensors: what it did on random images is taken for what it does")
    locked = {axis: TIED for layer in matching(layers(graph), leave) for axis in _filters(layer)}
    channels = find(graph, module, locked, soft=soft)
    groups = [family for family in families(channels) if len(family.sets) > 1]
    stuck = _stuck(module, channels, groups, shape)
    for family, reason in stuck:
        axis = next(axis for axis, _ in family.axes)
        locked[axis] = f"its number is written in code: {reason}"
        log(f"{axis[0]}: left alone, {locked[axis]}")
    return graph, find(graph, module, locked, soft=soft) if stuck else channels


def _filters(layer: Layer) -> list[Axis]:
    """The axes of a layer's weight that its outputs go along: both where they lie on one within groups, or it is not known."""
    both = (layer.transposed and layer.groups > 1) or not layer.called
    return [(layer.weight, axis) for axis in ((0, 1) if both else (layer.out_axis,))]


def _stuck(module: nn.Module, channels: Channels, groups: Sequence[Family], shape: Sequence[int]) -> list[tuple[Family, str]]:
    """The families that may not be cut, and why: halves of those that fail together, again and again."""
    reason = _runs(module, channels, [int(family.sets[0]) for family in groups], shape)
    if reason is None:
        return []
    middle = len(groups) // 2
    found = [each for half in (groups[:middle], groups[middle:]) if middle for each in _stuck(module, channels, half, shape)]
    return found or [(family, reason) for family in groups]  # the only one, or those that fail only together


def _runs(module: nn.Module, channels: Channels, removed: Sequence[int], shape: Sequence[int]) -> str | None:
    """Why the network without the sets does not run, in eval and in train mode, or its code then reckons with other numbers;
    None if it does, with the same.
    """
    changes, numbers = edits(channels, removed, module), Numbers()
    try:
        run_fake(module, shape, train=None, change=lambda shadow: surgery.apply_(shadow, changes), numbers=numbers)
    except CompactError as problem:
        return str(problem)
    if numbers.found:
        before = Numbers()
        run_fake(module, shape, numbers=before)
        others = sorted(numbers.found - before.found)
        if others:
            name, number = others[0]
            return f"with fewer channels its code would {VERBS[name.strip('_')]} {number:g}"
    return None
