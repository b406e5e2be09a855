"""What documents say as people read it: lines of text, and Rich tables. Absent values are a dash."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .commands import command_line
from .errors import printable, shape_text
from .report import ratio

MADE = ("params_materialised", "params_without_shared", "macs_synthesis")  # figures of layers that make their kernels


def report_tables(tree: Mapping[str, Any], *, layers: bool = False) -> RenderableType:
    """The report as Rich tables: the measures, the history, and with `layers` each layer that changed."""
    model = tree["model"]
    summary = Table(title=words(title(model)), title_justify="left")
    for name in HEADINGS:
        summary.add_column(name, justify="left" if not name else "right")
    for row in summary_rows(tree):
        summary.add_row(*row)
    judged = judged_by(model, tree["baseline"])
    if judged:
        summary.caption = words(judged)
        summary.caption_justify = "left"
    parts: list[RenderableType] = [summary]
    if tree["steps"]:
        parts.append(_history(tree["steps"]))
    if layers and layers_known(tree["layers"]):
        parts.append(_changed(tree["layers"]))
    return Group(*parts)


def title(model: Mapping[str, Any]) -> str:
    """A network's architecture and input."""
    return f"{model['arch']}, input {shape_text(model['input_shape'])}"


def judged_by(model: Mapping[str, Any], first: Mapping[str, Any] | None = None) -> str:
    """What a network's accuracy was measured on, and the original's where that is other images; "" where it is not known."""
    told = f"Accuracy on {_images(model)}" if model["evaluated"] else ""
    if not first or None in (model["accuracy"], first["accuracy"]) or model["evaluated"] == first["evaluated"]:
        return told
    other = f"on {_images(first)}" if first["evaluated"] else "on images that are not known"
    return "; ".join(filter(None, (told, f"the original's {other}")))


def _images(model: Mapping[str, Any]) -> str:
    what = model["evaluated"]
    return f"{number(what['images'])} {what['split']} images of {what['dataset']}"


HEADINGS = ("", "original", "now", "kept")


