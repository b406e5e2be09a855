"""What the commands that train share: their flags, and where an interrupted run is kept."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import streams
from ..errors import CompactError, UsageError
from .common import check_own, note

if TYPE_CHECKING:
    from ..artefact import Network
    from ..history import EpochRecord

LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate. [default: 0.05 for sgd, 0.001 for adamw]")]
WeightDecay = Annotated[float, typer.Option(min=0.0, help="Weight decay, on every parameter.")]
Optimizer = Annotated[str, typer.Option(metavar="sgd|adamw", help="Optimizer; sgd has Nesterov momentum 0.9.")]
Schedule = Annotated[str, typer.Option(metavar="cosine|milestones|constant", help="Learning rate over time, after a warm-up.")]
DistillWeight = Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the teacher in the loss.")]
Temperature = Annotated[float, typer.Option(help="Softmax temperature of the distillation.")]
Keep = Annotated[str, typer.Option(metavar="best|last", help="Which epoch's weights: the best on images held out, or the last.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that was interrupted, to the same result.")]
State = Annotated[Path | None, typer.Option(metavar="FILE", help="Where the run is kept. [default: OUTPUT.resume.safetensors]")]
SaveEvery = Annotated[int, typer.Option(metavar="STEPS", help="Write --state that often, and after each epoch.")]
TimeLimit = Annotated[float | None, typer.Option(metavar="SECONDS", help="End after that long; --resume goes on.")]
History = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a JSON line per epoch.")]
Workers = Annotated[
    int | None,
    typer.Option(min=0, help="Threads that decode ahead; 0: decode all first. [default: 2 where they do not fit in memory]"),
]
CudaGraphs = Annotated[
    bool,
    typer.Option(
        "--cuda-graphs", help="Record a training step once and replay it on a GPU. Not for networks that choose on the CPU."
    ),
]
Precision = Annotated[
    str, typer.Option(metavar="auto|float32|bfloat16", help="auto: bfloat16 where the hardware computes in it.")
]


FLAGS = (
    *("resume", "state", "history", "time_limit", "lr", "teacher", "weight_decay", "optimizer", "schedule", "distill_weight"),
    *("temperature", "keep", "save_every", "workers", "precision", "cuda_graphs", "batch_size"),
)  # that change nothing where there is no training


def check_idle(context: typer.Context) -> None:
    """Raise UsageError if one of FLAGS is given to a command that does not train; the teacher may be none."""
    for name in FLAGS:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and context.params[name] != "none":
            raise UsageError(f"--{name.replace('_', '-')}: it is for training; give --epochs or --finetune-epochs as well")


def check_keep(keep: str) -> None:
    """Raise UsageError for a word that --keep does not know."""
    if keep not in ("best", "last"):
        raise UsageError(f"--keep {keep}: it is best or last")


def check_history(history: Path | None, others: Sequence[str | Path | None]) -> None:
    """Raise CompactError if --history cannot be written; UsageError if it is one of the command's other files."""
    if history is not None:
        streams.check_folder(str(history))
        check_own("--history", history, others)


def teacher(network: "Network", wanted: str | None, arch: str | None, trust_pickle: bool) -> "Network | None":
    """The network to learn from: the file given, or the network as it is before it is compressed."""
    from ..artefact import open_beside

    if wanted == "none":
        return None
    if wanted is None:
        return network.copied()  # training lays it out anew
    return open_beside(wanted, network, arch, trust_pickle=trust_pickle)


def left_run(model: str | None, output: str | None, state: Path | None) -> Path | None:
    """What an interrupted run left, where no model is given, not through stdin either, and it is there."""
    kept = state or (None if output in (None, "-") else _beside(str(output)))
    if model is not None or kept is None or not kept.exists():
        return None
    return None if streams.piped() else kept


def run_file(
    destination: str, state: Path | None, others: Sequence[str | Path | None], *, resume: bool, quiet: bool
) -> Path | None:
    """Where the run is kept; None where there is no place, for the model goes to stdout.

    Raises UsageError if it is one of the other files, or nowhere though it is asked for; CompactError if it cannot be written.
    """
    kept = state or (None if destination == "-" else _beside(destination))
    if kept is None:
        if resume:
            raise UsageError("--resume: say with --state FILE where the run is kept; the model goes to stdout")
        return None
    check_own("--state", kept, others)
    streams.check_folder(str(kept))
    if kept.exists():
        from .. import resume as file

        file.check(kept)  # never replace what is none of ours
    if kept.exists() != resume:
        note(
            f"{kept.name}: " + ("not there; beginning anew" if resume else "replaced; --resume would have gone on with it"), quiet
        )
    return kept


def write(network: "Network", destination: str, kept: Path | None, *, quiet: bool, unfinished: bool = False) -> None:
    """Write the network and remove the run's file, unless there is more to go on with; in the main process alone.

    There is where the time was up within a run, or as `unfinished` before another.
    """
    from .. import artefact, distributed, resume

    if not distributed.is_main():
        return
    size = artefact.save(network, destination)
    note(f"wrote {size:,} bytes to {'stdout' if destination == '-' else destination}", quiet)
    if Path(destination).suffix.lower() in streams.ENDINGS - {".safetensors"}:
        note(f"{destination}: safetensors, whatever its name says; compactcli.load reads it, torch.load does not", quiet)
    if kept is not None and not unfinished and not resume.steps_left(kept):
        kept.unlink(missing_ok=True)


def _beside(destination: str) -> Path:
    """Where the run is kept that makes that file."""
    return Path(f"{destination.removesuffix('.safetensors')}.resume.safetensors")


def history_writer(
    path: Path | None, stage: str | None = None, *, after: str | None = None
) -> "Callable[[Sequence[EpochRecord]], None]":
    """What writes a JSON line per epoch, of that stage of a command that has several, behind the lines that there are of the
    stage `after`. The file is whole at any moment; a pipe is given each line once.
    """
    told = {} if stage is None else {"stage": stage}
    before = []
    if path is not None and path.is_file() and after is not None:
        try:
            before = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line).get("stage") == after]
        except (ValueError, AttributeError):
            raise CompactError(f"--history {path}: that is no history of this command; give it a file of its own") from None

    pipe = streams.opened(str(path)) if path is not None and streams.passes_on(path) else None  # to the end: one stream
    given = 0

    def write(records: "Sequence[EpochRecord]") -> None:
        nonlocal given
        lines = [*before, *(json.dumps(told | asdict(record)) + "\n" for record in records)]
        if pipe is not None:
            streams.give("".join(lines[given:]).encode(), pipe, str(path))
        elif path is not None:
            streams.write("".join(lines).encode(), str(path))
        given = len(lines)

    return write
