"""`compactcli finetune`."""

from typing import Annotated

import typer

from .. import streams
from ..errors import UsageError
from . import common
from .common import guarded, note, open_data, open_network


@guarded
def command(
    model: common.Model = None,
    data: common.Data = None,
    epochs: Annotated[int, typer.Option(min=0, help="Passes over the training images.")] = 10,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. [default: 0.05 for sgd, 0.001 for adamw]")] = None,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Weight decay, on every parameter.")] = 1e-4,
    optimizer: Annotated[str, typer.Option(metavar="sgd|adamw", help="Optimizer; sgd has Nesterov momentum 0.9.")] = "sgd",
    schedule: Annotated[
        str, typer.Option(metavar="cosine|constant", help="Learning rate over time, after a warm-up.")
    ] = "cosine",
    teacher: Annotated[
        str | None, typer.Option(metavar="FILE|none", help="Network to learn from. [default: the original, where it is found]")
    ] = None,
    distill_weight: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the teacher in the loss.")] = 0.4,
    temperature: Annotated[float, typer.Option(help="Softmax temperature of the distillation.")] = 4.0,
    output: common.Output = None,
    data_dir: common.DataDir = None,
    download: common.Download = False,
    limit: common.Limit = None,
    batch_size: common.BatchSize = 128,
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
    """
    source = streams.model_source(model)
    destination = streams.model_target(output, source, "tuned")
    network = open_network(
        model, arch=arch, arch_kwargs=arch_kwargs, input_shape=input_shape, mean=mean, std=std,
        trust_pickle=trust_pickle, quiet=quiet,
    )  # fmt: skip
    spec = data or network.recipe.dataset
    if spec is None:
        raise UsageError("give --data: the file names no dataset to train on")
    from .. import artefact, train
    from ..finetune import find_teacher, finetune

    settings = train.Settings(
        epochs=epochs, lr=lr, weight_decay=weight_decay, optimizer=optimizer, schedule=schedule, batch_size=batch_size,  # type: ignore[arg-type]
        distill_weight=distill_weight, temperature=temperature, seed=seed, device=device,
    )  # fmt: skip
    common.check_device(device)
    dataset = open_data(network, spec, data_dir=data_dir, download=download, limit=limit, seed=seed)
    assert dataset is not None
    guide = find_teacher(network, teacher, arch=arch, log=lambda line: note(line, quiet))
    with common.progress_bar(quiet) as advance:
        finetune(network, dataset, settings, teacher=guide, log=lambda line: note(line, quiet), progress=advance)
    size = artefact.save(network, destination)
    note(f"wrote {size:,} bytes to {'stdout' if destination == '-' else destination}", quiet)
