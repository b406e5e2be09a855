"""What the commands share: their flags, how errors are shown, how a model is opened."""

import contextlib
import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer

from .. import streams
from ..errors import CompactError, UsageError, brief, printable
from ..recipe import DTYPES

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..artefact import Network
    from ..data import Dataset

P = ParamSpec("P")
R = TypeVar("R")


def _seed(given: int) -> int:
    if not 0 <= given < 2**63:
        raise typer.BadParameter("a seed is from 0 to 2^63 - 1")
    return given


Model = Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Checkpoint file or folder; - or nothing reads stdin.")]
Output = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        help="Where to write the model. [default: stdout into a pipe; in a terminal a file named after the model]",
    ),
]
Arch = Annotated[str | None, typer.Option(help="Architecture: a torchvision name, cifar:NAME, timm:NAME, file.py:factory.")]
ArchKwargs = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="Argument of the architecture; may be repeated.")
]
InputShape = Annotated[str | None, typer.Option(metavar="CxHxW", help="Input shape, e.g. 3x32x32. [default: the architecture's]")]
Mean = Annotated[str | None, typer.Option(metavar="A,B,C", help="Channel means of the input, of pixels from 0 to 1.")]
Std = Annotated[str | None, typer.Option(metavar="A,B,C", help="Channel standard deviations of the input.")]
TrustPickle = Annotated[bool, typer.Option("--trust-pickle", help="Unpickle the file, which runs whatever code it holds.")]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="D",
        help="Images: digits, cifar10, cifar100, mnist, fashionmnist, svhn, a folder, or module:function.",
        envvar="COMPACTCLI_DATA",
    ),
]
DataDir = Annotated[Path | None, typer.Option(help="Folder of the named datasets.", envvar="COMPACTCLI_DATA_DIR")]
Download = Annotated[
    bool, typer.Option("--download", help="Download the named dataset if it is missing.", envvar="COMPACTCLI_DOWNLOAD")
]
SkipCorrupt = Annotated[
    bool,
    typer.Option("--skip-corrupt", help="Leave out files of a folder that are no images.", envvar="COMPACTCLI_SKIP_CORRUPT"),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="At most that many images of each split, evenly over the classes.", envvar="COMPACTCLI_LIMIT"),
]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Images per batch, of all processes together.", envvar="COMPACTCLI_BATCH_SIZE")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...", envvar="COMPACTCLI_DEVICE")]
Dtype = Annotated[
    str | None, typer.Option(metavar="float16|bfloat16", help="Store numbers so in the file: half the bytes. [default: float32]")
]
Seed = Annotated[int, typer.Option(help="Seed of all that is random.", envvar="COMPACTCLI_SEED", callback=_seed)]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", envvar="COMPACTCLI_JSON")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No notes on stderr.", envvar="COMPACTCLI_QUIET")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="More detail.", envvar="COMPACTCLI_VERBOSE")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", envvar="COMPACTCLI_DEBUG")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Take an untrained --arch network and read nothing.")]


# What libraries say of memory that they do not get, whatever they raise: torch of a CPU and of CUDA, C++, the loader, Python.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "failed to map segment", "can't start new thread")

LONGEST = 2_000  # characters of a line for people


