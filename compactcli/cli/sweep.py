"""`compactcli sweep`."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import streams
from ..errors import CompactError, UsageError
from ..recipe import IMAGES
from . import common, training
from .common import guarded, note, open_data, open_network


@guarded
def command(
    model: common.Model = None,
    methods: Annotated[str | None, typer.Option(metavar="NAME,...", help="Methods to compare. [default: all]")] = None,
    ratios: Annotated[str, typer.Option(metavar="R,...", help="Shares to keep, between 0 and 1.")] = "0.9,0.7,0.5",
    set: Annotated[
        list[str] | None, typer.Option(metavar="METHOD.NAME=VALUE", help="Option of one of the methods; may be repeated.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=0, help="Epochs of fine-tuning of each row; 0: calibrate only.")] = 0,
    data: common.Data = None,
    data_dir: common.DataDir = None,
    download: common.Download = False,
    skip_corrupt: common.SkipCorrupt = False,
    limit: Annotated[int, typer.Option(min=1, help="At most that many images to calibrate on.")] = IMAGES,
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
    batch_size: common.BatchSize = 128,
    workers: training.Workers = None,
    precision: training.Precision = "auto",
    cuda_graphs: training.CudaGraphs = False,
    device: common.Device = "cpu",
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FILE", help="Write the JSON document there, after each row.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows of -o FILE that are of the same settings.")] = False,
    arch: common.Arch = None,
    arch_kwargs: common.ArchKwargs = None,
    input_shape: common.InputShape = None,
    mean: common.Mean = None,
    std: common.Std = None,
    trust_pickle: common.TrustPickle = False,
    seed: common.Seed = 0,
    json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Compare methods and ratios on one network, on equal terms.

    compactcli sweep resnet56.pt --data cifar10 --epochs 5 -o sweep.json

    compactcli sweep resnet56.pt --methods hinge,csg --data images/ --json | jq '.rows[] | select(.pareto | index("macs"))'
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UsageError("a sweep runs in one process; start it without torchrun")
    training.check_keep(keep)
    json, output = json or output == "-", None if output == "-" else output
    if resume and output is None:
        raise UsageError("--resume: say with -o FILE which document to go on with")
    if epochs and data is None:
        raise UsageError("--epochs needs images: give --data")
    chosen = _chosen(methods, set or ())
    shares = common.floats("--ratios", ratios)
    if not all(0 < share < 1 for share in shares):
        raise UsageError(f"--ratios {ratios}: each is the share to keep, between 0 and 1")
    from .. import optim
    from ..compress import Calibration
    from ..data import sample
    from ..sweep import Terms, dumps, sweep, sweep_table

    settings = optim.Settings(
        epochs=epochs, lr=lr, weight_decay=weight_decay, optimizer=optimizer, schedule=schedule,  # type: ignore[arg-type]
        batch_size=batch_size, distill_weight=distill_weight, temperature=temperature, seed=seed, device=device,
        precision=precision, cuda_graphs=cuda_graphs, workers=workers,  # type: ignore[arg-type]
    )  # fmt: skip
    source = streams.model_source(model)
    earlier = None
    if output is not None:
        streams.check_folder(output)
        common.check_own("-o", output, (source, teacher))
        earlier = _earlier(Path(output), quiet) if resume else None
    common.check_device(device)
    network = open_network(
        model, arch=arch, arch_kwargs=arch_kwargs, input_shape=input_shape, mean=mean, std=std,
        trust_pickle=trust_pickle, quiet=quiet,
    )  # fmt: skip
    dataset = open_data(
        network, data, data_dir=data_dir, download=download, skip_corrupt=skip_corrupt, limit=None, seed=seed, quiet=quiet
    )
    calibration = None
    if dataset is not None:
        split = dataset.train or dataset.test
        assert split is not None
        calibration = Calibration(sample(split, min(limit, len(split)), seed), dataset.name)
    guide = training.teacher(network, teacher, arch, trust_pickle) if epochs else None
    terms = Terms(calibration, dataset, settings, guide, keep)  # type: ignore[arg-type]

    def save(tree: dict[str, Any]) -> None:
        if output is not None:
            streams.write(dumps(tree), output)

    say = partial(note, quiet=quiet)
    try:
        tree = sweep(
            network, chosen, shares, terms,
            earlier=earlier, log=say, detail=partial(note, quiet=quiet or not verbose), save=save,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt("" if output is None else "--resume goes on from there") from None
    if json:
        common.write_json(tree)
    beside = json or output is not None
    if not (beside and quiet):
        common.show(sweep_table(tree), err=beside)


def _chosen(names: str | None, pairs: Sequence[str]) -> dict[str, Any]:
    """Method -> its options. Raises UsageError for a method or an option that there is not."""
    from .. import methods

    wanted = methods.names() if names is None else [name.strip() for name in names.split(",")]
    kinds = {name: methods.get(name) for name in wanted}
    own: dict[str, list[str]] = {name: [] for name in wanted}
    for pair in pairs:
        name, dot, rest = pair.partition("=")[0].partition(".")
        if not dot:
            raise UsageError(f"--set {pair}: give it as method.name=value")
        option, idle = pair.partition(".")[2], {each.name for each in methods.option_list(methods.get(name)) if _searches(each)}
        if name not in own:
            raise UsageError(f"--set {pair}: {name} is none of the --methods")
        if rest in idle:
            raise UsageError(f"--set {pair}: it is for a search, and a sweep has none")
        own[name].append(option)
    return {name: methods.parse_options(kinds[name], own[name]) for name in wanted}


def _searches(option: Any) -> bool:
    """Whether an option of a method is for its search alone."""
    return bool(option.help.startswith("search: "))


def _earlier(path: Path, quiet: bool) -> dict[str, Any] | None:
    """The document to go on with; None if there is none yet. Raises CompactError for any other file."""
    from ..sweep import loads

    if not path.exists():
        note(f"{path.name}: not there; beginning anew", quiet)
        return None
    try:
        return loads(path.read_text(encoding="utf-8", errors="replace"), path.name)
    except OSError as problem:
        raise CompactError(f"{path.name}: {(problem.strerror or str(problem)).lower()}") from None
