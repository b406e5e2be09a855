"""Which channels must go together: ids carried through every operation of the graph.

Every axis of every parameter gets fresh ids, one per position. Each tensor of the graph carries
labels: an axis and the ids along it, which say what channel an element belongs to. An operation
that pairs positions ties their ids together; one that moves positions moves ids; one that nobody
wrote a rule for locks the ids it touches, with its name as the reason. What is tied together in the
end is one set: removed as a whole, or kept.

Locked is always correct, only less compact.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from ..graph import Graph, trace
from ..recipe import Edit, Keep, Set
from . import rules  # noqa: F401  # registers its rules
from .moves import BY_NUMBERS
from .walk import INPUT, OUTPUT, SOFT, Axis, Channels, Ids, Label, Slot, Walk

__all__ = ["BY_NUMBERS", "INPUT", "OUTPUT", "SOFT", "Axis", "Channels", "Ids", "Slot", "edits", "find", "layer_axis"]


def find(graph: Graph, model: nn.Module, locked: Mapping[Axis, str] | None = None, *, soft: bool = False) -> Channels:
    """The coupled sets of the traced network; `locked` names axes that may not be cut, and why.

    With `soft` channels may go that a layer normalisation takes its statistics over, which changes those of the others.
    Heads that run only in training are traced as well: they read channels of the trunk. What a branch that was
    not taken reads is not known, so nothing is free where there is one with parameters of its own.
    """
    walk = Walk(graph, model, soft)
    walk.run()
    if walk.unreached():
        walk.graph = trace(model, graph.image.meta["val"].shape[1:], train=True)
        walk.run()
    if graph.baked and any(not name.endswith("num_batches_tracked") for name, _ in walk.unreached()):
        walk.lock([Label(0, ids) for ids in walk.axes.values()], "a branch that depends on values may read it")
    for axis, reason in (locked or {}).items():
        walk.lock([Label(0, walk.axes[axis])], reason)
    return walk.result()


def edits(channels: Channels, removed: Sequence[int], model: nn.Module) -> list[Edit]:
    """The edits that remove the given sets: one Keep per module axis, one Set per number in code."""
    gone = np.zeros(channels.count, dtype=bool)
    gone[list(removed)] = True
    result: list[Edit] = []
    seen: set[tuple[str, int]] = set()
    for (tensor, axis), sets in channels.axes.items():
        target = layer_axis(model, tensor, axis)
        if target not in seen and gone[sets].any():
            seen.add(target)
            result.append(Keep(*target, tuple(np.flatnonzero(~gone[sets]).tolist())))
    for slot in channels.slots:
        if gone[slot.sets].any():
            result.append(Set(slot.module, slot.attribute, int((~gone[slot.sets]).sum())))
    return result


def layer_axis(model: nn.Module, tensor: str, axis: int) -> tuple[str, int]:
    """(module, 0 = output or 1 = input) of a known layer's tensor axis; else (tensor, axis) itself."""
    path, _, name = tensor.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and name == "weight":
        return path, 1 - axis
    known = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.PReLU)
    if isinstance(module, nn.modules.conv._ConvNd | nn.Linear) and module._parameters.get("weight") is None:
        return tensor, axis  # its weight is computed, and does not go with its bias
    own = name in ("weight", "bias", "running_mean", "running_var")  # a gain beside them is cut by itself
    return (path, axis) if own and isinstance(module, known) else (tensor, axis)
