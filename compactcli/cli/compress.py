"""`compactcli compress`."""

from functools import partial
from typing import Annotated

import typer

from .. import streams
from ..errors import UsageError
from . import common
from .common import guarded, note, open_data, open_network


@guarded
def command(
    model: common.Model = None,
    *,
    method: Annotated[str, typer.Option(help="How to compress; `compactcli methods` lists them.")],
    ratio: Annotated[float, typer.Option(help="Share to keep, between 0 and 1.")],
    of: Annotated[
        str | None, typer.Option(metavar="macs|params", help="What the ratio is of. [default: the method's own]")
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
    set: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Option of the method; may be repeated.")] = None,
    data: common.Data = None,
    data_dir: common.DataDir = None,
    download: common.Download = False,
    limit: Annotated[int, typer.Option(min=1, help="At most that many images to calibrate on.")] = 1024,
    no_calibrate: Annotated[bool, typer.Option("--no-calibrate", help="Use the weights alone, whatever --data says.")] = False,
    output: common.Output = None,
    arch: common.Arch = None,
    arch_kwargs: common.ArchKwargs = None,
    input_shape: common.InputShape = None,
    mean: common.Mean = None,
    std: common.Std = None,
    trust_pickle: common.TrustPickle = False,
    fresh: common.Fresh = False,
    seed: common.Seed = 0,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Make a network smaller and write it as a self-describing safetensors file.

    compactcli compress resnet56.pt --method hinge --ratio 0.5 --data cifar10 -o small.safetensors
    """
    from .. import methods

    kind = methods.get(method)
    if of is not None and of not in ("macs", "params"):
        raise UsageError(f"--of {of}: it is macs or params")
    from ..compress import Calibration, Target, compress

    chosen = kind(methods.parse_options(kind, set or ()))
    target = Target(ratio, of, _rounding(round), nearest)  # type: ignore[arg-type]
    source = "-" if fresh else streams.model_source(model)
    destination = streams.model_target(output, arch.rpartition(":")[2] if fresh and arch else source, f"{method}-{ratio:g}")
    network = open_network(
        model, arch=arch, arch_kwargs=arch_kwargs, input_shape=input_shape, mean=mean, std=std,
        trust_pickle=trust_pickle, quiet=quiet, fresh=fresh, seed=seed,
    )  # fmt: skip
    from .. import artefact
    from ..data import sample

    dataset = None if no_calibrate else open_data(network, data, data_dir=data_dir, download=download, limit=None, seed=seed)
    images = None
    if dataset is not None:
        split = dataset.train or dataset.test
        assert split is not None
        images = Calibration(sample(split, min(limit, len(split)), seed), dataset.name)
    with common.progress_bar(quiet) as advance:
        said = partial(note, quiet=quiet)
        compress(network, method, chosen, target, calibration=images, seed=seed, log=said, progress=advance)
    size = artefact.save(network, destination)
    note(f"wrote {size:,} bytes to {'stdout' if destination == '-' else destination}", quiet)


def _rounding(text: str | None) -> int | None:
    """The number of --round; None for the default. The compression runs on the CPU, and `auto` is what that has."""
    from ..compress import ROUND

    if text is None or text == "auto":
        return None if text is None else ROUND["cpu"]
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--round {text}: give it as a whole number, or auto") from None
