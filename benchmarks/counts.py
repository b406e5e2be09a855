"""Parameters and FLOPs of the papers' networks, by the authors' own counters: `python -m benchmarks counts`.

Nothing is trained or timed: shapes alone decide, on the meta device. The networks are built as the tests build them, which hold
each count to the last digit (tests/test_*_arithmetic.py): hinge's to start from and with uniform ranks; fcf's with a share of
the filters gone; linearconv's plain, with all coefficients and at rank 10; csg's plain and from codes; hetconv's in P parts.

Required: what the papers print, to its last digit; `docs/results.md` tells where it is not.

    python -m benchmarks counts
"""

import sys
from typing import Any

from torch import nn

from compactcli import counters, measure

from ._common import ROOT, write

sys.path.insert(0, str(ROOT / "tests"))  # the builders
import test_csg_arithmetic as csg
import test_fcf_arithmetic as fcf
import test_hetconv_arithmetic as hetconv
import test_hinge_arithmetic as hinge
import test_linearconv_arithmetic as linearconv

SHAPE = (3, 32, 32)
HINGE = ("resnet20", "resnet56", "resnet164", "vgg16_linear3", "densenet12_40", "resnext20", "resnext164", "wrn16_10")
FCF_RATES = (0.15, 0.25, 0.35, 0.45)
CSG = ("resnet20", "resnet56", "resnet110", "densenet_bc40_36", "densenet_bc40_48")
CODES = {"16x16, 128": (16, 128), "12x12, 72": (12, 72)}
VARIANTS = {"full": linearconv.FULL, "rank 10": linearconv.RANK_10}


def main(arguments: list[str]) -> None:
    """Count and write benchmarks/results/counts.json."""
    if arguments:
        raise SystemExit("counts takes no arguments")
    write("counts", {"command": "python -m benchmarks counts", **found()})


def found() -> dict[str, Any]:
    """All counts, by method."""
    return {
        "hinge": {name: dict(zip(("flops", "params"), hinge.counts(hinge.build(name)), strict=True)) for name in HINGE},
        "fcf": {f"{rate:g}": [float(figure) for figure in fcf.down("resnet34", rate)] for rate in FCF_RATES},
        "linearconv": {name: _linearconv(name) for name in linearconv.NETWORKS},
        "csg": {name: _csg(name) for name in CSG},
        "hetconv": {str(parts): _hetconv(hetconv.divided(parts)) for parts in hetconv.PARTS},
    }


def _linearconv(name: str) -> dict[str, Any]:
    """Parameters and FLOPs, the making of the kernels included. In the paper the stem of ResNeXt is replaced as well."""
    plain = "" if name.startswith("resnext") else None
    models = {"plain": linearconv.build(name)}
    models |= {variant: linearconv.replaced(name, kind, plain) for variant, kind in VARIANTS.items()}
    return {key: {"params": measure.params(one), "flops": counters.linearconv(one, SHAPE)} for key, one in models.items()}


def _csg(name: str) -> dict[str, Any]:
    """Parameters: plain; from codes; from codes where the generator is known already."""
    coded = {key: csg.counts(csg.coded(name, *sizes, 3, csg.in_a_block)) for key, sizes in CODES.items()}
    return {"plain": measure.params(csg.build(name)), **{key: list(counts) for key, counts in coded.items()}}


def _hetconv(model: nn.Module) -> dict[str, int]:
    """By the paper's formula; what is executed; what is stored."""
    return {
        "flops": counters.hetconv(model, SHAPE),
        "executed": measure.macs(model, SHAPE),
        "params": measure.params(model),
    }
