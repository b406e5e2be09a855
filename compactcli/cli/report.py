"""`compactcli report`."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import streams
from ..errors import CompactError, UsageError
from . import common
from .common import guarded, note, open_data, open_network

if TYPE_CHECKING:
    from ..artefact import Network
    from ..data import Dataset


@guarded
def command(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Checkpoint files or folders, several to compare them; - or nothing reads stdin."),
    ] = None,
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
    skip_corrupt: common.SkipCorrupt = False,
    limit: common.Limit = None,
    arch: common.Arch = None,
    arch_kwargs: common.ArchKwargs = None,
    input_shape: common.InputShape = None,
    mean: common.Mean = None,
    std: common.Std = None,
    trust_pickle: common.TrustPickle = False,
    json: common.Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown on stdout, for a model card.")] = False,
    html: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="Write a page with charts, in one file that needs no network.")
    ] = None,
    history: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Epochs that training wrote with its --history: curves in the page.")
    ] = None,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
    debug: common.Debug = False,
) -> None:
    """Report parameters, FLOPs, size, latency and accuracy, beside the original's.

    compactcli report small.safetensors --baseline resnet56.pt --data cifar10

    compactcli report small.safetensors --html small.html --history epochs.jsonl

    compactcli report resnet56.pt small.safetensors tiny.safetensors --data cifar10 --html compared.html
    """
    sources: Sequence[str | None] = models or [None]
    json = json and not (common.by_environment(context, "json") and (markdown or html == "-"))
    if sum([json, markdown, html == "-"]) > 1:
        raise UsageError("--json, --markdown and --html - all go to stdout; give one of them")
    if [*sources, baseline].count("-") > 1:
        raise UsageError("stdin holds one model; give - once, and files for the others")
    if history is not None and (html is None or len(sources) > 1):
        raise UsageError("--history: its curves are in the page of one model; give one, and --html FILE")
    if html not in (None, "-"):
        streams.check_folder(str(html))
        common.check_own("--html", str(html), [*sources, baseline, history])
    if counter is not None:
        from .. import counters

        counters.get(counter)
    epochs = None if history is None else _epochs(history)
    wishes: Any = {"arch": arch, "arch_kwargs": arch_kwargs, "input_shape": input_shape, "mean": mean, "std": std}
    networks = [open_network(model, **wishes, trust_pickle=trust_pickle, quiet=quiet) for model in sources]
    if len({network.name for network in networks}) < len(networks):
        for network, model in zip(networks, sources, strict=True):
            network.name = str(model)  # as given, for bare names are alike
    from .. import artefact, compare, page, report, tables
    from ..markdown import comparison_markdown, report_markdown

    given = artefact.Wishes(mean=common.floats_of("--mean", mean), std=common.floats_of("--std", std))
    other = None if baseline is None else artefact.open_beside(baseline, networks[0], arch, trust_pickle=trust_pickle, pre=given)
    shape = common.parse_shape(input_shape)
    if baseline is not None and other is not None and shape not in (None, other.input_shape):
        other = artefact.open_model(baseline, replace(given, input_shape=shape, trust_pickle=trust_pickle))
    for line in other.notes if other is not None else ():
        note(f"{baseline}: {line}", quiet)
    datasets = _datasets(
        networks, data, data_dir=data_dir, download=download, skip_corrupt=skip_corrupt, limit=limit, seed=0, quiet=quiet
    )
    told = partial(note, quiet=quiet)
    if len(networks) == 1:
        tree = report.report(networks[0], other, datasets[0], counter=counter, arch=arch, log=told)
        shown, text = tables.report_tables(tree, layers=verbose), report_markdown(tree)
        whole = html and page.report_page(page.document(tree, networks[0], other, epochs))
    else:
        tree = compare.comparison(networks, other, datasets, counter=counter, arch=arch, log=told)
        shown, text = compare.table(tree), comparison_markdown(tree)
        whole = html and page.comparison_page(tree)
    if html and whole:
        content = whole.encode(errors="replace")  # names of files need not be text
        streams.write(content, html)
        note(f"wrote {len(content):,} bytes to {'stdout' if html == '-' else html}", quiet)
    if json:
        common.write_json(tree)
    elif markdown:
        typer.echo(text, nl=False)
    elif html is None:
        common.show(shown)


def _epochs(path: Path) -> list[dict[str, Any]]:
    """The epochs that training wrote. Raises CompactError if it cannot be read or is none of that."""
    from ..history import loads

    try:
        return loads(path.read_text(encoding="utf-8", errors="replace"), path.name)
    except OSError as problem:
        raise CompactError(f"{path.name}: {(problem.strerror or str(problem)).lower()}") from None


def _datasets(networks: "Sequence[Network]", spec: str | None, **wishes: Any) -> "list[Dataset | None]":
    """The images of --data for each network, decoded once for those that take them alike."""
    known: dict[Any, Dataset | None] = {}
    recipes = [each.recipe for each in networks]
    keys = [(each.input_shape, each.preprocessing.resize, each.preprocessing.interpolation, each.classes) for each in recipes]
    for key, network in zip(keys, networks, strict=True):
        if key not in known:
            known[key] = open_data(network, spec, **wishes)
    return [known[key] for key in keys]
