"""timm's networks are recognised from their tensors, and never taken for what they are not."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from compactcli import architectures, artefact, detection, signatures
from compactcli.errors import CompactError
from compactcli.signatures import Entry

INDEX = json.loads(Path(signatures.__file__).with_name("signatures-timm.json").read_text())
RECOGNISED = [
    *("convnext_atto", "efficientnet_b0", "hardcorenas_a", "lcnet_050", "mobilenetv3_large_100", "mobilenetv4_conv_small"),
    *("regnetx_002", "repghostnet_050", "repvgg_a0", "resnet18", "starnet_s1", "tinynet_e"),
]


def tensors(name: str, **kwargs: Any) -> dict[str, Tensor]:
    return dict(architectures.get(f"timm:{name}", kwargs).build(device="meta").state_dict())


def refusal(state: dict[str, Tensor]) -> str:
    with pytest.raises(CompactError) as refused:
        detection.detect(state)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def shipped(name: str) -> list[Entry]:
    return [entry for entry in signatures.timms() if entry.name == f"timm:{name}"]


def test_a_sample_of_the_index_is_that_of_the_definitions(timm: Any) -> None:
    if INDEX["version"] != [timm.__version__]:
        pytest.skip(f"the index is of timm {INDEX['version'][0]}")
    names = timm.list_models()
    assert {entry.name for entry in signatures.timms()} <= {f"timm:{name}" for name in names}
    for name in names[7::180]:
        described = signatures.describe(name)
        assert described == [replace(entry, forward=0) for entry in shipped(name)], "run scripts/index_architectures.py --timm"


def test_the_index_leaves_out_only_what_cannot_be_built(timm: Any) -> None:
    if INDEX["version"] != [timm.__version__]:
        pytest.skip(f"the index is of timm {INDEX['version'][0]}")
    left_out = sorted({f"timm:{name}" for name in timm.list_models()} - {entry.name for entry in signatures.timms()})
    for name in left_out[::9]:
        with pytest.raises(CompactError, match="cannot be built"):
            architectures.get(name).build(device="meta")
    assert all(name.startswith("timm:vit") for name in left_out)


@pytest.mark.parametrize(
    "names", [["resnet18", "resnetblur18"], ["mobilenetv3_small_050"], ["mobilenetv3_small_075", "tf_mobilenetv3_small_075"]]
)
def test_who_makes_the_same_of_the_same_tensors_is_measured(timm: Any, names: list[str]) -> None:
    entries = [entry for name in names for entry in shipped(name)]
    assert len({entry.fingerprint for entry in entries}) == 1
    assert signatures.forwards([replace(entry, forward=0) for entry in entries]) == entries
    assert [entry.forward for entry in entries] == list(range(len(names)))


@pytest.mark.parametrize("name", RECOGNISED)
def test_a_bare_file_opens_as_the_network_it_is(timm: Any, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = architectures.get(f"timm:{name}").build(initialise=True).eval()
    safetensors.torch.save_file(network.state_dict(), tmp_path / "bare.safetensors")
    found = artefact.open_model(tmp_path / "bare.safetensors")
    assert found.recipe.architecture in (f"timm:{name}", name)
    image = torch.randn(1, *found.input_shape)
    with torch.no_grad():
        torch.testing.assert_close(found.module(image), network(image))


@pytest.mark.parametrize("name", ["densenet121", "inception_v3", "dpn68", "fastvit_t8", "resnet50_clip_gap"])
def test_class_counts_and_input_channels_are_read_off(timm: Any, name: str) -> None:
    kwargs = {"num_classes": 7, "in_chans": 1}
    expected = tensors(name, **kwargs)
    found = detection.detect(expected).architecture
    assert found.kwargs["num_classes"] == 7
    definition = found.build(device="meta").state_dict()
    assert {key: value.shape for key, value in definition.items()} == {key: value.shape for key, value in expected.items()}


def test_the_plainest_of_twins_is_taken_and_others_are_named(timm: Any) -> None:
    found = detection.detect(tensors("tf_efficientnet_b0"))
    assert found.architecture.name == "timm:efficientnet_b0"
    assert found.notes == (
        "taken as timm:efficientnet_b0; the same tensors fit timm:tf_efficientnet_b0, timm:efficientnet_blur_b0: "
        "choose with --arch",
    )
    assert detection.detect(tensors("efficientnet_el_pruned", num_classes=3)).architecture.name == "timm:efficientnet_el"
    assert detection.detect(tensors("lcnet_050")).notes == ()


def test_torchvisions_come_before_timms(timm: Any) -> None:
    found = detection.detect(tensors("resnetaa50"))
    assert found.architecture.name == "resnet50"
    assert found.notes[-1].startswith("taken as resnet50; the same tensors fit timm:resnetaa50, timm:resnetblur50: choose")
    assert detection.detect(tensors("resnet34")).notes == ()


def test_a_near_miss_is_explained(timm: Any) -> None:
    state = tensors("seresnet50") | {"fc.weight": torch.empty(10, 2048, 1)}
    assert "nearest is timm:seresnet50, but fc.weight is 10x2048x1, not 1000x2048; try --arch" in refusal(state)
    state = tensors("convnext_atto", num_classes=10)
    del state["stages.3.blocks.1.norm.weight"]
    assert "nearest is timm:convnext_atto (num_classes=10), but stages.3.blocks.1.norm.weight is missing" in refusal(state)


def test_detection_is_fast(timm: Any) -> None:
    for name in ("efficientnet_b0", "densenet121"):
        state = tensors(name, num_classes=7)
        start = time.process_time()
        detection.detect(state)
        assert time.process_time() - start < 1


@pytest.mark.parametrize("name", ["regnetx_002", "levit_128", "vgg11"])
@pytest.mark.parametrize(("axis", "size"), [(0, 0), (0, 1 << 40), (1, 0), (1, 1 << 40)])
def test_absurd_ends_are_refused(timm: Any, name: str, axis: int, size: int) -> None:
    state = tensors(name)
    for key in (shipped(name)[0].classes, shipped(name)[0].channels)[axis]:
        shape = list(state[key].shape)
        state[key] = torch.empty([*shape[:axis], size, *shape[axis + 1 :]], device="meta")
    assert f"nearest is timm:{name}, but " in refusal(state)


IMAGINARY = {"stem.kernel": torch.empty(4, 3, 3, 3), "top.kernel": torch.empty(10, 4)}


def imaginary(name: str) -> Entry:
    """An entry of timm's index that says of IMAGINARY that it is this network."""
    shapes = signatures.shapes_of(IMAGINARY)
    keys, patterns = signatures.signature(shapes), signatures.patterns_of(shapes)
    ends: tuple[tuple[str, ...], tuple[str, ...]] = (("top.kernel",), ("stem.kernel",))
    return Entry(f"timm:{name}", {}, keys, len(shapes), patterns, signatures.fingerprint(shapes, *ends), 0, *ends)


