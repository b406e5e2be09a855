"""What a network is now, what it was, and how it got there: as JSON, and as tables for people."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from . import architectures, artefact, budget, counters, data, kernels, measure, surgery
from .artefact import Network
from .channels import Channels
from .commands import command_line
from .data import Split
from .errors import CompactError, shape_text
from .graph import run_fake, trace
from .plain import plained
from .plan import plan

LATENCY_SECONDS = 1.0
MADE = ("params_materialised", "params_without_shared", "macs_synthesis")  # figures of layers that make their kernels


@dataclass(frozen=True)
class Evaluated:
    """An accuracy and what it was measured on."""

    accuracy: measure.Accuracy
    dataset: str
    split: str

    def to_json(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "split": self.split, "images": self.accuracy.images}


def evaluate(network: Network, dataset: data.Dataset, *, batch_size: int = 256, device: str = "cpu") -> Evaluated:
    """Accuracy on the test images; on the training images of a dataset that has no others.

    Raises CompactError if there are no labels, or the network's classes are not the dataset's.
    """
    split = dataset.test or dataset.train
    assert split is not None
    data.check_classes(dataset, network.num_classes)
    module = kernels.folded(network.module).to(device)
    batches = data.batches(split, network.recipe.preprocessing, batch_size, device)
    accuracy = measure.accuracy(module, batches)
    network.module.to("cpu")
    return Evaluated(accuracy, dataset.name, _split_name(dataset, split))


def _split_name(dataset: data.Dataset, split: Split) -> str:
    return "test" if split is dataset.test else split.name


def report(
    network: Network, baseline: Network | None, dataset: data.Dataset | None, *, counter: str | None = None
) -> dict[str, Any]:
    """The measures of a network beside those of the first of its history: schema compactcli/report/1.

    With `counter`, a paper's own count as well. Raises UsageError if there is none of that name.
    """
    (tree,) = described([network], baseline, [dataset], counter=counter)
    return {"schema": "compactcli/report/1", **tree}


def described(
    networks: Sequence[Network], baseline: Network | None, datasets: Sequence[data.Dataset | None], *, counter: str | None = None
) -> list[dict[str, Any]]:
    """The report on each network, without its schema: all timed in turn, with the baseline as the last, that is measured once.

    `datasets` holds for each network the images that it is evaluated on; the baseline shares those of the first.
    """
    every = [*networks, *([] if baseline is None else [baseline])]
    pairs = zip(every, [*datasets, datasets[0]], strict=False)
    evaluated = [None if dataset is None else evaluate(each, dataset) for each, dataset in pairs]
    # Folded, and in the memory format, as load() gives them.
    modules = [kernels.folded(each.module) for each in every]
    found = measure.latency(modules, networks[0].input_shape, seconds=LATENCY_SECONDS, memory_formats=["contiguous"])
    models = [measured(each, own, time.median_ms) for each, own, time in zip(every, evaluated, found, strict=True)]
    first = None if baseline is None else models.pop()
    return [
        _beside(network, model, _source(network) if first is None else _recalled(first, network))
        | ({} if counter is None else {"counter": _counted(counter, network, baseline)})
        for network, model in zip(networks, models, strict=True)
    ]


def _recalled(first: dict[str, Any], network: Network) -> dict[str, Any]:
    """The first network as measured, with the accuracy that the history knows of it where none was."""
    source = network.recipe.source
    if first["accuracy"] is not None or source is None or source.sha256 != first["sha256"]:
        return first
    return first | {"accuracy": source.measures.accuracy, "evaluated": source.measures.evaluated}


def _beside(network: Network, model: dict[str, Any], first: dict[str, Any] | None) -> dict[str, Any]:
    """A network's measures, those of the first one, and how it came from there."""
    ratios = {
        name: ratio(model[key], None if first is None else first[key])
        for name, key in (("params", "params"), ("macs", "macs"), ("size_bytes", "size_bytes"), ("latency", "latency_ms"))
    }
    delta = None
    if first is not None and None not in (model["accuracy"], first["accuracy"]):
        delta = model["accuracy"] - first["accuracy"]
    return {
        "model": model,
        "baseline": first,
        "ratios": ratios,
        "accuracy_delta": delta,
        "steps": [
            {
                "command": step.command,
                "method": step.method,
                "options": dict(step.options),
                "params": step.measures.params,
                "macs": step.measures.macs,
                "accuracy": step.measures.accuracy,
                "error": step.error,
                "version": step.version,
            }
            for step in network.recipe.steps
        ],
        "layers": _layers(network),
    }


