"""Odd numbers: weights, layers and images that say nothing are compressed or refused in one line, and nothing is spoilt."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from networks import named
from PIL import Image
from test_cli import one_line, run
from torch import Tensor, nn

from compactcli import methods, optim, report
from compactcli.artefact import Wishes, open_model
from compactcli.optim import Settings

METHODS = list(methods.names())
TRAINED = ("--epochs", "1", "--batch-size", "8")
WAYS: dict[str, tuple[str, ...]] = {"weights": (), "search": ("--data", "ten", *TRAINED)}  # a search calibrates in the end
INPUT = ("--mean", "0.5", "--std", "0.5")

# Checkpoints: what is done to a network's convolutions and batch norms


def _of(*kinds: type[nn.Module]) -> Callable[[nn.Module], list[Any]]:
    return lambda model: [module for module in model.modules() if isinstance(module, kinds)]


convolutions, norms = _of(nn.Conv2d), _of(nn.BatchNorm2d)


def _dead(model: nn.Module) -> None:
    for layer, norm in zip(convolutions(model), norms(model), strict=True):
        for tensor in (layer.weight, norm.weight, norm.bias):
            tensor[::2] = 0


def _scaled(by: float) -> Callable[[nn.Module], None]:
    return lambda model: [layer.weight.mul_(by) for layer in convolutions(model)] and None


SERVED: dict[str, Callable[[nn.Module], Any]] = {
    "half of the filters are dead": _dead,
    "one layer is dead": lambda model: convolutions(model)[2].weight.zero_(),
    "all layers are dead": _scaled(0.0),
    "the scales are zero": lambda model: [norm.weight.zero_() for norm in norms(model)],
    "all filters of a layer are one": lambda model: [
        c.weight.copy_(c.weight[:1].expand_as(c.weight)) for c in convolutions(model)
    ],
    "all weights are one number": lambda model: [c.weight.fill_(0.01) for c in convolutions(model)],
    "subnormal weights": _scaled(1e-40),
    "weights whose squares are subnormal": _scaled(1e-20),
    "variances of zero": lambda model: [norm.running_var[::2].zero_() for norm in norms(model)],
    "means far away": lambda model: [norm.running_mean.fill_(1e8) for norm in norms(model)],
}
REFUSED: dict[str, Callable[[nn.Module], Any]] = {  # from where on its outputs are not finite
    "layer1.0.conv2": _scaled(1e15),
    "layer1.0.bn1": lambda model: norms(model)[1].running_var[:1].fill_(-0.5),
}


def checkpoint(folder: Path, spoil: Callable[[nn.Module], Any]) -> nn.Module:
    """A network whose weights are spoilt, and its file."""
    model = named("cifar:resnet8", width=8, in_channels=1)
    with torch.no_grad():
        spoil(model)
    torch.save(model.state_dict(), folder / "net.pt")
    return model


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finite(path: Path, arch: str | None = None, shape: tuple[int, ...] = (1, 8, 8)) -> nn.Module:
    """The network in a file, whose outputs are finite."""
    module = open_model(str(path), Wishes(arch=arch)).module
    assert module(torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))).isfinite().all()
    return module


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spoil", SERVED)
def test_weights_that_say_nothing_are_compressed(spoil, method, way, folder):
    before = checkpoint(folder, SERVED[spoil])
    images(folder, "ten", 10, 3)
    result = run("compress", "net.pt", "--method", method, "--ratio", "0.7", "-o", "small.safetensors", *WAYS[way], "-q")
    assert result.exit_code == 0, result.output
    after = finite(folder / "small.safetensors")
    assert sum(p.numel() for p in after.parameters()) < sum(p.numel() for p in before.parameters())


@pytest.mark.parametrize("where", REFUSED)
@pytest.mark.parametrize(
    "command",
    [
        ("compress", "--method", "hinge", "--ratio", "0.5"),
        ("compress", "--method", "csg", "--ratio", "0.5", "--data", "ten"),
        ("compress", "--method", "fcf", "--ratio", "0.5", "--dry-run"),
        ("export", "--to", "onnx"),
        ("export", "--fold-bn"),
        ("analyze", "--methods", "--data", "ten"),
    ],
    ids=" ".join,
)
def test_outputs_that_are_not_finite_are_refused_by_where_that_begins(command, where, folder):
    checkpoint(folder, REFUSED[where])
    images(folder, "ten", 10, 3)
    output = () if command[0] == "analyze" or "--dry-run" in command else ("-o", "out")
    line = one_line(run(command[0], "net.pt", *command[1:], *output, "-q"))
    assert f"hold NaN or Inf, from {where} on" in line
    assert not (folder / "out").exists()


# Layers: one channel, nothing but 1x1, no batch norm, more kernel than image

OWN = """
from torch import nn

