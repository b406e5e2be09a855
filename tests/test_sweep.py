"""A sweep: rows are what compress alone makes, Pareto marks are what brute force finds, and no row is made twice."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import named
from test_cli import one_line, run
from test_report import MODEL
from typer.testing import Result

from compactcli import artefact, data, latency, measure, report, sources
from compactcli import compress as driver
from compactcli import sweep as sweeping
from compactcli.errors import CompactError
from compactcli.methods import get, names, parse_options
from compactcli.optim import Settings
from compactcli.sweep import COSTS, FIGURES, ROW, SCHEMA, Terms, loads, pareto, sweep

GRID = ("--methods", "linearconv,hinge", "--ratios", "0.6,0.8", "--limit", "24")
CELLS = [("hinge", 0.8), ("hinge", 0.6), ("linearconv", 0.8), ("linearconv", 0.6)]
TRAINING = ("--lr", "0.02", "--batch-size", "16")

IMAGES = """
import numpy as np
from pathlib import Path
from torch import from_numpy
HERE = Path({!r})
def load(split):
    return tuple(from_numpy(np.load(HERE / f"{{split}}-{{what}}.npy")) for what in ("images", "labels"))
def bare(split):
    return load(split)[0], None
def alone(split):
    return load(split) if split == "train" else None
