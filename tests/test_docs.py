"""The documents say what the code does: every command's --help, and the file."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from test_chaining import made

from compactcli import folding, methods, plain, recipe
from compactcli.artefact import open_model
from compactcli.methods._slices import name_of
from compactcli.recipe import Recipe, Replace, Share
from compactcli.surgery import LAYERS

DOCS = Path(__file__).parents[1] / "docs"
FORMAT = (DOCS / "format.md").read_text()


def example() -> dict[str, object]:
    return json.loads(re.search(r"```json\n(.*?)```", FORMAT, re.DOTALL)[1])


def rows(heading: str) -> dict[str, list[str]]:
    """The table under that heading: first cell, and the names that the others hold."""
    lines = FORMAT.split(f"| {heading} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    cells = [re.split(r"\s*\|\s*", line)[1:-1] for line in lines]
    return {first.strip("`"): [re.findall(r"`([^`]+)`", cell) for cell in others] for first, *others in cells}


def test_the_command_line_is_documented():
    spec = importlib.util.spec_from_file_location("make_docs", DOCS / "make.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert (DOCS / "cli.md").read_text() == maker.command_line(), "run `make docs`"


def test_the_recipe_of_the_document_is_one_and_shows_every_key():
    assert json.loads(Recipe.loads(json.dumps(example())).dumps()) == example()
    assert rows("key").keys() == example().keys()


def test_a_generator_of_the_document_has_the_name_that_layers_look_for():
    shares = [edit for edit in Recipe.loads(json.dumps(example())).edits if isinstance(edit, Share)]
    assert shares
    assert {edit.name for edit in shares} == {name_of((edit.options["height"], edit.options["width"])) for edit in shares}


def test_every_kind_of_edit_is_documented_with_its_keys():
    documented = {kind: set(cells[0]) for kind, cells in rows("kind").items()}
    assert documented == {kind: set(readers) for kind, readers in recipe._READERS.items()}


def test_every_kind_of_layer_is_documented():
    adding = [plain, folding, *(methods.get(name) for name in methods.names())]
    owners = {
        each.__module__.rpartition(".")[2] if isinstance(each, type) else each.__name__.rpartition(".")[2] for each in adding
    }
    assert rows("layer").keys() == {kind for kind in LAYERS if kind.partition(".")[0] in owners}


@pytest.mark.parametrize("names", [*[(name,) for name in methods.names()], ("csg", "hinge")])
def test_options_and_tensors_of_layers_are_the_documented_ones(names):
    documented, network = rows("layer"), open_model(made(*names))
    state, found = network.module.state_dict(), [e for e in network.recipe.edits if isinstance(e, Replace | Share)]
    assert found or names[-1] in ("fcf", "hinge")  # which may leave all layers plain
    gone = {edit.module for edit in network.recipe.steps[-1].edits if isinstance(edit, Replace)} if len(names) > 1 else set()
    for edit in found:
        options, tensors, _ = documented[edit.layer]
        assert set(edit.options) <= set(options)
        place = f"compactcli_shared.{edit.name}" if isinstance(edit, Share) else edit.module
        if place not in gone:
            assert {name.removeprefix(f"{place}.") for name in state if name.startswith(f"{place}.")} <= set(tensors)
