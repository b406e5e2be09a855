"""`compactcli export`."""

from functools import partial
from typing import Annotated

import typer

from .. import streams
from ..errors import UsageError
from . import common
from .common import guarded, note, open_data, open_network

FORMATS = ("artefact",)


@guarded
def command(
    model: common.Model = None,
    *,
    dtype: Annotated[
        str, typer.Option(metavar="float16|bfloat16", help="What the file holds numbers in: half the bytes of float32.")
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="artefact", help="Format; the artefact is what compactcli reads.")
    ] = "artefact",
    data: common.Data = None,
    data_dir: common.DataDir = None,
    download: common.Download = False,
    limit: common.Limit = None,
    batch_size: common.BatchSize = 256,
    device: common.Device = "cpu",
    output: common.Output = None,
    arch: common.Arch = None,
    arch_kwargs: common.ArchKwargs = None,
    input_shape: common.InputShape = None,
    mean: common.Mean = None,
    std: common.Std = None,
    trust_pickle: common.TrustPickle = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Write a network with its numbers in half precision, and tell what that costs in accuracy.

    compactcli export tuned.safetensors --dtype float16 --data cifar10 -o half.safetensors

    compactcli compress resnet56.pt --method csg --ratio 0.5 | compactcli export --dtype bfloat16 | compactcli report --json
    """
    common.check_dtype(dtype)
    if to not in FORMATS:
        raise UsageError(f"--to {to}: it is {' or '.join(FORMATS)}")
    source = streams.model_source(model)
    destination = streams.model_target(output, source, dtype)
    common.check_device(device)
    network = open_network(
        model, arch=arch, arch_kwargs=arch_kwargs, input_shape=input_shape, mean=mean, std=std,
        trust_pickle=trust_pickle, quiet=quiet,
    )  # fmt: skip
    dataset = open_data(network, data, data_dir=data_dir, download=download, limit=limit, seed=0)
    from .. import artefact
    from ..precision import cast_

    cast_(network, dtype, dataset, batch_size=batch_size, device=device, log=partial(note, quiet=quiet))
    size = artefact.save(network, destination)
    note(f"wrote {size:,} bytes to {'stdout' if destination == '-' else destination}, instead of {network.size_bytes:,}", quiet)
