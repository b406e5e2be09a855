"""What methods, and single layers, would do to a network's outputs: predicted from one set of moments, nothing is compressed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import data, kernels, methods
from .artefact import Network
from .budget import Budget, Floats, Of
from .channels import Channels
from .data import Split
from .errors import CompactError, UsageError
from .graph import Graph, copied, scores
from .layers import Layer
from .methods import hinge
from .methods._widths import removable
from .moments import Moments, gather

SHARES = (0.75, 0.5, 0.25)  # of a layer's channels, or of its rank
LABELLED = 1_024  # images that predicted accuracies are of
DRAWS = 4  # of noise, over which they are averaged

Accuracies = Callable[[float], float | None]


@dataclass(frozen=True)
class Plain:
    """A network of plain layers, with what may be cut of it, and the moments of its layers where there are images."""

    module: nn.Module
    graph: Graph
    channels: Channels
    moments: Mapping[str, Moments] | None
    whole: Mapping[str, int] = field(default_factory=dict)  # what ratios are of, as `measure.wholes` tells

    def budget(self, ratio: float, of: Of, module: nn.Module | None = None) -> Budget:
        return Budget(self.graph, self.channels, module or self.module, ratio=ratio, of=of, original=self.whole.get(of))


def moments(
    network: Network, module: nn.Module, graph: Graph, names: Sequence[str], batches: Sequence[Tensor]
) -> dict[str, Moments]:
    """The moments of the named layers. Raises CompactError if the network's code depends on the values of tensors."""
    if graph.baked:
        raise CompactError(f"{network.name}: the network's code depends on the values of tensors; leave out --data")
    return gather(module, names, batches)


def accuracies(network: Network, split: Split | None) -> Accuracies:
    """The accuracy, in percent, that a relative output error leaves: of logits with noise of that size; None without labels.

    As if an error of the outputs had no direction, on LABELLED images at most.
    """
    if split is None or split.labels is None:
        return lambda error: None
    count = min(LABELLED, len(split))
    chosen = split.subset(data.choose(split.labels, len(split), count, 0))
    batches = list(data.batches(chosen, network.recipe.preprocessing, 256, "cpu"))
    module = kernels.folded(network.module).eval()
    with torch.inference_mode():
        logits = torch.cat([scores(module(image)) for image, _ in batches])
    labels = torch.cat([label for _, label in batches])
    noise = torch.randn(DRAWS, *logits.shape, generator=torch.Generator().manual_seed(0))
    deviation = float((logits - logits.mean(0)).square().mean().sqrt())
    return lambda error: 100 * float(((logits + error * deviation * noise).argmax(2) == labels).float().mean())


def predicted(
    plain: Plain, names: Sequence[str], ratios: Sequence[float], of: Of | None, accuracy: Accuracies
) -> list[dict[str, Any]]:
    """For each method and ratio the relative output error that the method's own plan expects, least first within a ratio.

    All by the same measure: what a change of a layer's weights does to the outputs to first order, summed over layers, without
    what a refit then makes good. A method that cannot be had at a ratio has a reason instead.
    """
    rows = []
    for ratio in ratios:
        found = [_row(plain, name, ratio, of, accuracy) for name in names]
        rows += sorted(found, key=lambda row: (row["error"] is None, row["error"]))
    return rows


def _row(plain: Plain, name: str, ratio: float, of: Of | None, accuracy: Accuracies) -> dict[str, Any]:
    method = methods.get(name)()
    row: dict[str, Any] = {"method": name, "ratio": ratio, "of": of or method.of[0]}
    if row["of"] not in method.of:
        return {**row, "error": None, "accuracy": None, "reason": f"{name} takes a share of {' or '.join(method.of)}"}
    module = copied(plain.module)  # some put its channels in another order
    budget = plain.budget(ratio, row["of"], module)
    try:
        method.start(module, plain.channels, budget, plain.moments)
        if not method.losses:
            method.finish(module, plain.channels, budget, plain.moments)
    except UsageError:
        raise
    except CompactError as problem:
        return {**row, "error": None, "accuracy": None, "reason": str(problem)}
    error = sum(method.losses.values()) ** 0.5
    return {**row, "error": error, "accuracy": accuracy(error), "reason": None}


def sensitivity(plain: Plain, accuracy: Accuracies) -> dict[str, dict[str, Any]]:
    """By layer, what the outputs lose with SHARES of its channels left, and of its rank: schema compactcli/analysis/1.

    Each layer alone, the others whole; those that read its channels make good what they can.
    """
    budget = plain.budget(0.5, "macs")
    widths: dict[str, Floats] = {}
    for family, _, errors in removable(plain.module, plain.channels, budget, plain.moments, shared=True):
        for layer in budget.makers(budget.families[family]):
            if layer.groups == 1 and _mostly(plain, layer, budget, family):
                widths[layer.name] = errors
    ranks = {
        budget.layers[index].name: errors
        for index, errors in hinge.rank_errors(plain.module, plain.channels, budget, plain.moments)
    }
    return {
        layer.name: {
            "channels": _at_shares(widths.get(layer.name), accuracy),
            "ranks": _at_shares(ranks.get(layer.name), accuracy),
        }
        for layer in budget.layers
    }


def _mostly(plain: Plain, layer: Layer, budget: Budget, family: int) -> bool:
    """Whether a family's sets are the most that a layer makes of any."""
    made = set(plain.channels.axes[layer.weight, layer.out_axis].tolist())
    shared = [len(made & set(each.sets.tolist())) for each in budget.families]
    return shared[family] == max(shared)


def _at_shares(errors: Floats | None, accuracy: Accuracies) -> list[dict[str, Any]] | None:
    """The relative output error, and the accuracy, at each of SHARES; `errors` are squares, by how many are kept."""
    if errors is None:
        return None
    kept = [max(1, round(share * (len(errors) - 1))) for share in SHARES]
    found = [float(np.sqrt(max(float(errors[count]), 0.0))) for count in kept]
    return [
        {"share": share, "kept": count, "error": error, "accuracy": accuracy(error)}
        for share, count, error in zip(SHARES, kept, found, strict=True)
    ]
