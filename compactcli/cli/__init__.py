"""The command line. Each command parses, calls the library, writes; `--help` never imports torch."""

import os
import signal
import sys
from typing import Annotated

import typer

from .. import __version__
from . import analyze, bench, common, compress, evaluate, export, finetune, methods, report, sweep

app = typer.Typer(
    help="Make pretrained CNN checkpoints smaller and faster. Models travel through pipes as safetensors.",
    add_completion=True,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="compactcli compress resnet56.pt --method hinge --ratio 0.5 | compactcli finetune --data cifar10 | compactcli report",
)
for command in (analyze, compress, finetune, report, sweep, evaluate, export, bench, methods):
    app.command(command.__name__.rpartition(".")[2])(command.command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"compactcli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; a reader that closes the pipe ends it quietly, and SIGTERM as Ctrl-C does."""
    _open_standard_streams()
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except KeyboardInterrupt:
        common.note("compactcli: interrupted")
        sys.exit(130)
    except OSError as problem:  # of stdout, before there is a command: --help
        common.note(f"compactcli: stdout: {(problem.strerror or str(problem)).lower()}")
        os._exit(1)  # the interpreter would try to flush it once more


def _open_standard_streams() -> None:
    """Open the standard streams that the caller closed (`>&-`), before other files get their numbers.

    Stdin is empty, stdout cannot be written to, and what goes to stderr goes nowhere.
    """
    for name, flags, mode in (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, flags), mode, encoding="utf-8"))  # noqa: SIM115
