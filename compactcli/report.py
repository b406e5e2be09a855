"""What a network is now, what it was, and how it got there: the documents that --json prints."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from . import artefact, counters, data, kernels, latency, measure, surgery
from .artefact import Network
from .data import Split
from .errors import CompactError, shape_text
from .graph import run_fake, trace
from .layers import Layer, labels, layers, stored
from .recipe import Replace

LATENCY_SECONDS = 1.0


@dataclass(frozen=True)
class Evaluated:
    """An accuracy and what it was measured on."""

    accuracy: measure.Accuracy
    dataset: str
    split: str

    def to_json(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "split": self.split, "images": self.accuracy.images}


def evaluate(
    network: Network,
    dataset: data.Dataset,
    *,
    batch_size: int = 256,
    device: str = "cpu",
    log: Callable[[str], None] = lambda line: None,
) -> Evaluated:
    """Accuracy on the test images; on the training images of a dataset that has no others.

    `log` is told where the loss is not finite.
    Raises CompactError if there are no labels, or the network's classes are not the dataset's.
    """
    split = dataset.test or dataset.train
    assert split is not None
    data.check_classes(dataset, network.num_classes)
    module = kernels.folded(network.module).to(device)
    batches = data.batches(split, network.recipe.preprocessing, batch_size, device)
    accuracy = measure.accuracy(module, batches)
    network.module.to("cpu")
    if not math.isfinite(accuracy.loss):
        log(f"warning: {network.name}: outputs hold NaN or Inf, or are so large that the loss is not finite")
    return Evaluated(accuracy, dataset.name, _split_name(dataset, split))


def _split_name(dataset: data.Dataset, split: Split) -> str:
    return "test" if split is dataset.test else split.name


def report(
    network: Network,
    baseline: Network | None,
    dataset: data.Dataset | None,
    *,
    counter: str | None = None,
    arch: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The measures of a network beside those of the first of its history: schema compactcli/report/1.

    With `counter`, a paper's own count as well; `arch` is the user's own factory, where that built the network: without it
    nothing is known of each layer's past. Raises UsageError if there is no counter of that name,
    CompactError if the baseline takes another input.
    """
    (tree,) = described([network], baseline, [dataset], counter=counter, arch=arch, log=log)
    return {"schema": "compactcli/report/1", **tree}


def described(
    networks: Sequence[Network],
    baseline: Network | None,
    datasets: Sequence[data.Dataset | None],
    *,
    counter: str | None = None,
    arch: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """The report on each network, without its schema: all timed in turn, with the baseline as the last, that is measured once.

    `datasets` holds for each network the images that it is evaluated on; the baseline shares those of the first.
    Raises CompactError if they take different inputs.
    """
    every = [*networks, *([] if baseline is None else [baseline])]
    other = next((each for each in every if each.input_shape != networks[0].input_shape), None)
    if other is not None:
        sizes = f"takes {shape_text(other.input_shape)}, {networks[0].name} {shape_text(networks[0].input_shape)}"
        raise CompactError(f"{other.name}: {sizes}; compare networks of one input, or give all one with --input-shape CxHxW")
    pairs = zip(every, [*datasets, datasets[0]], strict=False)
    evaluated = [None if dataset is None else evaluate(each, dataset, log=log) for each, dataset in pairs]
    # Folded, and in the memory format, as load() gives them.
    modules = [kernels.folded(each.module) for each in every]
    found = latency.of(modules, networks[0].input_shape, seconds=LATENCY_SECONDS, memory_formats=["contiguous"])
    models = [measured(each, own, time.median_ms) for each, own, time in zip(every, evaluated, found, strict=True)]
    first = None if baseline is None else models.pop()
    known = {model["sha256"]: model for model in models if model["sha256"] is not None}
    return [
        _beside(network, model, _source(network, known) if first is None else _recalled(first, network), arch)
        | ({} if counter is None else {"counter": _counted(counter, network, baseline)})
        for network, model in zip(networks, models, strict=True)
    ]


def _recalled(first: dict[str, Any], network: Network) -> dict[str, Any]:
    """The first network as measured, with the accuracy that the history knows of it where none was."""
    source = network.recipe.source
    if first["accuracy"] is not None or source is None or source.sha256 != first["sha256"]:
        return first
    return first | {"accuracy": source.measures.accuracy, "evaluated": source.measures.evaluated}


def _beside(network: Network, model: dict[str, Any], first: dict[str, Any] | None, arch: str | None) -> dict[str, Any]:
    """A network's measures, those of the first one, and how it came from there."""
    ratios = {
        name: ratio(model[key], None if first is None else first[key])
        for name, key in (("params", "params"), ("macs", "macs"), ("size_bytes", "size_bytes"), ("latency", "latency_ms"))
    }
    delta = None
    alike = first is not None and model["evaluated"] is not None and model["evaluated"] == first["evaluated"]
    if first is not None and alike and None not in (model["accuracy"], first["accuracy"]):
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
        "layers": _layers(network, arch),
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
        **about(network, macs),
        "thop_macs": measure.thop_macs(network.module, network.input_shape),
        "latency_ms": latency_ms,
        "accuracy": evaluated.accuracy.top1 if evaluated else last.accuracy if last else None,
        "evaluated": evaluated.to_json() if evaluated else dict(last.evaluated) if last and last.evaluated else None,
    }


