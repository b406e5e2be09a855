"""Reports and comparisons as one page of HTML each: no network, no library, everything from a file escaped.

The page holds the document that it shows, as JSON, in the element with the id "data".
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from typing import Any

from .. import __version__, compare, report, tables
from ..artefact import Network
from ..errors import shape_text
from . import charts, figures
from .markup import Markup, tag

CARDS = (("Parameters", "params", ""), ("FLOPs", "flops", ""), ("File size", "size_bytes", "B"))
COST_NAMES = {"params": "parameters", "macs": "MACs", "latency": "ms"}


def document(
    tree: Mapping[str, Any], network: Network, baseline: Network | None, epochs: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """What the page of one network shows: schema compactcli/page/1.

    A report, how alike filters are and were, the norms of hinge's matrices, the epochs of training: each where it is known.
    """
    layers = [layer["name"] for layer in tree["layers"]]
    return {
        "schema": "compactcli/page/1",
        "report": dict(tree),
        "likeness": {
            "before": None if baseline is None else figures.likeness(baseline, layers),
            "now": figures.likeness(network, layers),
        },
        "norms": figures.norms(network),
        "epochs": None if epochs is None else [dict(epoch) for epoch in epochs],
    }


def report_page(tree: Mapping[str, Any]) -> str:
    """The page of a document that `document` made."""
    shown = tree["report"]
    model = shown["model"]
    head = [tables.judged_by(model), f"sha256 {model['sha256'][:12]}" if model["sha256"] else ""]
    sections = [_cards(shown), _costs(shown["layers"]), _likeness(tree), _norms(tree), _training(tree["epochs"])]
    sections += [_history(shown["steps"]), _figures(shown)]
    return _page(model["arch"], [f"input {shape_text(model['input_shape'])}", *head], sections, tree)


def comparison_page(tree: Mapping[str, Any]) -> str:
    """The page of a comparison: schema compactcli/comparison/1."""
    numbered = [
        (f"{number}. {row[0]}" if number <= len(tree["models"]) else row[0], *row[1:])
        for number, row in enumerate(compare.rows(tree), 1)
    ]
    told = tag("p", f"{compare.caption(tree)}.", class_="told")
    sections = [tag("section", _table(compare.HEADINGS, numbered), told), _pareto(tree["models"])]
    sections += [_history(each["steps"], each["name"]) for each in tree["models"] if each["steps"]]
    shape = shape_text(tree["models"][0]["model"]["input_shape"])
    return _page(f"{len(tree['models'])} networks compared", [f"input {shape}"], sections, tree)


def _page(title: str, facts: Sequence[str], sections: Sequence[Markup | None], tree: Mapping[str, Any]) -> str:
    style, script = ((files(__name__) / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    data = json.dumps(tree, allow_nan=False).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{title} - compactcli"),
        tag("style", Markup(style)),
    )
    body = tag(
        "body",
        tag("header", tag("h1", title), tag("p", " · ".join(filter(None, facts)))),
        tag("main", *filter(None, sections)),
        tag("footer", tag("p", f"Made by compactcli {__version__}.")),
        tag("script", Markup(data), type="application/json", id="data"),
        tag("script", Markup(script)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _section(title: str, told: str, *content: Markup) -> Markup:
    return tag("section", tag("h2", title), tag("p", told, class_="told"), *content)


def _plot(title: str, *content: Markup) -> Markup:
    return tag("figure", tag("figcaption", title), *content)


def _cards(shown: Mapping[str, Any]) -> Markup:
    """The headline figures: what they are, what they were, and the share kept."""
    model, first = shown["model"], shown["baseline"] or {}
    cards = []
    for label, key, unit in CARDS:
        now, before = model[key], first.get(key)
        end = f" {unit}" if unit else ""
        exact = tables.number(now, end), tables.number(before, end)
        cards.append(_card(label, _brief(now, unit), exact[0], exact[1], report.ratio(now, before)))
    times = (tables.number(each.get("latency_ms"), " ms") for each in (model, first))
    cards.append(_card("Latency", next(times), "for one image", next(times), shown["ratios"]["latency"]))
    accuracies, judged = (tables.percent(each.get("accuracy")) for each in (model, first)), model["evaluated"]
    what = f"of {tables.number(judged['images'])} {judged['split']} images" if judged else "top-1"
    delta, known = shown["accuracy_delta"], None not in (model["accuracy"], first.get("accuracy"))
    change = f"{delta:+.2f} points" if delta is not None else "on other images" if known else None
    cards.append(_card("Accuracy", next(accuracies), what, next(accuracies), None, change))
    return tag("section", *cards, class_="cards", aria_label="Headline figures")


def _brief(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    text = charts.short(value)
    return text + unit if text[-1].isalpha() else " ".join(filter(None, (text, unit)))


def _card(label: str, now: str, told: str, before: str, kept: float | None, change: str | None = None) -> Markup:
    if kept is not None:
        change = f"{tables.share(kept)} kept"
    lines = [tag("p", now, class_="now"), tag("p", told, class_="was")]
    lines.append(tag("p", "was not measured" if before[0] == "-" else f"was {before}", class_="was"))
    lines += [charts.kept(kept)] if kept is not None else []
    lines += [tag("p", change, class_="change")] if change is not None else []
    return tag("article", tag("h2", label), *lines, class_="card")


def _costs(layers: Sequence[Mapping[str, Any]]) -> Markup | None:
    """What each layer stores and computes, before and after; None where that is not known."""
    if not tables.layers_known(layers):
        return None
    names = [layer["name"] for layer in layers]
    plots = []
    for title, key in (("MACs", "macs"), ("Parameters", "params")):
        before, after = ([layer[side][key] for layer in layers] for side in ("before", "after"))
        labels = [
            f"{name}: {was:,} {title} before, {now:,} after ({tables.share(report.ratio(now, was))} kept)"
            for name, was, now in zip(names, before, after, strict=True)
        ]
        plots.append(_plot(f"{title} of each layer", charts.bars(title, labels, before, after), charts.groups(names)))
    key = charts.legend(("before", "before: wide, hollow"), ("after", "after: narrow, filled"))
    changed = sum(layer["before"] != layer["after"] for layer in layers)
    return _section("Where it became smaller", f"{changed} of {len(layers)} layers changed.", key, *plots, _layer_table(layers))


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> Markup:
    headings = ("layer", "weights before", "weights after", "parameters before", "after", "MACs before", "after")
    rows = []
    for layer in layers:
        shapes = [" + ".join(map(shape_text, layer[side]["weight_shapes"])) or "-" for side in ("before", "after")]
        figures = [tables.number(layer[side][key]) for key in ("params", "macs") for side in ("before", "after")]
        rows.append((layer["name"], *shapes, *figures))
    return _details("All layers in figures", _table(headings, rows))


def _likeness(tree: Mapping[str, Any]) -> Markup | None:
    """How alike the filters of each convolution are."""
    if not tree["likeness"]["now"]:
        return None
    names = [layer["name"] for layer in tree["report"]["layers"]]
    plots = []
    for side, title in (("before", "Before"), ("now", "Now")):
        if tree["likeness"][side] is not None:
            found = {each["layer"]: each for each in tree["likeness"][side]}
            labels = [_likeness_label(name, found.get(name)) for name in names]
            levels = [found[name]["levels"] if name in found else None for name in names]
            heat = charts.heat(f"Likeness of filters, {title.lower()}", labels, levels, ("most", "least"))
            plots.append(_plot(title, heat, charts.groups(names)))
    told = (
        "A column for each layer, a field for a part of its filters: at the top those that are most like another filter, at the "
        "bottom those that are least. The stronger the field, the larger the absolute correlation with that other filter."
    )
    return _section("How redundant its filters are", told, charts.legend(("ramp", "correlation from 0 to 1")), *plots)


def _likeness_label(name: str, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return f"{name}: no filters to compare"
    part = "" if found["part"] == name else f" ({found['part']})"
    most, least = (f"{found['levels'][at]:.2f}" for at in (0, -1))
    return (
        f"{name}{part}: {found['filters']} filters, correlation {most} at most, {found['mean']:.2f} in the mean, {least} at least"
    )


def _norms(tree: Mapping[str, Any]) -> Markup | None:
    """The norms that hinge's groups have in the layers that it decomposed."""
    found = {each["layer"]: each for each in tree["norms"]}
    names = [layer["name"] for layer in tree["report"]["layers"] if layer["name"] in found]
    if not names:
        return None
    labels = [
        f"{name}: rank {found[name]['columns']}, norms from {found[name]['largest']:.3g} "
        f"to {found[name]['largest'] * found[name]['levels'][-1]:.3g}"
        for name in names
    ]
    plot = charts.heat("Norms of hinge's matrices", labels, [found[name]["levels"] for name in names], ("largest", "smallest"))
    told = (
        f"{len(names)} layers are two now: filters, and the matrix that combines them. hinge draws the columns of the matrix to "
        "zero; these are the norms of those that were kept, from the largest of a layer, at the top, to its smallest."
    )
    title = f"Norms of the columns, {len(names)} decomposed layers"
    key = charts.legend(("ramp", "norm, from 0 to the layer's largest"))
    return _section("What hinge kept", told, key, _plot(title, plot, charts.groups(names)))


