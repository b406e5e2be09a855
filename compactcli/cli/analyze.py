"""`compactcli analyze`."""

from functools import partial
from typing import Annotated

import typer

from ..errors import UsageError
from . import common
from .common import guarded, open_data, open_network


@guarded
def command(
    model: common.Model = None,
    data: common.Data = None,
    data_dir: common.DataDir = None,
    download: common.Download = False,
    skip_corrupt: common.SkipCorrupt = False,
    limit: common.Limit = None,
    methods: Annotated[
        bool, typer.Option("--methods", help="Predict the output error of each method at --ratios, without compressing.")
    ] = False,
    ratios: Annotated[str, typer.Option(metavar="R,...", help="Shares to keep, between 0 and 1.")] = "0.7,0.5",
    of: Annotated[
        str | None, typer.Option(metavar="macs|params", help="What --ratios are of. [default: each method's own]")
    ] = None,
    time: Annotated[bool, typer.Option("--time", help="Measure the share of time that each layer takes.")] = False,
    linear: Annotated[bool, typer.Option("--linear", help="Redundancy of linear layers too.")] = False,
    explain: Annotated[
        str | None, typer.Option("--explain", metavar="LAYER", help="What goes with the layer's channels, and why some may not.")
    ] = None,
    arch: common.Arch = None,
    arch_kwargs: common.ArchKwargs = None,
    input_shape: common.InputShape = None,
    mean: common.Mean = None,
    std: common.Std = None,
    trust_pickle: common.TrustPickle = False,
    fresh: common.Fresh = False,
    seed: common.Seed = 0,
    json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Show where a network is redundant and what may be cut; with --data also how much each layer's loss would hurt.

    compactcli analyze resnet56.pt --data images/ --methods --ratios 0.7,0.5

    compactcli analyze resnet56.pt --json | jq .suggestion
    """
    if of not in (None, "macs", "params"):
        raise UsageError(f"--of {of}: it is macs or params")
    shares = common.floats("--ratios", ratios)
    if not all(0 < share < 1 for share in shares):
        raise UsageError(f"--ratios {ratios}: they are shares to keep, between 0 and 1")
    network = open_network(
        model, arch=arch, arch_kwargs=arch_kwargs, input_shape=input_shape, mean=mean, std=std,
        trust_pickle=trust_pickle, quiet=quiet, fresh=fresh, seed=seed,
    )  # fmt: skip
    from .. import artefact, tables
    from ..analysis import Predicted, analyse
    from ..explain import explanation, explanation_tables
    from ..methods import names

    weights, variances = artefact.nonfinite(network.module)
    for name in weights:
        common.note(f"warning: {network.name}: {name} holds NaN or Inf; compress will refuse it", quiet)
    for name in variances:
        common.note(f"warning: {network.name}: {name} holds Inf", quiet)
    note = partial(common.note, quiet=quiet)
    if explain is not None:
        tree = explanation(network, explain)
    else:
        if weights and (data is not None or methods):
            artefact.check_finite(network)
        dataset = open_data(
            network, data, data_dir=data_dir, download=download, skip_corrupt=skip_corrupt, limit=limit, seed=seed, quiet=quiet
        )
        given: list[str | None] = ["-" if model is None and not fresh else model, *(["--fresh"] * fresh)]
        given += ["--skip-corrupt"] * (skip_corrupt and data is not None) + ["--trust-pickle"] * (trust_pickle and not fresh)
        pairs = [("--data", data), ("--data-dir", data_dir), ("--arch", arch), ("--input-shape", input_shape)]
        pairs += [("--mean", mean), ("--std", std), *(("--arch-kwargs", pair) for pair in arch_kwargs or ())]
        pairs += [("--seed", str(seed))] if fresh and seed else []
        given += [part for flag, value in pairs if value is not None for part in (flag, str(value))]
        tree = analyse(
            network,
            linear=linear,
            timed=time,
            dataset=dataset,
            wanted=Predicted(names(), shares, of) if methods else None,  # type: ignore[arg-type]
            flags=[part for part in given if part is not None],
            log=note,
            detail=partial(common.note, quiet=quiet or not verbose),
        )
    if json:
        common.write_json(tree)
    else:
        common.show(tables.analysis_tables(tree, verbose=verbose) if explain is None else explanation_tables(tree))