def about(network: Network, macs: int) -> dict[str, Any]:
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


def _source(network: Network, measured: Mapping[str | None, dict[str, Any]]) -> dict[str, Any] | None:
    """The first network, as `measured` where it is among those, by their sha256; else what the recipe remembers of it."""
    source = network.recipe.source
    if source is None:
        return None
    if source.sha256 in measured and source.sha256 != network.sha256:
        return _recalled(measured[source.sha256], network)
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


def _layers(network: Network, arch: str | None = None) -> list[dict[str, Any]]:
    """Each layer of the first network, with what stands in its place now; of the network itself where that is not known."""
    first = _first(network, arch)
    module = network.module if first is None else first
    before = kernels.folded(module)
    now = layers(trace(kernels.folded(network.module), network.input_shape))
    result = []
    found = layers(trace(before, network.input_shape))
    replaced = {edit.module for edit in network.recipe.edits if isinstance(edit, Replace)}
    for layer, label in zip(found, labels(found), strict=True):
        parts = [part for part in now if part.weight == layer.weight]
        if layer.name in replaced or not parts:  # other layers stand in its place, inside of what has its name
            parts = [part for part in now if f"{part.name}.".startswith(f"{layer.name}.")]
        result.append(
            {
                "name": label,
                "type": type(before.get_submodule(layer.name)).__name__,
                "before": None if first is None else _shape(first, [layer], label),
                "after": _shape(network.module, parts, label),
                "params": _params(network.module, parts, label),
                "macs": sum(part.macs for part in parts),
            }
        )
    return result


def _first(network: Network, arch: str | None) -> nn.Module | None:
    """The first network of the history, untrained; None if a user's own factory built it that is not given."""
    recipe = network.recipe
    if not recipe.steps:
        return network.module
    if arch is None and not artefact.is_known(recipe.architecture):
        return None
    first = artefact.first_architecture(recipe, arch).build().eval()
    surgery.apply_(first, recipe.opened)
    return first


def _params(module: nn.Module, parts: Sequence[Layer], label: str) -> int:
    """Parameters of what stands for a layer: of its weight alone where its module has several."""
    if [part.weight for part in parts] == [label]:
        return stored(module, parts[0], label)
    return params_of(module, parts)


def _shape(module: nn.Module, parts: Sequence[Layer], label: str) -> dict[str, Any]:
    return {
        "weight_shapes": [list(part.shape) for part in parts],
        "params": _params(module, parts, label),
        "macs": sum(part.macs for part in parts),
    }


def params_of(module: nn.Module, parts: Sequence[Layer]) -> int:
    """Parameters that the network stores for layers that are run; one that makes its kernel may be run as several."""
    made = kernels.layers(module)
    parents = [part.name.rpartition(".")[0] for part in parts]
    holders = {parent if parent in made else part.name for part, parent in zip(parts, parents, strict=True)}
    return sum(parameter.numel() for name in holders for parameter in module.get_submodule(name).parameters(recurse=False))


def evaluation(network: Network, evaluated: Evaluated) -> dict[str, Any]:
    """Accuracy, and loss where it is finite: schema compactcli/evaluation/1."""
    accuracy = evaluated.accuracy
    return {
        "schema": "compactcli/evaluation/1",
        "accuracy": accuracy.top1,
        "accuracy_top5": accuracy.top5,
        "loss": accuracy.loss if math.isfinite(accuracy.loss) else None,
        **evaluated.to_json(),
        "model": about(network, measure.macs(network.module, network.input_shape)),
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
        found = latency.of(
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
        "processor": latency.processor(device),
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
    return {**about(network, macs), "input_shape": list(shape)}
