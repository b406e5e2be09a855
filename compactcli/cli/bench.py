"""`compactcli bench`."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .. import streams
from ..errors import UsageError
from . import common
from .common import guarded, open_network


@guarded
def command(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL", help="Checkpoint files or folders; - or nothing reads stdin.")
    ] = None,
    batch_size: Annotated[str, typer.Option(metavar="N,...", help="Images per batch, one or several.")] = "1",
    threads: Annotated[
        str | None, typer.Option(metavar="N,...", help="CPU threads, one number or several. [default: torch's]")
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=2, help="Rounds at least; there are more until a second has gone by at each setting.")
    ] = 5,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Time the layers of one model too, at several widths, for compress --latency-table."),
    ] = None,
    device: common.Device = "cpu",
    arch: common.Arch = None,
    arch_kwargs: common.ArchKwargs = None,
    input_shape: common.InputShape = None,
    trust_pickle: common.TrustPickle = False,
    fresh: common.Fresh = False,
    seed: common.Seed = 0,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Measure latency: every model in turn, round after round, beside the first.

    compactcli bench resnet56.pt --threads 1 --save table.json

    compactcli bench resnet56.pt small.safetensors --batch-size 1,16 --threads 1,2
    """
    batches = _counts("--batch-size", batch_size)
    counts: Sequence[int | None] = [None] if threads is None else _counts("--threads", threads)
    processors = os.cpu_count() or 1
    if any(count is not None and count > processors for count in counts):
        raise UsageError(f"--threads {threads}: there are {processors} processors here; give no more than that")
    if (models or []).count("-") > 1:
        raise UsageError("stdin holds one model; give - once, and files for the others")
    if save is not None and (len(models or [""]) > 1 or len(batches) > 1 or len(counts) > 1):
        raise UsageError("--save: a table is of one model, at one batch size and number of threads")
    if save is not None:
        streams.check_folder(str(save))
        common.check_own("--save", save, models or [])
    shape = common.parse_shape(input_shape)
    networks = []
    sources: Sequence[str | None] = models or [None]
    for model in sources:
        network = open_network(
            model, arch=arch, arch_kwargs=arch_kwargs, input_shape=input_shape, mean=None, std=None,
            trust_pickle=trust_pickle, quiet=quiet, fresh=fresh, seed=seed,
        )  # fmt: skip
        if model is not None and model != "-":
            network.name = model  # as given: bare names may be alike
        networks.append(network)
    common.check_device(device)
    from .. import report, tables, timing

    tree = report.bench(networks, input_shape=shape, batches=batches, threads=counts, repeats=repeats, device=device)
    if save is not None:
        measured = timing.table(networks[0], input_shape=shape, batch=batches[0], threads=counts[0], device=device)
        streams.write(measured.dumps(), str(save))
        common.note(f"wrote the times of {len(measured.layers)} layers to {save}", quiet)
    if json:
        common.write_json(tree)
    else:
        common.show(tables.bench_table(tree))


def _counts(flag: str, text: str) -> list[int]:
    """The numbers of a flag, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[1-9][0-9]{0,8}", part) for part in parts):
        raise UsageError(f"{flag} {text}: give it as whole numbers from 1 up with commas, e.g. 1,16")
    return list(dict.fromkeys(map(int, parts)))