def summary_rows(tree: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The measures of a report as people read them, under HEADINGS."""
    model, first = tree["model"], tree["baseline"] or {}
    shown = [
        ("Parameters", "params", ""),
        ("Parameters, kernels made", "params_materialised", ""),
        ("Parameters, but for shared ones", "params_without_shared", ""),
        ("MACs", "macs", ""),
        ("MACs to make kernels, once", "macs_synthesis", ""),
        ("FLOPs", "flops", ""),
        ("File", "size_bytes", " B"),
        ("Latency", "latency_ms", " ms"),
    ]
    idle = {key for key in MADE if all(_is_idle(key, part) for part in (model, first))}
    rows = [(label, first.get(key), model[key], unit) for label, key, unit in shown if key not in idle]
    if "counter" in tree:
        own = tree["counter"]
        rows.insert(len(rows) - 2, (f"By {own['name']}'s counter", own["baseline"], own["count"], ""))
    told = [(label, number(before, unit), number(now, unit), share(ratio(now, before))) for label, before, now, unit in rows]
    delta = tree["accuracy_delta"]
    points = "-" if delta is None else f"{delta:+.2f} points"
    return [*told, ("Accuracy", percent(first.get("accuracy")), percent(model["accuracy"]), points)]


def _is_idle(key: str, model: Mapping[str, Any]) -> bool:
    """Whether a figure says nothing new of a network: its kernels are not made, or nothing is shared."""
    return not model.get(key) or (key == "params_materialised" and model[key] == model["params"])


def _history(steps: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="history", title_justify="left")
    for name in STEP_HEADINGS:
        table.add_column(name, justify="left" if name == "command" else "right")
    for step in steps:
        table.add_row(*map(words, step_row(step)))
    return table


STEP_HEADINGS = ("command", "parameters", "MACs", "accuracy", "output error")


def step_row(step: Mapping[str, Any]) -> tuple[str, ...]:
    """A step of the history as people read it, under STEP_HEADINGS: without the files, and options at their defaults."""
    sizes = number(step["params"]), number(step["macs"])
    return command_line(step), *sizes, percent(step["accuracy"]), error(step["error"])


def layers_known(layers: Sequence[Mapping[str, Any]]) -> bool:
    """Whether it is known what the layers were."""
    return all(layer["before"] is not None for layer in layers)


def _changed(layers: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="layers that changed", title_justify="left")
    for name in ("layer", "before", "after", "parameters kept", "MACs kept"):
        table.add_column(name, justify="right" if name.endswith("kept") else "left")
    for layer in layers:
        if layer["before"] != layer["after"]:
            table.add_row(words(layer["name"]), *_change(layer))
    return table


def _change(layer: Mapping[str, Any]) -> list[str]:
    """A layer's weights before and after, and the shares kept of its parameters and MACs."""
    before, after = layer["before"], layer["after"]
    shapes = (" + ".join(map(shape_text, part["weight_shapes"])) for part in (before, after))
    return [*shapes, *(share(ratio(after[key], before[key])) for key in ("params", "macs"))]


def analysis_tables(tree: Mapping[str, Any], *, verbose: bool = False) -> RenderableType:
    """The analysis as Rich tables; with `verbose` the coupled sets, and what is known of activations, too."""
    model = tree["model"]
    title = f"{model['arch']}: {model['params']:,} parameters, {model['macs']:,} MACs, input {shape_text(model['input_shape'])}"
    table = Table(title=words(title), title_justify="left", caption_justify="left")
    timed, sensed = (any(layer[key] for layer in tree["layers"]) for key in ("time", "sensitivity"))
    seen = verbose and any(layer["activations"] for layer in tree["layers"])
    names = [
        "layer",
        "weight",
        "params",
        "MACs",
        *["time"] * timed,
        "free sets",
        "max corr",
        "mean corr",
        "eff. rank",
        "rank 99 %",
    ]
    names += [*["activations: mean corr", "rank 99 %"] * seen, *["channels 75/50/25 %", "rank 75/50/25 %"] * sensed, "locked"]
    for name in names:
        table.add_column(name, justify="left" if name in ("layer", "weight", "locked") else "right")
    for layer in tree["layers"]:
        row: list[RenderableType] = [
            words(layer["name"]),
            shape_text(layer["weight_shape"]),
            number(layer["params"]),
            number(layer["macs"]),
        ]
        row += [share(layer["time"])] * timed + [str(layer["sets"]), *_alike(layer["redundancy"])]
        if seen:
            _, mean, _, rank = _alike(layer["activations"])
            row += [mean, rank]
        if sensed:
            found = layer["sensitivity"] or {"channels": None, "ranks": None}
            row += [_sensed(found["channels"]), _sensed(found["ranks"])]
        table.add_row(*row, words(layer["locked"] or ""))
    if sensed:
        scale = "accuracy" if any(_accurate(layer) for layer in tree["layers"]) else "relative output error"
        table.caption = f"channels, rank: predicted {scale} with 75, 50 and 25 % of that layer's left, the others whole"
    parts: list[RenderableType] = [table]
    if verbose:
        parts.append(_sets_table(tree["sets"]))
    if tree["predictions"]:
        parts.append(_predictions(tree["predictions"]))
    if tree["suggestion"] is not None:
        parts.append(words(f"try: {tree['suggestion']['command']}"))
    return Group(*parts)


def _alike(redundancy: Mapping[str, float] | None) -> list[str]:
    if redundancy is None:
        return ["-"] * 4
    figures = [f"{redundancy[key]:.2f}" for key in ("max_abs_corr", "mean_abs_corr")]
    return [*figures, f"{redundancy['effective_rank']:.1f}", f"{100 * redundancy['rank_ratio_99']:.0f} %"]


def _accurate(layer: Mapping[str, Any]) -> bool:
    """Whether a layer's sensitivity is known as accuracy."""
    found = layer["sensitivity"] or {}
    return any(point["accuracy"] is not None for points in found.values() for point in points or ())


def _sensed(points: Sequence[Mapping[str, Any]] | None) -> str:
    """The predicted accuracies, or else errors, at each share."""
    if points is None:
        return "-"
    return " ".join(f"{p['error']:.2f}" if p["accuracy"] is None else f"{p['accuracy']:.1f}" for p in points)


def _sets_table(sets: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="channels that go together", title_justify="left")
    for name in ("sets", "made by", "read by", "params of one", "MACs of one"):
        table.add_column(name, justify="left" if name.endswith("by") else "right", overflow="fold")
    for each in sets:
        sizes = (number(each["params"]), number(each["macs"]))
        table.add_row(str(each["sets"]), *(words(", ".join(each[key])) for key in ("made_by", "read_by")), *sizes)
    return table


def _predictions(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="methods, as they plan", title_justify="left", caption_justify="left")
    table.caption = "relative output error before any refit or training, predicted; least first"
    judged, failed = (any(row[key] is not None for row in rows) for key in ("accuracy", "reason"))
    for name in ("method", "kept", "output error", *["accuracy"] * judged, *["why not"] * failed):
        table.add_column(name, justify="right" if name in ("output error", "accuracy") else "left", overflow="fold")
    for at, row in enumerate(rows):
        if at and row["ratio"] != rows[at - 1]["ratio"]:
            table.add_section()
        cells = [row["method"], f"{100 * row['ratio']:g} % of {row['of']}", error(row["error"])]
        table.add_row(*cells, *[percent(row["accuracy"])] * judged, *[words(row["reason"] or "")] * failed)
    return table


def plan_table(tree: Mapping[str, Any]) -> RenderableType:
    """What a compression would make of each layer, as a Rich table."""
    shares = {key: share(tree["after"][key] / tree["before"][key]) for key in ("params", "macs")}
    title = f"{tree['method']}, {100 * tree['target']['ratio']:g} % of {tree['target']['of']}"
    table = Table(title=f"{title}: {shares['params']} of the parameters, {shares['macs']} of the MACs", title_justify="left")
    for name in ("layer", "before", "after", "parameters kept", "MACs kept", "output error", "why"):
        table.add_column(name, justify="left" if name in ("layer", "before", "after", "why") else "right", overflow="fold")
    for layer in tree["layers"]:
        table.add_row(words(layer["name"]), *_change(layer), error(layer["error"]), words(layer["why"]))
    return table


def bench_table(tree: Mapping[str, Any]) -> RenderableType:
    """The latencies as a Rich table: for each setting a row per model, with the ratio to the first."""
    title = f"latency of a batch, input {shape_text(tree['input_shape'])}, {tree['processor']}, torch {tree['torch']}"
    table = Table(title=words(title), title_justify="left", caption_justify="left")
    table.caption = "spread: interquartile range; ratio: to the first model"
    memory = any(own["peak_memory_bytes"] for model in tree["models"] for own in model["latency"])
    names = ["model", "batch", "threads", "format", "median ms", "spread", "images/s", "ratio", *["memory"] * memory]
    for name in names:
        table.add_column(name, justify="left" if name in ("model", "format") else "right", overflow="fold")
    for setting in zip(*(model["latency"] for model in tree["models"]), strict=True):
        for model, own in zip(tree["models"], setting, strict=True):
            figures = [f"{own[key]:,.3f}" for key in ("median_ms", "iqr_ms")]
            figures += [f"{own['images_per_second']:,.1f}", f"{own['ratio']:.3f}"]
            row = [words(model["name"]), str(own["batch"]), str(own["threads"]), own["memory_format"], *figures]
            table.add_row(*row, *[number(own["peak_memory_bytes"], " B")] * memory)
        table.add_section()
    return table


def words(text: str) -> Text:
    """Words of a file or of the user as a Rich table shows them: as they are, but printable."""
    return Text(printable(text))


def number(value: float | None, unit: str = "") -> str:
    """A count with commas, or a measure with two decimals."""
    return "-" if value is None else f"{value:,}{unit}" if isinstance(value, int) else f"{value:,.2f}{unit}"


def error(value: float | None) -> str:
    """A relative error of outputs."""
    return "-" if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    """An accuracy."""
    return "-" if value is None else f"{value:.2f} %"


def share(value: float | None) -> str:
    """A share kept."""
    return "-" if value is None else f"{100 * value:.1f} %"
