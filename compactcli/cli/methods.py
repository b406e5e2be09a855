"""`compactcli methods`."""

from typing import Annotated

import typer

from .common import Debug, guarded


@guarded
def command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A method, to see its options.")] = None,
    debug: Debug = False,
) -> None:
    """List the compression methods, or the options of one.

    compactcli methods hinge
    """
    from .. import methods

    if name is None:
        for each in methods.names():
            typer.echo(f"{each:12} {methods.summary(each)}")
        return
    kind = methods.get(name)
    typer.echo(methods.summary(name))
    for option in methods.option_list(kind):
        values = "|".join(option.kind) if isinstance(option.kind, tuple) else option.kind.__name__
        typer.echo(f"  --set {option.name}={values}  {option.help} [default: {option.default}]")
