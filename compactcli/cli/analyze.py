"""`compactcli analyze`."""

from functools import partial
from typing import Annotated

import typer

from . import common
from .common import guarded, open_network


@guarded
def command(
    model: common.Model = None,
    arch: common.Arch = None,
    arch_kwargs: common.ArchKwargs = None,
    input_shape: common.InputShape = None,
    mean: common.Mean = None,
    std: common.Std = None,
    trust_pickle: common.TrustPickle = False,
    fresh: common.Fresh = False,
    seed: common.Seed = 0,
    linear: Annotated[bool, typer.Option("--linear", help="Redundancy of linear layers too.")] = False,
    explain: Annotated[
        str | None, typer.Option("--explain", metavar="LAYER", help="What goes with the layer's channels, and why some may not.")
    ] = None,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Show where a network is redundant and what may be cut.

    compactcli analyze resnet56.pt --json | jq .suggestion
    """
    network = open_network(
        model, arch=arch, arch_kwargs=arch_kwargs, input_shape=input_shape, mean=mean, std=std,
        trust_pickle=trust_pickle, quiet=quiet, fresh=fresh, seed=seed,
    )  # fmt: skip
    from .. import artefact, report
    from ..explain import explanation, explanation_tables

    weights, variances = artefact.nonfinite(network.module)
    for name in weights:
        common.note(f"warning: {network.name}: {name} holds NaN or Inf; compress will refuse it", quiet)
    for name in variances:
        common.note(f"warning: {network.name}: {name} holds Inf", quiet)
    note = partial(common.note, quiet=quiet)
    tree = report.analysis(network, linear=linear, log=note) if explain is None else explanation(network, explain)
    if json:
        common.write_json(tree)
    else:
        common.show(report.analysis_tables(tree) if explain is None else explanation_tables(tree))
