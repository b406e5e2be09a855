"""The published schemas are those of the documents: every command's output is valid, and nothing unknown or missing is."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from networks import named
from test_cli import run

import compactcli
from compactcli import report
from compactcli.artefact import open_model
from compactcli.page import document

PACKAGE = Path(compactcli.__file__).parent
SCHEMAS = {path.stem.removesuffix("-1"): json.loads(path.read_text()) for path in sorted(PACKAGE.glob("schemas/*.json"))}
EPOCH = {"stage": None, "epoch": 0, "loss": None, "accuracy": 50.0, "validation_loss": 1.5, "lr": 0.1}


def printed(*arguments: str | Path) -> dict[str, Any]:
    """What a command prints with --json."""
    result = run(*arguments, "--json", "-q")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """Schema -> documents of it, of networks with and without history, baseline, data and kernels that are made."""
    folder = tmp_path_factory.mktemp("documents")
    net, small, coded = (folder / name for name in ("net.pt", "small.safetensors", "coded.safetensors"))
    torch.save(named("cifar:resnet8", width=8, in_channels=1).state_dict(), net)
    judged = ("--data", "digits", "--limit", "20")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "LATENCY_SECONDS", 0.01)
        assert run("compress", net, "--method", "hinge", "--ratio", "0.6", "--set", "mode=decompose", "-o", small).exit_code == 0
        assert run("compress", net, "--method", "csg", "--ratio", "0.5", "-o", coded).exit_code == 0
        beside = printed("report", small, "--baseline", net, *judged, "--counter", "hinge")
        pages = [document(beside, open_model(small), open_model(net), [EPOCH | {"images_per_second": 9.5, "seconds": 1.0}])]
        pages.append(document(printed("report", net), open_model(net), None, None))
        return {
            "report": [printed("report", net), beside, printed("report", coded)],
            "comparison": [printed("report", net, small, *judged), printed("report", net, coded, "--baseline", net)],
            "analysis": [
                printed("analyze", small),
                printed("analyze", "--arch", "cifar:resnet8", "--fresh", "--linear"),
                printed("analyze", net, *judged, "--time", "--methods", "--ratios", "0.6"),
            ],
            "explanation": [printed("analyze", net, "--explain", "linear"), printed("analyze", net, "--explain", "conv1")],
            "evaluation": [printed("evaluate", small, *judged)],
            "bench": [printed("bench", net, small)],
            "sweep": [
                printed("sweep", net, "--methods", "hinge", "--ratios", "0.6,0.0001", *judged),
                printed("sweep", net, "--methods", "hinge", "--ratios", "0.6"),
            ],
            "page": pages,
            "plan": [
                printed("compress", net, "--method", method, "--ratio", "0.6", "--dry-run") for method in ("hinge", "linearconv")
            ],
        }


def objects(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where objects are whose keys a schema names, of each list in the first element."""
    if isinstance(tree, dict) and (not path or path[-1] not in ("options", "training")):
        yield path
        for key, value in tree.items():
            yield from objects(value, (*path, key))
    elif isinstance(tree, list) and tree:
        yield from objects(tree[0], (*path, 0))


def at(tree: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema in a schema."""
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from parts(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from parts(value)


def test_every_document_has_its_schema():
    sources = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    assert set(re.findall(r'"compactcli/([a-z]+)/1"', sources)) == set(SCHEMAS)
    for name, schema in SCHEMAS.items():
        assert schema["properties"]["schema"] == {"const": f"compactcli/{name}/1"}
        assert schema["$id"] == f"urn:compactcli:{name}:1"


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_one_and_names_every_key(name):
    schema = SCHEMAS[name]
    Draft202012Validator.check_schema(schema)
    closed = [part for part in parts(schema) if "properties" in part and part.get("type") == "object"]
    assert closed
    for part in closed:
        assert part["additionalProperties"] is False
        assert set(part["properties"]) - set(part["required"]) <= {"counter"}
    used = set(re.findall(r'"#/\$defs/([a-z_]+)"', json.dumps(schema)))
    assert used == set(schema["$defs"])


def test_what_schemas_share_is_the_same():
    known: dict[str, Any] = {}
    for name, schema in SCHEMAS.items():
        for part in ("evaluated", "model", "options", "step", "layer_shape", "changed_layer", "ratios", "counter"):
            if part in schema["$defs"]:
                assert known.setdefault(part, schema["$defs"][part]) == schema["$defs"][part], (name, part)


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_commands_print_is_valid(documents, name):
    validator = Draft202012Validator(SCHEMAS[name])
    for tree in documents[name]:
        assert [error.message for error in validator.iter_errors(tree)] == []


@pytest.mark.parametrize("name", SCHEMAS)
def test_unknown_and_missing_keys_are_refused(documents, name):
    validator = Draft202012Validator(SCHEMAS[name])
    for tree in documents[name]:
        for path in objects(tree):
            changed = copy.deepcopy(tree)
            at(changed, path)["unknown"] = 1
            assert not validator.is_valid(changed), path
            for key in set(at(tree, path)) - {"counter"}:
                changed = copy.deepcopy(tree)
                del at(changed, path)[key]
                assert not validator.is_valid(changed), (path, key)


def test_documents_show_what_may_be_null_with_a_value(documents):
    """A key that is null in all of them would be held to nothing."""
    seen = {key for trees in documents.values() for tree in trees for key in filled(tree)}
    keys = {key for schema in SCHEMAS.values() for part in parts(schema) for key in part.get("properties", ())}
    assert keys - seen <= {"peak_memory_bytes", "training", "stage"}  # on CUDA, with epochs, of a search


def filled(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            if value is not None:
                yield key
            yield from filled(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from filled(value)
