"""The command that makes a step of a history again, as far as the file tells it."""

import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from . import methods
from .optim import Settings

# The options of a step that are flags of its command, in the order in which they are written.
FLAGS = {
    "compress": ("ratio", "of", "round"),
    "finetune": ("epochs", "lr", "optimizer", "schedule", "batch_size", "teacher", "distill_weight", "keep", "seed"),
    "export": ("dtype", "fold_bn"),
}
DEFAULTS = {field.name: field.default for field in fields(Settings) if field.name != "epochs"} | {"keep": "best"}


def command_line(step: Mapping[str, Any]) -> str:
    """The line to paste, without the files and the data; of a step that no command makes (`open`) what it was.

    Options are in it where they are not the default.
    """
    name, options = step["command"], step["options"]
    if name not in FLAGS:
        return " ".join(filter(None, (name, step["method"])))
    words = ["compactcli", name, *(() if step["method"] is None else ("--method", step["method"]))]
    kind = methods.get(step["method"]) if step["method"] in methods.names() else None
    plain = DEFAULTS if kind is None else {"of": kind.of[0]}
    for option in FLAGS[name]:
        if options.get(option) not in (None, plain.get(option)):
            words += [f"--{option.replace('_', '-')}", *([] if options[option] is True else [_word(options[option])])]
    if isinstance(options.get("search"), Mapping):
        words += ["--epochs", _word(options["search"].get("epochs"))]
    for known in () if kind is None else methods.option_list(kind):
        if options.get(known.name, known.default) != known.default:
            words += ["--set", f"{known.name}={_word(options[known.name])}"]
    return shlex.join(words)


def _word(value: object) -> str:
    """A value as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