def block(i, o, k=3, **options):
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **options), nn.BatchNorm2d(o), nn.ReLU())

def pooled(*layers, width):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))

def single(): return pooled(block(1, 1), block(1, 1), block(1, 8), width=8)
def narrow(): return pooled(block(1, 2), block(2, 3), block(3, 2), width=2)
def alone(): return pooled(nn.Conv2d(1, 16, 3), width=16)
def bare(): return pooled(nn.Conv2d(1, 16, 3, bias=False), nn.Conv2d(16, 16, 3, bias=False), nn.ReLU(), width=16)
def pixel(): return pooled(block(1, 16, 1), block(16, 16), block(16, 16, 1), width=16)
def linear(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
def wide(): return pooled(block(1, 8, 7), block(8, 8, 5), block(8, 8), width=8)
def separable(): return pooled(block(1, 8), block(8, 8, groups=8), block(8, 16, 1), width=16)
def strided(): return pooled(*(block(1 if i == 0 else 16, 16, stride=2) for i in range(5)), width=16)
"""
NETWORKS = ["single", "narrow", "alone", "bare", "pixel", "linear", "wide", "separable", "strided"]


def own(folder: Path, name: str) -> tuple[str, ...]:
    """A network of one's own, and how its file is opened."""
    (folder / "own.py").write_text(OWN)
    space: dict[str, Any] = {}
    exec(OWN, space)
    torch.manual_seed(0)
    torch.save(space[name]().state_dict(), folder / "net.pt")
    return ("net.pt", "--arch", f"own.py:{name}", *INPUT)


def images(folder: Path, name: str, classes: int, each: int, size: int = 8, value: int | None = None) -> None:
    """A folder of grey images, random or all of one value."""
    generator = np.random.default_rng(0)
    for number in range(classes):
        (folder / name / str(number)).mkdir(parents=True)
        for index in range(each):
            pixels = generator.integers(0, 256, (size, size)) if value is None else np.full((size, size), value)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / str(number) / f"{index}.png")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_odd_layers_are_compressed_or_refused_in_one_line(name, method, way, folder):
    images(folder, "ten", 10, 3)
    result = run(
        *("compress", *own(folder, name), "--input-shape", "1x8x8", "--method", method, "--ratio", "0.6", "--nearest"),
        *("-o", "small.safetensors", *WAYS[way], "-q"),
    )
    if result.exit_code:
        assert "nothing" in one_line(result) or "no convolutions" in one_line(result)
        assert not (folder / "small.safetensors").exists()
    else:
        finite(folder / "small.safetensors", f"own.py:{name}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["pixel", "strided"])
def test_images_of_one_pixel(name, method, way, folder):
    images(folder, "ten", 10, 3, size=1)
    result = run(
        *("compress", *own(folder, name), "--input-shape", "1x1x1", "--method", method, "--ratio", "0.6"),
        *("-o", "small.safetensors", *WAYS[way], "-q"),
    )
    assert result.exit_code == 0, result.output
    finite(folder / "small.safetensors", f"own.py:{name}", (1, 1, 1))


# Images: none, of one class, all the same, one too many for a batch


@pytest.mark.parametrize("value", [0, 128])
@pytest.mark.parametrize("method", METHODS)
def test_images_that_are_all_the_same_calibrate_nothing_away(method, value, folder):
    images(folder, "ten", 10, 3, value=value)
    result = run(
        *("compress", *own(folder, "pixel"), "--input-shape", "1x8x8", "--method", method, "--ratio", "0.6", "--data", "ten"),
        *("-o", "small.safetensors", "-q"),
    )
    assert result.exit_code == 0, result.output
    finite(folder / "small.safetensors", "own.py:pixel")


@pytest.mark.parametrize(
    ("classes", "each", "said"),
    [
        (0, 0, ") and no folders of images"),
        (3, 0, "the folders in ten hold no images"),
        (1, 5, "has 1 class, the network 10"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "finetune", "compress"])
def test_folders_that_cannot_be_learnt_from(command, classes, each, said, folder):
    (folder / "ten").mkdir()
    images(folder, "ten", classes, each)
    given = {
        "evaluate": (),
        "finetune": (*TRAINED, "-o", "out"),
        "compress": ("--method", "hinge", "--ratio", "0.5", *TRAINED, "-o", "out"),
    }
    line = one_line(run(command, *own(folder, "pixel"), "--input-shape", "1x8x8", "--data", "ten", *given[command], "-q"))
    assert said in line
    assert not (folder / "out").exists()


def test_a_last_batch_of_one_image_is_no_batch(folder):
    images(folder, "ten", 10, 2)  # of 20 images 18 are trained on: two batches of 8, 2 are left; of 17 one would be
    for size in (8, 17):
        epoch = ("--epochs", "1", "--batch-size", str(size), "-o", f"{size}.safetensors", "-q")
        result = run("finetune", *own(folder, "pixel"), "--input-shape", "1x8x8", "--data", "ten", *epoch)
        assert result.exit_code == 0, result.output
        finite(folder / f"{size}.safetensors", "own.py:pixel")


# Numbers of a processor: oneDNN's bfloat16 gradients are wrong where a convolution reads less than its stride


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_gradients_are_right_where_a_convolution_reads_less_than_its_stride(size, stride, monkeypatch):
    monkeypatch.setattr(optim, "_computes_bfloat16", lambda device: True)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, stride=stride, padding=1, bias=False)).to(memory_format=torch.channels_last)
    settled = optim.settled(Settings(), model, (16, size, size))
    assert settled.precision == ("float32" if size < stride else "auto")
    image = torch.randn(8, 16, size, size, generator=torch.Generator().manual_seed(0))

    def gradient(image: Tensor, exact: bool) -> Tensor:
        torch.full((100_000,), 1e35)  # what memory held before
        own = model.double() if exact else model.float()
        own.zero_grad()
        with optim.autocast(Settings(precision="float32") if exact else settled):
            outputs = own(image)
        outputs.float().square().sum().backward()
        weight: Any = own[0].weight
        return weight.grad.double().clone()

    wanted = gradient(image.double(), exact=True)
    for _ in range(5):
        assert float((gradient(image, exact=False) - wanted).abs().max()) <= 0.05 * float(wanted.abs().max())


