"""Which networks can be pruned, and how much of them, ours beside Torch-Pruning 1.6.1: `python -m benchmarks coverage`.

torchvision's 80 classification and 6 segmentation networks and 61 of timm's, with every parameter drawn at random.

Ours: is a bare file of the weights recognised; does the network without a random 30 % of its free channel sets compute, in
float64, what the masked original does; does it train; does it cost what the budget predicted; what share of the
convolutions' output channels is free, and what locks the others; does `compress` to half the parameters meet its target.

Torch-Pruning: MagnitudePruner at 30 %, the linear classifier ignored as its documentation says; held to the same law.
A network without a linear classifier is measured once more ("helped") with convolutions as wide as the classes ignored.

Every network and tool has a process of its own, with one thread, 12 GB of memory and 600 seconds.
Required: ours equals the masked original, and trains, wherever it is cut.

    python -m benchmarks coverage [--networks resnet18 timm:dla34] [--skip-peer] [--only-peer] [--resume]
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import torch

from compactcli import architectures

from . import claim
from ._common import RESULTS, ROOT, machine
from ._coverage_worker import GIANTS, SEGMENTATION

SECONDS = 600  # that one process may take
TIMM = (
    *("bat_resnext26ts", "botnet26t_256", "coatnet_nano_rw_224", "convnext_atto", "convnextv2_atto"),
    *("cspdarknet53", "cspresnet50", "darknet53", "densenet121", "dla34", "dm_nfnet_f0", "dpn68", "eca_nfnet_l0"),
    *("ecaresnet26t", "edgenext_xx_small", "efficientformer_l1", "efficientnet_b0", "efficientnetv2_rw_t"),
    *("ese_vovnet19b_dw", "fastvit_t8", "gernet_s", "ghostnet_100", "ghostnetv2_100", "halonet26t"),
    *("hardcorenas_a", "hrnet_w18_small", "inception_next_atto", "inception_resnet_v2", "inception_v3"),
    *("lcnet_050", "legacy_xception", "levit_128", "mnasnet_100", "mobilenetv3_large_100"),
    *("mobilenetv4_conv_small", "mobileone_s0", "mobilevit_xxs", "nasnetalarge", "nfnet_f0", "poolformer_s12"),
    *("regnetx_002", "regnety_002", "regnetz_b16", "repghostnet_050", "repvgg_a0", "res2net50_26w_4s"),
    *("resnest14d", "resnet50", "resnetaa50", "resnetv2_50", "resnext50_32x4d", "rexnet_100", "selecsls42b"),
    *("seresnet50", "skresnet18", "spnasnet_100", "starnet_s1", "tiny_vit_5m_224", "tinynet_e", "wide_resnet50_2"),
    "xception41",
)
ATTENTION = (
    *("vit_", "swin_", "maxvit_t", "timm:bat_resnext26ts", "timm:botnet26t_256", "timm:coatnet_nano_rw_224"),
    *("timm:edgenext_xx_small", "timm:efficientformer_l1", "timm:halonet26t", "timm:levit_128", "timm:mobilevit_xxs"),
    "timm:tiny_vit_5m_224",
)  # how their names begin; all others are CNNs

Found = dict[str, Any]


def main(arguments: list[str]) -> None:
    """Measure each network with each tool, write benchmarks/results/coverage.json after each, and print the summary."""
    parser = argparse.ArgumentParser(prog="coverage")
    parser.add_argument("--networks", nargs="+", default=networks())
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--only-peer", action="store_true")
    parser.add_argument("--resume", action="store_true", help="keep the rows there are, except those that ran out of time")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    tools = [tool for tool, skip in (("ours", options.only_peer), ("peer", options.skip_peer)) if not skip]
    for name in options.networks:
        for tool in tools:
            old = rows().get(name, {}).get(tool)
            if options.resume and old is not None and not old.get("failed", "").startswith("time"):
                continue
            row = measured(tool, name)
            save(name, tool, row, options.networks)
            print(f"{name:32} {tool}  {line(row)}", flush=True)
    print(json.dumps(summary(rows()), indent=2))


def networks() -> list[str]:
    """All of them, by the names that --networks takes."""
    classification = [name for name in architectures.names() if not name.startswith("cifar:")]
    return [*classification, *SEGMENTATION, *(f"timm:{name}" for name in TIMM)]


def measured(tool: str, name: str) -> Found:
    """The last row that the worker printed; `failed` says what ended it early."""
    command = [sys.executable, "-m", "benchmarks._coverage_worker", tool, name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    failed = None
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=environment) as process:
        try:
            output, errors = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            failed = f"time: more than {SECONDS} s"
        except BaseException:  # this process is told to end
            process.kill()
            raise
    lines = [line for line in output.splitlines() if line.startswith("{") and line.endswith("}")]
    row: Found = json.loads(lines[-1]) if lines else {}
    if not row.pop("finished", False):
        code = process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        row["failed"] = failed or f"{how}: {(errors.strip().splitlines() or [''])[-1][:300]}"
    return row


def rows() -> dict[str, Found]:
    """Network -> tool -> row, of every run so far."""
    path = RESULTS / "coverage.json"
    found: dict[str, Found] = json.loads(path.read_text())["rows"] if path.is_file() else {}
    return found


def save(name: str, tool: str, row: Found, order: list[str]) -> None:
    """Put one row into the file, at once: another process may be adding those of the other tool."""
    every = rows()
    every.setdefault(name, {})[tool] = row
    place = {known: index for index, known in enumerate([*networks(), *order])}
    every = dict(sorted(every.items(), key=lambda item: place.get(item[0], len(place))))
    versions = {"timm": version("timm"), "torch_pruning": version("torch_pruning")}
    result = {"claim": claim("coverage"), "machine": {**machine(), **versions}}
    result |= {"command": "python -m benchmarks coverage", "summary": summary(every)}
    RESULTS.mkdir(exist_ok=True)
    part = RESULTS / f"coverage.json.{tool}"
    part.write_text(json.dumps({**result, "rows": every}, indent=1) + "\n")
    part.replace(RESULTS / "coverage.json")


def line(row: Found) -> str:
    """One row for people: what failed, else "ok"; and the share of free channels."""
    problems = [f"{stage}: {found['error']}" for stage, found in row.items() if isinstance(found, dict) and "error" in found]
    problems += [
        f"{stage}: not {test}"
        for stage, test in (("bare", "equal"), ("eval", "same_outputs"), ("exact", "exact"))
        if row.get(stage, {}).get(test, True) is False
    ]
    problems += [f"cost: {of} {c['predicted']} predicted, {c['measured']} measured" for of, c in costs(row) if not c["equal"]]
    problems += [f"{key} {row[key]}" for key in ("skipped", "failed", "running") if key in row]
    share = free(row)
    return f"{'-' if share is None else f'{share:.0%}':>5} free  {'; '.join(problems) or 'ok'}"


def costs(row: Found) -> list[tuple[str, Found]]:
    """Predicted and measured MACs and parameters."""
    return [(of, found) for of, found in row.get("cost", {}).items() if isinstance(found, dict)]


def free(row: Found, prefix: str = "") -> float | None:
    """The share of the convolutions' output channels that the tool says it can remove."""
    found = row.get(f"{prefix}free", {})
    return found["free"] / found["channels"] if found.get("channels") else None


