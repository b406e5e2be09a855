"""Faults from outside: the old output or the new one is there, whole; one line says what happened, and the exit code is 1."""

import os
import re
import resource
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import COMMAND, HINGE, net, one_line, run, small  # noqa: F401  # fixtures
from test_numbers import images

from compactcli import artefact, checkpoint, data, export, report, train
from compactcli.errors import CompactError

ROOM = 1000  # bytes that a file may have on a full disk
OLD = b"what was there before"
TRAINED = ("--data", "digits", "--limit", "60", "--epochs", "1", "--batch-size", "16")
WRITERS: dict[str, list[str]] = {
    "compress": ["compress", "small.safetensors", *HINGE, "0.5", "-o", "out"],
    "finetune": ["finetune", "small.safetensors", *TRAINED, "--teacher", "none", "-o", "out"],
    "sweep": ["sweep", "net.pt", "--methods", "hinge", "--ratios", "0.6", "-o", "out"],
    "weights": ["export", "net.pt", "--to", "weights", "-o", "out"],
    "half": ["export", "net.pt", "--dtype", "float16", "-o", "out"],
    "page": ["report", "small.safetensors", "--html", "out"],
    "table": ["bench", "net.pt", "--threads", "1", "--repeats", "2", "--save", "out"],
}
ENDED = WRITERS | {"search": ["compress", "net.pt", *HINGE, "0.6", *TRAINED, "-o", "out"]}
OWN = {
    "a syntax error": ("def load(:", r"cannot load own\.py:load: SyntaxError: "),
    "an error while it is imported": ("1 / 0", r"cannot load own\.py:load: ZeroDivisionError: division by zero; it must be "),
    "an error in the function": (
        "def load(split): raise OSError('the disk is\\ngone')",
        r"own\.py:load failed for 'train': OSError: the disk is gone; --debug shows where",
    ),
    "images alone": ("import torch\ndef load(split): return torch.zeros(3, 1, 8, 8)", r"own\.py:load gave no pair of images and"),
    "a word": ("def load(split): return 'ab'", r"own\.py:load gave no pair of images and labels, as tensors or arrays"),
}


