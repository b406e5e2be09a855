"""FCF's projection onto the box beside a solver of quadratic programs: `python -m benchmarks fcf_projection`.

The z1 update of one step (Li et al., CVPR 2019): for every layer of a ResNet-56 that loses filters (both convolutions of each
block) the nearest vector with entries from 0 to 1 and the sum k, k three quarters of the filters. Ours is one exact call for all
layers; OSQP solves each at tolerance 1e-9, its problems set up beforehand, warm from the step before. The inputs are those of
`--steps` steps of ADMM from random scalars, first all by ours, then all by OSQP. A time is the sum over the layers, the figure
the median over the steps.

Required: at least 50 times faster, the same result to 1e-6.

    python -m benchmarks fcf_projection [--steps 50]
"""

import argparse
import statistics
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compactcli.lpbox import Admm, Penalty, onto_box

from ._common import write

LAYERS = [width for width in (16, 32, 64) for _ in range(18)]  # filters
KEPT = 0.75
TIMES = 50  # faster than OSQP
TOLERANCE = 1e-6
PRECISE = {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 100_000, "verbose": False}


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/fcf_projection.json."""
    parser = argparse.ArgumentParser(prog="fcf_projection")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args(arguments)
    sizes = torch.tensor(LAYERS)
    counts = (KEPT * sizes).long()
    solvers = [_solver(size, count) for size, count in zip(sizes.tolist(), counts.tolist(), strict=True)]
    every = _inputs(counts, sizes, options.steps)
    ours, theirs, results, far = [], [], [], 0.0
    for points in every:
        start = time.perf_counter()
        results.append(onto_box(points, counts, sizes))
        ours.append(time.perf_counter() - start)
    for points, found in zip(every, results, strict=True):
        rows = [row[:size].numpy() for row, size in zip(points, LAYERS, strict=True)]
        start = time.perf_counter()
        solved = [_solved(solver, row) for solver, row in zip(solvers, rows, strict=True)]
        theirs.append(time.perf_counter() - start)
        far = max(far, *(float(np.abs(row[: len(x)].numpy() - x).max()) for row, x in zip(found, solved, strict=True)))
    times = statistics.median(theirs) / statistics.median(ours)
    result = {
        "layers": len(LAYERS),
        "steps": options.steps,
        "ours_ms": 1e3 * statistics.median(ours),
        "osqp_ms": 1e3 * statistics.median(theirs),
        "osqp": version("osqp"),
        "times_faster": times,
        "largest_difference": far,
        "required": {"times_faster": TIMES, "difference": TOLERANCE, "met": times >= TIMES and far <= TOLERANCE},
    }
    print(f"ours {result['ours_ms']:.2f} ms, OSQP {result['osqp_ms']:.1f} ms: {times:.0f} times; they differ by {far:.1e}")
    write("fcf_projection", {"command": " ".join(["python -m benchmarks fcf_projection", *arguments]), **result})


def _inputs(counts: Tensor, sizes: Tensor, steps: int) -> list[Tensor]:
    """What is projected in each step (layers, widest), float64."""
    v = torch.rand(len(sizes), int(sizes.max()), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v[torch.arange(v.shape[1]) >= sizes[:, None]] = 0.0
    admm, found = Admm(counts, sizes, v.shape[1], Penalty()), []
    for _ in range(steps):
        found.append(v + admm.y1.double() / admm.rho)
        v = v - 0.1 * admm.gradient(v)
        admm.step(v)
    return found


def _solver(size: int, count: int) -> Any:
    import osqp
    from scipy import sparse

    solver = osqp.OSQP()
    bounds = sparse.vstack([sparse.eye(size), np.ones((1, size))], format="csc")
    lower, upper = np.array([*[0.0] * size, count]), np.array([*[1.0] * size, count])
    solver.setup(sparse.eye(size, format="csc"), np.zeros(size), bounds, lower, upper, **PRECISE)
    return solver


def _solved(solver: Any, point: Any) -> Any:
    solver.update(q=-point)
    return solver.solve(raise_error=True).x
