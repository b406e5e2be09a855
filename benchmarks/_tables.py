"""What README's tables and docs/results.md have in common: names, a Markdown table, a share in percent."""

from collections.abc import Iterable, Sequence

NAMES = {
    "resnet20": "ResNet-20",
    "resnet56": "ResNet-56",
    "resnet34": "ResNet-34",
    "resnet50": "ResNet-50",
    "cifar:vgg16": "VGG-16",
}
CONTENDERS = {
    "auto": "hinge",
    "magnitude": "fcf's widths, filters by mean absolute weight",
    "prune": "hinge, pruning alone",
    "decompose": "hinge, decomposing alone",
    "calibrated": "hinge, no search",
    "peer": "Torch-Pruning, sparse learning",
    "peer-norm": "Torch-Pruning",
    "control": "whole network",
}


def markdown(header: str, rows: Iterable[Sequence[str]]) -> str:
    """A table, its columns parted by bars, each line with its end."""
    columns, rows = header.split(" | "), list(rows)
    assert all(len(row) == len(columns) for row in rows), header
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (columns, ["---"] * len(columns), *rows))


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"
