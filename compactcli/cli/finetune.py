"""`compactcli finetune`."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import streams
from ..errors import UsageError
from . import common, training
from .common import guarded, note, open_data, open_network


@guarded
def command(
    model: common.Model = None,
    data: common.Data = None,
    epochs: Annotated[int, typer.Option(min=0, help="Passes over the training images.")] = 10,
    lr: training.LearningRate = None,
    weight_decay: training.WeightDecay = 1e-4,
    optimizer: training.Optimizer = "sgd",
    schedule: training.Schedule = "cosine",
    milestones: Annotated[
        str, typer.Option(metavar="A,B", help="Shares of the run at which `milestones` divides the rate by 10.")
    ] = "0.5,0.75",
    warmup_epochs: Annotated[float, typer.Option(min=0.0, help="Warm-up from 0; at most a tenth of the run.")] = 1.0,
    teacher: Annotated[
        str | None, typer.Option(metavar="FILE|none", help="Network to learn from. [default: the original, where it is found]")
    ] = None,
    distill_weight: training.DistillWeight = 0.4,
    temperature: training.Temperature = 4.0,
    label_smoothing: Annotated[float, typer.Option(help="Share of each label that is spread over all classes.")] = 0.0,
    cutout: Annotated[
        int, typer.Option(min=0, metavar="PIXELS", help="Blank a square of that side in every training image.")
    ] = 0,
    clip_grad: Annotated[float | None, typer.Option(metavar="NORM", help="Scale larger gradients down to that norm.")] = None,
    ema: Annotated[
        float | None, typer.Option(metavar="DECAY", help="Validate and keep a moving average of the weights, e.g. 0.999.")
    ] = None,
    freeze_bn: Annotated[bool, typer.Option("--freeze-bn", help="Batch-norm keeps its running statistics.")] = False,
    sync_bn: Annotated[bool, typer.Option("--sync-bn", help="Batch-norm over the images of all processes.")] = False,
    patience: Annotated[int | None, typer.Option(metavar="N", help="End after N epochs without a better one.")] = None,
    time_limit: training.TimeLimit = None,
    keep: training.Keep = "best",
    dtype: common.Dtype = None,
    output: common.Output = None,
    resume: training.Resume = False,
    state: training.State = None,
    save_every: training.SaveEvery = 500,
    history: training.History = None,
    data_dir: common.DataDir = None,
    download: common.Download = False,
    skip_corrupt: common.SkipCorrupt = False,
    limit: common.Limit = None,
    batch_size: common.BatchSize = 128,
    accumulate: Annotated[int, typer.Option(min=1, metavar="PARTS", help="Compute each batch in parts: less memory.")] = 1,
    workers: training.Workers = None,
    precision: training.Precision = "auto",
    cuda_graphs: training.CudaGraphs = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the network.")] = False,
    device: common.Device = "cpu",
    seed: common.Seed = 0,
    arch: common.Arch = None,
    arch_kwargs: common.ArchKwargs = None,
    input_shape: common.InputShape = None,
    mean: common.Mean = None,
    std: common.Std = None,
    trust_pickle: common.TrustPickle = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Train a network on, with the original as teacher, and write it with its accuracy.

    compactcli finetune small.safetensors --data cifar10 --teacher resnet56.pt -o tuned.safetensors

    torchrun --nproc-per-node 2 -m compactcli finetune small.safetensors --data cifar10 -o tuned.safetensors
    """
    training.check_keep(keep)
    common.check_dtype(dtype)
    if freeze_bn and sync_bn:
        raise UsageError("--freeze-bn and --sync-bn: batch-norm does one or the other")
    from .. import artefact, distributed, optim
    from ..finetune import find_teacher, finetune
    from ..history import Watch
    from ..sources import remembered

    with distributed.joined(device) as own_device:
        settings = optim.Settings(
            epochs=epochs, lr=lr, weight_decay=weight_decay, optimizer=optimizer, schedule=schedule,  # type: ignore[arg-type]
            milestones=common.floats("--milestones", milestones), warmup_epochs=warmup_epochs, batch_size=batch_size,
            accumulate=accumulate, label_smoothing=label_smoothing, clip_grad=clip_grad, ema=ema, cutout=cutout,
            distill_weight=distill_weight, temperature=temperature, patience=patience, time_limit=time_limit,
            batch_norm="frozen" if freeze_bn else "sync" if sync_bn else "train", save_every=save_every, seed=seed,
            device=own_device, precision=precision, cuda_graphs=cuda_graphs, compile=compile, workers=workers,  # type: ignore[arg-type]
        )  # fmt: skip
        quiet = quiet or not distributed.is_main()
        left: Path | None = distributed.shared(
            training.left_run(model, output, state) if resume and distributed.is_main() else None
        )
        source = streams.model_source(model) if left is None else str(left)
        destination = streams.model_target(output, source, "tuned") if distributed.is_main() else "-"
        common.check_own("-o", destination, (model, teacher))
        training.check_history(history, (destination, None if left else source, teacher))
        others = (destination, history, None if left else source)
        own = training.run_file(destination, state, others, resume=resume, quiet=quiet) if distributed.is_main() else None
        kept: Path | None = distributed.shared(own)
        wishes: Any = {"arch": arch, "trust_pickle": trust_pickle, "mean": mean, "std": std}
        wishes |= {"arch_kwargs": arch_kwargs, "input_shape": input_shape, "quiet": quiet}
        network = open_network(model, **wishes) if left is None else artefact.open_interrupted(left, artefact.Wishes(arch))
        spec = data or remembered(network.recipe)
        if spec is None:
            raise UsageError("give --data: the file names no dataset to train on")
        common.check_device(own_device)
        dataset = open_data(
            network, spec, data_dir=data_dir, download=download, skip_corrupt=skip_corrupt, limit=limit, seed=seed, quiet=quiet
        )
        assert dataset is not None
        say = partial(note, quiet=quiet)
        guide = find_teacher(network, teacher, arch=arch, trust_pickle=trust_pickle, log=say)
        with common.progress_bar(quiet, "images") as advance:
            watch = Watch(say, advance, training.history_writer(history))
            run: Any = {"keep": keep, "kept": kept, "resume": resume, "dtype": dtype}
            finetune(network, dataset, settings, teacher=guide, watch=watch, **run)
        training.write(network, destination, kept, quiet=quiet)