def _counted(name: str, network: Network, baseline: Network | None) -> dict[str, Any]:
    """What a paper's counter makes of the network, and of the one it is compared with."""
    count = counters.get(name)
    before = None if baseline is None else count(baseline.module, baseline.input_shape)
    return {"name": name, "count": count(network.module, network.input_shape), "baseline": before}


def measured(network: Network, evaluated: Evaluated | None, latency_ms: float) -> dict[str, Any]:
    """A network as documents describe it. Not evaluated, it has the accuracy that its last step recorded."""
    macs = measure.macs(network.module, network.input_shape)
    last = next((step.measures for step in reversed(network.recipe.steps) if step.measures.accuracy is not None), None)
    source = network.recipe.source
    if last is None and not network.recipe.steps and source is not None:
        last = source.measures
    return {
        **_described(network, macs),
        "thop_macs": measure.thop_macs(network.module, network.input_shape),
        "latency_ms": latency_ms,
        "accuracy": evaluated.accuracy.top1 if evaluated else last.accuracy if last else None,
        "evaluated": evaluated.to_json() if evaluated else dict(last.evaluated) if last and last.evaluated else None,
    }


def _described(network: Network, macs: int) -> dict[str, Any]:
    """The keys of every model in a document, with what needs no measuring filled in."""
    return {
        "arch": network.recipe.architecture,
        "input_shape": list(network.input_shape),
        "params": measure.params(network.module),
        "params_materialised": measure.params_materialised(network.module),
        "params_without_shared": measure.params_without_shared(network.module),
        "macs": macs,
        "macs_synthesis": kernels.synthesis_macs(network.module),
        "flops": 2 * macs,
        "thop_macs": None,
        "size_bytes": network.size_bytes,
        "latency_ms": None,
        "accuracy": None,
        "evaluated": None,
        "sha256": network.sha256,
    }


def _source(network: Network) -> dict[str, Any] | None:
    """What the recipe remembers of the first network."""
    source = network.recipe.source
    if source is None:
        return None
    known = asdict(source.measures)
    return {
        "arch": network.recipe.architecture,
        "input_shape": list(network.input_shape),
        "params": known["params"],
        "params_materialised": known["params"],
        "params_without_shared": None,
        "macs": known["macs"],
        "macs_synthesis": 0,
        "flops": None if known["macs"] is None else 2 * known["macs"],
        "thop_macs": None,
        "size_bytes": known["size_bytes"],
        "latency_ms": None,
        "accuracy": known["accuracy"],
        "evaluated": known["evaluated"],
        "sha256": source.sha256,
    }


def ratio(now: float | None, before: float | None) -> float | None:
    """The share kept of a figure; None where one is not known."""
    return None if now is None or not before else now / before


def _layers(network: Network) -> list[dict[str, Any]]:
    """Each layer of the first network, with what stands in its place now."""
    recipe = network.recipe
    first = network.module
    if recipe.steps and artefact.is_known(recipe.architecture):
        first = architectures.get(recipe.architecture, recipe.kwargs, network.input_shape).build().eval()
        surgery.apply_(first, recipe.opened)
    before = kernels.folded(first)
    now = budget.layers(trace(kernels.folded(network.module), network.input_shape))
    result = []
    for layer in budget.layers(trace(before, network.input_shape)):
        parts = [part for part in now if part.name == layer.name or part.name.startswith(f"{layer.name}.")]
        result.append(
            {
                "name": layer.name,
                "type": type(before.get_submodule(layer.name)).__name__,
                "before": _shape(first, [layer]),
                "after": _shape(network.module, parts),
                "params": _params(network.module, parts),
                "macs": sum(part.macs for part in parts),
            }
        )
    return result


def _shape(module: nn.Module, parts: Sequence[budget.Layer]) -> dict[str, Any]:
    return {
        "weight_shapes": [list(part.shape) for part in parts],
        "params": _params(module, parts),
        "macs": sum(part.macs for part in parts),
    }


def _params(module: nn.Module, parts: Sequence[budget.Layer]) -> int:
    """Parameters that the network stores for layers that are run; one that makes its kernel may be run as several."""
    made = kernels.layers(module)
    parents = [part.name.rpartition(".")[0] for part in parts]
    holders = {parent if parent in made else part.name for part, parent in zip(parts, parents, strict=True)}
    return sum(parameter.numel() for name in holders for parameter in module.get_submodule(name).parameters(recurse=False))


