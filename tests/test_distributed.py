"""Processes that train together do what one does alone."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worker import trained
from networks import SHAPE, named
from torch import nn

from compactcli import batchnorm, distributed, optim
from compactcli.artefact import open_model
from compactcli.errors import CompactError

TESTS = Path(__file__).parent


def torchrun(*arguments: str, folder: Path, **options: Any) -> subprocess.CompletedProcess[Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], cwd=folder, capture_output=True, env=environment, **options)


KINDS = ("frozen", "sync", "residual", "plain", "parts", "hook", "uneven", "uneven sync", "different")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of two processes found, which join once for all kinds."""
    folder = tmp_path_factory.mktemp("together")
    done = torchrun(str(TESTS / "distributed_worker.py"), str(folder), *KINDS, folder=folder)
    assert done.returncode == 0, done.stderr.decode()
    found = {name: [json.loads((folder / f"{name}.{rank}").read_text()) for rank in (0, 1)] for name in (*KINDS, "threads")}
    assert found.pop("threads") == [[], []]  # they abort an interpreter that ends before them
    return found


@pytest.mark.parametrize("what", ["frozen", "sync", "residual"])
def test_two_processes_take_the_steps_of_one(what: str, together: dict[str, Any]) -> None:
    """20 steps in float32: batch-norm with its running statistics, and with those of all processes' images."""
    first, second = together[what]
    assert first["weights"] == second["weights"]
    single = trained(what)
    assert len(single["losses"]) == 20
    assert first["losses"] == pytest.approx(single["losses"], rel=1e-4)
    assert single["losses"][-1] < 0.9 * single["losses"][0]
    assert first["accuracy"] == second["accuracy"]


@pytest.mark.parametrize("what", ["plain", "parts", "hook"])
def test_all_processes_have_the_same_weights(what: str, together: dict[str, Any]) -> None:
    """Each with batch-norm over its own images; with batches in parts; with what a method adds behind the mean gradient."""
    first, second = together[what]
    assert first == second


@pytest.mark.parametrize("what", ["uneven", "uneven sync"])
def test_uneven_shares_and_small_rests_are_trained_on(what: str, together: dict[str, Any]) -> None:
    """Seven batches of 15 and a rest of three that is too small to share; in parts, with averaged weights."""
    first, second = together[what]
    assert first == second
    single = trained(what)
    assert len(single["losses"]) == len(first["losses"]) == 3
    if what == "uneven":  # synchronised statistics are of a part, and parts are other images
        assert first["losses"] == pytest.approx(single["losses"], rel=1e-4)


def test_what_synchronised_batch_norm_would_lose_is_refused() -> None:
    class Active(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).relu()

    message = "--sync-bn does not know Active; leave it out, or take --freeze-bn"
    with pytest.raises(CompactError, match=message), batchnorm.synchronised(nn.Sequential(Active(3)), True):
        pass


def test_different_networks_are_refused(together: dict[str, Any]) -> None:
    assert {found["error"] for found in together["different"]} == {
        "process 1 has another network, other settings or other data; give all the same"
    }


def quiet(told: bytes) -> list[str]:
    """The lines of stderr, of which none is a warning."""
    lines = told.decode().splitlines()
    assert not any("Warning" in line for line in lines)
    return lines


def test_the_command_in_two_processes(tmp_path: Path) -> None:
    """One reads stdin, writes to a pipe, and talks."""
    content = io.BytesIO()
    torch.save(named("cifar:resnet8", width=4).state_dict(), content)
    flags = ("--data", "digits", "--epochs", "1", "--limit", "200", "--sync-bn")
    done = torchrun("-m", "compactcli", "finetune", *flags, folder=tmp_path, input=content.getvalue())
    assert done.returncode == 0, done.stderr.decode()
    assert [line.partition(" ")[0] for line in quiet(done.stderr)].count("epoch") == 1
    assert os.listdir(tmp_path) == []
    step = open_model(done.stdout).recipe.steps[0]
    assert (step.command, step.options["batch_norm"]) == ("finetune", "sync")


def test_a_search_and_fine_tuning_in_two_processes(tmp_path: Path) -> None:
    """One of them writes one file, and tells how it went."""
    torch.save(named("cifar:resnet8", width=4, num_classes=10).state_dict(), tmp_path / "net.pt")
    stages = ("--epochs", "1", "--finetune-epochs", "1", "--batch-size", "200", "--precision", "float32")
    flags = ("net.pt", "--method", "hinge", "--ratio", "0.6", "--data", "digits", "-o", "out", *stages)
    done = torchrun("-m", "compactcli", "compress", *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pt", "out"]
    assert done.stdout == b""
    assert "\n".join(quiet(done.stderr)).count("groups are gone after the search") == 1
    assert [step.command for step in open_model(tmp_path / "out").recipe.steps] == ["compress", "finetune"]


def test_heads_that_only_train_are_not_waited_for() -> None:
    from networks import AWKWARD

    assert optim.ignores_outputs(AWKWARD["several_outputs"](), SHAPE)
    assert not optim.ignores_outputs(named("cifar:resnet8"), (3, 32, 32))


def test_one_process_is_the_main_one() -> None:
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.shared("value") == "value"
    assert distributed.total([1, 2]) == [1, 2]
    with distributed.joined("cuda:3") as device:
        assert device == "cuda:3"


def test_synchronised_batch_norm_comes_and_goes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    image = torch.randn(2, 3, 4, 4)
    expected = model(image)
    with batchnorm.synchronised(model, True):
        assert "forward" in vars(model[1])
        torch.testing.assert_close(model(image), expected)
    assert "forward" not in vars(model[1])


def test_frozen_batch_norm_keeps_its_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
    batchnorm.train_(model, "frozen")
    model(torch.randn(2, 3, 4, 4))
    assert torch.equal(model[0].running_mean, torch.zeros(3))
    assert model[1].training


def test_tensors_on_the_cpu_are_shared_beside_those_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a search ends with lies on the CPU, and is shared from there."""
    begun: list[str] = []
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: begun.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with distributed.joined("cuda") as device:
        assert device == "cuda:0"
    (backend,) = begun
    assert dict(part.split(":") for part in backend.split(",")) == {"cpu": "gloo", "cuda": "nccl"}
