"""The documents' tables are those of benchmarks/results, and the campaign's commands make the rows that it looks for."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _results, campaign, claim, finetune, names, runtimes, tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_documents_say_what_was_found():
    for name, text in tables.documents().items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, "run `python -m benchmarks tables`"


def test_every_table_of_figures_in_the_readme_is_made_from_results():
    assert {name for _, name, _ in tables.MARKED.findall(README)} == set(tables.README)
    by_hand = [
        line for line in tables.MARKED.sub("", README).splitlines() if line.startswith("|") and re.search(r"\d\.\d|\d %", line)
    ]
    assert by_hand == []


def changed(tree: Any) -> Any:
    """The same, every number a tenth higher."""
    if isinstance(tree, dict):
        return {key: value if key in ("ratio", "batch", "images", "run") else changed(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [changed(each) for each in tree]
    return 1.1 * tree if isinstance(tree, float) else tree


@pytest.mark.parametrize("name", tables.README)
def test_a_result_that_changes_changes_its_table(name, monkeypatch):
    before, read = tables.README[name](), tables.read
    monkeypatch.setattr(tables, "read", lambda file: changed(read(file)))
    assert tables.README[name]() != before


def finished(run: finetune.Run, after: float) -> dict[str, Any]:
    row = {"run": finetune.asdict(run), "command": "-", "epochs": {"search": 10, "finetune": 30}, "original": 90.0}
    return row | {"before": 88.0, "after": after, "macs_kept": 0.5, "params_kept": 0.49}


def test_a_run_of_the_campaign_appears_where_it_was_told_not_to_be_run(monkeypatch):
    read, run = _results.read, campaign.planned("resnet56", "auto", 0.5, 40)
    accuracies = {"auto": 89.5, "control": 90.25, "peer": 88.25, "peer-norm": 88.0}
    runs = {name: campaign.planned("resnet56", name, run.ratio, 40) for name in accuracies}
    rows = {own.key: finished(own, accuracies[name]) for name, own in runs.items()}
    found = {"machine": {"cpu": "C", "threads": 1, "torch": "2"}, "rows": rows}
    there: dict[str, Any] = {"machine": {}, "rows": {}}
    monkeypatch.setattr(_results, "read", lambda file: copy.deepcopy(there) if file == "finetune-resnet56" else read(file))
    whole = _results.results()
    there |= found
    told = set(_results.results().splitlines()) - set(whole.splitlines())
    where = "40 epochs, n = 1, C, 1 thread, torch 2"
    assert f"| 1 | ResNet-56, CIFAR-10 | 6.31 | 7.05 | 50.00 | 48.73 | 10.50 | 9.75 | 50.00 | 49.00 | {where} |" in told
    assert f"| hinge | 50 % | 89.50 | -0.75 | +1.25 | {where} |" in told
    assert f"| Torch-Pruning, sparse learning | 50 % | 88.25 | -2.00 | – | {where} |" in told
    assert _results.results().count(_results.WAITING) < whole.count(_results.WAITING)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_commands_of_the_campaign_make_the_rows_that_it_looks_for(device):
    entries = campaign.entries(device, limit=100)
    assert len({(entry.file, entry.key) for entry in entries}) == len(entries) > 20
    for entry in entries:
        benchmark, *arguments = entry.command
        if benchmark == "finetune":
            (run,) = finetune.asked(finetune.parsed(arguments))
            assert (f"finetune-{run.network}", run.key, run.limit, run.device) == (entry.file, entry.key, 100, device)
        else:
            assert (entry.file, benchmark) == ("runtimes", "runtimes")
            assert entry.key.split()[0] in runtimes.NETWORKS


def test_the_campaign_knows_what_is_done(monkeypatch, capsys):
    first, *others = campaign.entries()
    monkeypatch.setattr(campaign, "read", lambda file: {"rows": {first.key: {"seconds": 600.0}} if file == first.file else {}})
    campaign.main(["--list"])
    out = capsys.readouterr().out
    assert out.count(" done ") == 1
    assert out.count(" left ") == len(others) + 1  # and the caption
    ran: list[str] = []
    monkeypatch.setattr(
        campaign.subprocess, "run", lambda command, **_: ran.append(command[-1]) or subprocess.CompletedProcess([], 1)
    )
    with pytest.raises(SystemExit, match=r"failed: .*; --resume tries them again"):
        campaign.main(["--resume"])
    assert ran == ["--resume"] * len(others)


def test_benchmarks_are_listed_with_what_they_show():
    ended = subprocess.run([sys.executable, "-m", "benchmarks"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"campaign", "counts", "tables"} < set(names())
    assert all(re.search(rf"^  {name} +{re.escape(claim(name))}$", ended.stdout, re.MULTILINE) for name in names())


def test_every_benchmark_states_what_is_required_and_its_command():
    for name in names():
        docstring = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
        assert re.search(r"\b[Rr]equired\b", docstring), name
        assert f"python -m benchmarks {name}" in docstring


def test_a_result_says_how_it_came_about(tmp_path):
    """claim, command, versions, device, threads and n."""
    code = "from benchmarks._common import *; write('counts-try', {'rows': {'one': provenance('a command')}})"
    environment = {**os.environ, "COMPACTCLI_BENCH_RESULTS": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True)
    found = json.loads((tmp_path / "counts-try.json").read_text())
    assert found["claim"] == claim("counts")
    row = found["rows"]["one"]
    assert (row["command"], row["n"], row["machine"]["device"]) == ("a command", 1, "cpu")
    assert {"cpu", "threads", "python", "torch", "torchvision", "compactcli"} < row["machine"].keys()
    assert [path.name for path in tmp_path.iterdir()] == ["counts-try.json"]