"""


def timed(modules: list[torch.nn.Module], *_arguments: object, **_options: object) -> list[latency.Latency]:
    """A latency that is always the same for the same network."""
    times = [measure.params(module) / 1000 for module in modules]
    return [latency.Latency(1, 1, "contiguous", each, 0.0, 1000 / each, 5, None) for each in times]


@pytest.fixture(autouse=True)
def fixed_latency(monkeypatch):
    monkeypatch.setattr(latency, "of", timed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A network, and images that it labels itself, so that it is right of all and smaller ones of fewer."""
    folder = tmp_path_factory.mktemp("sweep")
    model = named("cifar:resnet8", width=8, in_channels=1).eval()
    torch.save(model.state_dict(), folder / "net.pt")
    (folder / "own.py").write_text(IMAGES.format(str(folder)))
    preprocessing = artefact.open_model(folder / "net.pt").recipe.preprocessing
    images = torch.randint(0, 256, (2, 64, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        inputs = data.normalise(images.flatten(0, 1), preprocessing)
        model.linear.bias -= model(inputs).mean(0)  # else it would give one class to all
        labels = model(inputs).argmax(1).view(2, 64)
    torch.save(model.state_dict(), folder / "net.pt")
    for split, own, classes in zip(("train", "test"), images, labels, strict=True):
        np.save(folder / f"{split}-images.npy", own.numpy())
        np.save(folder / f"{split}-labels.npy", classes.numpy())
    return folder


def swept(folder: Path, *flags: str | Path, images: str = "load") -> Result:
    return run("sweep", folder / "net.pt", "--data", f"{folder / 'own.py'}:{images}", *GRID, *flags)


@pytest.fixture(scope="module")
def unbroken(folder) -> dict[str, Any]:
    """The document of a sweep that nothing came between."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "of", timed)
        result = swept(folder, "-q", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


@pytest.fixture
def made(monkeypatch) -> list[tuple[str, float]]:
    """(method, ratio) of every compression from now on."""
    return counted(monkeypatch, lambda number: None)


def counted(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> list[tuple[str, float]]:
    """The compressions from now on, after each of which there is something to do before the next, by its number."""
    found: list[tuple[str, float]] = []

    def compress(network: artefact.Network, name: str, method: Any, target: driver.Target, **means: Any) -> artefact.Network:
        before(len(found))
        found.append((name, target.ratio))
        return driver.compress(network, name, method, target, **means)

    monkeypatch.setattr(sweeping, "compress", compress)
    return found


def timeless(tree: dict[str, Any]) -> dict[str, Any]:
    """A document without what the clock says."""
    return tree | {"rows": [{**row, "seconds": None} for row in tree["rows"]]}


def cells(tree: dict[str, Any]) -> list[tuple[str, float]]:
    return [(row["method"], row["ratio"]) for row in tree["rows"]]


# What a row is


def test_the_document(unbroken, folder):
    assert (unbroken["schema"], set(unbroken)) == (SCHEMA, {"schema", "model", "settings", "rows"})
    assert set(unbroken["model"]) == MODEL
    assert all(row.keys() == ROW for row in unbroken["rows"])
    assert cells(unbroken) == [(None, None), *CELLS]
    settings = unbroken["settings"]
    assert (settings["methods"], settings["ratios"]) == (["hinge", "linearconv"], [0.8, 0.6])
    assert (settings["data"], settings["images"], settings["training"]) == ("own.py:load", 24, None)
    first = unbroken["rows"][0]
    assert all(first[key] == unbroken["model"][key] for key in ("params", "macs", "latency_ms", "accuracy"))
    assert (first["error"], first["latency_ratio"]) == (0.0, 1.0)
    assert first["size_bytes"] == len(artefact.dumps(artefact.open_model(folder / "net.pt")))
    assert loads(json.dumps(unbroken), "it") == unbroken


@pytest.mark.parametrize(("method", "ratio"), CELLS[1:3])
def test_a_row_is_what_compress_alone_gives(unbroken, folder, tmp_path, method, ratio):
    own = f"{folder / 'own.py'}:load"
    path = tmp_path / "small.safetensors"
    run("compress", folder / "net.pt", "--method", method, "--ratio", str(ratio), "--data", own, "--limit", "24", "-o", path)
    network = artefact.open_model(path)
    tree = json.loads(run("evaluate", "--json", path, "--data", own).stdout)
    row = next(row for row in unbroken["rows"] if (row["method"], row["ratio"]) == (method, ratio))
    assert row["accuracy"] == tree["accuracy"]
    assert row["size_bytes"] == path.stat().st_size
    assert all(row[key] == tree["model"][key] for key in ("params", "params_materialised", "macs", "macs_synthesis"))
    (step,) = network.recipe.steps
    assert (row["error"], row["of"]) == (step.error, step.options["of"])
    assert row["options"].items() <= step.options.items()
    assert row["latency_ratio"] == pytest.approx(row["params_materialised"] / unbroken["rows"][0]["params"])


def test_accuracies_differ(unbroken):
    """Else the laws here would say little."""
    assert len({row["accuracy"] for row in unbroken["rows"]}) > 2


def test_a_trained_row_is_what_compress_alone_gives(folder, tmp_path, monkeypatch):
    """The original is evaluated once, by whatever many rows it teaches."""
    evaluated: list[str | None] = []
    evaluate = report.evaluate

    def noted(network: artefact.Network, *arguments: Any, **options: Any) -> report.Evaluated:
        evaluated.append(network.recipe.steps[0].method if network.recipe.steps else None)
        return evaluate(network, *arguments, **options)

    monkeypatch.setattr(report, "evaluate", noted)
    rows = json.loads(swept(folder, *TRAINING, "--epochs", "1", "--ratios", "0.8", "--json").stdout)["rows"]
    assert evaluated == [None, "hinge", "linearconv"]
    monkeypatch.setattr(report, "evaluate", evaluate)
    path = tmp_path / "small.safetensors"
    flags = ("--limit", "24", "--data", f"{folder / 'own.py'}:load", "--finetune-epochs", "1", *TRAINING, "-o", path)
    assert run("compress", folder / "net.pt", "--method", "linearconv", "--ratio", "0.8", *flags).exit_code == 0
    steps = artefact.open_model(path).recipe.steps
    assert rows[2]["accuracy"] == steps[1].measures.accuracy
    assert (rows[2]["error"], rows[2]["size_bytes"]) == (steps[0].error, path.stat().st_size)


def test_what_cannot_be_reached_is_a_row(folder):
    result = run("sweep", folder / "net.pt", "--methods", "linearconv", "--ratios", "0.8,0.001", "--json")
    assert result.exit_code == 0
    first, made, row = json.loads(result.stdout)["rows"]
    assert (row["method"], row["ratio"], row["pareto"]) == ("linearconv", 0.001, [])
    assert row["reason"].startswith("--ratio 0.001 of params is out of reach: ")
    assert all(row[key] is None for key in FIGURES)
    assert (first["reason"], made["reason"], made["accuracy"]) == (None, None, None)
    assert (first["pareto"], made["pareto"]) == ([*COSTS], ["params"])  # by the output error; it computes the same
    assert "out of reach" in " ".join(result.stderr.split())


def test_nothing_of_the_original_is_changed(folder):
    network = artefact.open_model(folder / "net.pt")
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    recipe, content = network.recipe, (folder / "net.pt").read_bytes()
    found = sources.open_dataset(f"{folder / 'own.py'}:load", input_shape=network.input_shape, preprocessing=recipe.preprocessing)
    terms = Terms(None, found, Settings(epochs=1, batch_size=16), artefact.open_model(folder / "net.pt"))
    sweep(network, {"hinge": None}, [0.7], terms)
    after = network.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.is_contiguous() and parameter.grad is None for parameter in network.module.parameters())
    assert (network.recipe, (folder / "net.pt").read_bytes()) == (recipe, content)


# Pareto

COUNTS = st.integers(1, 4)
ROWS = st.lists(st.tuples(COUNTS, COUNTS, COUNTS, COUNTS, st.booleans()), min_size=1, max_size=8)


@given(ROWS, st.booleans())
def test_the_marks_are_those_of_brute_force(given_rows, labelled):
    """Dominance by its definition: no worse in both, and better in one."""
    rows = [
        {**dict(zip(COSTS.values(), (p, m, t), strict=True)), "reason": "none" if failed else None}
        | {"accuracy": float(good) if labelled and not failed else None, "error": None if failed else 1 / good}
        for p, m, t, good, failed in given_rows
    ]
    for number, (row, marks) in enumerate(zip(rows, pareto(rows), strict=True)):
        wanted = []
        for place, name in enumerate(COSTS):
            cost, good = given_rows[number][place], given_rows[number][3]
            rivals = [(each[place], each[3]) for each in given_rows if not each[4]]
            less = any(c < cost and g >= good for c, g in rivals)
            better = any(c == cost and g > good for c, g in rivals)
            if row["reason"] is None and not less and not better:
                wanted.append(name)
        assert marks == wanted


# To go on


def test_an_interrupted_sweep_goes_on_to_the_same_document(unbroken, folder, tmp_path, monkeypatch):
    """Stopped before each row in turn; every row is made once, and the original evaluated once."""
    path = tmp_path / "sweep.json"
    originals = []
    measured = report.measured
    monkeypatch.setattr(report, "measured", lambda *arguments: originals.append(1) or measured(*arguments))

    def stop(number: int) -> None:
        if number == allowed:
            raise KeyboardInterrupt

    every = []
    for done in range(len(CELLS)):
        allowed = min(done, 1)
        found = counted(monkeypatch, stop)
        result = swept(folder, "-q", "-o", path, *(["--resume"] if done else []))
        assert one_line(result, 130) == "compactcli: interrupted; --resume goes on from there"
        every += found
        tree = loads(path.read_text(), "it")
        assert cells(tree) == [(None, None), *CELLS[:done]]
        assert [row["pareto"] for row in tree["rows"]] == pareto(tree["rows"])
    allowed = -1
    found = counted(monkeypatch, stop)
    assert swept(folder, "-q", "-o", path, "--resume").exit_code == 0
    assert every + found == CELLS
    assert timeless(json.loads(path.read_text())) == timeless(unbroken)
    assert len(originals) == 1
    assert os.listdir(tmp_path) == ["sweep.json"]


@pytest.mark.parametrize(
    ("flags", "again"),
    [
        ((), []),
        (("--set", "linearconv.share=0.9"), CELLS[2:]),
        (("--ratios", "0.8,0.7"), [("hinge", 0.7), ("linearconv", 0.7)]),
        (("--seed", "1"), CELLS),
        (("--limit", "20"), CELLS),
        (("--epochs", "1", "--batch-size", "16"), CELLS),
        (("--mean", "0.4"), CELLS),
    ],
    ids=str,
)
def test_what_was_made_otherwise_is_made_again(unbroken, folder, tmp_path, monkeypatch, flags, again):
    """A row is kept where all that makes it is the same, and only there."""
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(unbroken))
    found = counted(monkeypatch, lambda number: None)

    def refused(network: artefact.Network, *_arguments: object, **_options: object) -> None:
        raise CompactError("not now")

    monkeypatch.setattr(driver, "compress", refused)  # which rows are made is what counts here
    assert swept(folder, "-q", "-o", path, "--resume", *flags).exit_code == 0
    assert found == again
    tree = json.loads(path.read_text())
    assert [row for row in tree["rows"][1:] if row["reason"] is None] == [
        row | {"pareto": own["pareto"]}
        for own in tree["rows"]
        for row in unbroken["rows"][1:]
        if (row["identity"], own["reason"]) == (own["identity"], None)
    ]
    assert [(row["method"], row["ratio"]) for row in tree["rows"] if row["reason"]] == again


@pytest.mark.parametrize("flags", [("--ratios", "0.8"), ("--methods", "hinge"), ("--methods", "csg", "--ratios", "0.9")], ids=str)
def test_rows_that_are_not_asked_for_now_stay(unbroken, folder, tmp_path, monkeypatch, flags):
    """They took as long as others, and are of the same network, images and settings."""
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(unbroken))
    found = counted(monkeypatch, lambda number: None)
    result = swept(folder, "-o", path, "--resume", *flags)
    assert result.exit_code == 0, result.stderr
    added = [("csg", 0.9)] if "csg" in flags else []
    assert found == added
    assert "of them not asked for now" in result.stderr
    tree = json.loads(path.read_text())
    assert cells(tree) == [(None, None), *sorted([*CELLS, *added], key=lambda cell: (cell[0], -cell[1]))]
    assert tree["settings"]["methods"] == sorted({name for name, _ in cells(tree)[1:]})
    kept = {row["identity"]: row for row in tree["rows"]}
    assert all(kept[row["identity"]] == row | {"pareto": kept[row["identity"]]["pareto"]} for row in unbroken["rows"])


def test_a_hostile_document_keeps_no_rows_of_its_own(unbroken, folder, tmp_path):
    path = tmp_path / "sweep.json"
    rows = [
        row | {"options": value} for row, value in zip(unbroken["rows"], (None, 5, {"mode": 3}, ["a"], {"x": 1}), strict=False)
    ]
    path.write_text(json.dumps(unbroken | {"rows": rows}))
    assert swept(folder, "-q", "-o", path, "--resume", "--ratios", "0.8").exit_code == 0


@pytest.mark.parametrize(
    "what", ["weights", "version", "images", "other images", "other labels", "calibration", "teacher", "device", "file"]
)
def test_what_another_thing_made_is_not_kept(folder, monkeypatch, tmp_path, what):
    network = artefact.open_model(folder / "net.pt")
    shape, preprocessing = network.input_shape, network.recipe.preprocessing
    own = sources.open_dataset(f"{folder / 'own.py'}:load", input_shape=shape, preprocessing=preprocessing)
    calibration = driver.Calibration(data.sample(own.train, 8, 0), own.name)
    (tmp_path / "gen.safetensors").write_bytes(b"one")
    cell = sweeping.Cell("csg", parse_options(get("csg"), [f"generator={tmp_path / 'gen.safetensors'}"]), 0.5)
    terms = Terms(calibration, own, Settings(epochs=1), artefact.open_model(folder / "net.pt"))
    before = sweeping._identity(network, cell, terms)
    assert sweeping._identity(artefact.open_model(folder / "net.pt"), cell, terms) == before
    if what == "weights":
        network.sha256 = "0" * 64
    elif what == "version":
        monkeypatch.setattr(sweeping, "__version__", "9.9")
    elif what == "images":
        terms = replace(terms, dataset=replace(own, test=own.test.subset(torch.arange(9))))
    elif what == "other images":  # as many, of the same name
        terms = replace(terms, dataset=replace(own, test=replace(own.test, read=lambda index: 255 - own.test.read(index))))
    elif what == "other labels":
        terms = replace(terms, dataset=replace(own, train=replace(own.train, labels=own.train.labels.flip(0))))
    elif what == "device":  # `auto` is another precision there
        terms = replace(terms, settings=replace(terms.settings, device="cuda"))
    elif what == "file":
        (tmp_path / "gen.safetensors").write_bytes(b"two")
    elif what == "calibration":
        terms = replace(terms, calibration=replace(calibration, images=255 - calibration.images))
    else:
        terms = replace(terms, teacher=replace(terms.teacher, sha256="0" * 64))
    assert sweeping._identity(network, cell, terms) != before


def test_without_resume_a_file_is_replaced(unbroken, folder, tmp_path, made):
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(unbroken))
    result = swept(folder, "--methods", "hinge", "--ratios", "0.8", "-o", path, "-v")
    assert (result.exit_code, result.stdout_bytes, made) == (0, b"", CELLS[:1])
    assert cells(json.loads(path.read_text())) == [(None, None), *CELLS[:1]]
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("hinge 0.8: ")]
    assert line.startswith("hinge 0.8: accuracy ")
    assert re.search(r"^hinge: output error \S+ on 24 images of own.py:load$", result.stderr, re.MULTILINE)  # more with -v


def test_resume_takes_only_what_a_sweep_wrote(unbroken, folder, tmp_path):
    path = tmp_path / "sweep.json"
    broken = unbroken | {"rows": [{"identity": "0"}]}
    changes = [{"accuracy": "x"}, {"identity": ["a"]}, {"macs": None}, {"error": float("nan")}, {"method": 1}, {"of": []}]
    changes += [{"params": 10**400}, {"ratio": None}, {"latency_ms": True}, {"reason": {}}]
    rows = [json.dumps(unbroken | {"rows": [unbroken["rows"][0], unbroken["rows"][1] | change]}) for change in changes]
    models = [json.dumps(unbroken | {"model": model}) for model in ({}, {"arch": "a", "input_shape": 3}, None)]
    empty = json.dumps({"schema": SCHEMA, "rows": []})
    for content in ("{", "[]", "{}", json.dumps(broken), "\0", empty, *rows, *models):
        path.write_text(content)
        line = one_line(swept(folder, "-q", "-o", path, "--resume"))
        assert line == "compactcli: sweep.json is not what a sweep wrote; leave --resume out to begin one"
        assert path.read_text() == content


# The command


def test_stdout_has_the_document_alone_and_the_table_is_beside(unbroken, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sweep.json").write_text(json.dumps(unbroken))
    beside = swept(folder, "-o", "sweep.json", "--resume", "--json")
    assert json.loads(beside.stdout) == unbroken == json.loads(Path("sweep.json").read_text())
    assert "kept 4 of 4 rows" in beside.stderr
    assert "hinge: " not in beside.stderr
    alone = swept(folder, "-o", "sweep.json", "--resume")
    assert alone.stdout_bytes == b""
    assert os.listdir() == ["sweep.json"]
    table = alone.stderr
    assert [line.split()[1] for line in table.splitlines() if "│" in line] == ["original", *(name for name, _ in CELLS)]
    smallest = min(row["params"] for row in unbroken["rows"])
    assert f"{smallest:,} *" in table
    assert table.count("*:") == 1
    for line, row in zip((line for line in table.splitlines() if "│" in line), unbroken["rows"], strict=True):
        assert line.split("│")[-2].strip() == ", ".join(row["pareto"])
    one = run("sweep", "-q", folder / "net.pt", "--methods", "linearconv", "--ratios", "0.8")
    assert (one.stderr, "linearconv" in one.stdout, "Pareto" in one.stdout) == ("", True, True)


def test_all_methods_at_three_ratios_are_the_default(folder, monkeypatch):
    found = counted(monkeypatch, lambda number: None)

    def refused(*_arguments: object, **_options: object) -> None:
        raise CompactError("not now")

    monkeypatch.setattr(driver, "compress", refused)
    assert run("sweep", "-q", folder / "net.pt").exit_code == 0
    assert found == [(name, ratio) for name in names() for ratio in (0.9, 0.7, 0.5)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--methods", "hing"), "no method 'hing'; did you mean hinge?"),
        (("--methods", ""), "no method ''; there are "),
        (("--ratios", "0.5,1"), "--ratios 0.5,1: each is the share to keep, between 0 and 1"),
        (("--ratios", "nan"), "--ratios nan: give it as numbers with commas"),
        (("--ratios", "half"), "--ratios half: give it as numbers with commas"),
        (("--epochs", "1"), "--epochs needs images: give --data"),
        (("--resume",), "--resume: say with -o FILE which document to go on with"),
        (("--resume", "-o", "-"), "--resume: say with -o FILE"),
        (("--set", "floor=1"), "--set floor=1: give it as method.name=value"),
        (("--set", "hinge.flor=1"), "--set flor: no such option; did you mean floor?"),
        (("--set", "hinges.floor=1"), "no method 'hinges'; did you mean hinge?"),
        (("--set", "hinge.factor=1"), "--set hinge.factor=1: it is for a search, and a sweep has none"),
        (("--methods", "csg", "--set", "hinge.floor=1"), "--set hinge.floor=1: hinge is none of the --methods"),
        (("--keep", "first"), "--keep first: it is best or last"),
        (("--optimizer", "lion"), "optimizer is lion; it must be sgd or adamw"),
        (("-o", "net.pt"), "-o net.pt: that is another file of this command; give one of its own"),
    ],
    ids=str,
)
def test_wrong_usage(folder, monkeypatch, flags, message):
    monkeypatch.chdir(folder)
    before = sorted(os.listdir())
    assert one_line(run("sweep", "net.pt", *flags), 2).startswith(f"compactcli: {message}")
    assert sorted(os.listdir()) == before


def test_what_cannot_be_judged_is_one_line(folder, tmp_path):
    assert "has no test images with labels to judge training by" in one_line(swept(folder, "-q", "--epochs", "1", images="alone"))
    assert "labels" in one_line(swept(folder, "-q", "--epochs", "1", images="bare"))
    assert "the folder 'nowhere' does not exist" in one_line(swept(folder, "-o", tmp_path / "nowhere" / "sweep.json"))
    assert "try --device cpu" in one_line(swept(folder, "-q", "--device", "nonsense"))
    state = torch.load(folder / "net.pt") | {"linear.bias": torch.full((10,), float("nan"))}
    torch.save(state, tmp_path / "net.pt")
    assert "linear.bias holds NaN or Inf" in one_line(run("sweep", "-q", tmp_path / "net.pt", "-o", tmp_path / "sweep.json"))
    assert os.listdir(tmp_path) == ["net.pt"]


def test_torchrun_is_not_served(folder):
    command = [sys.executable, "-m", "compactcli", "sweep", str(folder / "net.pt")]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TORCHELASTIC_RUN_ID": "1"})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "compactcli: a sweep runs in one process; start it without torchrun\n"
