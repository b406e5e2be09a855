"""Several networks side by side: what each is, and which no other beats."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from . import data, report
from .artefact import Network
from .pareto import ALIKE, marks
from .tables import judged_by, number, percent, share, words

COSTS = {"params": "params", "macs": "macs", "latency": "latency_ms"}  # what a network may be the best at -> its figure
HEADINGS = ("network", "parameters", "kept", "MACs", "kept", "file", "latency", "accuracy", "Pareto for")
UNJUDGED = "Pareto: not known, for not all accuracies are of the same images; give --data"
JUDGED = f"Pareto: no other is as accurate at less, or more accurate at no more ({ALIKE})"


def comparison(
    networks: Sequence[Network],
    baseline: Network | None,
    datasets: Sequence[data.Dataset | None],
    *,
    counter: str | None = None,
    arch: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The reports on several networks, timed in turn: schema compactcli/comparison/1.

    Each has its `name` and, as `pareto`, the costs of COSTS for which no other is as accurate at less, or more accurate at no
    more: none unless all accuracies are known and of the same images. Latencies that are near (`pareto.NOISE`) count as equal.
    Raises CompactError if they take different inputs.
    """
    trees = report.described(networks, baseline, datasets, counter=counter, arch=arch, log=log)
    models = [tree["model"] for tree in trees]
    best: list[list[str]] = [[] for _ in models]
    if _judged_alike(models):
        costs = {name: [model[key] for model in models] for name, key in COSTS.items()}
        best = marks([model["accuracy"] for model in models], costs)
    named = zip(networks, best, trees, strict=True)
    return {
        "schema": "compactcli/comparison/1",
        "models": [{"name": network.name, "pareto": own, **tree} for network, own, tree in named],
    }


def _judged_alike(models: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all accuracies are known and of the same images."""
    return all(model["accuracy"] is not None and model["evaluated"] == models[0]["evaluated"] for model in models)


def rows(tree: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The networks as people read them, under HEADINGS; below them what all are compared with, unless it is one of them."""
    found = [_row(each["name"], each["model"], each["ratios"], ", ".join(each["pareto"]) or "-") for each in tree["models"]]
    first = tree["models"][0]["baseline"]
    known = [each["model"]["sha256"] for each in tree["models"]]
    if first is None or first["sha256"] in known or any(each["baseline"] != first for each in tree["models"]):
        return found
    return [*found, _row("baseline", first, {}, "")]


def _row(name: str, model: Mapping[str, Any], ratios: Mapping[str, Any], pareto: str) -> tuple[str, ...]:
    return (
        name,
        number(model["params"]),
        share(ratios["params"]) if ratios else "",
        number(model["macs"]),
        share(ratios["macs"]) if ratios else "",
        number(model["size_bytes"], " B"),
        number(model["latency_ms"], " ms"),
        percent(model["accuracy"]),
        pareto,
    )


def caption(tree: Mapping[str, Any]) -> str:
    """What accuracies were measured on and what the marks mean, or why there are none."""
    models = [each["model"] for each in tree["models"]]
    if not _judged_alike(models):
        return UNJUDGED
    return "; ".join(filter(None, (judged_by(models[0]), JUDGED)))


def table(tree: Mapping[str, Any]) -> RenderableType:
    """The comparison as a Rich table."""
    shown = Table(title=f"{len(tree['models'])} networks", title_justify="left", caption_justify="left")
    for name in HEADINGS:
        shown.add_column(name, justify="left" if name in ("network", "Pareto for") else "right", overflow="fold")
    for row in rows(tree):
        shown.add_row(*map(words, row))
    shown.caption = words(caption(tree))
    return shown