# Flags: numbers that are none

GIVEN: dict[str, tuple[str, ...]] = {
    "analyze": ("net.pt",),
    "bench": ("net.pt", "--repeats", "2", "--threads", "1"),
    "compress": ("net.pt", "--method", "hinge", "--ratio", "0.6", "--data", "ten", *TRAINED, "-o", "out"),
    "evaluate": ("net.pt", "--data", "ten"),
    "export": ("net.pt", "--dtype", "float16", "-o", "out"),
    "finetune": ("net.pt", "--data", "ten", *TRAINED, "-o", "out"),
    "report": ("net.pt",),
    "sweep": ("net.pt", "--methods", "hinge", "--ratios", "0.6", "-o", "out"),
}
TEXTS = ("mean", "std", "milestones", "ratios", "set")  # that hold numbers
NUMBERS = [
    (name, f"--{parameter.replace('_', '-')}")
    for name in GIVEN
    for parameter, kind in get_type_hints(import_module(f"compactcli.cli.{name}").command).items()
    if kind in (int, float, int | None, float | None) or parameter in TEXTS
    if parameter != "repeats"  # as many as one likes
]


@pytest.mark.parametrize("value", ["nan", "inf", str(10**20)])
@pytest.mark.parametrize(("name", "flag"), NUMBERS)
def test_numbers_that_are_none_are_served_or_refused_in_one_line(name, flag, value, folder, monkeypatch):
    monkeypatch.setattr(report, "LATENCY_SECONDS", 0.0)
    checkpoint(folder, lambda model: None)
    images(folder, "ten", 10, 3)
    result = run(name, *GIVEN[name], flag, f"factor={value}" if flag == "--set" else value)
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code in (0, 2)
    if result.exit_code:
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("compactcli: ")]
        assert flag.rpartition("-")[2] in line
        assert not (folder / "out").exists()
