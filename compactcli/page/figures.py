"""What a page shows of a network's weights: how alike its filters are, and the norms that hinge's groups have."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels, redundancy
from ..artefact import Network
from ..recipe import Replace

LEVELS = 16  # values that a layer's distribution is shown by


def likeness(network: Network, layers: Iterable[str]) -> list[dict[str, Any]]:
    """For each of the layers that is a convolution still, or several, how alike the filters of its first one are.

    `levels` runs from the filter that is most alike another to the one that is least, by the largest |correlation|.
    """
    module = kernels.folded(network.module)
    convolutions = {name: each for name, each in module.named_modules() if isinstance(each, nn.Conv1d | nn.Conv2d | nn.Conv3d)}
    found = []
    for layer in layers:
        part = next((name for name in convolutions if name == layer or name.startswith(f"{layer}.")), None)
        values = None if part is None else redundancy.likeness(convolutions[part].weight)
        if part is not None and values is not None:
            found.append({"layer": layer, "part": part, "filters": len(values), "mean": float(values.mean())} | _levels(values))
    return found


def norms(network: Network) -> list[dict[str, Any]]:
    """For each layer that hinge decomposed, the norms of its matrix's columns, which are the groups that it draws to zero.

    `levels` runs from the largest to the smallest, as shares of the largest.
    """
    modules = dict(network.module.named_modules())
    found = []
    for edit in network.recipe.edits:
        if not isinstance(edit, Replace) or edit.layer != "hinge.decomposed":
            continue
        pair = modules.get(edit.module)  # whatever another method has put there since
        if isinstance(pair, nn.Sequential) and len(pair) == 2 and isinstance(pair[1], nn.Conv2d | nn.Linear):
            values = pair[1].weight.detach().flatten(1).double().norm(dim=0)  # (o, r) -> (r,)
            if values.isfinite().all() and values.max() > 0:
                largest = float(values.max())
                found.append({"layer": edit.module, "columns": len(values), "largest": largest} | _levels(values / largest))
    return found


def _levels(values: Tensor) -> dict[str, Sequence[float]]:
    """What a page draws of a distribution: as many quantiles, from the largest down."""
    quantiles = values.quantile(torch.linspace(1, 0, LEVELS, dtype=values.dtype))
    return {"levels": [round(level, 4) for level in quantiles.tolist()]}
