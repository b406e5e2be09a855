"""README's tables and docs/results.md, made from benchmarks/results: `python -m benchmarks tables`.

A table of README stands between `<!-- table: NAME -->` and `<!-- end -->`; docs/results.md is written whole (`_results`). With
--check nothing is written: exit 1 names the documents that say something else. Nothing is measured here, so nothing is required.

    python -m benchmarks tables [--check]
"""

import argparse
import re
from collections.abc import Callable
from typing import Any

from ._common import ROOT, read
from ._results import results
from ._tables import CONTENDERS, NAMES, markdown, percent
from .finetune import Run

MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(arguments: list[str]) -> None:
    """Write the documents, or say which are not as they should be."""
    parser = argparse.ArgumentParser(prog="tables")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document would change")
    options = parser.parse_args(arguments)
    changed = {name: text for name, text in documents().items() if not _holds(name, text)}
    if options.check and changed:
        raise SystemExit(f"{', '.join(changed)}: not what benchmarks/results says; run python -m benchmarks tables")
    for name, text in changed.items():
        (ROOT / name).write_text(text, encoding="utf-8")
        print(f"wrote {name}")


def _holds(name: str, text: str) -> bool:
    path = ROOT / name
    return path.is_file() and path.read_text(encoding="utf-8") == text


def documents() -> dict[str, str]:
    """Every document that holds measured tables, by its path, as it should be."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return {"README.md": MARKED.sub(lambda found: found[1] + README[found[2]]() + found[3], readme), "docs/results.md": results()}


def _oneshot() -> str:
    """Accuracy without any training."""
    rows = []
    for name in ("resnet20", "resnet56"):
        found = read(f"oneshot-{name}")
        for peer in found["torch_pruning"]:
            ours = [each for each in found["ours"] if each["ratio"] == peer["ratio"]]
            own = (f"{each['accuracy']:.2f} ± {each['deviation']:.2f}" for each in sorted(ours, key=lambda each: each["images"]))
            ends = f"{found['original']:.2f}", f"{peer['accuracy']:.2f}"
            rows.append([NAMES[name], percent(peer["ratio"]), ends[0], *own, ends[1]])
    header = "network | MACs kept | original | compactcli, 64 images | 256 images | 1,024 images | Torch-Pruning 1.6.1"
    return markdown(header, rows)


def _speed() -> str:
    """Time at half the MACs."""
    rows = []
    for network in read("speed")["networks"]:
        settings = {(each["batch"], each["memory_format"]): each["variants"] for each in network["settings"]}
        for batch in (1, 16):
            cells = []
            for memory_format in ("channels_last", "contiguous"):
                own = {variant["variant"]: variant for variant in settings[batch, memory_format]}
                shares = (own[variant]["share"] for variant in ("ours", "Torch-Pruning, global"))
                cells += [f"{own['dense']['median_ms']:.1f}", *(f"{share:.2f}" for share in shares)]
            side = network["input_shape"][-1]
            rows.append([f"{NAMES[network['network']]}, {side} x {side}", str(batch), *cells])
    columns = (f"{name}: whole, ms | compactcli | Torch-Pruning" for name in ("channels_last", "contiguous"))
    return markdown(" | ".join(["network | batch", *columns]), rows)


def _coverage() -> str:
    """Which networks can be cut."""
    found = read("coverage")["summary"]
    ours, rows = found["ours"], []
    rows.append(["compactcli", *(ours["law"],) * 3, ours["train"], percent(ours["cnns_mean_free"])])
    for name, peer in (("Torch-Pruning", found["peer"]), ("Torch-Pruning, helped", found["peer_helped"])):
        counts = (peer[key] for key in ("runs", "same_outputs", "law", "train"))
        rows.append([name, *counts, percent(peer["cnns_mean_free"])])
    laws = "runs after the cut | keeps its classes | equals the masked original | takes a training step"
    return markdown(f" | {laws} | conv channels that are free so, mean over CNNs", rows)


def _starts() -> str:
    """What three methods start from."""
    found, rows = read("starts-resnet56")["rows"], []
    for ratio in (0.9, 0.7, 0.5, 0.3):
        own = [found[f"{method} {ratio:g}"] for method in ("linearconv", "csg", "hetconv")]
        pairs = ((f"{row['accuracy']:.2f}", f"{row['plain']['accuracy']:.2f}") for row in own)
        rows.append([percent(ratio), *(cell for pair in pairs for cell in pair)])
    return markdown("kept | linearconv | truncated | csg | truncated | hetconv | centres", rows)


def _trained() -> str:
    """What 20 epochs of training make of ResNet-20, by hinge and by Torch-Pruning; a dash where that was not run."""
    found, rows = read("finetune-resnet20")["rows"], []
    trained: tuple[dict[str, Any], ...] = ({"ratio": 0.5}, {"ratio": 0.5, "weight_decay": 5e-4}, {"ratio": 0.24})
    for contender in ("calibrated", "auto", "prune", "decompose", "peer-norm", "peer", "control"):
        whole = {"ratio": 1.0} if contender == "control" else {}
        keys = [Run(contender, **{**how, **whole}).key for how in trained]
        epochs = " + ".join(str(count) for count in found[keys[0]]["epochs"].values() if count)
        rows.append([CONTENDERS[contender], epochs, *(f"{found[key]['after']:.2f}" if key in found else "–" for key in keys)])
    return markdown(" | epochs | 50 % of MACs | 50 %, weight decay 5e-4 | 24 % of MACs", rows)


def _sweep() -> str:
    """All methods at three ratios on ResNet-56."""
    original, *others = read("sweep")["sweep"]["rows"]
    rows = []
    for row in others:
        of = "MACs" if row["of"] == "macs" else "parameters"
        shares = (f"{100 * row[cost] / original[cost]:.1f} %" for cost in ("params", "macs"))
        cells = [row["method"], f"{percent(row['ratio'])} of {of}", *shares, f"{row['latency_ratio']:.2f}"]
        rows.append([*cells, f"{row['accuracy']:.2f}", ", ".join(row["pareto"]) or "–"])
    return markdown("method | asked | parameters | MACs | time | accuracy | not beaten in", rows)


README: dict[str, Callable[[], str]] = {
    "oneshot": _oneshot,
    "speed": _speed,
    "coverage": _coverage,
    "starts": _starts,
    "sweep": _sweep,
    "trained": _trained,
}
