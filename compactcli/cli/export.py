"""`compactcli export`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .. import streams
from ..errors import UsageError
from . import common
from .common import guarded, note, open_data, open_network

FORMATS = ("artefact", "onnx", "pt2", "weights", "timm")
OWN_ENDING = ("onnx", "pt2")  # formats after which files are named


@guarded
def command(
    context: typer.Context,
    model: common.Model = None,
    *,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="|".join(FORMATS),
            help="Format: onnx and pt2 (torch.export) run without compactcli and take any number of images; weights is a plain "
            "state_dict, timm one for timm.create_model, of networks whose layers are as they were; the artefact is what "
            "compactcli reads. [default: by the name of -o, else artefact]",
        ),
    ] = None,
    fold_bn: Annotated[
        bool, typer.Option("--fold-bn", help="Fold batch norms into the layers before them (artefact, onnx, pt2).")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="float16|bfloat16", help="What an artefact holds numbers in: half the bytes of float32."),
    ] = None,
    data: common.Data = None,
    data_dir: common.DataDir = None,
    download: common.Download = False,
    skip_corrupt: common.SkipCorrupt = False,
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
    """Write a network for other programs, or with its numbers in half precision.

    compactcli export tuned.safetensors --to onnx -o tuned.onnx

    compactcli export tuned.safetensors --to pt2 --fold-bn -o tuned.pt2

    compactcli export tuned.safetensors --dtype float16 --data cifar10 -o half.safetensors

    compactcli compress resnet56.pt --method csg --ratio 0.5 | compactcli export --to weights -o plain.pth

    A file appears once what was written has been read back and its outputs agree with the network's. Numbers so small
    that they slow CPUs down (subnormal ones) become zero.
    """
    to = to or _format(output)
    if common.by_environment(context, "data") and (to != "artefact" or dtype is None):
        data = None
    _check(to, fold_bn, dtype, data)
    source = streams.model_source(model)
    suffix = (dtype or "folded") if to == "artefact" else to
    destination = streams.model_target(output, source, suffix, "" if to in OWN_ENDING else ".safetensors")
    common.check_own("-o", destination, (model,))
    common.check_device(device)
    if to != "artefact":
        from ..export import check_extra

        check_extra(to)
    network = open_network(
        model, arch=arch, arch_kwargs=arch_kwargs, input_shape=input_shape, mean=mean, std=std,
        trust_pickle=trust_pickle, quiet=quiet,
    )  # fmt: skip
    log = partial(note, quiet=quiet)
    from .. import artefact
    from ..export import export, simplify_
    from ..precision import cast_

    if to == "artefact":
        dataset = open_data(
            network, data, data_dir=data_dir, download=download, skip_corrupt=skip_corrupt, limit=limit, seed=0, quiet=quiet
        )
        simplify_(network, fold_bn=fold_bn, log=log)
        if dtype is not None:
            cast_(network, dtype, dataset, batch_size=batch_size, device=device, log=log)
        content = artefact.dumps(network)
    else:
        content = export(network, to, fold_bn=fold_bn, ending=Path(destination).suffix.lower(), arch=arch, log=log).data
    streams.write(content, destination)
    place = "stdout" if destination == "-" else destination
    note(f"wrote {len(content):,} bytes to {place}, instead of {network.size_bytes:,}", quiet)


def _format(output: str | None) -> str:
    """What the name of the output asks for."""
    ending = Path(output or "").suffix.lower().removeprefix(".")
    return ending if ending in OWN_ENDING else "artefact"


def _check(to: str, fold_bn: bool, dtype: str | None, data: str | None) -> None:
    """Raise UsageError for flags that mean nothing together."""
    common.check_dtype(dtype)
    if to not in FORMATS:
        raise UsageError(f"--to {to}: it is {' or '.join(FORMATS)}")
    if fold_bn and to in ("weights", "timm"):
        raise UsageError(f"--to {to} keeps the layers of an architecture, batch norms too; --fold-bn goes with onnx or pt2")
    if to != "artefact" and (dtype or data):
        raise UsageError(f"--{'dtype' if dtype else 'data'} goes with --to artefact; --to {to} holds float32 numbers")
    if to == "artefact" and not (dtype or fold_bn):
        raise UsageError("--to artefact changes nothing: give --dtype or --fold-bn, or another --to, e.g. --to onnx")
    if data and not dtype:
        raise UsageError("--data measures what --dtype costs in accuracy; give --dtype as well")
