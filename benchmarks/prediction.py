"""Error predicted from the moments against error measured, per layer: `python -m benchmarks prediction`.

ResNet-56 on CIFAR-10 (JPEG images). Each layer alone is decomposed at half its rank and refitted on 256
unlabelled images; predicted is trace(worth dW inputs dW^T) for the change dW of its kernel, measured the
squared relative error of the logits on the same images. No figure is required: told is how the two correlate.
"""

import copy
from typing import Any

import numpy as np

from compactcli import artefact, calibrate, data, sources, surgery
from compactcli.budget import Budget
from compactcli.channels import find
from compactcli.graph import trace
from compactcli.methods import hinge
from compactcli.methods._decomposed import decompose
from compactcli.moments import Batches, gather, value_bytes

from ._common import checkpoint, images, write

IMAGES = 256


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/prediction.json."""
    network = artefact.open_model(checkpoint("resnet56-cifar10jpeg.th"))
    module, shape, preprocessing = network.module, network.input_shape, network.recipe.preprocessing
    dataset = sources.open_dataset(str(images()), input_shape=shape, preprocessing=preprocessing)
    assert dataset.train is not None
    graph = trace(module, shape)
    channels = find(graph, module)
    budget = Budget(graph, channels, module, ratio=0.5)
    batches = Batches(data.sample(dataset.train, IMAGES, 0), preprocessing, value_bytes(graph))
    moments = gather(module, [layer.name for layer in budget.layers], batches)
    rows: list[dict[str, Any]] = []
    for index, errors in hinge.rank_errors(module, channels, budget, moments):
        layer = budget.layers[index]
        model = copy.deepcopy(module)
        edits = [decompose(model, channels, layer, (len(errors) - 1) // 2, [])]
        surgery.apply_(model, edits)
        measured = calibrate.refit_(model, module, edits, batches, only={layer.name}) ** 2
        dense = surgery.LAYERS["hinge.decomposed"].dense(model.get_submodule(layer.name))
        change = (dense.get_parameter("weight") - module.get_parameter(layer.weight)).detach().flatten(1).double()
        known = moments[layer.name]
        predicted = float((known.worth.double() @ change @ known.inputs.double() * change).sum())
        rows.append({"layer": layer.name, "predicted": predicted, "measured": measured})
    by_plan, by_images = (np.array([row[key] for row in rows]) for key in ("predicted", "measured"))
    correlation = float(np.corrcoef(by_plan, by_images)[0, 1])
    of_logarithms = float(np.corrcoef(np.log(by_plan), np.log(by_images))[0, 1])
    print(f"{len(rows)} layers: correlation {correlation:.3f}, of logarithms {of_logarithms:.3f}")
    result = {
        "command": "python -m benchmarks prediction",
        "correlation": correlation,
        "of_logarithms": of_logarithms,
        "layers": rows,
    }
    write("prediction", result)
