"""The driver of a compression: plan, edit under the law, measure, and one `Step` in the recipe."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__, artefact, calibrate, data, distributed, kernels, law, measure, precision, surgery, timing
from .artefact import Network
from .budget import Budget, Of
from .channels import SOFT, Channels
from .errors import CompactError, UsageError, shape_text
from .finetune import check, kept_run
from .graph import copied, trace
from .history import Watch
from .layers import Layer, labels, layers, single, stored
from .methods import Method, attached
from .moments import Batches, Moments, gather, value_bytes
from .optim import Settings
from .plain import plain_
from .plan import plan
from .recipe import Edit, Keep, Measures, Replace, Step, without_tensors
from .train import fit_

# `--round auto` for each type of device. Fixed, so that one command gives one file everywhere.
ROUND = {"cpu": 16, "cuda": None}
TOLD = 0.02  # share of the budget by which what is kept is off before it is told beside what was asked for


@dataclass(frozen=True)
class Target:
    """How small the network shall be. Raises UsageError for a share that is none."""

    ratio: float  # share kept of the network that was read
    of: Of | None = None  # None: what the method is for
    round_to: int | None = None  # channel counts and ranks are multiples of it; None: what suits their width and the method's aim
    nearest: bool = False  # take the nearest reachable ratio instead of failing
    table: timing.Table | None = None  # of the network's layers, for a share of latency; None: they are timed first

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UsageError(f"--ratio {self.ratio:g}: it is the share to keep, between 0 and 1")
        if self.round_to is not None and self.round_to < 1:
            raise UsageError(f"--round {self.round_to}: it is 1 or more")


@dataclass(frozen=True)
class Calibration:
    """Images that a compression is calibrated on: uint8 (n, c, h, w), labels not needed."""

    images: Tensor
    dataset: str


@dataclass(frozen=True)
class Search:
    """What a method trains the network on before it decides, how, and where that is kept."""

    dataset: data.Dataset
    settings: Settings
    teacher: Network | None = None
    kept: Path | None = None
    resume: bool = False
    watch: Watch | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)  # what else must be the same for it to go on


def compress(
    network: Network,
    name: str,
    method: Method,
    target: Target,
    *,
    calibration: Calibration | None = None,
    search: Search | None = None,
    leave: Sequence[str] = (),
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> Network:
    """Change the network in place with a method; the same network, one step on.

    From its weights alone; calibrated on images; or, with those as well, after a search that trains it with the method's
    hooks: what is then made smaller, and refitted to, is the network that the search ends with. Layers that `leave` names, or
    has a pattern for, keep their filters and stay what they are.

    Raises UsageError for a name that no layer has; CompactError if a weight or an output is not finite, the target is out of
    reach or the law is broken.
    """
    job = _job(network, name, method, target, calibration, leave, seed, log)
    module, shape, channels, budget, of = network.module, network.input_shape, job.channels, job.budget, job.budget.of
    if search is not None:
        check(network, search.dataset, search.teacher)
    known = job.moments()
    with _narrowed(leave):
        begun = method.start(module, channels, budget, known, trains=search is not None)
    made_on = "random images" if calibration is None else f"{len(calibration.images):,} images of {calibration.dataset}"
    hint = "; --data D refits the layers on images" if calibration is None else ""
    error: float | None = None
    if begun:
        error = _made_(job, module, method, begun, shape, seed, progress)
        log(f"{name}: output error {error:.3f} on {made_on}{hint}")
    if search is not None:
        method.attach(module, begun)
        _searched_(network, method, budget, search, job.table, log)
        known = None if begun else job.moments()  # of what a method made at the start it knows all it needs
    with _narrowed(leave):
        ended = method.finish(module, channels, budget, known)
        if not begun and not ended and not budget.met:
            raise CompactError(f"{name} could make nothing here smaller; `compactcli analyze` says why")
    if error is None:
        searched = job if search is None or job.before is None else replace(job, before=measure.probed(module, shape))
        error = _made_(searched, module, method, ended, shape, seed, progress)
        log(f"{name}: output error {error:.3f} on {made_on}{hint}")
    else:
        law.apply_checked_(module, ended, channels.consumed, shape)
    params, macs = measure.params(module), measure.macs(module, shape)
    if of == "latency":
        log(f"{name}: planned for {budget.target:.2f} of {budget.original:.2f} ms a batch; `compactcli bench` measures it")
    else:
        kept = (macs if of == "macs" else params) / budget.original
        asked = f" ({100 * target.ratio:g} % asked for)" if abs(kept - target.ratio) > TOLD else ""
        log(f"{name}: {100 * kept:.1f} % of {of} kept{asked}")
    images = None if calibration is None else len(calibration.images)
    options = {"ratio": target.ratio, "of": of, "round": target.round_to, "images": images, **method.recorded()}
    if target.nearest:
        options["nearest"] = True
    if leave:
        options["leave"] = list(leave)
    if search is not None:
        options["search"] = {**search.settings.identity(), "teacher": None if search.teacher is None else search.teacher.name}
    edits = without_tensors([*job.plain, *begun, *ended])
    step = Step("compress", name, options, edits, Measures(params, macs), error, __version__)
    network.recipe = network.recipe.then(step)
    return network


def planned(
    network: Network,
    name: str,
    method: Method,
    target: Target,
    *,
    calibration: Calibration | None = None,
    leave: Sequence[str] = (),
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """What `compress` would make of each layer, and why, without a search: schema compactcli/plan/1.

    The network is left in an undefined state. Raises what `compress` raises before it changes anything.
    """
    sizes = measure.params(network.module), measure.macs(network.module, network.input_shape)
    job = _job(network, name, method, target, calibration, leave, seed, log)
    module, known = network.module, job.moments()
    with _narrowed(leave):
        edits = method.start(module, job.channels, job.budget, known)
        edits = [*edits, *method.finish(module, job.channels, job.budget, known)]
    names = labels(job.budget.layers)
    before = [stored(module, layer, name) for layer, name in zip(job.budget.layers, names, strict=True)]
    replaced = {edit.module for edit in edits if isinstance(edit, Replace)}
    surgery.apply_(module, edits)
    after = layers(trace(kernels.folded(module), network.input_shape))
    rows = []
    for layer, name_, params in zip(job.budget.layers, names, before, strict=True):
        inside = layer.name in replaced
        parts = [part for part in after if part.weight == layer.weight]
        if inside:
            parts = [part for part in after if f"{part.name}.".startswith(f"{layer.name}.")]
        loss = method.losses.get(layer.name) if name_ == layer.name else None
        rows.append(
            {
                "name": name_,
                "before": {"weight_shapes": [list(layer.shape)], "params": params, "macs": layer.macs},
                "after": {
                    "weight_shapes": [list(part.shape) for part in parts],
                    "params": measure.params(module.get_submodule(layer.name)) if inside else stored(module, layer, name_),
                    "macs": sum(part.macs for part in parts),
                },
                "error": None if loss is None else loss**0.5,
                "why": _why(layer, edits, job.channels, hasattr(method.options, "soft")),
            }
        )
    now = measure.params(module), measure.macs(module, network.input_shape)
    return {
        "schema": "compactcli/plan/1",
        "method": name,
        "options": method.recorded(),
        "target": {"ratio": target.ratio, "of": job.budget.of},
        "before": dict(zip(("params", "macs"), sizes, strict=True)),
        "after": dict(zip(("params", "macs"), now, strict=True)),
        "error": sum(method.losses.values()) ** 0.5 if method.losses else None,
        "layers": rows,
    }


def _why(layer: Layer, edits: Sequence[Edit], channels: Channels, softens: bool) -> str:
    """What the edits do to a layer, or why they leave it as it is; whether the method's options know `soft`."""
    told = []
    for edit in edits:
        match edit:
            case Replace(module=layer.name):
                options = ", ".join(f"{key} {value}" for key, value in edit.options.items())
                told.append(f"{edit.layer} ({options})" if options else edit.layer)
            case Keep(module=layer.name, axis=0) | Keep(module=layer.weight, axis=layer.out_axis):
                full = layer.shape[layer.out_axis]
                told.append(f"{full - len(edit.index)} of {full} filters go")
            case Keep(module=layer.name, axis=1) | Keep(module=layer.weight, axis=layer.in_axis):
                told.append(f"reads {len(edit.index)} channels")
    if told:
        return "; ".join([*told, *(["its filters stay: --leave says so"] if layer.fixed else [])])
    reason = "--leave says so" if layer.fixed else channels.reason((layer.weight, layer.out_axis))
    reason = reason.removesuffix(SOFT) if reason and not softens else reason
    return f"left: {reason}" if reason else "left: others lose less for what they cost"


