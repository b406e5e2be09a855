"""`compactcli report`."""

from typing import Annotated

import typer

from . import common
from .common import guarded, open_data, open_network


@guarded
def command(
    model: common.Model = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Network to compare with. [default: what the file remembers of the original]"),
    ] = None,
    counter: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A paper's own count as well: hinge, fcf, linearconv, hetconv."),
    ] = None,
    data: common.Data = None,
    data_dir: common.DataDir = None,
    download: common.Download = False,
    limit: common.Limit = None,
    arch: common.Arch = None,
    arch_kwargs: common.ArchKwargs = None,
    input_shape: common.InputShape = None,
    mean: common.Mean = None,
    std: common.Std = None,
    trust_pickle: common.TrustPickle = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Report parameters, FLOPs, size, latency and accuracy, beside the original's.

    compactcli report small.safetensors --baseline resnet56.pt --data cifar10
    """
    if counter is not None:
        from .. import counters

        counters.get(counter)
    network = open_network(
        model, arch=arch, arch_kwargs=arch_kwargs, input_shape=input_shape, mean=mean, std=std,
        trust_pickle=trust_pickle, quiet=quiet,
    )  # fmt: skip
    from .. import artefact, report

    other = None if baseline is None else artefact.open_beside(baseline, network, arch)
    dataset = open_data(network, data, data_dir=data_dir, download=download, limit=limit, seed=0)
    tree = report.report(network, other, dataset, counter=counter)
    if json:
        common.write_json(tree)
    else:
        common.show(report.report_tables(tree, layers=verbose))
