"""Random networks after random chains of edits are held to the law: `python -m benchmarks random_networks`.

Small networks of up to five blocks (plain, normed, residual, concatenating, gated, separable, grouped, shuffled, transposed,
padded, called twice), flattened or pooled, each changed by up to three steps: channels cut at random, or one of the five methods
from the weights. Every cut equals the network in which what reads the removed channels is zero; the file in the end gives the
same network to the last bit of its outputs, and is the same bytes when written again (`tests/chains.py`). Required: no failure.

Counts are in benchmarks/results/random_networks.json after each hundred; --resume goes on from there.

    python -m benchmarks random_networks [--count 2000] [--resume]
"""

import argparse
import re
import sys
import time
from collections import Counter
from typing import Any

from ._common import ROOT, provenance, read, write

sys.path.insert(0, str(ROOT / "tests"))  # the networks, and the law

import chains

STORED = 100  # networks from one writing of the counts to the next


def main(arguments: list[str]) -> None:
    """Run and write benchmarks/results/random_networks.json."""
    parser = argparse.ArgumentParser(prog="random_networks")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--resume", action="store_true", help="go on behind the networks that there are")
    options = parser.parse_args(arguments)
    earlier = read("random_networks") if options.resume else {}
    steps, refused = (Counter(earlier.get(name, {})) for name in ("steps", "refused"))
    failed: list[dict[str, Any]] = earlier.get("failed", [])
    done, seconds, start = earlier.get("networks", 0), earlier.get("seconds", 0.0), time.perf_counter()
    for number in range(done, options.count):
        try:
            told = chains.held(number)
        except Exception as problem:  # whatever it is, it is a finding
            failed.append({"number": number, "problem": f"{type(problem).__name__}: {problem}"[:300]})
            print(failed[-1], flush=True)
        else:
            steps.update(told.steps)
            refused.update(re.sub(r"[\d.]+", "N", line) for line in told.refused)
        if (number + 1) % STORED == 0 or number + 1 == options.count:
            counts = {"steps": dict(steps), "refused": dict(refused), "failed": failed, "met": not failed}
            counts |= {"networks": number + 1, "seconds": seconds + time.perf_counter() - start}
            write("random_networks", {**provenance(" ".join(["python -m benchmarks random_networks", *arguments])), **counts})
    print(f"{options.count} networks, {sum(steps.values())} steps, {sum(refused.values())} refused, {len(failed)} failed")