@dataclass(frozen=True)
class _Job:
    """What a compression knows before it changes anything."""

    plain: Sequence[Edit]  # that made layers plain
    channels: Channels
    budget: Budget
    batches: Batches | None
    moments: Callable[[], dict[str, Moments] | None]
    before: Tensor | None  # the outputs for random images, where there are no real ones
    table: timing.Table | None  # that a budget of latency is met by


def _job(
    network: Network,
    name: str,
    method: Method,
    target: Target,
    calibration: Calibration | None,
    leave: Sequence[str],
    seed: int,
    log: Callable[[str], None],
) -> _Job:
    """The network in plain layers, in place, and its budget. Raises what `compress` does before there is a plan."""
    artefact.check_finite(network, log)
    of: Of = target.of or method.of[0]
    if of not in method.of:
        why = "makes layers of a kind that is not timed" if "macs" in method.of else "stores less and computes the same"
        raise UsageError(f"--of {of}: {name} {why}; use --of {method.of[0]}")
    if target.round_to is not None and not method.rounds:
        raise UsageError(f"--round: {name} makes nothing that it could round; leave it out")
    precision.uncast_(network, log)
    module, shape = network.module, network.input_shape
    made = len(kernels.layers(module))
    whole = measure.wholes(module, shape).get(of)
    plain = plain_(module, shape)
    if made:
        log(f"{name}: made {made} layers of an earlier step plain: what it had saved there is undone")
    graph, channels = plan(module, shape, log, soft=method.soft, leave=leave)
    table = target.table
    if of == "latency" and table is None:
        log(f"{network.name}: timing its layers, one image at a time; --latency-table FILE takes what bench --save measured")
        table = timing.table(network)
    if table is not None and table.input_shape != shape:
        both = f"of {shape_text(table.input_shape)} inputs, the network takes {shape_text(shape)}"
        raise CompactError(f"the latency table is {both}; measure it anew with bench --save, or give --input-shape")
    budget = Budget(
        graph,
        channels,
        module,
        ratio=target.ratio,
        of=of,
        round_to=target.round_to,
        nearest=target.nearest,
        original=whole,
        times=None if table is None else table.times(layers(graph)),
        leave=leave,
    )
    if graph.baked and calibration is not None:
        raise CompactError(
            f"{network.name}: the network's code depends on the values of tensors, so it cannot be calibrated; leave out --data"
        )
    batches = before = None
    if calibration is None:
        before = measure.probed(module, shape, finite=True)
    else:
        batches = Batches(calibration.images, network.recipe.preprocessing, value_bytes(graph))
    names = single(budget.layers)

    def moments() -> dict[str, Moments] | None:
        return None if batches is None else gather(module, names, batches, seed=seed)

    return _Job(plain, channels, budget, batches, moments, before, table)