def test_without_timm_its_networks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "timms", lambda: (imaginary("wonder"),))
    monkeypatch.setattr(detection, "has_timm", lambda: False)
    monkeypatch.setattr(architectures, "has_timm", lambda: False)
    assert refusal(IMAGINARY) == "these are the tensors of timm:wonder; pip install compactcli[timm]"
    assert "of timm:wonder;" in refusal(IMAGINARY | {"top.kernel": torch.empty(77, 4), "stem.kernel": torch.empty(4, 1, 3, 3)})
    near = refusal(IMAGINARY | {"top.kernel": torch.empty(10, 5)})
    assert "nearest is timm:wonder, which only timm can compare (pip install compactcli[timm]); try --arch" in near
    near = refusal(IMAGINARY | {"top.offset": torch.empty(10)})
    assert "nearest is timm:wonder, which only timm" in near


@pytest.mark.parametrize("name", ["lcnet_050", "no_such_network"])
def test_an_index_of_another_version_is_not_believed(timm: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "timms", lambda: (imaginary(name),))
    assert "cannot name the architecture; nearest is timm:" in refusal(IMAGINARY)


def test_what_the_index_does_not_know_yet_is_built_and_compared(timm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tuple(replace(entry, fingerprint="") for entry in shipped("lcnet_050"))
    monkeypatch.setattr(detection, "timms", lambda: old)
    assert detection.detect(tensors("lcnet_050")) == detection.Detection(architectures.get("timm:lcnet_050"), ())


def test_the_index_is_small() -> None:
    assert Path(signatures.__file__).with_name("signatures-timm.json").stat().st_size < 400_000


def test_a_variant_that_torchvision_has_no_weights_of_is_taken_for_timms():
    """Inception without auxiliary heads: torchvision's rescales its input, timm's does not."""
    found = detection.detect(architectures.get("timm:inception_v3").build(device="meta").state_dict())
    assert found.architecture.name == "timm:inception_v3"
    whole = detection.detect(architectures.get("inception_v3").build(device="meta").state_dict())
    assert whole.architecture.name == "inception_v3"