@pytest.fixture(autouse=True)
def short_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LATENCY_SECONDS", 0.0)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may be larger than ROOM, as none can be where there is no room."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_every_file_as_it_was(name, small, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").write_bytes(OLD)
    before = files(tmp_path)
    with full_disk():
        line = one_line(run(*WRITERS[name], "-q"))
    assert "file too large" in line
    assert files(tmp_path) == before
    assert run(*WRITERS[name], "-q").exit_code == 0  # and it is the disk alone
    assert (tmp_path / "out").read_bytes() != OLD


@pytest.mark.parametrize("name", ["compress", "search", "sweep"])
def test_a_command_that_is_ended_leaves_the_old_output(name, small, tmp_path):  # noqa: F811
    (tmp_path / "out").write_bytes(OLD)
    process = subprocess.Popen([*shlex.split(COMMAND), *ENDED[name], "-q"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    time.sleep(1.5)  # while it imports, or works
    process.terminate()
    _, told = process.communicate(timeout=60)
    # SIGTERM: Python itself was still starting. SIGINT: `python -m` ends so once an interrupt has passed through exec(),
    # which dataclasses call while torch is imported; to a shell that is 130 as well.
    assert process.returncode in (-signal.SIGTERM, -signal.SIGINT, 130, 0)
    if process.returncode in (-signal.SIGINT, 130):
        assert re.fullmatch("compactcli: interrupted(; --resume goes on from there)?\n", told)
    if process.returncode:
        assert (tmp_path / "out").read_bytes() == OLD


NO_STDOUT, FULL = "compactcli: stdout: bad file descriptor\n", "compactcli: stdout: no space left on device\n"
STREAMS = {  # what the shell does with them: exit code, what stderr says
    "--help >&-": (1, NO_STDOUT),
    "--help >/dev/full": (1, FULL),
    "methods >&-": (1, NO_STDOUT),
    "methods >/dev/full": (1, FULL),
    "report small.safetensors >&-": (1, NO_STDOUT),
    "export small.safetensors --dtype float16 -q >&-": (1, NO_STDOUT),
    "export small.safetensors --dtype float16 -q >/dev/full": (1, FULL),
    "report <&-": (1, "compactcli: no model on stdin (did the command before it fail?)\n"),
    "report small.safetensors -q <&- >report": (0, ""),
    "compress small.safetensors --method hinge --ratio 0.9 -o again 2>&-": (0, ""),
    "compress small.safetensors --method hinge --ratio 0.9 -o again 2>/dev/full": (0, ""),
    "compress none.pt --method hinge --ratio 0.9 -o again 2>/dev/full": (1, ""),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is full")
@pytest.mark.parametrize("case", STREAMS)
def test_closed_and_full_streams_are_one_line(case, small, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    result = subprocess.run(f"{COMMAND} {case}", shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == STREAMS[case]
    if " -o again" in case and result.returncode == 0:
        whole = run("compress", "small.safetensors", *HINGE, "0.9", "-q")
        assert (tmp_path / "again").read_bytes() == whole.stdout_bytes


def test_too_small_an_address_space_is_one_line(small, tmp_path):  # noqa: F811
    room = f"ulimit -v {200 * 1024}; {COMMAND} report small.safetensors"
    result = subprocess.run(room, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr == "compactcli: out of memory; try a smaller --batch-size or --limit\n"


def test_a_checkpoint_that_changes_while_it_is_read_is_refused(net, monkeypatch):  # noqa: F811
    inner = checkpoint._read_file

    def slow(file: Any, *arguments: Any) -> Any:
        found = inner(file, *arguments)
        with net.open("ab") as other:
            other.write(b"more")
        return found

    monkeypatch.setattr(checkpoint, "_read_file", slow)
    line = one_line(run("report", net, "-q"))
    assert line.endswith("net.pt: was written to while it was read; try again once it is whole")


@pytest.mark.parametrize("command", [["bench", "net.pt", "--save"], ["finetune", "net.pt", *TRAINED, "-o", "out", "--history"]])
def test_what_cannot_be_written_is_told_before_the_work(command, net, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(artefact, "open_model", too_much)
    assert "the folder 'nowhere' does not exist" in one_line(run(*command, "nowhere/file"))
    (tmp_path / "folder").mkdir()
    assert "folder: is a folder; give a file" in one_line(run(*command, "folder"))


def test_two_processes_that_write_one_file_leave_one_of_theirs(net, tmp_path):  # noqa: F811
    ratios = ("0.5", "0.7")
    wanted = [run("compress", net, *HINGE, ratio).stdout_bytes for ratio in ratios]
    own = [[*shlex.split(COMMAND), "compress", str(net), *HINGE, ratio, "-q", "-o", "both"] for ratio in ratios]
    processes = [subprocess.Popen(each, cwd=tmp_path) for each in own]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert (tmp_path / "both").read_bytes() in wanted
    assert sorted(os.listdir(tmp_path)) == ["both", "net.pt"]


@pytest.mark.parametrize("case", OWN)
def test_code_of_the_users_own_that_fails_is_one_line(case, net, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    body, message = OWN[case]
    (tmp_path / "own.py").write_text(body)
    line = one_line(run("evaluate", net, "-q", "--data", "own.py:load"))
    assert re.search(message, line), line


def test_arrays_are_as_good_as_tensors(net, tmp_path):  # noqa: F811
    path = tmp_path / "own.py"
    told = []
    for library, dtype in (("numpy", "uint8"), ("torch", "uint8")):
        path.write_text(f"import {library} as l\ndef load(split): return l.zeros((9, 1, 8, 8), dtype=l.{dtype}), l.arange(9)")
        told.append(run("evaluate", net, "--data", f"{path}:load").stdout)
    assert told[0] == told[1]
    assert "on 9 test images" in told[0]


def too_much(*arguments: Any, **options: Any) -> None:
    torch.empty(1 << 50)


@pytest.mark.parametrize("error", [None, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")])
def test_no_memory_is_one_line(error, net, monkeypatch):  # noqa: F811
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(report, "evaluate", too_much if error is None else fail)
    line = one_line(run("evaluate", net, "-q", "--data", "digits"))
    assert line == "compactcli: out of memory; try a smaller --batch-size or --limit"


def test_no_memory_in_a_library_is_no_fault_of_the_network(net, monkeypatch):  # noqa: F811
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "_traced", too_much)
    line = one_line(run("export", net, "--to", "onnx", "-o", "out", "-q"))
    assert line == "compactcli: out of memory; try a smaller --batch-size or --limit"


@pytest.mark.parametrize("error", [MemoryError(), CompactError("what the user can help"), OSError(28, "no space left")])
def test_debug_shows_where_it_was(error, net, monkeypatch):  # noqa: F811
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(report, "evaluate", fail)
    assert run("evaluate", net, "-q", "--data", "digits", "--debug").exception is error


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"no image")], ids=["gone", "damaged"])
def test_an_image_that_is_lost_in_mid_epoch_ends_in_one_line_and_the_run_goes_on(damage, net, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "MEMORY_LIMIT", 20_000)  # bytes: images are decoded when it is their turn
    images(tmp_path, "ten", 10, 8)
    lost = tmp_path / "ten" / "3" / "5.png"
    pixels, whole = lost.read_bytes(), train._Run.train_batch
    command = ["finetune", net, "--data", "ten", "--epochs", "2", "--batch-size", "8", "--save-every", "1", "-q", "-o"]
    result = run(*command, "unbroken")
    assert result.exit_code == 0, result.output

    def losing(self: Any, *arguments: Any) -> tuple[bool, bool]:
        if self.step == 11:  # in the second epoch
            damage(lost)
        return whole(self, *arguments)

    (tmp_path / "out").write_bytes(OLD)
    with monkeypatch.context() as patched:
        patched.setattr(train._Run, "train_batch", losing)
        line = one_line(run(*command, "out"))
    assert "ten/3/5.png" in line.replace(os.sep, "/")
    assert (tmp_path / "out").read_bytes() == OLD
    lost.write_bytes(pixels)
    assert run(*command, "out", "--resume").exit_code == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "unbroken").read_bytes()
