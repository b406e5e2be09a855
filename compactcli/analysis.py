"""Where a network is redundant and what may be cut, and what methods would lose: the document of `analyze --json`."""

import copy
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from . import artefact, budget, data, latency, measure, methods, predict, redundancy
from .artefact import Network
from .channels import Channels
from .layers import Layer, labels, layers, single, stored
from .layers import macs as macs_of
from .moments import MOMENT_IMAGES, Batches, value_bytes
from .plain import plained
from .plan import plan
from .report import about

TOLERATED = 0.25  # predicted output error: with images, about as much as a refit makes good


@dataclass(frozen=True)
class Predicted:
    """Methods and shares for which an analysis predicts the output error."""

    methods: Sequence[str]
    ratios: Sequence[float] = (0.7, 0.5)
    of: budget.Of | None = None  # None: what each method is for


def analyse(
    network: Network,
    *,
    linear: bool = False,
    timed: bool = False,
    dataset: data.Dataset | None = None,
    wanted: Predicted | None = None,
    flags: Sequence[str] | None = None,
    log: Callable[[str], None] = lambda line: None,
    detail: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Where a network is redundant and what may be cut: schema compactcli/analysis/1.

    The redundancy is given for convolutions, and for linear layers too with `linear`; the share of time of each layer where it
    is to be `timed`; with images of a dataset the redundancy of activations and the sensitivity of each layer too; the errors of
    methods that are `wanted`. `flags` name the model and the data in the suggested command; there
    is none for a network whose weights are not finite.
    Raises CompactError if the images do not fit the network.
    """
    module, shape = plained(network.module, network.input_shape), network.input_shape
    graph, channels = plan(module, shape, log)
    found = layers(graph)
    names = [layer.name for layer in found if layer.called]
    rows = [_analysed(module, channels, layer, label, linear) for layer, label in zip(found, labels(found), strict=True)]
    if timed:
        detail("timing the layers")
        _join(rows, "time", latency.layer_times(module, names, shape))
    accuracy, moments, told = predict.accuracies(network, None), None, None
    if dataset is not None:
        split, judged = dataset.train or dataset.test, dataset.test or dataset.train
        assert split is not None
        data.check_classes(dataset, network.num_classes)
        images = data.sample(split, MOMENT_IMAGES, 0)
        told = {"dataset": dataset.name, "split": split.name, "images": len(images)}
        detail(f"moments of {len(found)} layers, from {len(images)} images of {dataset.name}")
        batches = Batches(images, network.recipe.preprocessing, value_bytes(graph))
        moments = predict.moments(network, module, graph, single(found), batches)
        accuracy = predict.accuracies(network, judged)
        alike = redundancy.of_activations(module, names, batches)
        _join(rows, "activations", {name: asdict(own) for name, own in alike.items()})
    plain = predict.Plain(module, graph, channels, moments, measure.wholes(network.module, shape))
    if moments is not None:
        detail("sensitivity of the layers")
        _join(rows, "sensitivity", predict.sensitivity(plain, accuracy))
    predictions = None
    if wanted is not None:
        detail(f"planning {', '.join(wanted.methods)} at {', '.join(f'{ratio:g}' for ratio in wanted.ratios)}")
        predictions = predict.predicted(plain, wanted.methods, wanted.ratios, wanted.of, accuracy)
    named = flags or [network.name if network.name != "stdin" else "MODEL"]
    return {
        "schema": "compactcli/analysis/1",
        "model": about(network, macs_of(graph)),
        "data": told,
        "layers": rows,
        "sets": _coupled(plain),
        "predictions": predictions,
        "suggestion": None if artefact.nonfinite(network.module)[0] else _suggestion(named, rows, predictions),
    }


def _join(layers: Sequence[dict[str, Any]], key: str, values: Mapping[str, Any]) -> None:
    """Give each layer its value."""
    for layer in layers:
        layer[key] = values.get(layer["name"])


def _coupled(plain: predict.Plain) -> list[dict[str, Any]]:
    """The sets of channels that must go together and may go: alike ones together, with what one of them saves."""
    one = plain.budget(0.5, "macs")
    budgets = {"params": copy.copy(one), "macs": one}
    budgets["params"].of = "params"
    result = []
    states = np.stack([one.along() - taken for taken in [np.zeros_like(one.along()), *one.per_set]])
    costs = {of: own.cost(states, np.tile(one.ranks(), (len(states), 1))) for of, own in budgets.items()}
    for number, family in enumerate(one.families, 1):
        result.append(
            {
                "sets": len(family.sets),
                "made_by": [layer.name for layer in one.makers(family)],
                "read_by": [layer.name for layer in one.readers(family)],
                **{of: round(float(cost[0] - cost[number])) for of, cost in costs.items()},
            }
        )
    return result


def _analysed(module: nn.Module, channels: Channels, layer: Layer, label: str, linear: bool) -> dict[str, Any]:
    owner = module.get_submodule(layer.name)
    out = (layer.weight, 1 if layer.transposed else 0)
    wanted = linear or not isinstance(owner, nn.Linear)
    alike = redundancy.of(_filters(module.get_parameter(layer.weight), layer)) if wanted else None
    return {
        "name": label,
        "type": type(owner).__name__,
        "weight_shape": list(layer.shape),
        "params": stored(module, layer, label),
        "macs": layer.macs,
        "sets": len({number for number in channels.axes[out].tolist() if number not in channels.locked}),
        "locked": channels.reason(out),
        "redundancy": None if alike is None else asdict(alike),
        "time": None,
        "activations": None,
        "sensitivity": None,
    }


def _filters(weight: Tensor, layer: Layer) -> Tensor:
    """The weight with its outputs first (o, i / groups, ...), as that of a layer that is not transposed lies already."""
    if not layer.transposed:
        return weight
    grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])  # (groups, i / groups, o / groups, ...)
    return grouped.transpose(1, 2).flatten(0, 1)


def _suggestion(
    flags: Sequence[str], layers: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """The smallest ratio at which a method is predicted to lose no more than TOLERATED, and the command to try it.

    Without predictions `hinge`, at a ratio from the rank that holds 99 % of each layer's energy, weighed by MACs.
    """
    base = f"compactcli compress {shlex.join(flags)}"
    rows = [row for row in predictions or () if row["error"] is not None]
    if rows:
        fine = [row for row in rows if row["error"] <= TOLERATED] or [min(rows, key=lambda row: row["error"])]
        row = min(fine, key=lambda row: (row["ratio"], row["error"]))
        of = "" if row["of"] == methods.get(row["method"]).of[0] else f" --of {row['of']}"
        command = f"{base} --method {row['method']} --ratio {row['ratio']:g}{of}"
        return {"method": row["method"], "ratio": row["ratio"], "command": command}
    known = [(layer["redundancy"]["rank_ratio_99"], layer["macs"]) for layer in layers if layer["redundancy"]]
    total = sum(macs for _, macs in known)
    share = sum(ratio * macs for ratio, macs in known) / total if total else 0.5
    ratio = min(max(round(share - 0.2, 1), 0.3), 0.8)
    return {"method": "hinge", "ratio": ratio, "command": f"{base} --method hinge --ratio {ratio:g}"}