def _training(epochs: Sequence[Mapping[str, Any]] | None) -> Markup | None:
    """Accuracy and loss by epoch."""
    if not epochs:
        return None
    names = [" ".join(filter(None, (each["stage"], f"epoch {each['epoch']}"))) for each in epochs]
    starts = [number for number, (one, other) in enumerate(pairwise(epochs), 1) if one["stage"] != other["stage"]]
    figures = (
        ("accuracy", "validation accuracy", " %"),
        ("loss", "training loss", ""),
        ("validation_loss", "validation loss", ""),
    )
    labels = [
        f"{name}: " + ", ".join(f"{told} {each[key]:.4g}{unit}" for key, told, unit in figures if each[key] is not None)
        for name, each in zip(names, epochs, strict=True)
    ]
    below = charts.numbers([str(each["epoch"]) for each in epochs])
    accuracy, loss, validation = (charts.Series(told, [each[key] for each in epochs]) for key, told, _ in figures)
    losses = [validation, charts.Series(loss.name, loss.values, dashed=True)]
    key = charts.legend(("solid", "on images held out"), ("dash", "on training images"))
    plots = [
        _plot("Accuracy, %, by epoch", charts.lines("Accuracy by epoch", labels, [accuracy], starts), below),
        _plot("Loss, by epoch", charts.lines("Loss by epoch", labels, losses, starts), below),
    ]
    return _section("How it was trained", "Epoch 0 is before any training.", key, tag("div", *plots, class_="pair"))


