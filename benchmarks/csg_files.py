"""Accuracy of the csg files that its authors published, as they are: `python -m benchmarks csg_files`.

Their networks on CIFAR-10 (JPEG images, which they were not trained on), all 10,000 test images, beside the accuracy that each
file says it had on the images as the authors have them. Required: at least 78 % (ResNet-56), 75 % (ResNet-20) and 78 %
(DenseNet-BC): the images cost the rest, as they do the plain network of the authors, which stands beside them.

    python -m benchmarks csg_files [--limit 1000]
"""

import argparse
import time

import torch

from compactcli import artefact, measure, report, sources

from ._common import checkpoint, images, provenance, write

LEAST = {
    "csg-rn56_org.t7": None,
    "csg-rn56_1616-128.t7": 78,
    "csg-rn20_1616-128.t7": 75,
    "csg-dnbc4036-csg1212-72.t7": 78,
}


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/csg_files.json."""
    parser = argparse.ArgumentParser(prog="csg_files")
    parser.add_argument("--limit", type=int, help="test images")
    options = parser.parse_args(arguments)
    command = " ".join(["python -m benchmarks csg_files", *arguments])
    rows = {}
    for file, least in LEAST.items():
        start = time.perf_counter()
        network = artefact.open_model(checkpoint(file))
        shape, preprocessing = network.input_shape, network.recipe.preprocessing
        dataset = sources.open_dataset(str(images()), input_shape=shape, preprocessing=preprocessing, limit=options.limit)
        evaluated = report.evaluate(network, dataset)
        accuracy = evaluated.accuracy.top1
        rows[file] = {
            **provenance(command),
            "architecture": network.recipe.architecture,
            "params": measure.params(network.module),
            "recorded": torch.load(checkpoint(file), weights_only=True, map_location="cpu")["acc"],
            "accuracy": accuracy,
            "evaluated": evaluated.to_json(),
            "seconds": time.perf_counter() - start,
            "required": {"accuracy": least, "met": None if least is None else accuracy >= least},
        }
        print(f"{file}: {accuracy:.2f} %, {rows[file]['recorded']:.2f} % recorded", flush=True)
        write("csg_files", {"rows": rows})
