"""The command line. Each command parses, calls the library, writes; `--help` never imports torch."""

import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.core

from .. import __version__
from . import analyze, bench, common, compress, evaluate, export, finetune, methods, report, sweep

UsageProblem: Any = typer.BadParameter.__mro__[1]  # of the option parser's, which has no public name in every typer


class Commands(typer.core.TyperGroup):
    """The commands; what their flags are wrong in is one line, as every other error."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        """Parse, run and, where this is the program, exit."""
        standalone_mode = options.pop("standalone_mode", True)
        try:
            code = super().main(args, *more, **options | {"standalone_mode": False})
        except UsageProblem as problem:
            if not standalone_mode:
                raise
            _tell(problem)
            sys.exit(2)
        if standalone_mode:
            sys.exit(code or 0)
        return code


def _tell(problem: Any) -> None:
    """One line for what is wrong; the help where nothing was given."""
    if type(problem).__name__ == "NoArgsIsHelpError":
        problem.show()
        return
    message = " ".join(problem.format_message().split()).rstrip(".")
    command = problem.ctx.info_name + " " if problem.ctx is not None and problem.ctx.parent is not None else ""
    common.note(f"compactcli: {message[:1].lower()}{message[1:]}; see compactcli {command}--help")


app = typer.Typer(
    cls=Commands,
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