def _history(steps: Sequence[Mapping[str, Any]], name: str | None = None) -> Markup:
    """The steps from the first network to this one, each with its command."""
    title = "How it was made" if name is None else f"How {name} was made"
    if not steps:
        return _section(title, "The file holds no history: the network is as it was read.")
    return _section(title, "Commands without the files and the data that they were given.", tag("ol", *map(_step, steps)))


def _step(step: Mapping[str, Any]) -> Markup:
    line, *figures = tables.step_row(step)
    told = zip(tables.STEP_HEADINGS[1:], figures, strict=True)
    options = " ".join(f"{key}={value}" for key, value in step["options"].items() if value is not None)
    return tag(
        "li",
        tag("code", line, class_="command"),
        tag("p", " · ".join(f"{value} {what}" for what, value in told if value != "-"), class_="told"),
        _details("Options", tag("p", tag("code", options))) if options else Markup(),
    )


def _figures(shown: Mapping[str, Any]) -> Markup:
    told = tables.judged_by(shown["model"], shown["baseline"])
    return _section("In figures", told, _table(tables.HEADINGS, tables.summary_rows(shown)))


def _pareto(models: Sequence[Mapping[str, Any]]) -> Markup:
    """Accuracy against each cost."""
    if not any(each["pareto"] for each in models):
        return _section("Which to take", f"{compare.UNJUDGED}.")
    plots = []
    for cost, key in compare.COSTS.items():
        points = [_point(str(number), each, cost, key) for number, each in enumerate(models, 1)]
        title = f"Accuracy, %, by {'latency, ms' if cost == 'latency' else COST_NAMES[cost]}"
        plots.append(_plot(title, charts.scatter(title, points)))
    key = charts.legend(
        ("point best", "no other is better at no more"), ("point", "dominated: hollow, dashed"), ("solid", "the front")
    )
    return _section("Which to take", "The numbers in the points are those of the table.", key, tag("div", *plots, class_="three"))


def _point(name: str, each: Mapping[str, Any], cost: str, key: str) -> charts.Point:
    model, best = each["model"], cost in each["pareto"]
    told = f"{tables.percent(model['accuracy'])} at {tables.number(model[key])} {COST_NAMES[cost]}"
    mark = "no other is better at no more" if best else "dominated"
    return charts.Point(name, f"{name}: {each['name']}, {told}; {mark}", model[key], model["accuracy"], best)


def _details(title: str, *content: Markup) -> Markup:
    return tag("details", tag("summary", title), *content)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A table whose first column of words names the row; it scrolls by itself where the page is narrow."""
    head = tag("tr", *(tag("th", heading, scope="col") for heading in headings))
    lines = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    table = tag("table", tag("thead", head), tag("tbody", *lines))
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=", ".join(filter(None, headings)))
