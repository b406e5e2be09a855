"""`compactcli compress`."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import streams
from ..errors import UsageError
from ..recipe import IMAGES
from . import common, training
from .common import guarded, note, open_data, open_network

if TYPE_CHECKING:
    from ..artefact import Network
    from ..compress import Calibration
    from ..data import Dataset


@guarded
def command(
    context: typer.Context,
    model: common.Model = None,
    *,
    method: Annotated[str, typer.Option(help="How to compress; `compactcli methods` lists them.")],
    ratio: Annotated[float, typer.Option(help="Share to keep, between 0 and 1.")],
    of: Annotated[
        str | None, typer.Option(metavar="macs|params|latency", help="What the ratio is of. [default: the method's own]")
    ] = None,
    latency_table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What bench --save measured, for --of latency. [default: it is measured at once]"),
    ] = None,
    round: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Channel counts are multiples of N; auto: of 16, for CPUs. "
            "[default: 1 up to width 64, else 8; where speed is favoured 1 below 64, else 16]",
        ),
    ] = None,
    nearest: Annotated[bool, typer.Option("--nearest", help="Take the nearest reachable ratio.")] = False,
    leave: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Layer, or module of layers, that keeps its filters and is not replaced; * and ? match.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would become of each layer, and why; write nothing.")
    ] = False,
    set: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Option of the method; may be repeated.")] = None,
    epochs: Annotated[int, typer.Option(min=0, help="Epochs of the method's search before it decides; 0: calibrate only.")] = 0,
    finetune_epochs: Annotated[int, typer.Option(min=0, help="Epochs of fine-tuning afterwards.")] = 0,
    data: common.Data = None,
    data_dir: common.DataDir = None,
    download: common.Download = False,
    skip_corrupt: common.SkipCorrupt = False,
    limit: Annotated[int, typer.Option(min=1, help="At most that many images to calibrate on.")] = IMAGES,
    no_calibrate: Annotated[bool, typer.Option("--no-calibrate", help="Use the weights alone, whatever --data says.")] = False,
    lr: training.LearningRate = None,
    weight_decay: training.WeightDecay = 1e-4,
    optimizer: training.Optimizer = "sgd",
    schedule: training.Schedule = "cosine",
    teacher: Annotated[
        str | None, typer.Option(metavar="FILE|none", help="Network to learn from. [default: the one that is compressed]")
    ] = None,
    distill_weight: training.DistillWeight = 0.4,
    temperature: training.Temperature = 4.0,
    keep: training.Keep = "best",
    resume: training.Resume = False,
    state: training.State = None,
    save_every: training.SaveEvery = 500,
    time_limit: training.TimeLimit = None,
    history: training.History = None,
    batch_size: common.BatchSize = 128,
    workers: training.Workers = None,
    precision: training.Precision = "auto",
    cuda_graphs: training.CudaGraphs = False,
    device: common.Device = "cpu",
    dtype: common.Dtype = None,
    output: common.Output = None,
    arch: common.Arch = None,
    arch_kwargs: common.ArchKwargs = None,
    input_shape: common.InputShape = None,
    mean: common.Mean = None,
    std: common.Std = None,
    trust_pickle: common.TrustPickle = False,
    fresh: common.Fresh = False,
    seed: common.Seed = 0,
    json: Annotated[bool, typer.Option("--json", help="The plan of --dry-run as one JSON document on stdout.")] = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Make a network smaller and write it as a self-describing safetensors file.

    compactcli compress resnet56.pt --method hinge --ratio 0.5 --data cifar10 -o small.safetensors

    compactcli compress resnet56.pt --method hinge --ratio 0.5 --of latency --latency-table table.json -o small.safetensors

    compactcli compress resnet56.pt --method hinge --ratio 0.5 --data cifar10 --epochs 5 --finetune-epochs 15 -o small.safetensors
    """
    from .. import methods

    kind = methods.get(method)
    if of is not None and of not in ("macs", "params", "latency"):
        raise UsageError(f"--of {of}: it is macs, params or latency")
    if latency_table is not None and of != "latency":
        raise UsageError("--latency-table: it is for --of latency")
    if json and not dry_run:
        raise UsageError("--json: it is for --dry-run; the model says all in its file, and `compactcli report --json` tells it")
    if dry_run and (epochs or finetune_epochs):
        raise UsageError("--dry-run plans from weights or images, not from training; leave --epochs and --finetune-epochs out")
    training.check_keep(keep)
    common.check_dtype(dtype)
    trains = epochs > 0 or finetune_epochs > 0
    if trains and (data is None or no_calibrate):
        raise UsageError("--epochs and --finetune-epochs need images: give --data, and leave --no-calibrate out")
    from .. import artefact, distributed, optim, tables, timing
    from ..compress import Search, Target, compress, planned
    from ..finetune import finetune
    from ..history import Watch
    from ..precision import cast_

    options = methods.parse_options(kind, set or ())
    searches = {option.name for option in methods.option_list(kind) if option.help.startswith("search: ")}
    searched = [name for name in (pair.partition("=")[0] for pair in set or ()) if name in searches and not epochs]
    if searched:
        raise UsageError(f"--set {searched[0]}: it is for a search; give --epochs as well")
    chosen = kind(options)
    table = None if latency_table is None else timing.load(latency_table)
    target = Target(ratio, of, _rounding(round), nearest, table)  # type: ignore[arg-type]
    started = time.perf_counter()
    with distributed.joined(device) as own_device:
        plan = partial(
            optim.Settings, lr=lr, weight_decay=weight_decay, optimizer=optimizer, batch_size=batch_size,  # type: ignore[arg-type]
            schedule=schedule,  # type: ignore[arg-type]
            distill_weight=distill_weight, temperature=temperature, save_every=save_every, time_limit=time_limit, seed=seed,
            device=own_device, precision=precision, cuda_graphs=cuda_graphs, workers=workers,  # type: ignore[arg-type]
        )  # fmt: skip
        searching, finetuning = plan(epochs=epochs), plan(epochs=finetune_epochs)
        quiet = quiet or not distributed.is_main()
        source = "-" if fresh else streams.model_source(model)
        named = arch.rpartition(":")[2] if fresh and arch else source
        writes = distributed.is_main() and not dry_run
        destination = streams.model_target(output, named, f"{method}-{ratio:g}") if writes else "-"
        common.check_own("-o", destination, (model, teacher, latency_table))
        if not trains:
            training.check_idle(context)
        training.check_history(history, (destination, source, teacher, latency_table))
        kept: Path | None = None
        if trains:
            others = (destination, history, source)
            own = training.run_file(destination, state, others, resume=resume, quiet=quiet) if distributed.is_main() else None
            kept = distributed.shared(own)
            if resume and of == "latency" and table is None and kept is not None and kept.exists():
                target = replace(target, table=timing.kept(kept))
        common.check_device(own_device)
        network = open_network(
            model, arch=arch, arch_kwargs=arch_kwargs, input_shape=input_shape, mean=mean, std=std,
            trust_pickle=trust_pickle, quiet=quiet, fresh=fresh, seed=seed,
        )  # fmt: skip
        spec = None if no_calibrate else data
        dataset = open_data(
            network, spec, data_dir=data_dir, download=download, skip_corrupt=skip_corrupt, limit=None, seed=seed, quiet=quiet
        )
        say = partial(note, quiet=quiet)
        guide = None if not trains or (fresh and teacher is None) else training.teacher(network, teacher, arch, trust_pickle)
        identity: dict[str, Any] = {"source": network.sha256, "method": method, "ratio": ratio, "of": of, "round": round}
        identity |= {"nearest": nearest, "set": sorted(set or ()), "leave": sorted(leave or ())}
        identity |= {"calibrated_on": limit, "searched_for": epochs}
        identity |= {"files": [artefact.file_sha256(path) for path in chosen.files]} if chosen.files else {}
        means: dict[str, Any] = {"leave": leave or (), "seed": seed, "log": say}
        if dry_run:
            tree = planned(network, method, chosen, target, calibration=_calibration(dataset, limit, seed), **means)
            common.show(tables.plan_table(tree), err=True)
            if json:
                common.write_json(tree)
            return
        left = _compressed(kept, network, arch) if resume and kept is not None and kept.exists() else None
        network = left or network

        if left is None:
            calibration, search = _calibration(dataset, limit, seed), None
            with common.progress_bar(quiet, "images" if epochs else "layers") as advance:
                if epochs and dataset is not None:
                    watch = Watch(say, advance, training.history_writer(history, "search"))
                    search = Search(dataset, searching, guide, kept, resume, watch, identity)
                means |= {"calibration": calibration, "search": search, "progress": advance}
                compress(network, method, chosen, target, **means)
        spare = distributed.shared(time_limit and time_limit - (time.perf_counter() - started))  # it is of both together
        unfinished = spare is not None and spare <= 0 and finetune_epochs > 0
        if unfinished:
            say("the time is up before fine-tuning; --resume goes on")
        elif finetune_epochs and dataset is not None:
            finetuning = replace(finetuning, time_limit=spare)
            with common.progress_bar(quiet, "images") as advance:
                watch = Watch(say, advance, training.history_writer(history, "finetune", after="search" if epochs else None))
                run: Any = {"keep": keep, "kept": kept, "resume": left is not None, "identity": identity, "dtype": dtype}
                finetune(network, dataset, finetuning, teacher=guide, watch=watch, **run)
        if dtype is not None and network.recipe.dtype is None and distributed.is_main():
            cast_(network, dtype, log=say)
        training.write(network, destination, kept, unfinished=unfinished, quiet=quiet)


def _calibration(dataset: "Dataset | None", limit: int, seed: int) -> "Calibration | None":
    """The images to calibrate on; None without data."""
    from ..compress import Calibration
    from ..data import sample

    if dataset is None:
        return None
    split = dataset.train or dataset.test
    assert split is not None
    return Calibration(sample(split, min(limit, len(split)), seed), dataset.name)


def _compressed(kept: Path, network: "Network", arch: str | None) -> "Network | None":
    """The network that an interrupted run had compressed and was fine-tuning; None if it was not that far."""
    from .. import artefact, resume
    from ..recipe import Recipe

    recipe = Recipe.loads(resume.check(kept)[artefact.KEY])
    return artefact.open_interrupted(kept, artefact.Wishes(arch)) if len(recipe.steps) > len(network.recipe.steps) else None


def _rounding(text: str | None) -> int | None:
    """The number of --round; None for the default. The compression runs on the CPU, and `auto` is what that has."""
    from ..compress import ROUND

    if text is None or text == "auto":
        return None if text is None else ROUND["cpu"]
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--round {text}: give it as a whole number, or auto") from None
