"""The history's commands: each option of a step that is not the default is in the line, and is read back as it was."""

import json
import shlex
from typing import Any

import pytest
import typer

from compactcli.cli import app
from compactcli.commands import DEFAULTS, SEARCH, command_line
from compactcli.methods import get, names, parse_options
from compactcli.optim import Settings

SETTINGS: dict[str, Any] = {
    **{"epochs": 3, "lr": 0.0123456789, "weight_decay": 5e-4, "optimizer": "adamw", "schedule": "milestones"},
    **{"milestones": (0.25, 0.875), "warmup_epochs": 2.5, "batch_size": 96, "accumulate": 4, "distill_weight": 0.7},
    **{"temperature": 2.0, "label_smoothing": 0.1, "cutout": 8, "clip_grad": 1.5, "ema": 0.9999999, "batch_norm": "frozen"},
    **{"precision": "float32", "seed": 7},
}


def recorded(**changes: Any) -> dict[str, Any]:
    """Options as a step has them, read from a file."""
    return json.loads(json.dumps({**Settings(**changes).identity(), "teacher": "net.pt"}))


def read(line: str) -> dict[str, Any]:
    """What a command takes from that line, by its parameters."""
    program, name, *words = shlex.split(line)
    assert program == "compactcli"
    return typer.main.get_command(app).commands[name].make_context(name, words).params


def value(found: dict[str, Any], name: str) -> Any:
    """A setting as the command takes it."""
    if name == "batch_norm":
        return "frozen" if found["freeze_bn"] else "sync" if found["sync_bn"] else "train"
    return tuple(map(float, found[name].split(","))) if name == "milestones" else found[name]


def test_every_setting_that_is_recorded_has_a_flag():
    assert recorded().keys() - {"teacher"} == SETTINGS.keys() | {"validation_share"}  # which no command changes


@pytest.mark.parametrize("given", [SETTINGS, *({name: other} for name, other in SETTINGS.items()), {"batch_norm": "sync"}])
def test_finetune_reads_what_the_step_says(given):
    step = {"command": "finetune", "method": None, "options": recorded(**given) | {"keep": "last"}}
    found = read(command_line(step))
    assert {name: value(found, name) for name in given} == given
    others = SETTINGS.keys() - given.keys() - {"lr"}
    assert {name: value(found, name) for name in others} == {name: {"epochs": 10, **DEFAULTS}[name] for name in others}
    assert (found["teacher"], found["keep"]) == ("net.pt", "last")


def test_what_was_trained_without_a_teacher_is_so_again():
    step = {"command": "finetune", "method": None, "options": recorded() | {"teacher": None}}
    assert read(command_line(step))["teacher"] == "none"


@pytest.mark.parametrize("method", names())
def test_compress_reads_how_its_search_was_trained(method):
    given = {name: other for name, other in SETTINGS.items() if name in SEARCH}
    options = {"ratio": 0.5, "of": None, "round": 4, "images": 9, **get(method)().recorded(), "search": recorded(**given)}
    found = read(command_line({"command": "compress", "method": method, "options": options}))
    assert {name: found[name] for name in given} == given
    assert (found["method"], found["ratio"], found["round"], found["teacher"]) == (method, 0.5, "4", "net.pt")
    assert (found["limit"], found["nearest"]) == (9, False)
    assert not found["set"]


def test_compress_reads_how_it_met_its_target():
    options = {"ratio": 0.5, "of": "macs", "round": 4, "images": 1024, **get("hinge")().recorded()}
    line = command_line({"command": "compress", "method": "hinge", "options": options})
    assert (read(line)["limit"], read(line)["nearest"]) == (1024, False)
    assert "--limit" not in line
    assert read(command_line({"command": "compress", "method": "hinge", "options": options | {"nearest": True}}))["nearest"]


@pytest.mark.parametrize("pairs", [("preset=cifar", "select=error"), ("preset=imagenet", "alpha=0.99"), ("preset=cifar",)])
def test_what_a_preset_says_otherwise_is_read_as_it_was(pairs):
    kind = get("fcf")
    given = parse_options(kind, pairs)
    options = {"ratio": 0.5, "of": "macs", **kind(given).recorded()}
    line = command_line({"command": "compress", "method": "fcf", "options": options})
    assert parse_options(kind, read(line)["set"]) == given
    assert line.count("--set") == len(pairs)


def test_a_flag_at_its_default_is_left_out():
    step = {"command": "finetune", "method": None, "options": recorded() | {"keep": "best"}}
    assert command_line(step) == "compactcli finetune --epochs 10 --lr 0.05 --teacher net.pt"


@pytest.mark.parametrize("value", [5, True, "abc", None, {"a": 1}, [1, "a b"]])
def test_layers_to_leave_may_be_anything_in_a_file(value):
    line = command_line({"command": "compress", "method": "fcf", "options": {"ratio": 0.5, "leave": value}})
    assert line.endswith(" --leave 1 --leave 'a b'" if isinstance(value, list) else "--ratio 0.5")
