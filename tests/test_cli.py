"""The command line in a real shell: pipes, terminals, exit codes, one line for every error, nothing but the product on stdout."""

import io
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import typer
from networks import named, randomise_
from PIL import Image
from test_report import ANALYSIS, EVALUATION, LAYER, MODEL, REPORT, check_bench, check_report
from typer.testing import CliRunner, Result

import compactcli
from compactcli import artefact, report, timing
from compactcli.artefact import Wishes, fresh, open_model
from compactcli.cli import app
from compactcli.compress import ROUND
from compactcli.counters import COUNTERS
from compactcli.errors import CompactError
from compactcli.recipe import DTYPES
from compactcli.sources import NAMES

COMMAND = f"{shlex.quote(sys.executable)} -m compactcli"
HINGE = ("--method", "hinge", "--ratio")


def run(*arguments: str | Path, stdin: bytes = b"") -> Result:
    """A command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def shell(script: str, folder: Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """A script in bash, where `compactcli` is the command."""
    text = f'compactcli() {{ {COMMAND} "$@"; }}; {script}'
    return subprocess.run(["bash", "-c", text], cwd=folder, capture_output=True, timeout=120, **options)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """A checkpoint with nothing but weights, for digits."""
    path = tmp_path / "net.pt"
    torch.save(named("cifar:resnet8", width=8, in_channels=1).state_dict(), path)
    return path


@pytest.fixture
def small(tmp_path: Path, net: Path) -> Path:
    path = tmp_path / "small.safetensors"
    assert run("compress", net, *HINGE, "0.6", "-o", path).exit_code == 0
    return path


@pytest.fixture(autouse=True)
def short_latency(monkeypatch):
    monkeypatch.setattr(report, "LATENCY_SECONDS", 0.01)


def one_line(result: Result, code: int = 1) -> str:
    """The one line on stderr of a command that failed, with nothing on stdout."""
    assert result.exit_code == code, result.output
    assert result.stdout_bytes == b""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("compactcli: ")
    assert len(lines[0]) < 500
    return lines[0]


# Help, flags, and what is imported


def commands() -> dict[str, Any]:
    return dict(typer.main.get_command(app).commands)


def test_help_imports_no_torch():
    """Neither does a misspelt flag, nor the list of methods."""
    lines = [["--help"], ["--version"], ["-h"], ["methods"], ["compress", "--nonsense"]]
    lines += [[name, "--help"] for name in commands()]
    code = """
import sys
from typer.testing import CliRunner
from compactcli.cli import app
for line in %r:
    result = CliRunner().invoke(app, line)
    print(result.exit_code, "torch" in sys.modules, "numpy" in sys.modules, len(result.stdout) > 0, *line)
