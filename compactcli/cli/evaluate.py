"""`compactcli evaluate`."""

from functools import partial

from ..errors import UsageError, printable
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
    batch_size: common.BatchSize = 256,
    device: common.Device = "cpu",
    arch: common.Arch = None,
    arch_kwargs: common.ArchKwargs = None,
    input_shape: common.InputShape = None,
    mean: common.Mean = None,
    std: common.Std = None,
    trust_pickle: common.TrustPickle = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Measure a network's accuracy on test images.

    compactcli evaluate resnet56.pt --data cifar10 --json | jq .accuracy
    """
    network = open_network(
        model, arch=arch, arch_kwargs=arch_kwargs, input_shape=input_shape, mean=mean, std=std,
        trust_pickle=trust_pickle, quiet=quiet,
    )  # fmt: skip
    common.check_device(device)
    from ..sources import remembered

    dataset = open_data(
        network,
        data or remembered(network.recipe),
        data_dir=data_dir,
        download=download,
        skip_corrupt=skip_corrupt,
        limit=limit,
        seed=0,
        quiet=quiet,
    )
    if dataset is None:
        raise UsageError("give --data: the file names no dataset to evaluate on")
    from .. import report

    told = partial(common.note, quiet=quiet)
    evaluated = report.evaluate(network, dataset, batch_size=batch_size, device=device, log=told)
    if json:
        common.write_json(report.evaluation(network, evaluated))
    else:
        found = evaluated.accuracy
        figures = f"top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} %, loss {found.loss:.4f}"
        print(f"{figures} on {found.images:,} {evaluated.split} images of {printable(evaluated.dataset)}")