def analysis(network: Network, *, linear: bool = False, log: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Where a network is redundant and what may be cut: schema compactcli/analysis/1.

    The redundancy is given for convolutions, and for linear layers too with `linear`.
    """
    module = plained(network.module, network.input_shape)
    graph, channels = plan(module, network.input_shape, log)
    layers = [_analysed(module, channels, layer, linear) for layer in budget.layers(graph)]
    return {
        "schema": "compactcli/analysis/1",
        "model": _described(network, budget.macs(graph)),
        "layers": layers,
        "suggestion": _suggestion(network, layers),
    }


def _analysed(module: nn.Module, channels: Channels, layer: budget.Layer, linear: bool) -> dict[str, Any]:
    owner = module.get_submodule(layer.name)
    out = (layer.weight, 1 if layer.transposed else 0)
    wanted = linear or not isinstance(owner, nn.Linear)
    redundancy = measure.redundancy(module.get_parameter(layer.weight)) if wanted else None
    return {
        "name": layer.name,
        "type": type(owner).__name__,
        "weight_shape": list(layer.shape),
        "params": _params(module, [layer]),
        "macs": layer.macs,
        "sets": len({number for number in channels.axes[out].tolist() if number not in channels.locked}),
        "locked": channels.reason(out),
        "redundancy": None if redundancy is None else asdict(redundancy),
    }


def _suggestion(network: Network, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A ratio from the rank that holds 99 % of each layer's energy, weighed by MACs, and the command to try it."""
    known = [(layer["redundancy"]["rank_ratio_99"], layer["macs"]) for layer in layers if layer["redundancy"]]
    total = sum(macs for _, macs in known)
    share = sum(ratio * macs for ratio, macs in known) / total if total else 0.5
    ratio = min(max(round(share - 0.2, 1), 0.3), 0.8)
    command = f"compactcli compress {network.name if network.name != 'stdin' else 'MODEL'} --method hinge --ratio {ratio:g}"
    return {"method": "hinge", "ratio": ratio, "command": command}


# Tables for people. Absent values are a dash.


def report_tables(tree: Mapping[str, Any], *, layers: bool = False) -> RenderableType:
    """The report as Rich tables: the measures, the history, and with `layers` each layer that changed."""
    model = tree["model"]
    summary = Table(title=Text(title(model)), title_justify="left")
    for name in HEADINGS:
        summary.add_column(name, justify="left" if not name else "right")
    for row in summary_rows(tree):
        summary.add_row(*row)
    if model["evaluated"]:
        summary.caption = Text(judged_by(model))
        summary.caption_justify = "left"
    parts: list[RenderableType] = [summary]
    if tree["steps"]:
        parts.append(_history(tree["steps"]))
    if layers:
        parts.append(_changed(tree["layers"]))
    return Group(*parts)


def title(model: Mapping[str, Any]) -> str:
    """A network's architecture and input."""
    return f"{model['arch']}, input {shape_text(model['input_shape'])}"


def judged_by(model: Mapping[str, Any]) -> str:
    """What a network's accuracy was measured on; "" where that is not known."""
    what = model["evaluated"]
    return f"Accuracy on {number(what['images'])} {what['split']} images of {what['dataset']}" if what else ""


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
        table.add_row(*map(Text, step_row(step)))
    return table


STEP_HEADINGS = ("command", "parameters", "MACs", "accuracy", "output error")


def step_row(step: Mapping[str, Any]) -> tuple[str, ...]:
    """A step of the history as people read it, under STEP_HEADINGS: without the files, and options at their defaults."""
    error = "-" if step["error"] is None else f"{step['error']:.3f}"
    return command_line(step), number(step["params"]), number(step["macs"]), percent(step["accuracy"]), error


def _changed(layers: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="layers that changed", title_justify="left")
    for name in ("layer", "before", "after", "parameters kept", "MACs kept"):
        table.add_column(name, justify="right" if name.endswith("kept") else "left")
    for layer in layers:
        before, after = layer["before"], layer["after"]
        if before != after:
            ratios = [ratio(after[key], before[key]) for key in ("params", "macs")]
            shapes = (" + ".join(map(shape_text, part["weight_shapes"])) for part in (before, after))
            table.add_row(Text(layer["name"]), *shapes, *map(share, ratios))
    return table


def analysis_tables(tree: Mapping[str, Any]) -> RenderableType:
    """The analysis as Rich tables."""
    model = tree["model"]
    title = f"{model['arch']}: {model['params']:,} parameters, {model['macs']:,} MACs, input {shape_text(model['input_shape'])}"
    table = Table(title=title, title_justify="left")
    for name in ("layer", "weight", "params", "MACs", "free sets", "max corr", "mean corr", "eff. rank", "rank 99 %", "locked"):
        table.add_column(name, justify="left" if name in ("layer", "weight", "locked") else "right")
    for layer in tree["layers"]:
        redundancy = layer["redundancy"]
        figures = ["-"] * 4
        if redundancy:
            figures = [f"{redundancy['max_abs_corr']:.2f}", f"{redundancy['mean_abs_corr']:.2f}"]
            figures += [f"{redundancy['effective_rank']:.1f}", f"{100 * redundancy['rank_ratio_99']:.0f} %"]
        sizes = (shape_text(layer["weight_shape"]), number(layer["params"]), number(layer["macs"]))
        table.add_row(layer["name"], *sizes, str(layer["sets"]), *figures, layer["locked"] or "")
    return Group(table, f"try: {tree['suggestion']['command']}")


def evaluation(network: Network, evaluated: Evaluated) -> dict[str, Any]:
    """Accuracy and loss: schema compactcli/evaluation/1."""
    accuracy = evaluated.accuracy
    return {
        "schema": "compactcli/evaluation/1",
        "accuracy": accuracy.top1,
        "accuracy_top5": accuracy.top5,
        "loss": accuracy.loss,
        **evaluated.to_json(),
        "model": _described(network, measure.macs(network.module, network.input_shape)),
    }


def bench(
    networks: Sequence[Network],
    *,
    input_shape: Sequence[int] | None = None,
    batches: Sequence[int] = (1,),
    threads: Sequence[int | None] = (None,),
    repeats: int = 5,
    device: str = "cpu",
) -> dict[str, Any]:
    """Latency of each network at each batch size and number of threads, timed in turn: schema compactcli/bench/1.

    Raises CompactError if they take different inputs and no shape is given, or one does not run.
    """
    shape = list(input_shape or networks[0].input_shape)
    other = next((each for each in networks if input_shape is None and list(each.input_shape) != shape), None)
    if other is not None:
        sizes = f"takes {shape_text(other.input_shape)}, {networks[0].name} {shape_text(shape)}"
        raise CompactError(f"{other.name}: {sizes}; give both one with --input-shape CxHxW")
    models: list[dict[str, Any]] = [
        {"name": each.name, "model": _benched(each, shape, batches), "latency": []} for each in networks
    ]
    modules = [kernels.folded(each.module) for each in networks]
    for batch, count in itertools.product(batches, threads):
        found = measure.latency(
            modules,
            shape,
            batch=batch,
            threads=count,
            repeats=repeats,
            seconds=LATENCY_SECONDS,
            device=device,
        )
        for model, own in zip(models, found, strict=True):
            model["latency"].append({**asdict(own), "ratio": own.median_ms / found[0].median_ms})
    return {
        "schema": "compactcli/bench/1",
        "device": device,
        "processor": measure.processor(device),
        "torch": torch.__version__,
        "input_shape": shape,
        "models": models,
    }


def _benched(network: Network, shape: Sequence[int], batches: Sequence[int]) -> dict[str, Any]:
    """What describes a network that runs on inputs of that shape in such batches."""
    try:
        for batch in batches:
            run_fake(network.module, shape, batch=batch)
        macs = measure.macs(network.module, shape)
    except CompactError as problem:
        raise CompactError(f"{network.name}: {problem}; try another --input-shape or --batch-size") from None
    return {**_described(network, macs), "input_shape": list(shape)}


def bench_table(tree: Mapping[str, Any]) -> RenderableType:
    """The latencies as a Rich table: for each setting a row per model, with the ratio to the first."""
    title = f"latency of a batch, input {shape_text(tree['input_shape'])}, {tree['processor']}, torch {tree['torch']}"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = "spread: interquartile range; ratio: to the first model"
    memory = any(own["peak_memory_bytes"] for model in tree["models"] for own in model["latency"])
    names = ["model", "batch", "threads", "format", "median ms", "spread", "images/s", "ratio", *["memory"] * memory]
    for name in names:
        table.add_column(name, justify="left" if name in ("model", "format") else "right", overflow="fold")
    for setting in zip(*(model["latency"] for model in tree["models"]), strict=True):
        for model, own in zip(tree["models"], setting, strict=True):
            figures = [f"{own[key]:,.3f}" for key in ("median_ms", "iqr_ms")]
            figures += [f"{own['images_per_second']:,.1f}", f"{own['ratio']:.3f}"]
            row = [Text(model["name"]), str(own["batch"]), str(own["threads"]), own["memory_format"], *figures]
            table.add_row(*row, *[number(own["peak_memory_bytes"], " B")] * memory)
        table.add_section()
    return table


def number(value: float | None, unit: str = "") -> str:
    """A count with commas, or a measure with two decimals."""
    return "-" if value is None else f"{value:,}{unit}" if isinstance(value, int) else f"{value:,.2f}{unit}"


def percent(value: float | None) -> str:
    """An accuracy."""
    return "-" if value is None else f"{value:.2f} %"


def share(value: float | None) -> str:
    """A share kept."""
    return "-" if value is None else f"{100 * value:.1f} %"