@contextmanager
def _narrowed(leave: Sequence[str]) -> Iterator[None]:
    """What cannot be done while the block runs may be for want of layers that the user leaves out: it is told."""
    try:
        yield
    except UsageError:
        raise
    except CompactError as problem:
        if not leave:
            raise
        raise CompactError(f"{problem}; or name less with --leave") from None


def _searched_(
    network: Network,
    method: Method,
    budget: Budget,
    search: Search,
    table: timing.Table | None,
    log: Callable[[str], None],
) -> None:
    """Train the network with the method's hooks; its weights, in the layers that it had, are then what the search ended with."""
    fixed = [layer.weight for layer in budget.layers if layer.fixed]
    identity = {**search.identity, "options": repr(method.options), "target": [budget.of, budget.target], "fixed": fixed}
    store = None
    if search.kept is not None:
        store = kept_run(search.kept, network, search.dataset, search.settings, search.teacher, identity)
        if table is not None:  # another would be measured, and another plan made, when the run goes on
            store = replace(store, metadata={**store.metadata, timing.KEY: table.dumps().decode()})
    hooks = [*attached(network.recipe, network.module), method]
    try:
        fit_(
            network.module,
            search.dataset,
            network.recipe.preprocessing,
            search.settings,
            teacher=None if search.teacher is None else search.teacher.module,
            hooks=hooks,
            keep="last",
            store=store,
            resume=search.resume,
            watch=search.watch,
        )
        distributed.share_(network.module.parameters())
    finally:
        told = method.end(network.module)
    if told is not None:
        log(told)


def _made_(
    job: _Job,
    module: nn.Module,
    method: Method,
    edits: Sequence[Edit],
    shape: Sequence[int],
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> float:
    """Apply the edits, and refit to images where there are; the relative change of the outputs on them, else on random ones."""
    if job.batches is None:
        assert job.before is not None
        law.apply_checked_(module, edits, job.channels.consumed, shape)
        return _mended_(module, method.mended(), shape, job.before)
    original = copied(module)
    law.apply_checked_(module, edits, job.channels.consumed, shape)
    return calibrate.refit_(module, original, edits, job.batches, seed=seed, progress=progress)


def _mended_(module: nn.Module, values: Mapping[str, Tensor], shape: Sequence[int], before: Tensor) -> float:
    """Take better values, if they are: the relative change of the outputs on random images is then less than without."""
    error = measure.relative_change(measure.probed(module, shape), before)
    if not values:
        return error
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    old = {name: tensors[name].detach().clone() for name in values}
    _put_(tensors, values)
    better = measure.relative_change(measure.probed(module, shape), before)
    if better < error:
        return better
    _put_(tensors, old)
    return error


def _put_(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)
