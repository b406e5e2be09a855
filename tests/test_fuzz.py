"""No damaged file brings anything but a result or one line. `python -m tests.fuzz` runs many more."""

import os
import signal
import warnings

import fuzz
import pytest

from compactcli.errors import CompactError

FORMATS = fuzz.formats()
INPUTS = 30  # for each of seven formats


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(name):
    target, seeds = FORMATS[name]
    outcomes = [outcome for _, outcome in fuzz.campaign(target, seeds, INPUTS)]
    assert [outcome.detail for outcome in outcomes if outcome.kind == "failed"] == []
    assert any(outcome.kind == "refused" for outcome in outcomes)


@pytest.mark.parametrize("name", FORMATS)
def test_the_seeds_are_good_files(name):
    target, seeds = FORMATS[name]
    assert [fuzz.run(target, data) for data in seeds] == [fuzz.Outcome("read")] * len(seeds)


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
    monkeypatch.setattr(fuzz, "SECONDS", 2)
    outcome = fuzz.run(target, b"key")
    assert outcome.kind == kind
    assert detail in outcome.detail


def test_the_same_seed_gives_the_same_inputs():
    target, seeds = FORMATS["safetensors"]
    first, second = ([data for data, _ in fuzz.campaign(target, seeds, 5, seed)] for seed in (7, 7))
    assert first == second
