"""No damaged file brings anything but a result or one line. `python -m tests.fuzz` runs many more."""

import itertools
import os
import signal
import warnings
from pathlib import Path

import fuzz
import pytest

from compactcli.errors import CompactError

INPUTS = 150  # for each format


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_damaged_files(name):
    outcomes = [outcome for _, outcome in fuzz.campaign(fuzz.FORMATS[name], INPUTS)]
    assert [outcome.detail for outcome in outcomes if outcome.kind == "failed"] == []
    assert len(outcomes) == INPUTS
    assert any(outcome.kind == "refused" for outcome in outcomes)


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_the_seeds_are_good_files(name):
    form = fuzz.FORMATS[name]
    assert [fuzz.run(form.target, data) for data in form.seeds()] == [fuzz.Outcome("read")] * len(form.seeds())


def refuse(line: str) -> object:
    raise CompactError(line)


# The harness itself: each way to fail is seen as a failure.
@pytest.mark.parametrize(
    ("target", "kind", "detail"),
    [
        (lambda data: data, "read", ""),
        (lambda data: refuse("a line"), "refused", "a line"),
        (lambda data: refuse("two\nlines"), "failed", "two"),
        (lambda data: refuse("long" * 300), "failed", "long"),
        (lambda data: {}[data], "failed", "KeyError"),
        (lambda data: bytes(2 * fuzz.MEMORY), "failed", "MemoryError"),
        (lambda data: warnings.warn("careless", UserWarning, stacklevel=1), "failed", "careless"),
        (lambda data: os.kill(os.getpid(), signal.SIGKILL), "failed", "SIGKILL"),
        (lambda data: os._exit(3), "failed", "exit status"),
        (lambda data: signal.pause(), "failed", "SIGALRM"),
    ],
)
def test_the_harness_sees(monkeypatch, target, kind, detail):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(fuzz, "PATIENCE", 3)
    outcome = fuzz.run(target, b"key")
    assert outcome.kind == kind
    assert detail in outcome.detail


def test_the_harness_sees_what_never_ends(monkeypatch):
    """By the time of the CPU, so that a busy machine is no failure."""
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    assert "SIGPROF" in fuzz.run(lambda data: all(itertools.repeat(True)), b"").detail


@pytest.mark.parametrize("forbidden", [lambda: os.system("true"), lambda: Path(os.devnull).write_bytes(b"")])
def test_the_harness_sees_what_a_file_must_not_do(forbidden):
    def target(data: bytes) -> None:
        with fuzz.watched():
            forbidden()

    assert fuzz.run(target, b"").kind == "failed"
    assert "ForbiddenError" in fuzz.run(target, b"").detail


def test_inputs_depend_on_seed_and_number_alone():
    form = fuzz.FORMATS["safetensors"]
    every = [outcome for _, outcome in fuzz.campaign(form, 40, 7)]
    assert [outcome for _, outcome in fuzz.campaign(form, 10, 7, 30)] == every[30:]
    assert [outcome for _, outcome in fuzz.campaign(form, 40, 8)] != every


def test_a_child_that_ends_takes_no_other_input_with_it():
    def target(data: bytes) -> None:
        if data == b"3":
            os._exit(3)

    kinds = [outcome.kind for outcome in fuzz.run_all(target, lambda number: b"%d" % number, range(6))]
    assert kinds == ["read"] * 3 + ["failed"] + ["read"] * 2
