"""An interrupted run ends where an unbroken one does, to the bit, whatever it trains with and wherever it broke."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from networks import named
from test_artefact import network as opened
from test_cli import one_line
from test_cli import run as command
from test_train import PREPROCESSING, dataset, network, same, weights
from torch import Tensor, nn

from compactcli import train
from compactcli.errors import CompactError
from compactcli.finetune import kept_run
from compactcli.history import EpochRecord, History, Watch
from compactcli.methods import Method, Progress
from compactcli.optim import Settings
from compactcli.resume import Store, read


class DeadError(Exception):
    """The process was killed."""


class Dual(Method):
    """A search with a variable of its own for each class, that learns from the weights and pulls at them."""

    def __init__(self) -> None:
        self.dual = torch.zeros(3)

    def regularise(self, model: nn.Module, progress: Progress) -> None:
        model.get_parameter("6.bias").grad.add_(self.dual)

    def project(self, model: nn.Module, progress: Progress) -> None:
        self.dual += 0.1 * model.get_parameter("6.bias").detach() + 0.01 * progress.share

    def state_dict(self) -> dict[str, Tensor]:
        return {"dual": self.dual}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.dual = state["dual"].clone()


def settings(**values: Any) -> Settings:
    return Settings(**{"epochs": 3, "batch_size": 16, "lr": 0.1, "precision": "float32", "save_every": 3, **values})


def store(path: Path, **identity: Any) -> Store:
    return Store(path / "run.resume.safetensors", identity, {"compactcli": "a recipe"})


def run(
    chosen: Settings, path: Path | None, *, die_at: int | None = None, resume: bool = False
) -> tuple[dict[str, Any], History]:
    """Weights and history of a run that may die after a number of batches."""
    batches = 0

    def progress(done: int, total: int) -> None:
        nonlocal batches
        batches += 1
        if batches == die_at:
            raise DeadError

    model, hook = network(), Dual()
    history = train.fit_(
        model,
        dataset(),
        PREPROCESSING,
        chosen,
        teacher=network(3, dropout=0),
        hooks=[hook],
        keep="last" if chosen.patience is None else "best",
        store=None if path is None else store(path),
        resume=resume,
        watch=Watch(progress=progress),
    )
    return {**weights(model), "dual": hook.dual}, history


KINDS = {
    "sgd": {},
    "adamw": {"optimizer": "adamw", "lr": 0.01},
    "average": {"ema": 0.9},
    "best": {"patience": 2, "schedule": "milestones"},
    "parts": {"accumulate": 3, "clip_grad": 0.5, "cutout": 2, "label_smoothing": 0.1},
    "bfloat16": {"precision": "bfloat16", "workers": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_an_unbroken_one(kind: str, tmp_path: Path) -> None:
    """108 images make 7 batches an epoch; killed before the first file, within epochs, at their ends, and twice."""
    chosen = settings(**KINDS[kind])
    whole, history = run(chosen, None)
    for number, deaths in enumerate([(2,), (4,), (7,), (8,), (14,), (20,), (9, 5)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        for death in deaths:
            with pytest.raises(DeadError):
                run(chosen, folder, die_at=death, resume=True)
        broken, resumed = run(chosen, folder, resume=True)
        assert same(whole, broken)
        assert [(r.epoch, r.loss, r.accuracy) for r in resumed.epochs] == [(r.epoch, r.loss, r.accuracy) for r in history.epochs]
        assert resumed.best_epoch == history.best_epoch


def test_keeping_a_run_does_not_change_it(tmp_path: Path) -> None:
    assert same(run(settings(), None)[0], run(settings(save_every=1), tmp_path)[0])


@pytest.mark.parametrize("values", [{}, {"epochs": 9, "lr": 0.0, "batch_norm": "frozen", "patience": 2}])
def test_a_run_that_has_ended_ends_again_at_once(values: dict[str, Any], tmp_path: Path) -> None:
    whole, first = run(settings(**values), tmp_path)
    again, second = run(settings(**values), tmp_path, die_at=1, resume=True)
    assert same(whole, again)
    assert first == second


def test_without_resume_a_run_begins_again(tmp_path: Path) -> None:
    whole, _ = run(settings(), None)
    with pytest.raises(DeadError):
        run(settings(), tmp_path, die_at=9)
    assert same(whole, run(settings(), tmp_path)[0])


def test_another_runs_file_is_refused_by_the_first_difference(tmp_path: Path) -> None:
    one = store(tmp_path, lr=0.1, data=["digits", 3])
    one.save({"model.w": torch.zeros(2)}, {"step": 1})
    assert store(tmp_path, lr=0.1, data=("digits", 3)).load()[1] == {"step": 1}  # a tuple is what JSON makes of it
    with pytest.raises(CompactError, match=r"the run there has lr 0.1, this one 0.2; give the same flags, or leave --resume out"):
        store(tmp_path, lr=0.2, data=["digits", 3]).load()


@pytest.mark.parametrize("content", [b"", b"nothing", safetensors.torch.save({"w": torch.zeros(1)})])
def test_what_is_no_run_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    path.write_bytes(content)
    with pytest.raises(CompactError, match=r"run\.safetensors (cannot be resumed from|is not what an interrupted)"):
        read(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda run, tensors: run["standing"].clear(),
        lambda run, tensors: run.update(standing=[]),
        lambda run, tensors: run.update(identity=[]),
        lambda run, tensors: run["standing"].update(step="many"),
        lambda run, tensors: run["standing"].update(loss_sum=10**400),
        lambda run, tensors: run["standing"].update(records=[{"epoch": 0}]),
        lambda run, tensors: run["standing"].update(best=99),
        lambda run, tensors: tensors.pop(next(name for name in tensors if name.startswith("model."))),
        lambda run, tensors: tensors.pop(next(name for name in tensors if name.startswith("best."))),
    ],
)
def test_a_damaged_run_is_one_line(change: Callable[[Any, Any], Any], tmp_path: Path) -> None:
    kind = settings(**KINDS["best"])
    with pytest.raises(DeadError):
        run(kind, tmp_path, die_at=9)
    path = store(tmp_path).path
    tensors, metadata = read(path)
    told = json.loads(metadata["compactcli_run"])
    change(told, tensors)
    safetensors.torch.save_file(tensors, path, {**metadata, "compactcli_run": json.dumps(told)})
    with pytest.raises(CompactError, match="leave --resume out to begin") as caught:
        run(kind, tmp_path, resume=True)
    assert str(caught.value).isprintable()


# The command, really killed

PROCESS = (sys.executable, "-m", "compactcli")


def finetune(folder: Path, *flags: str) -> list[str]:
    images = ["--data", "digits", "--epochs", "2", "--save-every", "2", "--batch-size", "100", "--precision", "float32"]
    return ["finetune", str(folder / "net.pt"), *images, "-o", str(folder / "out"), *flags]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    torch.save(named("cifar:resnet8", width=4, num_classes=10).state_dict(), folder / "net.pt")
    return folder


def piped(arguments: list[str]) -> list[str]:
    """The same in a process of its own, with the network from stdin."""
    return [*PROCESS, *(part for part in arguments if not part.endswith("net.pt"))]


def output(folder: Path) -> bytes:
    return (folder / "out").read_bytes()


@pytest.fixture(scope="module")
def unbroken(small: Path) -> bytes:
    assert command(*finetune(small)).exit_code == 0
    assert sorted(os.listdir(small)) == ["net.pt", "out"]  # the run's file is gone with the run
    return output(small)


@pytest.mark.parametrize("flags", [(), ("--workers", "2"), ("--save-every", "100", "--history", "epochs.jsonl")])
def test_the_same_seed_gives_the_same_file(
    flags: tuple[str, ...], small: Path, unbroken: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, and in one of its own."""
    (tmp_path / "net.pt").write_bytes((small / "net.pt").read_bytes())
    monkeypatch.chdir(tmp_path)
    if flags:
        assert command(*finetune(tmp_path, *flags)).exit_code == 0
    else:
        subprocess.run([*PROCESS, *finetune(tmp_path)], check=True, capture_output=True)
    assert output(tmp_path) == unbroken
    if "--history" in flags:
        epochs = [json.loads(line) for line in (tmp_path / "epochs.jsonl").read_text().splitlines()]
        assert [epoch["epoch"] for epoch in epochs] == [0, 1, 2]
        assert set(epochs[0]) == {field.name for field in fields(EpochRecord)}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_command_goes_on_to_the_same_file(number: signal.Signals, small: Path, unbroken: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes((small / "net.pt").read_bytes())
    kept = tmp_path / "out.resume.safetensors"
    with subprocess.Popen([*PROCESS, *finetune(tmp_path)], stderr=subprocess.PIPE) as process:
        while not kept.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        errors = process.communicate()[1].decode()
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    assert number == signal.SIGKILL or errors.splitlines()[-1] == "compactcli: interrupted; --resume goes on from there"
    assert sorted(os.listdir(tmp_path)) == ["net.pt", "out.resume.safetensors"]
    done = command(*finetune(tmp_path, "--resume"))
    assert (done.exit_code, "resumed at step" in done.stderr) == (0, True)
    assert output(tmp_path) == unbroken
    assert sorted(os.listdir(tmp_path)) == ["net.pt", "out"]


def test_what_is_left_of_a_run_is_enough_to_end_it(small: Path, unbroken: bytes, tmp_path: Path) -> None:
    """Without the network that it began with, which may have come through a pipe."""
    (tmp_path / "net.pt").write_bytes((small / "net.pt").read_bytes())
    kept = tmp_path / "out.resume.safetensors"
    with subprocess.Popen([*PROCESS, *finetune(tmp_path)], stderr=subprocess.DEVNULL) as process:
        while not kept.exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    (tmp_path / "net.pt").unlink()
    subprocess.run(piped(finetune(tmp_path, "--resume")), check=True, capture_output=True, stdin=subprocess.DEVNULL)
    assert output(tmp_path) == unbroken


def test_a_model_on_stdin_is_not_passed_over_for_what_a_run_left(small: Path, tmp_path: Path) -> None:
    """What a pipeline made anew goes on only if it is the network that the run began with."""
    given = piped(finetune(tmp_path))
    model = (small / "net.pt").read_bytes()
    subprocess.run([*given, "--time-limit", "0.01"], check=True, capture_output=True, input=model)
    other = io.BytesIO()
    torch.save(named("cifar:resnet8", width=8, num_classes=10).state_dict(), other)
    done = subprocess.run([*given, "--resume"], check=False, capture_output=True, input=other.getvalue())
    assert done.returncode == 1
    assert b"the run there has network" in done.stderr
    done = subprocess.run([*given, "--resume"], check=True, capture_output=True, input=model)
    assert b"resumed at step" in done.stderr


@pytest.mark.parametrize("limit", ["1000", "0.01"])
def test_the_runs_file_stays_only_where_the_time_was_up(limit: str, small: Path, unbroken: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes((small / "net.pt").read_bytes())
    assert command(*finetune(tmp_path, "--time-limit", limit)).exit_code == 0
    late = limit == "0.01"
    assert sorted(os.listdir(tmp_path)) == ["net.pt", "out", *(["out.resume.safetensors"] if late else [])]
    if late:
        assert command(*finetune(tmp_path, "--resume", "--time-limit", "1000")).exit_code == 0
    assert output(tmp_path) == unbroken
    assert sorted(os.listdir(tmp_path)) == ["net.pt", "out"]


def test_a_run_goes_on_with_the_images_and_labels_that_it_began_with(tmp_path: Path) -> None:
    """A folder of the same name may hold as many others."""
    network, images, chosen = opened(), dataset(), settings()
    assert images.train is not None
    assert images.train.labels is not None
    begun = kept_run(tmp_path / "run.safetensors", network, images, chosen, None).identity
    assert kept_run(tmp_path / "run.safetensors", network, dataset(), chosen, None).identity == begun
    read_ = images.train.read
    for part in (
        replace(images.train, read=lambda index: 255 - read_(index)),
        replace(images.train, labels=images.train.labels.flip(0)),
    ):
        other = kept_run(tmp_path / "run.safetensors", network, replace(images, train=part), chosen, None).identity
        assert {name for name in begun if begun[name] != other[name]} == {"images"}


@pytest.mark.parametrize("name", ["net.pt", "out"])
def test_the_history_is_never_written_over_another_file(name: str, small: Path, tmp_path: Path) -> None:
    before = (small / "net.pt").read_bytes()
    (tmp_path / "net.pt").write_bytes(before)
    flags = ("--history", str(tmp_path / name))
    told = one_line(command(*finetune(tmp_path, *flags)), 2)
    assert "that is another file of this command; give one of its own" in told
    assert os.listdir(tmp_path) == ["net.pt"]
    assert (tmp_path / "net.pt").read_bytes() == before


@pytest.mark.parametrize("name", ["net.pt", "out", "epochs.jsonl"])
def test_the_run_is_never_kept_in_another_file(name: str, small: Path, tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes((small / "net.pt").read_bytes())
    flags = ("--history", str(tmp_path / "epochs.jsonl"), "--state", str(tmp_path / name))
    told = one_line(command(*finetune(tmp_path, *flags)), 2)
    assert "that is another file of this command; give one of its own" in told
    assert os.listdir(tmp_path) == ["net.pt"]


def test_a_file_that_is_no_run_is_not_replaced(small: Path, tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes((small / "net.pt").read_bytes())
    (tmp_path / "mine.safetensors").write_bytes(safetensors.torch.save({"w": torch.zeros(1)}))
    told = one_line(command(*finetune(tmp_path, "--state", str(tmp_path / "mine.safetensors"))))
    assert "is not what an interrupted training run left" in told