def went(row: Found, stage: str) -> bool:
    """Whether a stage was reached and went through."""
    return stage in row and "error" not in row[stage]


def exact_free(row: Found, prefix: str | None = None) -> float:
    """The same share, counted as nothing unless the smaller network equals its mask, trains and has its classes.

    Of ours without a prefix; of the peer's run with one.
    """
    right = went(row, "surgery") and went(row, "train") if prefix is None else sound(row, prefix) and went(row, f"{prefix}train")
    return (free(row, prefix or "") or 0.0) if right else 0.0


def sound(row: Found, prefix: str) -> bool:
    """Whether the peer's result equals its own mask and has as many outputs as before."""
    return bool(row.get(f"{prefix}exact", {}).get("exact")) and bool(row.get(f"{prefix}eval", {}).get("same_outputs"))


def is_cnn(name: str) -> bool:
    return not name.startswith(ATTENTION)


def summary(every: dict[str, Found]) -> Found:
    """Counts over all rows: "n/N", N the networks for which it was tried."""
    mine = {name: row["ours"] for name, row in every.items() if "ours" in row}
    theirs = {name: row["peer"] for name, row in every.items() if "peer" in row and "skipped" not in row["peer"]}
    helped = {name: prefix(row) for name, row in theirs.items()}
    above = [
        f"{name}: {exact_free(row, helped[name]):.3f} against {exact_free(mine[name]):.3f}"
        for name, row in theirs.items()
        if name in mine and is_cnn(name) and exact_free(row, helped[name]) > exact_free(mine[name]) + 1e-9
    ]
    return {
        "ours": _ours(mine),
        "peer": _peer(theirs, dict.fromkeys(theirs, "")),
        "peer_helped": _peer(theirs, helped),
        "cnns_where_peer_is_above": above,
        "failed": [f"{name} {tool}: {r['failed']}" for name, row in every.items() for tool, r in row.items() if "failed" in r],
    }