""" % (lines,)  # noqa: UP031
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        f"{2 if '--nonsense' in line else 0} False False {'--nonsense' not in line} {' '.join(line)}" for line in lines
    ]


def test_importing_the_library_imports_no_torch():
    code = "import sys, compactcli; print('torch' in sys.modules, sys.getrefcount and len(compactcli.__all__) > 5)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False True\n"


MODEL_FLAGS = {
    "MODEL",
    "--arch",
    "--arch-kwargs",
    "--input-shape",
    "--mean",
    "--std",
    "--trust-pickle",
    "--quiet",
    "-q",
    "--debug",
}
DATA_FLAGS = {"--data", "--data-dir", "--download", "--skip-corrupt", "--limit"}
FRESH_FLAGS = {"--fresh", "--seed"}
TRAINING_FLAGS = {
    *("--epochs", "--lr", "--weight-decay", "--optimizer", "--schedule", "--teacher", "--distill-weight", "--temperature"),
    *("--batch-size", "--device", "--time-limit", "--resume", "--state", "--save-every", "--keep", "--history", "--workers"),
    *("--precision", "--cuda-graphs", "--dtype"),
}
FLAGS = {
    "analyze": MODEL_FLAGS
    | FRESH_FLAGS
    | DATA_FLAGS
    | {"--linear", "--explain", "--time", "--methods", "--ratios", "--of", "--json", "--verbose", "-v"},
    "compress": MODEL_FLAGS
    | FRESH_FLAGS
    | DATA_FLAGS
    | TRAINING_FLAGS
    | {"--method", "--ratio", "--of", "--round", "--nearest", "--leave", "--set", "--no-calibrate", "--finetune-epochs"}
    | {"--output", "-o"}
    | {"--latency-table", "--dry-run", "--json"},
    "finetune": MODEL_FLAGS
    | DATA_FLAGS
    | TRAINING_FLAGS
    | {"--output", "-o", "--seed", "--milestones", "--warmup-epochs", "--label-smoothing", "--cutout", "--clip-grad", "--ema"}
    | {"--freeze-bn", "--sync-bn", "--patience", "--accumulate", "--compile"},
    "report": (MODEL_FLAGS - {"MODEL"})
    | DATA_FLAGS
    | {"MODELS", "--baseline", "--counter", "--json", "--markdown", "--html", "--history", "--verbose", "-v"},
    "sweep": MODEL_FLAGS
    | DATA_FLAGS
    | (TRAINING_FLAGS - {"--time-limit", "--state", "--save-every", "--history", "--dtype"})
    | {"--methods", "--ratios", "--set", "--seed", "--json", "--output", "-o", "--verbose", "-v"},
    "export": MODEL_FLAGS | DATA_FLAGS | {"--dtype", "--to", "--fold-bn", "--batch-size", "--device", "--output", "-o"},
    "evaluate": MODEL_FLAGS | DATA_FLAGS | {"--batch-size", "--device", "--json"},
    "bench": (MODEL_FLAGS - {"MODEL", "--mean", "--std"})
    | FRESH_FLAGS
    | {"MODELS", "--batch-size", "--threads", "--repeats", "--save", "--device", "--json"},
    "methods": {"NAME", "--debug"},
}


def test_every_flag_of_every_command():
    """A flag that is added, renamed or dropped is meant to be."""
    found = {}
    for name, command in commands().items():
        options = {flag for p in command.params for flag in [*p.opts, *p.secondary_opts] if flag.startswith("-")}
        arguments = {p.name.upper() for p in command.params if p.param_type_name == "argument"}
        found[name] = options | arguments
    assert found == FLAGS


@pytest.mark.parametrize("name", FLAGS)
def test_every_command_and_every_flag_has_help(name):
    command = commands()[name]
    assert re.search(rf"compactcli {name} ", command.help)  # one line that can be run
    assert [p.name for p in command.params if not p.help] == []
    result = run(name, "--help")
    assert result.exit_code == 0
    assert all(flag in result.stdout for flag in FLAGS[name] if flag.startswith("--"))
    assert "│" not in result.stdout  # plain, no panels


def test_version():
    assert run("--version").stdout == f"compactcli {compactcli.__version__}\n"


# What cannot be served: exit 1, one line, no file


class Shell:
    """Unpickling one runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def torch_file(content: object, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def state(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**named("cifar:resnet8", width=4).state_dict(), **changes}


GOOD = torch_file(state())
BAD_FILES = {
    "empty": (b"", "the file is empty"),
    "truncated": (GOOD[: len(GOOD) // 2], "damaged|cut short"),
    "truncated-safetensors": (safetensors.torch.save(state())[:-10], "cut short or damaged"),
    "random": (bytes(range(255, -1, -1)) * 20, "not a checkpoint"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "this is an HTML page, not a checkpoint"),
    "huge-header": ((1 << 62).to_bytes(8, "little") + b'{"a":1}', "the safetensors header should be 4611686018427387904 bytes"),
    "number": (torch_file(3), "holds an? int; wanted a state_dict"),
    "unknown": (torch_file({"my.weight": torch.zeros(3, 3)}), "cannot name the architecture; .* try --arch NAME"),
    "other-width": (
        torch_file(state(**{"layer2.0.bn1.bias": torch.zeros(9)})),
        r"nearest is cifar:resnet8.*layer2\.0\.bn1\.bias is 9, not 8",
    ),
    "nan": (torch_file(state(**{"linear.bias": torch.full((10,), float("nan"))})), r"linear\.bias holds NaN or Inf"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("from_stdin", [False, True])
def test_a_bad_file_is_one_line(tmp_path, name, from_stdin):
    content, message = BAD_FILES[name]
    path = tmp_path / "net.pth"
    path.write_bytes(content)
    source, stdin = ("-", content) if from_stdin else (path, b"")
    if from_stdin and not content:
        message = r"no model on stdin \(did the command before it fail\?\)"
    quiet = ["-q"] if name == "nan" else []  # the one that could be recognised, which is a note of its own
    line = one_line(run("compress", *quiet, source, *HINGE, "0.5", "-o", tmp_path / "out.safetensors", stdin=stdin))
    assert re.search(message, line), line
    assert ("stdin" if from_stdin else "net.pth") in line
    assert os.listdir(tmp_path) == ["net.pth"]


@pytest.mark.parametrize(
    "command",
    [("analyze",), ("report",), ("bench",), ("sweep",), ("finetune", "--data", "digits"), ("evaluate", "--data", "digits")],
)
def test_every_command_refuses_alike(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.pt").write_bytes(b"random")
    for name, message in (("net.pt", "not a checkpoint"), ("nowhere.pt", "no such file")):
        line = one_line(run(command[0], "-q", name, *command[1:]))
        assert line.startswith(f"compactcli: {name}: ")
        assert message in line


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_pickle_that_runs_a_command_does_not(tmp_path, form):
    canary = tmp_path / "canary"
    content = {"state_dict": state(), "hook": Shell(f"touch {shlex.quote(str(canary))}")}
    data = pickle.dumps(content, 2) if form == "pickle" else torch_file(content, form == "zip")
    (tmp_path / "net.pt").write_bytes(data)
    result = run("analyze", "-q", tmp_path / "net.pt")
    assert result.exit_code in (0, 1)  # what is beside the weights need not be understood
    if result.exit_code == 1:
        one_line(result)
    hook_only = torch_file(Shell(f"touch {shlex.quote(str(canary))}"), form == "zip")
    (tmp_path / "hook.pt").write_bytes(hook_only)
    one_line(run("compress", tmp_path / "hook.pt", *HINGE, "0.5", "-o", tmp_path / "out"))
    assert not canary.exists()
    assert sorted(os.listdir(tmp_path)) == ["hook.pt", "net.pt"]
    pickle.loads(pickle.dumps(Shell(f"touch {shlex.quote(str(canary))}")))
    assert canary.exists()  # the trap works


def test_an_output_that_cannot_be_is_refused_before_the_work(net, tmp_path, monkeypatch):
    def no_work(*_arguments: object, **_options: object) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr(artefact, "open_model", no_work)
    for command in (("compress", net, *HINGE, "0.5"), ("finetune", net, "--data", "digits")):
        line = one_line(run(*command, "-o", tmp_path / "nowhere" / "out.safetensors"))
        assert "the folder 'nowhere' does not exist; make it, or write elsewhere" in line
    assert os.listdir(tmp_path) == ["net.pt"]


def test_out_of_reach_names_a_ratio_and_the_flag_that_takes_it(net, tmp_path):
    line = one_line(run("compress", "-q", net, *HINGE, "0.01", "-o", tmp_path / "out"))
    ratio = re.search(r"try --ratio ([\d.]+), or --nearest", line)[1]
    assert os.listdir(tmp_path) == ["net.pt"]
    assert run("compress", net, *HINGE, ratio, "-o", tmp_path / "first").exit_code == 0
    assert run("compress", net, *HINGE, "0.01", "--nearest", "-o", tmp_path / "second").exit_code == 0
    whole = open_model(net).recipe.source.measures.macs
    first, second = (open_model(tmp_path / name).recipe.steps[0].measures.macs for name in ("first", "second"))
    assert float(ratio) - 0.001 < second / whole <= first / whole <= float(ratio)


def test_an_input_that_does_not_fit_is_one_line(net):
    for command in (("analyze",), ("compress", *HINGE, "0.5"), ("report",)):
        line = one_line(run(command[0], "-q", net, *command[1:], "--input-shape", "4x32x32"))
        assert "does not run in eval mode on 4x32x32 images (--input-shape)" in line


def test_debug_shows_the_traceback(tmp_path):
    result = run("analyze", "--debug", tmp_path / "nowhere.pt")
    assert result.exit_code == 1
    assert isinstance(result.exception, compactcli.CompactError)


# Wrong usage: exit 2

USAGE = [
    (("--method", "hinge", "--ratio", "0"), "compactcli: --ratio 0: it is the share to keep, between 0 and 1"),
    (("--method", "hinge", "--ratio", "1"), "--ratio 1: "),
    (("--method", "hinge", "--ratio", "1.5"), "--ratio 1.5: "),
    (("--method", "hinge", "--ratio", "nan"), "--ratio nan: "),
    (("--method", "hinge", "--ratio", "half"), "compactcli: invalid value for '--ratio'"),
    (("--method", "hing", "--ratio", "0.5"), "compactcli: no method 'hing'; did you mean hinge"),
    (("--method", "hinge", "--ratio", "0.5", "--set", "mod=auto"), "compactcli: --set mod: no such option; did you mean mode"),
    (("--method", "hinge", "--ratio", "0.5", "--set", "mode"), "compactcli: --set mode: give it as name=value"),
    (("--method", "hinge", "--ratio", "0.5", "--set", "mode=x"), "compactcli: --set mode=x: it is one of auto, prune, decompose"),
    (("--method", "hinge", "--ratio", "0.5", "--of", "time"), "compactcli: --of time: it is macs, params or latency"),
    (("--method", "csg", "--ratio", "0.5", "--of", "latency"), "--of latency: csg stores less and computes the same"),
    (
        ("--method", "hetconv", "--ratio", "0.5", "--of", "latency"),
        "--of latency: hetconv makes layers of a kind that",
    ),
    *(
        (("--method", method, "--ratio", "0.5", "--round", "8"), f"--round: {method} makes nothing that it could")
        for method in ("csg", "hetconv")
    ),
    (("--method", "hinge", "--ratio", "0.5", "--latency-table", "t"), "compactcli: --latency-table: it is for --of latency"),
    (("--method", "hinge", "--ratio", "0.5", "--json"), "compactcli: --json: it is for --dry-run"),
    (("--method", "hinge", "--ratio", "0.5", "--dry-run", "--epochs", "1"), "compactcli: --dry-run plans from weights or images"),
    (("--method", "hinge", "--ratio", "0.5", "--resume"), "compactcli: --resume: it is for training; give --epochs or"),
    (("--method", "hinge", "--ratio", "0.5", "--history", "h"), "compactcli: --history: it is for training; give --epochs or"),
    (("--method", "hinge", "--ratio", "0.5", "--keep", "best"), "compactcli: --keep: it is for training; give --epochs or"),
    (("--method", "hinge", "--ratio", "0.5", "--round", "0"), "compactcli: --round 0: it is 1 or more"),
    (("--method", "hinge", "--ratio", "0.5", "--round", "many"), "compactcli: --round many: give it as a whole number, or auto"),
    (("--method", "hinge", "--ratio", "0.5", "--round", "1.5"), "compactcli: --round 1.5: give it as a whole number, or auto"),
    (("--method", "hinge", "--ratio", "0.5", "--input-shape", "32x32"), "compactcli: --input-shape 32x32: give it as CxHxW"),
    (("--method", "hinge", "--ratio", "0.5", "--mean", "a,b"), "compactcli: --mean a,b: give it as numbers with commas"),
    (("--method", "hinge", "--ratio", "0.5", "--arch-kwargs", "x"), "compactcli: --arch-kwargs x: give it as NAME=VALUE"),
    (("--method", "hinge"), "compactcli: missing option '--ratio'; see "),
    (("--ratio", "0.5"), "compactcli: missing option '--method'; see "),
    (("--method", "hinge", "--ratio", "0.5", "--fresh"), "compactcli: --fresh reads nothing; leave the model out"),
    (("--method", "hinge", "--ratio", "0.5", "--nonsense"), "compactcli: no such option: --nonsense"),
    (("--method", "hinge", "--ratio", "0.5", "--seed", "-1"), "a seed is from 0 to 2^63 - 1; see "),
    (("--method", "hinge", "--ratio", "0.5", "another.pt"), "compactcli: got unexpected extra argument"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=[" ".join(a[2:] or a) for a, _ in USAGE])
def test_wrong_usage(net, tmp_path, arguments, message):
    line = one_line(run("compress", "-q", net, *arguments, "-o", tmp_path / "out"), 2)
    assert message in line
    assert "; see " not in message or line.endswith("; see compactcli compress --help")
    assert os.listdir(tmp_path) == ["net.pt"]


@pytest.mark.parametrize("arguments", [(), ("compres",), ("--nonsense",)])
def test_without_a_command_there_is_help_and_with_a_wrong_one_a_line(arguments):
    result = run(*arguments)
    if arguments:
        assert one_line(result, 2).endswith(" --help")
    else:
        assert result.exit_code == 2
        assert "Commands:" in result.output


def test_data_is_asked_for_where_the_file_names_none(net, tmp_path):
    for command in ("finetune", "evaluate"):
        line = one_line(run(command, "-q", net, *(("-o", tmp_path / "out") if command == "finetune" else ())), 2)
        assert "give --data" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", "-1"), "--epochs"),
        (("--optimizer", "lion"), "optimizer is lion; it must be sgd or adamw"),
        (("--schedule", "step"), "schedule is step; it must be cosine, milestones or constant"),
        (("--batch-size", "1"), "batch-size is 1; it must be 2 or more"),
        (("--temperature", "0"), "temperature is 0"),
        (("--distill-weight", "2"), "--distill-weight"),
    ],
)
def test_wrong_usage_of_finetune(net, tmp_path, arguments, message):
    assert message in one_line(run("finetune", net, "-q", "--data", "digits", "-o", tmp_path / "out", *arguments), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-size", "0"), "compactcli: --batch-size 0: give it as whole numbers from 1 up with commas, e.g. 1,16"),
        (("--batch-size", "1,,2"), "compactcli: --batch-size 1,,2: give it as whole numbers"),
        (("--batch-size", "9999999999"), "compactcli: --batch-size 9999999999: give it as whole numbers"),
        (("--threads", "two"), "compactcli: --threads two: give it as whole numbers"),
        (("--threads", "1,100000"), "compactcli: --threads 1,100000: there are "),
        (("--repeats", "1"), "--repeats"),
        (("--input-shape", "1x0x9"), "compactcli: --input-shape 1x0x9: give it as CxHxW"),
        (("-", "-"), "compactcli: stdin holds one model; give - once, and files for the others"),
    ],
)
def test_wrong_usage_of_bench(net, arguments, message):
    result = run("bench", net, *arguments)
    assert (result.exit_code, result.stdout_bytes) == (2, b"")
    assert message in result.stderr
    if message.startswith("compactcli: "):
        assert len(result.stderr.splitlines()) == 1


def test_a_bench_that_cannot_be_is_one_line(net, tmp_path):
    assert "try --device cpu" in one_line(run("bench", "-q", net, "--device", "nonsense"))
    assert "nowhere.pt: no such file" in one_line(run("bench", "-q", net, tmp_path / "nowhere.pt"))
    beyond = ("--batch-size", "900000000", "--input-shape", "1x4096x4096")  # more than any address space holds
    assert "in batches of 900000000: " in one_line(run("bench", "-q", net, *beyond))


def test_bench_does_not_write_over_what_it_reads(net, monkeypatch):
    content = net.read_bytes()
    monkeypatch.chdir(net.parent)
    for save in (net, Path(net.name), Path("..", net.parent.name, net.name)):
        assert "that is another file of this command; give one of its own" in one_line(run("bench", "-q", net, "--save", save), 2)
    assert net.read_bytes() == content


# What is served


def test_compress_writes_what_the_library_makes(net, tmp_path):
    result = run("compress", net, *HINGE, "0.5", "-o", tmp_path / "small.safetensors")
    assert (result.exit_code, result.stdout_bytes) == (0, b"")
    assert f"wrote {(tmp_path / 'small.safetensors').stat().st_size:,} bytes" in result.stderr
    assert "recognised as cifar:resnet8" in result.stderr
    piped = run("compress", "-q", net, *HINGE, "0.5")
    assert piped.stderr == ""
    assert piped.stdout_bytes == (tmp_path / "small.safetensors").read_bytes()


def test_rounding_by_itself_is_a_fixed_number(tmp_path):
    """On a CPU 16, whatever machine the command runs on; the file is the one that the number gives."""
    torch.save(named("cifar:resnet8", width=32).state_dict(), tmp_path / "wide.pt")
    files = [
        run("compress", "-q", tmp_path / "wide.pt", *HINGE, "0.5", "--set", "mode=prune", "--round", value).stdout_bytes
        for value in ("auto", "16", "8")
    ]
    assert files[0] == files[1] != files[2]
    network = open_model(files[0])
    assert network.recipe.steps[0].options["round"] == 16
    widths = [module.out_channels for module in network.module.modules() if isinstance(module, torch.nn.Conv2d)]
    assert {width % 16 for width in widths} == {0}
    assert ROUND == {"cpu": 16, "cuda": None}


def test_settings_of_the_method_reach_it(net):
    def found(*flags: str) -> compactcli.artefact.Network:
        return open_model(run("compress", "-q", net, *HINGE, "0.7", *flags).stdout_bytes)

    recorded = found("--set", "mode=decompose", "--set", "floor=0.1", "--of", "params", "--round", "2").recipe.steps[0].options
    wanted = {"mode": "decompose", "floor": 0.1, "of": "params", "round": 2, "ratio": 0.7}
    assert recorded.items() >= wanted.items()
    assert found("--round", "1").recipe.steps[0].options["round"] == 1
    described = found("--input-shape", "1x24x24", "--mean", "0.25", "--std", "0.5", "--arch-kwargs", "shortcut=append").recipe
    assert described.input_shape == (1, 24, 24)
    assert (described.preprocessing.mean, described.preprocessing.std) == ((0.25,), (0.5,))
    assert described.kwargs["shortcut"] == "append"


def test_a_fresh_network_reads_nothing(tmp_path):
    result = run("compress", "-q", "--fresh", "--arch", "cifar:resnet8", "--arch-kwargs", "width=4", *HINGE, "0.5", "--seed", "7")
    assert result.exit_code == 0, result.stderr
    assert (
        result.stdout_bytes
        == run(
            "compress", "-q", "--fresh", "--arch", "cifar:resnet8", "--arch-kwargs", "width=4", *HINGE, "0.5", "--seed", "7"
        ).stdout_bytes
    )
    assert open_model(result.stdout_bytes).recipe.source is None
    unknown = one_line(run("compress", "--fresh", "--arch", "cifar:resnet9", *HINGE, "0.5", "-o", tmp_path / "out"))
    assert "cifar:resnet" in unknown


def test_analyze_json(net):
    result = run("analyze", "--json", net)
    tree = json.loads(result.stdout)
    assert (set(tree), set(tree["model"]), {*map(frozenset, tree["layers"])}) == (ANALYSIS, MODEL, {frozenset(LAYER)})
    plain = run("analyze", net).stdout
    assert "layer3.0.conv1" in plain
    assert tree["suggestion"]["command"] in plain


@pytest.mark.parametrize(
    "flags",
    [(), ("--data", "digits", "--limit", "64", "--methods", "--ratios", "0.8", "--of", "params", "--input-shape", "1x16x16")],
)
def test_the_suggested_command_can_be_run(net, monkeypatch, flags):
    monkeypatch.chdir(net.parent)
    result = run("analyze", "--json", "net.pt", *flags)
    assert result.exit_code == 0, result.stderr
    command = json.loads(result.stdout)["suggestion"]["command"]
    assert run(*shlex.split(command)[1:], "-o", "out.safetensors").exit_code == 0


def test_predictions_have_the_columns_that_they_fill(net):
    """No accuracy without images, no reason where all methods reach the ratio; every column is named."""
    for flags, columns in (
        (("--ratios", "0.6"), ["method", "kept", "output error"]),
        (("--ratios", "0.6,0.0001"), ["method", "kept", "output error", "why not"]),
        (("--ratios", "0.6", "--data", "digits", "--limit", "64"), ["method", "kept", "output error", "accuracy"]),
    ):
        table = run("analyze", "-q", net, "--methods", *flags).stdout.partition("methods, as they plan")[2]
        lines = [line.strip("┃").split("┃") for line in table.partition("┡")[0].splitlines()[2:]]
        assert [" ".join(" ".join(parts).split()) for parts in zip(*lines, strict=True)] == columns


def test_the_suggested_command_reads_what_analyze_read(net):
    """The same weights and the same images: each flag that says which is in it."""
    shown = json.loads(run("analyze", "--json", "--fresh", "--arch", "cifar:resnet8", "--seed", "7").stdout)
    assert "--fresh --arch cifar:resnet8 --seed 7 --method" in shown["suggestion"]["command"]
    shown = json.loads(run("analyze", "--json", net, "--trust-pickle", "--seed", "7").stdout)
    assert f"{net} --trust-pickle --method" in shown["suggestion"]["command"]
    folder = net.parent / "images"
    folder.mkdir()
    for number in range(4):
        Image.new("L", (32, 32), 60 * number).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no image")
    shown = json.loads(run("analyze", "--json", net, "--data", folder, "--skip-corrupt").stdout)
    assert f"{net} --skip-corrupt --data {folder} --method" in shown["suggestion"]["command"]


@pytest.mark.parametrize("name", ["net[best].pt", "a[/x].pt", "net:ok:.pt"])
def test_names_are_shown_as_they_are(net, monkeypatch, name):
    """Whatever tables take for markup or an emoji."""
    monkeypatch.chdir(net.parent)
    Path(name).parent.mkdir(exist_ok=True)
    net.rename(name)
    shown = run("analyze", name).stdout
    command = shown.partition("try: ")[2].split("\n")[0]
    assert shlex.split(command)[2] == name
    assert name in run("bench", "--repeats", "2", name).stdout
    factory = Path(name).with_suffix(".py")
    factory.write_text("from compactcli import cifar\ndef made(): return cifar.NETWORKS['resnet8'](width=8, in_channels=1)")
    wishes = ("--arch", f"{factory}:made", "--input-shape", "1x32x32")
    for command in (("report",), ("analyze",), ("sweep", "--methods", "hinge", "--ratios", "0.9")):
        assert f"{factory.name}:made" in run(*command, name, *wishes).stdout


ENVIRONMENT = {name: [name, "nowhere.pt"] for name in FLAGS} | {
    "compress": ["compress", "nowhere.pt", *HINGE, "0.5"],
    "export": ["export", "nowhere.pt", "--dtype", "float16", "-o", "out"],
    "methods": ["methods", "nothing"],
}


@pytest.mark.parametrize("name", FLAGS)
def test_every_command_reads_the_environment(name):
    """--debug, which lets an error through instead of showing one line."""
    assert run(*ENVIRONMENT[name]).exit_code in (1, 2)
    shown = CliRunner().invoke(app, ENVIRONMENT[name], env={"COMPACTCLI_DEBUG": "1"})
    assert isinstance(shown.exception, CompactError), shown.exception


def test_common_flags_have_a_variable(net):
    variables = {p.envvar for command in commands().values() for p in command.params if getattr(p, "envvar", None)}
    wanted = (
        "DATA",
        "DATA_DIR",
        "DOWNLOAD",
        "SKIP_CORRUPT",
        "LIMIT",
        "BATCH_SIZE",
        "DEVICE",
        "SEED",
        "JSON",
        "QUIET",
        "VERBOSE",
        "DEBUG",
    )
    assert variables == {f"COMPACTCLI_{name}" for name in wanted}
    result = CliRunner().invoke(app, ["analyze", str(net)], env={"COMPACTCLI_JSON": "1", "COMPACTCLI_QUIET": "1"})
    assert json.loads(result.stdout)["schema"] == "compactcli/analysis/1"
    assert result.stderr == ""


def test_a_dry_run_writes_nothing_and_tells_all(net, tmp_path):
    before = sorted(tmp_path.iterdir())
    result = run("compress", "-q", net, *HINGE, "0.6", "--dry-run", "--json")
    assert sorted(tmp_path.iterdir()) == before
    tree = json.loads(result.stdout)
    assert [row["name"] for row in tree["layers"]] == [
        row["name"] for row in json.loads(run("analyze", "--json", net).stdout)["layers"]
    ]
    assert all(row["why"] for row in tree["layers"])
    assert "filters go" in result.stderr
    assert run("compress", "-q", net, *HINGE, "0.6", "--dry-run").stdout == ""


def test_a_saved_table_drives_a_compression(net, tmp_path):
    table = tmp_path / "table.json"
    result = run("bench", net, "--threads", "1", "--repeats", "2", "--save", table)
    assert result.exit_code == 0, result.stderr
    assert "wrote the times of" in result.stderr
    made = [run("compress", "-q", net, *HINGE, "0.6", "--of", "latency", "--latency-table", table).stdout_bytes for _ in range(2)]
    assert made[0] == made[1]  # nothing is timed again
    assert open_model(made[0]).recipe.steps[0].options["of"] == "latency"
    other = ("--fresh", "--arch", "cifar:resnet8", "--arch-kwargs", "width=4", "--arch-kwargs", "in_channels=1")
    line = one_line(
        run("compress", "-q", *other, *HINGE, "0.6", "--of", "latency", "--latency-table", table, "-o", tmp_path / "o")
    )
    assert "the latency table is of another network: conv1 is 4x1x3x3 here, 8x1x3x3 in the table" in line
    damaged = tmp_path / "damaged.json"
    huge = json.dumps({"schema": "compactcli/latency-table/1", "whole_ms": 10**400, "layers": []})
    tree = json.loads(table.read_text())
    worded = tmp_path / "worded.json"
    worded.write_text(json.dumps(tree | {"whole_ms": str(tree["whole_ms"])}))
    assert timing.load(worded) == timing.load(table)
    for content in (net.read_bytes(), huge.encode(), b"[" * 100_000):
        damaged.write_bytes(content)
        line = one_line(run("compress", net, *HINGE, "0.6", "--of", "latency", "--latency-table", damaged))
        assert "damaged.json is not a latency table" in line
    assert "one model" in one_line(run("bench", net, net, "--save", table), 2)


@pytest.mark.parametrize("scale", [1e18, 1e37])
@pytest.mark.parametrize("name", ["conv1.weight", "linear.weight"])
def test_numbers_that_are_too_large_are_one_line_or_right(name, scale, tmp_path):
    """Of a network whose training was lost: each is finite, and their squares are not."""
    weights = named("cifar:resnet8", width=8, in_channels=1).state_dict()
    torch.save({**weights, name: weights[name] * scale}, tmp_path / "net.pt")
    images = ("--data", "digits", "--limit", "60")
    for command in (
        ("compress", *HINGE, "0.6", "-o", tmp_path / "out"),
        ("compress", *HINGE, "0.6", *images, "-o", tmp_path / "out"),
        ("analyze", "--json", *images),
        ("export", "--to", "weights", "-o", tmp_path / "out"),
        ("export", "--fold-bn", "-o", tmp_path / "out"),
    ):
        result = run(command[0], tmp_path / "net.pt", *command[1:], "-q")
        if result.exit_code:
            one_line(result)
        elif (tmp_path / "out").exists() and command[0] == "compress":
            error = open_model(tmp_path / "out").recipe.steps[0].error
            assert error is not None
            assert 0 < error < 100
        (tmp_path / "out").unlink(missing_ok=True)


def test_compress_tells_of_a_channel_without_a_variance(tmp_path):
    weights = named("cifar:resnet8", width=8, in_channels=1).state_dict()
    weights["bn1.running_var"][0] = float("inf")
    torch.save(weights, tmp_path / "net.pt")
    result = run("compress", tmp_path / "net.pt", *HINGE, "0.6", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "warning: net.pt: bn1.running_var holds Inf: the channel behind it is constant" in result.stderr


def test_an_output_without_a_name_is_refused(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "-o: the file's name is empty" in one_line(run("compress", net, *HINGE, "0.6", "-o", ""), 2)
    assert sorted(os.listdir(tmp_path)) == ["net.pt"]


def test_a_step_that_is_too_wide_is_the_rounds_fault(net, tmp_path):
    line = one_line(run("compress", net, *HINGE, "0.6", "--round", "1000", "--set", "mode=prune", "-q", "-o", tmp_path / "out"))
    assert line.endswith("nothing here can be made smaller by steps of 1000; try --round 1")


def test_a_baseline_has_the_normalisation_that_is_given(net, tmp_path):
    torch.save(randomise_(named("cifar:resnet8", width=8, in_channels=1), 1).state_dict(), tmp_path / "other.pt")
    images = ("--data", "digits", "--limit", "60", "--mean", "0.9", "--std", "0.1", "-q", "--json")
    told = json.loads(run("report", net, "--baseline", tmp_path / "other.pt", *images).stdout)
    assert told["baseline"]["accuracy"] == json.loads(run("evaluate", tmp_path / "other.pt", *images).stdout)["accuracy"]


def test_analyze_warns_of_what_compress_refuses(tmp_path):
    broken = state(**{"linear.bias": torch.full((10,), float("nan")), "bn1.running_var": torch.full((4,), float("inf"))})
    (tmp_path / "net.pt").write_bytes(torch_file(broken))
    result = run("analyze", tmp_path / "net.pt", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["suggestion"] is None
    assert "try:" not in run("analyze", tmp_path / "net.pt", "-q").stdout
    assert "warning: net.pt: linear.bias holds NaN or Inf; compress will refuse it" in result.stderr
    assert "warning: net.pt: bn1.running_var holds Inf" in result.stderr


def test_report_json(net, small):
    alone = json.loads(run("report", "--json", small).stdout)
    check_report(alone)
    beside = json.loads(run("report", "--json", small, "--baseline", net, "--data", "digits", "--limit", "20").stdout)
    check_report(beside)
    assert beside["model"]["evaluated"]["images"] == 20
    assert beside["ratios"]["macs"] == alone["ratios"]["macs"] <= 0.6
    assert "Parameters" in run("report", small).stdout
    assert "layers that changed" not in run("report", small).stdout
    assert "layers that changed" in run("report", "-v", small).stdout


def test_a_file_whose_name_is_no_text_is_compared(net):
    other = os.fsdecode(bytes(net.parent) + b"/net\xff.pt")
    shutil.copy(net, other)
    page = net.parent / "page.html"
    result = run("report", "-q", net, other, "--html", page)
    assert result.exit_code == 0, result.output
    assert "net?.pt" in page.read_text(encoding="utf-8")


def test_the_input_that_is_asked_for_is_the_baselines_too(net, tmp_path):
    other = tmp_path / "other.pt"
    torch.save(named("cifar:resnet8", width=4, in_channels=1).state_dict(), other)
    result = run("report", "-q", net, "--baseline", other, "--input-shape", "1x24x24", "--json")
    assert result.exit_code == 0, result.stderr
    tree = json.loads(result.stdout)
    assert tree["model"]["input_shape"] == tree["baseline"]["input_shape"] == [1, 24, 24]


def test_report_counts_as_a_paper_does(net, small):
    tree = json.loads(run("report", "--json", small, "--baseline", net, "--counter", "hinge").stdout)
    assert tree["counter"]["count"] < tree["counter"]["baseline"]
    assert "By hinge's counter" in run("report", small, "--counter", "hinge").stdout
    line = one_line(run("report", "nowhere.pt", "--counter", "thop"), 2)
    assert line == f"compactcli: --counter thop: it is one of {', '.join(COUNTERS)}"
    assert f"count as well: {', '.join(COUNTERS)}." in " ".join(run("report", "--help").stdout.split())


def test_bench_json(net, small):
    """Models in the order given, a file by its path and a pipe as stdin; stdout holds nothing else."""
    result = run(
        "bench", "--json", small, "-", "--batch-size", "1,2,1", "--threads", "1", "--repeats", "2", stdin=net.read_bytes()
    )
    tree = json.loads(result.stdout)
    check_bench(tree)
    assert [each["name"] for each in tree["models"]] == [str(small), "stdin"]
    assert [own["batch"] for own in tree["models"][1]["latency"]] == [1, 2]
    assert "stdin: recognised as cifar:resnet8" in result.stderr
    table = run("bench", "-q", small, net, "--repeats", "2")
    assert (table.exit_code, table.stderr) == (0, "")
    assert all(word in table.stdout for word in ("median ms", "spread", "images/s", "ratio"))
    assert json.loads(run("bench", "-q", "--json", stdin=net.read_bytes()).stdout)["models"][0]["name"] == "stdin"


def test_evaluate_json(small):
    result = run("evaluate", "--json", small, "--data", "digits", "--limit", "20")
    tree = json.loads(result.stdout)
    assert set(tree) == EVALUATION
    assert tree["images"] == 20
    line = run("evaluate", "-q", small, "--data", "digits", "--limit", "20").stdout
    assert f"top-1 {tree['accuracy']:.2f} %" in line
    assert "on 20 test images of digits" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_a_loss_that_is_not_finite_is_null_and_told(tmp_path, value):
    broken = {name: tensor * value if name == "linear.weight" else tensor for name, tensor in state().items()}
    torch.save(broken, tmp_path / "net.pt")
    judged = ("evaluate", tmp_path / "net.pt", "--data", "digits", "--limit", "20")
    reported = ("report", *judged[1:])
    for result in (run(*judged, "--json"), run(*judged), run(*reported), run(*reported, tmp_path / "net.pt")):
        assert result.exit_code == 0, result.stderr
        assert "net.pt: outputs hold NaN or Inf, or are so large that the loss is not finite" in result.stderr
    assert json.loads(run(*judged, "--json", "-q").stdout)["loss"] is None


def exported(path: Path, *flags: str) -> bytes:
    """What export writes into a pipe."""
    result = run("export", "-q", path, *flags)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout_bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_export_writes_half_the_bytes(small, tmp_path, dtype):
    """The same file twice, into a pipe and from one; a plain checkpoint as well."""
    half = tmp_path / "half.safetensors"
    result = run("export", small, "--dtype", dtype, "-o", half)
    assert (result.exit_code, result.stdout_bytes) == (0, b"")
    written, before = half.stat().st_size, small.stat().st_size
    assert result.stderr.splitlines()[-1] == f"wrote {written:,} bytes to {half}, instead of {before:,}"
    assert re.search(rf"^{dtype}: output error \S+ on random images$", result.stderr, re.MULTILINE)
    assert exported(small, "--dtype", dtype) == half.read_bytes() == exported(small, "--dtype", dtype, "--to", "artefact")
    assert run("export", "-q", "--dtype", dtype, stdin=small.read_bytes()).stdout_bytes == half.read_bytes()
    assert written - len(open_model(half).recipe.dumps()) < 0.7 * (before - len(open_model(small).recipe.dumps()))
    assert {tensor.dtype for tensor in compactcli.load(half).state_dict().values()} == {torch.float32, torch.int64}
    plain = open_model(exported(tmp_path / "net.pt", "--dtype", dtype))
    assert (plain.recipe.dtype, [step.command for step in plain.recipe.steps]) == (dtype, ["export"])


def test_export_measures_what_it_costs(small, tmp_path):
    half = tmp_path / "half.safetensors"
    result = run("export", small, "--dtype", "bfloat16", "--data", "digits", "--limit", "30", "-o", half)
    before, after = (
        json.loads(run("evaluate", "--json", path, "--data", "digits", "--limit", "30").stdout)["accuracy"]
        for path in (small, half)
    )
    figures = f"accuracy {after:.2f} %, {after - before:+.2f} points, before {before:.2f} %"
    assert f"bfloat16: {figures}, on 30 test images of digits" in result.stderr
    tree = json.loads(run("report", "--json", half).stdout)
    assert (tree["model"]["accuracy"], tree["model"]["evaluated"]["images"]) == (after, 30)
    assert tree["steps"][-1]["options"] == {"dtype": "bfloat16"}
    assert "--dtype bfloat16" in run("report", half).stdout


def test_export_refuses_what_it_does_not_know(small, tmp_path):
    out = ("-o", tmp_path / "out")
    assert "--dtype float8: it is float16 or bfloat16" in one_line(run("export", small, "--dtype", "float8", *out), 2)
    assert "--to keras: it is artefact or onnx" in one_line(run("export", small, "--to", "keras", *out), 2)
    assert "changes nothing: give --dtype or --fold-bn" in one_line(run("export", small, *out), 2)
    for flags, complaint in (
        (("--to", "onnx", "--dtype", "float16"), "--dtype goes with --to artefact"),
        (("--to", "pt2", "--data", "digits"), "--data goes with --to artefact"),
        (("--to", "weights", "--fold-bn"), "--to weights keeps the layers of an architecture"),
        (("--to", "timm", "--fold-bn"), "--to timm keeps the layers of an architecture"),
        (("--fold-bn", "--data", "digits"), "give --dtype as well"),
    ):
        assert complaint in one_line(run("export", small, *flags, *out), 2)
    assert "nowhere.pt: no such file" in one_line(run("export", "nowhere.pt", "--dtype", "float16", *out))
    for command in (("compress", *HINGE, "0.5"), ("finetune", "--data", "digits")):
        assert "it is float16 or bfloat16" in one_line(run(command[0], small, *command[1:], "--dtype", "half", *out), 2)
    assert not (tmp_path / "out").exists()


def test_export_names_what_is_not_installed(small, tmp_path, monkeypatch):
    monkeypatch.setattr("compactcli.export.find_spec", lambda name: None)
    line = one_line(run("export", small, "--to", "onnx", "-o", tmp_path / "net.onnx"))
    assert line == 'compactcli: --to onnx needs onnx and onnxscript and onnxruntime; pip install "compactcli[onnx]"'
    assert sorted(os.listdir(tmp_path)) == ["net.pt", "small.safetensors"]


def test_export_of_plain_weights(net, small, tmp_path):
    """As what they came from, through pipes as well; where the structure is another, nothing is written."""
    path = tmp_path / "plain.pth"
    result = run("export", net, "--to", "weights", "-o", path)
    assert (result.exit_code, result.stdout_bytes) == (0, b"")
    assert "plain weights: outputs differ at batch 1 and 3 by up to 0.0e+00 of the largest output" in result.stderr
    assert result.stderr.splitlines()[-1] == f"wrote {path.stat().st_size:,} bytes to {path}, instead of {net.stat().st_size:,}"
    piped = safetensors.torch.load(exported(net, "--to", "weights"))
    state = torch.load(path, weights_only=True)
    for name, tensor in torch.load(net, weights_only=True).items():
        assert torch.equal(state[name], tensor)
        assert torch.equal(piped[name], tensor)
    line = one_line(run("export", "-q", small, "--to", "weights", "-o", tmp_path / "out"))
    assert "weights alone do not say what this network is" in line
    assert sorted(os.listdir(tmp_path)) == ["net.pt", "plain.pth", "small.safetensors"]


def test_the_name_of_the_output_says_the_format(small, tmp_path):
    path = tmp_path / "net.pt2"
    result = run("export", small, "--fold-bn", "-o", path)
    assert (result.exit_code, result.stdout_bytes) == (0, b"")
    assert re.search(r"^folded (\d+) of \1 batch norms$", result.stderr, re.MULTILINE)
    assert re.search(r"^torch.export: outputs differ at batch 1 and 3 by up to \S+ of the", result.stderr, re.MULTILINE)
    image = torch.randn(4, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(path).module()(image), compactcli.load(small)(image), rtol=1e-3, atol=1e-4)
    assert exported(small, "--to", "pt2", "--fold-bn") == path.read_bytes()


def test_export_folds_the_artefact(small):
    folded = exported(small, "--fold-bn")
    assert [step.options for step in open_model(folded).recipe.steps[1:]] == [{"fold_bn": True}]
    half = open_model(exported(small, "--fold-bn", "--dtype", "float16"))
    assert [step.command for step in half.recipe.steps] == ["compress", "export", "export"]
    assert json.loads(run("report", "--json", stdin=folded).stdout)["steps"][1]["options"] == {"fold_bn": True}


def test_compress_and_finetune_end_in_half_precision(net, tmp_path):
    made = run("compress", "-q", net, "--method", "linearconv", "--ratio", "0.7", "--dtype", "float16").stdout_bytes
    whole = run("compress", "-q", net, "--method", "linearconv", "--ratio", "0.7").stdout_bytes
    assert run("export", "-q", "--dtype", "float16", stdin=whole).stdout_bytes == made
    training = ("--data", "digits", "--limit", "60", "--batch-size", "20")
    tuned = run("finetune", *training, "--epochs", "1", "--teacher", "none", "--dtype", "bfloat16", stdin=made)
    assert "stdin: no longer stored in float16, but in float32; --dtype rounds what comes of it" in tuned.stderr
    recipe = open_model(tuned.stdout_bytes).recipe
    assert (recipe.dtype, [step.command for step in recipe.steps]) == ("bfloat16", ["compress", "export", "finetune", "export"])
    both = run("compress", "-q", net, *HINGE, "0.7", *training, "--finetune-epochs", "1", "--dtype", "bfloat16").stdout_bytes
    steps = open_model(both).recipe.steps
    assert [step.command for step in steps] == ["compress", "finetune", "export"]
    assert steps[-1].measures.evaluated["split"] == "test"


def test_methods_lists_and_describes():
    assert re.search(r"^hinge +Hinge: ", run("methods").stdout, re.MULTILINE)
    text = run("methods", "hinge").stdout
    assert "--set mode=auto|prune|decompose" in text
    assert "--set floor=float" in text
    assert "did you mean hinge" in one_line(run("methods", "hinges"), 2)


def test_finetune_remembers_the_dataset(small, tmp_path):
    tuned = tmp_path / "tuned.safetensors"
    flags = ("--epochs", "1", "--limit", "60", "--batch-size", "20")
    result = run("finetune", small, "--data", "digits", *flags, "-o", tuned)
    assert result.exit_code == 0, result.stderr
    assert "teacher: net.pt" in result.stderr
    again = run("finetune", tuned, *flags, "-q", "--teacher", "none")
    assert again.exit_code == 0, again.stderr
    steps = open_model(again.stdout_bytes).recipe.steps
    assert [step.command for step in steps] == ["compress", "finetune", "finetune"]
    assert [step.options.get("teacher") for step in steps] == [None, "net.pt", None]
    assert run("evaluate", "-q", tuned, "--limit", "20").exit_code == 0


# In a real shell


def test_a_pipe_from_compress_to_report(net):
    """Weights in, JSON out; every command in between passes a whole model on."""
    script = """set -o pipefail
        compactcli compress -q --method hinge --ratio 0.6 < net.pt \
        | compactcli finetune -q --data digits --epochs 1 --limit 60 --batch-size 20 --teacher net.pt \
        | compactcli report --json"""
    result = shell(script, net.parent)
    assert result.returncode == 0, result.stderr.decode()
    tree = json.loads(result.stdout)
    assert set(tree) == REPORT
    assert [step["command"] for step in tree["steps"]] == ["compress", "finetune"]
    assert tree["steps"][1]["options"]["teacher"] == "net.pt"
    assert tree["model"]["accuracy"] is not None
    assert 0.55 < tree["ratios"]["macs"] <= 0.6
    assert sorted(os.listdir(net.parent)) == ["net.pt"]


def test_a_pipe_through_export(net):
    script = """set -o pipefail
        compactcli compress -q --method csg --ratio 0.7 < net.pt | compactcli export -q --dtype float16 | tee half.safetensors \
        | compactcli report --json"""
    result = shell(script, net.parent)
    assert (result.returncode, result.stderr) == (0, b"")
    tree = json.loads(result.stdout)
    check_report(tree)
    assert [step["command"] for step in tree["steps"]] == ["compress", "export"]
    assert tree["model"]["size_bytes"] == (net.parent / "half.safetensors").stat().st_size
    assert open_model(net.parent / "half.safetensors").recipe.dtype == "float16"


def test_a_failure_goes_down_the_pipe_as_one_line_each(tmp_path):
    result = shell("compactcli compress -q nowhere.pt --method hinge --ratio 0.5 | compactcli report --json", tmp_path)
    assert (result.returncode, result.stdout) == (1, b"")
    assert sorted(result.stderr.decode().splitlines()) == [
        "compactcli: no model on stdin (did the command before it fail?)",
        "compactcli: nowhere.pt: no such file",
    ]


def test_a_reader_that_leaves_ends_the_command_quietly(tmp_path):
    artefact.save(fresh(Wishes("cifar:resnet20"), 0), str(tmp_path / "net.safetensors"))  # more than a pipe holds
    script = "compactcli compress -q net.safetensors --method hinge --ratio 0.9 | head -c 10 | wc -c; echo ${PIPESTATUS[0]}"
    result = shell(script, tmp_path)
    assert result.stdout.split() == [b"10", b"141"]  # ended by SIGPIPE, as any tool
    assert result.stderr == b""


def test_a_full_disk_leaves_no_file(net):
    """The largest file may have 4 KB."""
    result = shell("ulimit -f 4; compactcli compress -q net.pt --method hinge --ratio 0.9 -o out.safetensors", net.parent)
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr == b"compactcli: out.safetensors: file too large; nothing was written\n"
    assert os.listdir(net.parent) == ["net.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("command", ["compress -q net.pt --method hinge --ratio 0.9", "report -q --json net.pt", "methods"])
def test_a_full_stdout_is_one_line(net, command):
    result = shell(f"compactcli {command} > /dev/full", net.parent)
    assert result.returncode == 1
    assert len(result.stderr.decode().splitlines()) == 1, result.stderr.decode()
    assert result.stderr.lower().startswith(b"compactcli: ")
    assert b"no space left on device" in result.stderr.lower()


def test_what_torch_logs_does_not_join_the_one_line(tmp_path):
    """An operation that fails on fake tensors is logged by torch, with a traceback, beside what it raises."""
    code = "from torch import nn\nclass make(nn.Conv2d):\n    def __init__(self): super().__init__(3, 8, 1)\n"
    code += "    def forward(self, x): return super().forward(x).exp() ** self.bias\n"  # 8 channels of 8 x 7 positions
    (tmp_path / "broken.py").write_text(code)
    result = shell("compactcli analyze -q --fresh --arch broken.py:make --input-shape 3x8x7", tmp_path)
    assert (result.returncode, result.stdout) == (1, b"")
    assert len(result.stderr.splitlines()) == 1, result.stderr.decode()
    assert result.stderr.startswith(b"compactcli: the network does not run")


def on_terminal(arguments: Sequence[str], folder: Path) -> tuple[int, bytes]:
    """Exit code and everything that a command writes with a terminal as its stdin, stdout and stderr."""
    ours, theirs = os.openpty()
    command = [*shlex.split(COMMAND), *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, close_fds=True) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux: the other end is closed
                break
            if not part:
                break
            written += part
        code = process.wait(timeout=120)
    os.close(ours)
    return code, written


def test_a_terminal_gets_a_file_instead_of_a_model(net):
    code, written = on_terminal(["compress", "net.pt", *HINGE, "0.5"], net.parent)
    assert code == 0
    assert sorted(os.listdir(net.parent)) == ["net.hinge-0.5.safetensors", "net.pt"]
    assert b"wrote " in written
    assert b"\0" not in written
    assert b"__metadata__" not in written
    assert open_model(net.parent / "net.hinge-0.5.safetensors").recipe.steps


def test_a_command_on_a_terminal_without_a_model_is_wrong_usage(tmp_path):
    code, written = on_terminal(["compress", *HINGE, "0.5"], tmp_path)
    assert (code, written.strip()) == (2, b"compactcli: no model: give a file, or pipe one in")


def test_an_interrupt_is_exit_130(monkeypatch, net):
    def interrupted(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artefact, "open_model", interrupted)
    assert "interrupted" in one_line(run("analyze", net), 130)


def test_out_of_memory_is_one_line(monkeypatch, net):
    def too_large(*_arguments: object, **_options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(artefact, "open_model", too_large)
    assert "out of memory" in one_line(run("analyze", net))


# Real checkpoints


def test_a_real_network_is_recognised(checkpoints):
    tree = json.loads(run("analyze", "--json", checkpoints / "resnet56-4bfd9763.th").stdout)
    assert tree["model"]["arch"] == "cifar:resnet56"
    assert (tree["model"]["params"], tree["model"]["macs"]) == (853_018, 125_485_696)
    assert tree["model"]["size_bytes"] == (checkpoints / "resnet56-4bfd9763.th").stat().st_size


@pytest.mark.parametrize("command", ["evaluate", "finetune"])
@pytest.mark.parametrize("data", ["code:make", "folder"])
def test_no_data_that_a_file_names_is_run_or_read(tmp_path, monkeypatch, small, command, data):
    """A named dataset alone is taken from it, as nothing of that is in the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "class").mkdir(parents=True)
    (tmp_path / "code.py").write_text("import pathlib\n\ndef make(split):\n    pathlib.Path('ran').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    network = open_model(small)
    network.recipe = replace(network.recipe, dataset=data)
    artefact.save(network, str(small))
    line = one_line(run(command, small))
    assert line == f"compactcli: the file names {data!r} as its data, which is none of {', '.join(NAMES)}; give --data"
    assert not (tmp_path / "ran").exists()


def test_what_is_set_once_for_all_commands_contradicts_none(monkeypatch, tmp_path, small):
    """A flag's environment variable is left out where the flag would mean nothing, and be refused."""
    monkeypatch.setenv("COMPACTCLI_DATA", "digits")
    monkeypatch.setenv("COMPACTCLI_JSON", "1")
    for flags in (("--to", "artefact", "--fold-bn"), ("--to", "pt2")):
        assert run("export", small, *flags, "-o", tmp_path / "out").exit_code == 0
        assert "--data" in one_line(run("export", small, *flags, "--data", "digits", "-o", tmp_path / "out"), code=2)
    assert run("report", small, "--markdown").stdout.startswith("### ")
    assert "--json" in one_line(run("report", small, "--markdown", "--json"), code=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--arch-kwargs", "x=NaN"), "--arch-kwargs x=NaN: give a finite number"),
        (("--arch-kwargs", f"x={'[' * 100_000}"), "--arch-kwargs x: nested too deeply"),
        (("--arch", "cifar:resnet8", "--arch-kwargs", "in_channels=None"), "cannot take in_channels=None"),
        (("--input-shape", "3x3²x32"), "--input-shape 3x3²x32: give it as CxHxW"),
        (("--device", "meta", "--data", "digits"), "--device meta: not to be had here"),
        (("--device", "hpu", "--data", "digits"), "--device hpu: not to be had here"),
        (("--device", "banana", "--data", "digits"), "--device banana: not to be had here (torch has no device of that name;"),
        (("--std", "0", "--data", "digits"), "--std 0: each must be more than 0"),
    ],
)
def test_odd_values_are_refused_in_one_line(net, flags, message):
    result = run("evaluate", net, *flags, "-q")
    assert message in one_line(result, code=result.exit_code)
    assert result.exit_code in (1, 2)


def test_a_history_goes_through_a_pipe_line_by_line(net):
    """Each epoch once, as it ends: what reads them need not wait, or leave any out."""
    script = "compactcli finetune net.pt --data digits --limit 100 --epochs 2 -o out --history >(cat > epochs.jsonl); sleep 0.5"
    done = shell(script, net.parent)
    assert done.returncode == 0, done.stderr.decode()
    lines = (net.parent / "epochs.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2]


@pytest.mark.parametrize("command", [("finetune", "--data", "digits", "--teacher"), ("compress", *HINGE, "0.5", "--teacher")])
def test_no_teacher_is_written_over(net, small, command):
    before = net.read_bytes()
    line = one_line(run(command[0], small, *command[1:], net, "-o", net), code=2)
    assert line == f"compactcli: -o {net}: that is another file of this command; give one of its own"
    assert net.read_bytes() == before


@pytest.mark.parametrize("command", [("compress", *HINGE, "0.6"), ("finetune", "--data", "digits", "--epochs", "1")])
def test_the_only_copy_of_a_model_is_not_overwritten(net, command):
    before = net.read_bytes()
    line = one_line(run(command[0], net, *command[1:], "-o", net), code=2)
    assert line == f"compactcli: -o {net}: that is another file of this command; give one of its own"
    assert net.read_bytes() == before


def test_a_name_that_promises_another_format_is_told_of(net, tmp_path):
    path = tmp_path / "small.pt"
    done = run("compress", net, *HINGE, "0.6", "-o", path)
    assert (
        done.stderr.splitlines()[-1]
        == f"{path}: safetensors, whatever its name says; compactcli.load reads it, torch.load does not"
    )
    assert compactcli.load(path)
