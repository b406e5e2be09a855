"""The command that makes a step of a history again, as far as the file tells it."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from . import methods
from .optim import Settings
from .recipe import IMAGES

# The options of a step that are flags of its command, in the order in which they are written.
TRAINING = ("epochs", "lr", "weight_decay", "optimizer", "schedule")
FLAGS = {
    "compress": ("ratio", "of", "round", "nearest", "leave", "images"),
    "finetune": (
        *(*TRAINING, "milestones", "warmup_epochs", "batch_size", "accumulate", "teacher", "distill_weight", "temperature"),
        *("label_smoothing", "cutout", "clip_grad", "ema", "batch_norm", "keep", "precision", "seed"),
    ),
    "export": ("dtype", "fold_bn"),
}
SEARCH = (*TRAINING, "batch_size", "teacher", "distill_weight", "temperature", "precision", "seed")  # those of compress
DEFAULTS = {field.name: field.default for field in fields(Settings) if field.name != "epochs"} | {"keep": "best"}
CALLED = {"images": "limit"}  # flags that have another name than what is recorded
BATCH_NORM = {"frozen": "--freeze-bn", "sync": "--sync-bn"}


def command_line(step: Mapping[str, Any]) -> str:
    """The line to paste, without the files and the data; of a step that no command makes (`open`) what it was.

    Options are in it where they are not the default.
    """
    name, options = step["command"], step["options"]
    if name not in FLAGS:
        return " ".join(filter(None, (name, step["method"])))
    words = ["compactcli", name, *(() if step["method"] is None else ("--method", step["method"]))]
    kind = methods.get(step["method"]) if step["method"] in methods.names() else None
    words += _flags(FLAGS[name], options, DEFAULTS if kind is None else {"of": kind.of[0], "images": IMAGES})
    if isinstance(options.get("search"), Mapping):
        words += _flags(SEARCH, options["search"], DEFAULTS)
    preset = {} if kind is None else kind.presets.get(str(options.get("preset")), {})
    for known in () if kind is None else methods.option_list(kind):
        default = preset.get(known.name, known.default)
        if options.get(known.name, default) != default:
            words += ["--set", f"{known.name}={_word(options[known.name])}"]
    return shlex.join(words)


def _flags(names: Sequence[str], options: Mapping[str, Any], plain: Mapping[str, Any]) -> list[str]:
    """The options of those names that are not the default, as flags."""
    words: list[str] = []
    for name in names:
        value = options.get(name)
        flag = f"--{CALLED.get(name, name).replace('_', '-')}"
        if name == "teacher" and name in options:
            words += [flag, "none" if value is None else _word(value)]
        elif name == "leave":
            words += [word for each in (value if isinstance(value, list) else ()) for word in (flag, _word(each))]
        elif name == "batch_norm":
            words += [BATCH_NORM[value]] if isinstance(value, str) and value in BATCH_NORM else []
        elif value is not None and value is not False and _word(value) != _word(plain.get(name)):
            words += [flag, *([] if value is True else [_word(value)])]
    return words


def _word(value: object) -> str:
    """A value as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(_word, value))
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)