def prefix(row: Found) -> str:
    """Which of the peer's two runs is the helped one; the only one, where no help was needed."""
    return "helped_" if "helped_build" in row else ""


def _ours(mine: dict[str, Found]) -> Found:
    whole = {name: row for name, row in mine.items() if name not in GIANTS}
    bare = [row for name, row in mine.items() if name not in SEGMENTATION]
    kept = {name: row["compress"]["kept"] for name, row in whole.items() if "kept" in row.get("compress", {})}
    return {
        "bare": _count(went(row, "bare") and row["bare"]["equal"] is not False for row in bare),
        "analysis": _count(went(row, "analysis") for row in mine.values()),
        "law": _count(went(row, "surgery") for row in whole.values()),
        "train": _count(went(row, "train") for row in whole.values()),
        "macs_equal": _count(row.get("cost", {}).get("macs", {}).get("equal", False) for row in whole.values()),
        "params_equal": _count(row.get("cost", {}).get("params", {}).get("equal", False) for row in whole.values()),
        "memory_within_limit": _count(_peak(row) <= 3 * row["bytes"] / 2**20 + 500 for row in whole.values()),
        "compress_within_0.01": _count(name in kept and abs(kept[name] - 0.5) <= 0.01 for name in whole),
        "compress_refused": {n: r["compress"]["error"] for n, r in whole.items() if "error" in r.get("compress", {})},
        "cnns_mean_free": _mean([exact_free(row) for name, row in whole.items() if is_cnn(name)]),
        "cnns_below_0.85": {n: round(exact_free(r), 3) for n, r in whole.items() if is_cnn(n) and exact_free(r) < 0.85},
    }


def _peak(row: Found) -> int:
    """The most memory that tracing, analysis, surgery and its check took, MiB, the interpreter and torch included."""
    return max(row.get(stage, {}).get("peak_mb", 0) for stage in ("analysis", "surgery"))


def _peer(theirs: dict[str, Found], prefixes: dict[str, str]) -> Found:
    each = [(name, row, prefixes[name]) for name, row in theirs.items()]
    return {
        "runs": _count(went(row, f"{p}eval") for _, row, p in each),
        "same_outputs": _count(bool(row.get(f"{p}eval", {}).get("same_outputs")) for _, row, p in each),
        "law": _count(sound(row, p) for _, row, p in each),
        "train": _count(went(row, f"{p}train") for _, row, p in each),
        "cnns_mean_free": _mean([exact_free(row, p) for name, row, p in each if is_cnn(name)]),
    }


def _count(flags: Any) -> str:
    listed = list(flags)
    return f"{sum(map(bool, listed))}/{len(listed)}"


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None