def guarded(function: Callable[P, R]) -> Callable[P, R]:
    """The command with errors shown as one line on stderr; exit 1 for a bad input, 2 for bad usage, 130 interrupted."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            result = function(*args, **kwargs)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt as problem:
            note("; ".join(filter(None, ("compactcli: interrupted", str(problem)))))
            raise typer.Exit(130) from None
        except Exception as problem:
            line = _line(problem)
            if line is None or kwargs.get("debug"):
                raise
            note(f"{_who()}: {line}")
            if isinstance(problem, OSError):
                os._exit(1)  # the interpreter would try to flush stdout once more
            raise typer.Exit(problem.exit_code if isinstance(problem, CompactError) else 1) from None

    return run


def _line(problem: Exception) -> str | None:
    """What a user is told of an error; None where it is a mistake of ours."""
    if _lacks_memory(problem):
        return "out of memory; try a smaller --batch-size or --limit"
    if isinstance(problem, CompactError):
        return shown(" ".join(str(problem).split()))
    if isinstance(problem, RuntimeError) and type(problem).__name__ == "_LinAlgError":
        return f"the network's numbers are too large, or too far apart, to compute with ({brief(str(problem))})"
    if isinstance(problem, OSError):  # what the library reads and writes has its own message: stdout's has no name
        return f"{problem.filename or 'stdout'}: {(problem.strerror or str(problem)).lower()}"
    if isinstance(problem, RuntimeError) and _who() != "compactcli":
        return (str(problem).splitlines() or [""])[0]  # what another's end has cut off
    return None


def shown(line: str) -> str:
    """A line for people: at most LONGEST characters, and printable, for names may be a file's."""
    return printable(line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…")


def _lacks_memory(problem: BaseException | None) -> bool:
    """Whether an error, or the one that it was raised for, is that of an allocation."""
    while problem is not None:
        told = isinstance(problem, RuntimeError | ImportError) and any(said in str(problem) for said in OUT_OF_MEMORY)
        if told or isinstance(problem, MemoryError):
            return True
        problem = problem.__cause__ or (None if problem.__suppress_context__ else problem.__context__)
    return False


def _who() -> str:
    """Who speaks: of processes that torchrun started, which."""
    rank = os.environ.get("RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
    return "compactcli" if rank == "0" else f"compactcli, process {rank}"


def by_environment(context: typer.Context, name: str) -> bool:
    """Whether an option has its value from its environment variable, and so is no contradiction where it means nothing."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "ENVIRONMENT"


def note(line: str, quiet: bool = False) -> None:
    """A line for people, on stderr."""
    if not quiet:
        with contextlib.suppress(OSError):  # notes that find no room are no reason to end
            typer.echo(shown(line), err=True)


def show(renderable: "RenderableType", *, err: bool = False) -> None:
    """Tables, on stdout or stderr; never cut off where the output is no terminal, and words as they are."""
    from rich.console import Console

    from .screen import fitting

    stream = sys.stderr if err else sys.stdout
    console = Console(file=stream, width=None if stream.isatty() else 160, markup=False, emoji=False)
    console.print(fitting(renderable, console))


@contextlib.contextmanager
def progress_bar(quiet: bool, unit: str = "steps") -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr while the block runs; nothing where stderr is no terminal. Yields (done, total) -> None.

    It shows how many of the unit are done in a second, and the time left.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.0f} {unit}/s")

    columns = (BarColumn(), TaskProgressColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def write_json(tree: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    try:
        text = json.dumps(tree, indent=2, allow_nan=False)
    except ValueError:
        raise CompactError("a figure is not finite: the network's numbers are too large to compute with") from None
    typer.echo(text)


def open_network(
    model: str | None,
    *,
    arch: str | None,
    arch_kwargs: list[str] | None,
    input_shape: str | None,
    mean: str | None,
    std: str | None,
    trust_pickle: bool,
    quiet: bool,
    fresh: bool = False,
    seed: int = 0,
) -> "Network":
    """The network that the command's model flags name; its notes go to stderr."""
    wished_kwargs = dict(_assignment(pair) for pair in arch_kwargs or ())
    shape = parse_shape(input_shape)
    means, stds = floats_of("--mean", mean), floats_of("--std", std)
    if fresh and model is not None:
        raise UsageError("--fresh reads nothing; leave the model out")
    source = None if fresh else streams.model_source(model)

    from .. import artefact, distributed

    wishes = artefact.Wishes(arch, wished_kwargs, shape, means, stds, trust_pickle)
    content: str | bytes | None = source
    if source == "-" and distributed.world_size() > 1:  # the main process alone has a stdin
        content = distributed.shared(sys.stdin.buffer.read() if distributed.is_main() else None) or source
    network = artefact.fresh(wishes, seed) if content is None else artefact.open_model(content, wishes)
    for line in network.notes:
        note(f"{network.name}: {line}", quiet)
    return network


def open_data(
    network: "Network",
    spec: str | None,
    *,
    data_dir: Path | None,
    download: bool,
    skip_corrupt: bool,
    limit: int | None,
    seed: int,
    quiet: bool,
) -> "Dataset | None":
    """The dataset of --data, decoded for the network's input; None without the flag."""
    if spec is None:
        return None
    from .. import data, distributed, sources

    with distributed.main_first():  # it may be downloaded
        dataset = sources.open_dataset(
            spec,
            input_shape=network.input_shape,
            preprocessing=network.recipe.preprocessing,
            data_dir=data_dir,
            download=download,
            limit=limit,
            seed=seed,
            skip_corrupt=skip_corrupt,
            log=lambda line: note(line, quiet),
        )
    return data.as_named(dataset, network.recipe.classes, log=lambda line: note(line, quiet))


def check_own(flag: str, path: str | Path, others: Sequence[str | Path | None]) -> None:
    """Raise UsageError if what a command writes is one of its other files."""
    if path != "-" and Path(path).resolve() in [Path(other).resolve() for other in others if other not in (None, "-", "none")]:
        raise UsageError(f"{flag} {path}: that is another file of this command; give one of its own")


def check_dtype(dtype: str | None) -> None:
    """Raise UsageError for a word that --dtype does not know."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: it is {' or '.join(DTYPES)}")


def check_device(device: str) -> None:
    """Raise CompactError for a device that torch does not have here."""
    import torch

    try:
        torch.zeros(1, device=device).item()  # which "meta" has not
    except (RuntimeError, AssertionError, ImportError) as problem:
        reason = brief(str(problem).strip().partition("\n")[0])
        if reason.startswith("Expected one of"):  # all that torch was ever built for
            reason = "torch has no device of that name; there are cpu, cuda, cuda:0 and so on"
        raise CompactError(f"--device {device}: not to be had here ({reason}); try --device cpu") from None


_PYTHON = {"True": "true", "False": "false", "None": "null"}


def _assignment(pair: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as a number or True/False/None where it is one, as Python or JSON writes it."""
    name, equals, text = pair.partition("=")
    if not equals:
        raise UsageError(f"--arch-kwargs {pair}: give it as NAME=VALUE")
    try:
        value = json.loads(_PYTHON.get(text, text))
    except ValueError:
        return name, text
    except RecursionError:
        raise UsageError(f"--arch-kwargs {name}: nested too deeply") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"--arch-kwargs {pair}: give a finite number")
    return name, value


def parse_shape(text: str | None) -> tuple[int, int, int] | None:
    """The numbers of --input-shape; None without it. Raises UsageError if they are not three."""
    if text is None:
        return None
    parts = text.lower().replace(",", "x").split("x")
    if len(parts) != 3 or not all(re.fullmatch("[1-9][0-9]{0,8}", part) for part in parts):
        raise UsageError(f"--input-shape {text}: give it as CxHxW, e.g. 3x32x32")
    channels, height, width = map(int, parts)
    return channels, height, width


def floats_of(flag: str, text: str | None) -> tuple[float, ...] | None:
    """The numbers of a flag; None without it. Raises UsageError if they are none."""
    return None if text is None else floats(flag, text)


def floats(flag: str, text: str) -> tuple[float, ...]:
    """The numbers of a flag, up to a million. Raises UsageError if they are none."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (float("nan"),)
    if not all(-1e6 <= number <= 1e6 for number in found):
        raise UsageError(f"{flag} {text}: give it as numbers with commas, e.g. 0.5,0.5,0.5")
    return found
