"""Torch-Pruning on one network, as its documentation shows it, held to the same law as ours."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from compactcli import measure
from compactcli.channels import Axis
from compactcli.graph import outputs, trace
from compactcli.law import NOISE_FACTOR, TOLERANCE, difference, run_double
from compactcli.layers import Layer

from ._coverage_worker import GIANTS, SHARE, Found, Row, architecture, law, randomised, shares, train_step

Masks = dict[Axis, set[int]]


def peer(row: Row, name: str) -> None:
    """Every stage of Torch-Pruning; where no linear layer is the classifier, once more with convolutions so wide ignored."""
    if name in GIANTS:
        row.say({"skipped": "more than 600 million parameters"})
        return
    model, shape = randomised(name), architecture(name).input_shape
    row.say({"params": measure.params(model), "bytes": 4 * measure.params(model), "shape": shape})
    with torch.inference_mode():
        found = outputs(model(torch.randn(1, *shape)))
    linear = _ignored(model, found, nn.Linear)
    _measure(row, "", model, shape, linear)
    if not linear:
        _measure(row, "helped_", model, shape, _ignored(model, found, nn.Conv2d))


def _ignored(model: nn.Module, outputs: list[Tensor], kind: type[nn.Module]) -> list[str]:
    """The layers of that kind as wide as the network has classes."""
    widths = {output.shape[1] for output in outputs}
    found = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    return [name for name, module in found.items() if len(module.get_parameter("weight")) in widths]


def _measure(row: Row, prefix: str, original: nn.Module, shape: tuple[int, int, int], ignored: list[str]) -> None:
    """Prune a copy, and note whether it runs, trains, and computes what the masked original does."""
    pruned = copy.deepcopy(original)
    made: list[_Pruning] = []

    def build() -> Found:
        made.append(_Pruning(pruned, shape, ignored))
        return {"ignored": ignored}

    def prune() -> Found:
        made[0].run()
        return {"params": measure.params(pruned)}

    if not (row.stage(f"{prefix}build", build) and row.stage(f"{prefix}prune", prune)):
        return
    row.stage(f"{prefix}eval", lambda: _evaluated(original, pruned, shape))
    row.stage(f"{prefix}exact", lambda: _exact(original, pruned, made[0], shape))
    row.stage(f"{prefix}train", lambda: train_step(pruned, shape))
    row.stage(f"{prefix}free", lambda: _free(original, shape, ignored))


class _Pruning:
    """One run of MagnitudePruner that notes which channels of the original went, on either side of every layer."""

    def __init__(self, model: nn.Module, shape: tuple[int, int, int], ignored: list[str]) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self.transposed = {name for name, module in model.named_modules() if isinstance(module, _ConvTransposeNd)}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        self.left: dict[Axis, list[int]] = {}  # positions of the original that are there yet
        self.producers: Masks = {}
        self.consumers: Masks = {}
        self.pruner = tp.pruner.MagnitudePruner(
            model,
            torch.randn(1, *shape),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=SHARE,
            ignored_layers=[model.get_submodule(name) for name in ignored],
        )

    def run(self) -> None:
        for group in self.pruner.step(interactive=True):
            for dependency, positions in group:
                self.note(dependency, positions)
            group.prune()

    def note(self, dependency: Any, positions: list[int]) -> None:
        target, graph = dependency.target.module, self.pruner.DG
        if isinstance(target, nn.Parameter):
            self.remove(self.producers, (graph._param_to_name[target], graph.module2node[target].pruning_dim), [], positions)
            return
        name = self.names.get(id(target))
        if name is None or f"{name}.weight" not in self.shapes:
            return  # an operation, not a layer
        outward = int(name in self.transposed)
        if graph.is_out_channel_pruning_fn(dependency.handler):
            self.remove(self.producers, (f"{name}.weight", outward), [f"{name}.bias", f"{name}.running_mean"], positions)
        elif isinstance(target, nn.Linear) or (isinstance(target, _ConvNd) and target.groups == 1):
            self.remove(self.consumers, (f"{name}.weight", 1 - outward), [], positions)

    def remove(self, masks: Masks, axis: Axis, beside: list[str], positions: list[int]) -> None:
        """Mask the positions, counted as of now, along the tensor's axis and those of the vectors beside it."""
        left = self.left.setdefault(axis, list(range(self.shapes[axis[0]][axis[1]])))
        gone = {left[position] for position in positions if position < len(left)}
        self.left[axis] = [position for position in left if position not in gone]
        for place in (axis, *((name, 0) for name in beside if name in self.shapes)):
            masks.setdefault(place, set()).update(gone)

    def masks(self) -> Iterator[tuple[str, dict[Axis, Tensor]]]:
        """Three ways to zero what was removed: a result that equals one of them counts as exact."""
        ways = {"producers": self.producers, "consumers": self.consumers, "both": {**self.producers, **self.consumers}}
        for way, masks in ways.items():
            yield way, {axis: torch.tensor(sorted(gone), dtype=torch.long) for axis, gone in masks.items()}


def _evaluated(original: nn.Module, pruned: nn.Module, shape: tuple[int, int, int]) -> Found:
    """Whether the pruned network runs, and gives outputs of the same shape: as many classes."""
    with torch.inference_mode():
        image = torch.randn(1, *shape)
        before, after = ([tuple(o.shape) for o in outputs(m.eval()(image))] for m in (original, pruned))
    return {"same_outputs": before == after}


def _exact(original: nn.Module, pruned: nn.Module, pruning: _Pruning, shape: tuple[int, int, int]) -> Found:
    """The smallest difference from the original with the removed channels zeroed, in float64."""
    image = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    actual = run_double(pruned, image)
    errors: dict[str, float] = {}
    for way, masks in pruning.masks():
        errors[way] = difference(actual, run_double(original, image, masks))
        if errors[way] <= TOLERANCE:
            break
    way = min(errors, key=lambda way: errors[way])
    found = law(pruned, image, errors[way])
    exact = errors[way] <= max(TOLERANCE, NOISE_FACTOR * found.get("noise", 0.0))
    return {"exact": exact, "masked": way, **found}


def _free(original: nn.Module, shape: tuple[int, int, int], ignored: list[str]) -> Found:
    """How many of the layers' output channels are in groups that it would prune."""
    graph = tp.DependencyGraph().build_dependency(original, example_inputs=torch.randn(1, *shape))
    names = {id(module): name for name, module in original.named_modules()}
    free: set[tuple[str, int]] = set()
    for group in graph.get_all_groups(ignored_layers=[original.get_submodule(name) for name in ignored]):
        for dependency, positions in group:
            name = names.get(id(dependency.target.module))
            if name is not None and graph.is_out_channel_pruning_fn(dependency.handler):
                free.update((f"{name}.weight", position) for position in positions)

    def counted(layer: Layer) -> tuple[int, int]:
        width = layer.shape[1] * layer.groups if layer.transposed else layer.shape[0]
        return width, sum((layer.weight, position) in free for position in range(width))

    return shares(trace(original, shape), counted)
