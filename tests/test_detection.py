"""A network is recognised from its keys and shapes."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compactcli import architectures, detection, signatures
from compactcli.errors import CompactError

CHECKPOINTS = Path(__file__).parents[2] / "shared" / "checkpoints"
SHIPPED = json.loads(Path(detection.__file__).with_name("signatures.json").read_text())


def tensors(name: str, **kwargs: Any) -> dict[str, Tensor]:
    return dict(architectures.get(name, kwargs).build(device="meta").state_dict())


def refusal(state: dict[str, Tensor]) -> str:
    with pytest.raises(CompactError) as refused:
        detection.detect(state)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_index_is_that_of_the_definitions() -> None:
    assert signatures.index() == SHIPPED, "run scripts/index_architectures.py"
    assert {network["name"] for network in SHIPPED["networks"]} == set(architectures.names())


@pytest.mark.parametrize("classes", [{}, {"num_classes": 7}])
def test_every_indexed_network_is_recognised(classes: dict[str, int]) -> None:
    depths = ("cifar:resnet8", "cifar:resnet20", "cifar:resnet56")
    for network in SHIPPED["networks"]:
        name = network["name"]
        if network["tensors"] > 600 or (network["patterns"] < 8 and name not in depths):
            continue  # the largest of their families, and one family in eight kinds and eighteen depths
        built = architectures.get(name, network["kwargs"] | classes)
        found = detection.detect(built.build(device="meta").state_dict()).architecture
        assert found == built or (network["kwargs"] and found.name == f"timm:{name}")  # a variant that timm has weights of


@pytest.mark.parametrize(
    "kwargs", [{"width": 24}, {"in_channels": 1}, {"num_classes": 3, "in_channels": 4, "width": 8, "keys": "csg"}]
)
def test_width_and_channels_are_read_off_the_shapes(kwargs: dict[str, Any]) -> None:
    found = detection.detect(tensors("cifar:resnet20", **kwargs)).architecture
    assert found == architectures.get("cifar:resnet20", kwargs)
    assert found.input_shape == (kwargs.get("in_channels", 3), 32, 32)


def test_old_files_without_counters_are_recognised() -> None:
    state = {key: value for key, value in tensors("resnet18").items() if not key.endswith("num_batches_tracked")}
    assert detection.detect(state).architecture.name == "resnet18"


@pytest.mark.parametrize(
    ("file", "name", "keys", "shortcut", "mean"),
    [
        ("resnet20-12fca82f.th", "cifar:resnet20", "akamaster", "pad", 0.485),
        ("resnet56-4bfd9763.th", "cifar:resnet56", "akamaster", "pad", 0.485),
        ("resnet20-cifar10jpeg.th", "cifar:resnet20", "akamaster", "pad", 0.485),
        ("resnet56-cifar10jpeg.th", "cifar:resnet56", "akamaster", "pad", 0.485),
        ("csg-rn56_org.t7", "cifar:resnet56", "csg", "append", 0.4914),
    ],
)
def test_published_files_are_recognised(file: str, name: str, keys: str, shortcut: str, mean: float) -> None:
    if not CHECKPOINTS.is_dir():
        pytest.skip(f"no {CHECKPOINTS}")
    content = torch.load(CHECKPOINTS / file, weights_only=True, map_location="cpu")
    state = content.get("state_dict") or content["net"]
    detected = detection.detect({key.removeprefix("module."): tensor for key, tensor in state.items()})
    found = detected.architecture
    assert (found.name, found.kwargs, found.preprocessing.mean[0]) == (name, {"keys": keys, "shortcut": shortcut}, mean)
    assert detected.notes[0].startswith(f'shortcut taken as "{shortcut}"')
    assert "--arch-kwargs shortcut=" in detected.notes[0]


def test_notes_name_only_what_is_open() -> None:
    assert detection.detect(tensors("cifar:resnet20", shortcut="conv")).notes == ()
    assert detection.detect(tensors("cifar:vgg16")).notes == ()
    assert detection.detect(tensors("resnet34")).notes == ()
    (twins,) = detection.detect(tensors("resnet18")).notes
    assert twins == "taken as resnet18; the same tensors fit timm:resnetblur18: choose with --arch"
    (twins,) = detection.detect(tensors("resnet18", num_classes=3)).notes
    assert twins.endswith("choose with --arch --arch-kwargs num_classes=3")
    note, _ = detection.detect(tensors("resnet50")).notes
    assert note.startswith("preprocessing taken from ResNet50_Weights.IMAGENET1K_V2 (resize to 232)")
    (note,) = detection.detect(tensors("googlenet")).notes
    assert "--arch-kwargs transform_input=false" in note


def test_a_wrong_shape_is_named() -> None:
    state = tensors("resnet50") | {"fc.weight": torch.empty(10, 2048, 1)}
    assert refusal(state) == (
        "cannot name the architecture; nearest is resnet50, but fc.weight is 10x2048x1, not 1000x2048; try --arch NAME"
    )


def test_a_missing_and_an_unexpected_tensor_are_named() -> None:
    state = tensors("cifar:resnet56")
    state["layer1.0.scale"] = torch.empty(())
    assert "nearest is cifar:resnet56, but layer1.0.scale is unexpected" in refusal(state)
    del state["layer1.0.scale"], state["layer3.8.bn2.bias"]
    assert "nearest is cifar:resnet56, but layer3.8.bn2.bias is missing" in refusal(state)
    assert "nearest is cifar:resnet56 (keys=csg), but linear" not in refusal(state)


def test_the_number_of_classes_counts_only_where_it_explains_everything() -> None:
    state = tensors("resnet18", num_classes=10)
    state["fc.bias"] = torch.empty(11, device="meta")
    assert "nearest is resnet18 (num_classes=10), but fc.bias is 11, not 10" in refusal(state)


@pytest.mark.parametrize("key", ["", "a\nb", "x" * 100_000, "\ud800", "1" * 5000, "\x1b[31mred", "layer1.0.conv1.weight"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 0), (3, 1 << 40), (1 << 40, 3, 3, 3)])
def test_strange_tensors_are_refused(key: str, shape: tuple[int, ...]) -> None:
    message = refusal({key: torch.empty(shape, device="meta")})
    assert len(message) < 400
    assert message.isprintable()


@pytest.mark.parametrize("key", ["conv1.weight", "linear.weight", "layer2.0.conv1.weight"])
@pytest.mark.parametrize("shape", [(), (0,), (1,) * 64, (1 << 40, 64), (1 << 19, 3, 3, 3), (16, 1 << 40, 3, 3), (0, 3, 3, 3)])
def test_absurd_sizes_in_a_known_network_are_refused(key: str, shape: tuple[int, ...]) -> None:
    state = tensors("cifar:resnet8") | {key: torch.empty(shape, device="meta")}
    message = refusal(state)
    assert "nearest is cifar:resnet8" in message
    assert len(message) < 400


def test_nothing_and_thousands_of_unknown_keys_are_refused() -> None:
    assert refusal({}) == "there are no tensors to recognise a network by"
    state = {f"block{i}.weight": torch.empty(1) for i in range(20_000)}
    assert "no known network has keys like 'block0.weight'" in refusal(state)


def test_a_cifar_network_is_recognised_without_torchvision_and_fast() -> None:
    program = """
import sys, time
from compactcli import cifar, detection
state = cifar.NETWORKS["resnet56"]().state_dict()
start = time.process_time()
print(detection.detect(state).architecture.name, time.process_time() - start, "torchvision" in sys.modules)
"""
    name, seconds, imported = run(program).split()
    assert (name, imported) == ("cifar:resnet56", "False")
    assert float(seconds) < 0.3


def test_resnet50_is_recognised_fast() -> None:
    state = tensors("resnet50")
    start = time.process_time()
    detection.detect(state)
    assert time.process_time() - start < 0.5


def run(program: str) -> str:
    root = Path(detection.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout
