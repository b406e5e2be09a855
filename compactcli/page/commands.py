"""The command that makes a step of a history again, as far as the file tells it."""

import shlex
from collections.abc import Mapping
from typing import Any

from .. import methods

# The options of a step that are flags of its command, in the order in which they are written.
FLAGS = {
    "compress": ("ratio", "of", "round"),
    "finetune": ("epochs", "lr", "optimizer", "batch_size", "teacher", "distill_weight", "temperature", "keep", "seed"),
    "export": ("dtype",),
}


def command_line(step: Mapping[str, Any]) -> str | None:
    """The line to paste, without the files and the data; None for a step that no command makes (a file of a method's authors).

    Options of the method are in it where they are not the default.
    """
    name, options = step["command"], step["options"]
    if name not in FLAGS:
        return None
    words = ["compactcli", name, *(() if step["method"] is None else ("--method", step["method"]))]
    for option in FLAGS[name]:
        if options.get(option) is not None:
            words += [f"--{option.replace('_', '-')}", _word(options[option])]
    search = options.get("search")
    if isinstance(search, Mapping):
        words += ["--epochs", _word(search.get("epochs"))]
    for option, default in _defaults(step["method"]).items():
        if option in options and options[option] != default:
            words += ["--set", f"{option}={_word(options[option])}"]
    return shlex.join(words)


def _defaults(method: str | None) -> dict[str, Any]:
    """The options of a method with their defaults; none for a method that there is not here."""
    if method not in methods.names():
        return {}
    return {option.name: option.default for option in methods.option_list(methods.get(str(method)))}


def _word(value: object) -> str:
    """A value as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
