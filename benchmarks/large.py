"""Time and memory of calibrating a large network: `python -m benchmarks large [--images 1024] [--arch resnet50]`.

torchvision's resnet50 with random weights on random 224 x 224 images, `compress --method hinge --ratio 0.5`.
No figure is required.
"""

import argparse
import resource
import time

import torch

from compactcli import artefact, measure
from compactcli.compress import Calibration, Target, compress
from compactcli.methods import get

from ._common import write


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/large.json."""
    parser = argparse.ArgumentParser(prog="large")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--arch", default="resnet50")
    options = parser.parse_args(arguments)
    network = artefact.fresh(artefact.Wishes(options.arch), 0)
    size = 4 * measure.params(network.module)
    images = torch.randint(0, 256, (options.images, *network.input_shape), dtype=torch.uint8)
    before = _peak()
    start = time.perf_counter()
    compress(network, "hinge", get("hinge")(), Target(0.5), calibration=Calibration(images, "random"), log=print)
    seconds, peak = time.perf_counter() - start, _peak()
    print(f"{seconds:.0f} s, peak {peak / 2**20:,.0f} MiB ({before / 2**20:,.0f} before), model {size / 2**20:,.0f} MiB")
    result = {"command": " ".join(["python -m benchmarks large", *arguments]), "seconds": seconds, "peak_bytes": peak}
    write("large", {**result, "before_bytes": before, "model_bytes": size, "images": options.images, "arch": options.arch})


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
