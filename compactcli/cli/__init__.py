"""The command line. Each command parses, calls the library, writes; `--help` never imports torch."""

import signal
import sys
from typing import Annotated

import typer

from .. import __version__
from . import analyze, bench, compress, evaluate, export, finetune, methods, report, sweep

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
    """Run the command line; a reader that closes the pipe ends it quietly."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
