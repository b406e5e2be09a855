"""What other programs get is what the network computes: read back from the bytes, in ONNX Runtime, torch.export, timm."""

import copy
import functools
import io
import json
from pathlib import Path
from typing import Any

import networks
import pytest
import safetensors.torch
import torch
from networks import AWKWARD, named, outputs, randomise_
from test_artefact import network
from test_compress import own
from torch import Tensor, nn

from compactcli import artefact, export, kernels
from compactcli.artefact import Network, Wishes
from compactcli.compress import Target, compress
from compactcli.errors import CompactError
from compactcli.export import TOLERANCE, simplify_
from compactcli.kernels import VECTOR
from compactcli.methods import get, names

METHODS = tuple(names())
# Two known networks, and two small ones with what is awkward to export.
ARCHITECTURES = ("cifar:resnet8", "squeezenet1_1", "shuffle_module", "depthwise", "input_in_place")
FORMS = [*(("hinge", name) for name in ARCHITECTURES), *((method, "cifar:resnet8") for method in METHODS if method != "hinge")]
IDS = ["-".join(form) for form in FORMS]


@functools.cache
def made(method: str | None, name: str) -> Network:
    """A network with random weights, compressed from the weights; shared, for nothing may change it."""
    if name in AWKWARD:
        given = own(randomise_(AWKWARD[name]()))
    else:
        shape, kwargs = ((3, 32, 32), {"width": 8}) if name == "cifar:resnet8" else ((3, 64, 64), {"num_classes": 7})
        given = network(name, shape, **kwargs)
    if method is None:
        return given
    return compress(given, method, get(method)(), Target(0.6))


@functools.cache
def written(to: str, method: str | None, name: str, fold_bn: bool = False) -> export.Exported:
    given = made(method, name)
    before = artefact.dumps(given)
    result = export.export(given, to, fold_bn=fold_bn)
    assert artefact.dumps(given) == before
    return result


def images(given: Network, batch: int) -> Tensor:
    """Others than the library compares on."""
    return torch.randn(batch, *given.input_shape, generator=torch.Generator().manual_seed(77 + batch))


def assert_close(found: Tensor, given: Network, example: Tensor) -> None:
    wanted = outputs(given.module, example)[0]
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())


def onnx_run(session: Any, image: Tensor) -> Tensor:
    (result,) = session.run(["logits"], {"input": image.numpy()})
    return torch.from_numpy(result)


def onnx_model(data: bytes) -> Any:
    return pytest.importorskip("onnx").load_from_string(data)


def pt2_load(data: bytes) -> tuple[nn.Module, dict[str, Any]]:
    files = {"compactcli.json": ""}
    program = torch.export.load(io.BytesIO(data), extra_files=files)
    return program.module(), json.loads(files["compactcli.json"])


@pytest.mark.parametrize(("method", "name"), FORMS, ids=IDS)
def test_onnx_computes_the_same(method, name):
    given, result = made(method, name), written("onnx", method, name)
    pytest.importorskip("onnx.checker").check_model(result.data, full_check=True)
    session = pytest.importorskip("onnxruntime").InferenceSession(result.data)
    for batch in (1, 3, 5):
        assert_close(onnx_run(session, images(given, batch)), given, images(given, batch))
    assert 0 <= result.difference <= TOLERANCE


@pytest.mark.parametrize(("method", "name"), FORMS, ids=IDS)
def test_pt2_computes_the_same(method, name):
    given, result = made(method, name), written("pt2", method, name, fold_bn=True)
    module, _ = pt2_load(result.data)
    for batch in (1, 3, 5):
        with torch.no_grad():
            assert_close(module(images(given, batch)), given, images(given, batch))
    floats = {tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point()}
    assert floats == {torch.float32}


def test_some_of_the_forms_are_no_plain_networks():
    """Else folding ours would be tested on nothing."""
    made_anew = {method for method in METHODS if kernels.layers(made(method, "cifar:resnet8").module)}
    assert made_anew == {"linearconv", "csg", "hetconv"}


def test_folded_batch_norms_are_gone():
    plain, folded = (pt2_load(written("pt2", "hinge", "cifar:resnet8", fold).data)[0].state_dict() for fold in (False, True))
    assert any("running_var" in name for name in plain)
    assert not any("running_var" in name for name in folded)


def test_names_shapes_and_what_the_input_is_made_of():
    given = made("hinge", "cifar:resnet8")
    wanted = {"architecture": "cifar:resnet8", "input_shape": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3}
    model = onnx_model(written("onnx", "hinge", "cifar:resnet8").data)
    (put,), (got,) = model.graph.input, model.graph.output
    assert (put.name, got.name) == ("input", "logits")
    assert [d.dim_value or d.dim_param for d in put.type.tensor_type.shape.dim] == ["batch", 3, 32, 32]
    assert [d.dim_value or d.dim_param for d in got.type.tensor_type.shape.dim] == ["batch", 10]
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert found.pop("architecture") == "cifar:resnet8"
    assert found.pop("interpolation") == "bilinear"
    assert {key: json.loads(value) for key, value in found.items()} == {k: v for k, v in wanted.items() if k != "architecture"}
    _, facts = pt2_load(written("pt2", "hinge", "cifar:resnet8", fold_bn=True).data)
    assert facts == {**wanted, "interpolation": "bilinear"} == export.facts(given)


def test_nothing_in_the_files_is_of_this_machine():
    """Neither the weights beside them: all is in one file, and twice the same bytes."""
    onnx, pt2 = (written(to, "hinge", "cifar:resnet8", to == "pt2").data for to in ("onnx", "pt2"))
    assert all(Path(torch.__file__).parents[1].name.encode() not in data for data in (onnx, pt2))
    assert all(each.data_location == 0 for each in onnx_model(onnx).graph.initializer)  # none is external
    assert export.export(made("hinge", "cifar:resnet8"), "pt2", fold_bn=True).data == pt2


@pytest.mark.parametrize(("width", "parts"), [(8, 2), (16, 2), (16, 4), (32, 2), (32, 8)])
def test_onnx_has_no_groups_that_leave_vectors_empty(width, parts):
    pytest.importorskip("onnxruntime")
    given = network("cifar:resnet8", width=width)
    small = compress(given, "hetconv", get("hetconv")(get("hetconv").Options(parts=parts)), Target(0.95))
    divided = {name: layer for name, layer in kernels.layers(small.module).items() if layer.parts == parts}
    assert divided
    model = onnx_model(export.export(small, "onnx").data)
    weights = {each.name: list(each.dims) for each in model.graph.initializer}
    found = []
    for node in model.graph.node:
        groups = next((each.i for each in node.attribute if each.name == "group"), 1)
        if groups > 1:
            outputs, inputs, *_ = weights[node.input[1]]
            found.append((groups, outputs // groups, inputs))
    assert all(outputs % VECTOR == 0 == inputs % VECTOR for _, outputs, inputs in found)
    fills = [layer for layer in divided.values() if all(size // parts % VECTOR == 0 for size in layer.shape[:2])]
    assert len([groups for groups, *_ in found if groups == parts]) == len(fills) * (2 if parts == 2 else 1)


def test_index_buffers_stay_integer():
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("index", torch.tensor([2, 0, 1, 1]))
            self.layer = nn.Conv2d(4, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.index_select(1, self.index)).mean((2, 3))

    given = own(randomise_(Picks()))
    module, _ = pt2_load(export.export(given, "pt2").data)
    assert {name: tensor.dtype for name, tensor in module.state_dict().items()}["index"] == torch.int64
    model = onnx_model(export.export(given, "onnx").data)
    (gather,) = (node for node in model.graph.node if node.op_type == "Gather")
    types = {each.name: each.data_type for each in model.graph.initializer}
    assert types[gather.input[1]] == 7  # INT64


def test_all_outputs_have_names():
    given = own(networks.several_outputs(), networks.SHAPE)
    count = len(outputs(given.module, images(given, 2)))
    assert count > 1
    model = onnx_model(export.export(given, "onnx").data)
    assert [each.name for each in model.graph.output] == ["logits", *(f"logits_{index}" for index in range(1, count))]
    module, _ = pt2_load(export.export(given, "pt2").data)
    for found, wanted in zip(module(images(given, 3)), outputs(given.module, images(given, 3)), strict=True):
        torch.testing.assert_close(found, wanted)


# Plain weights, and timm


@pytest.mark.parametrize(
    ("method", "ending"), [(None, ".pth"), ("linearconv", ".safetensors"), ("csg", ".pth"), ("hetconv", ".safetensors")]
)
def test_weights_fit_their_own_architecture(method, ending):
    given = made(method, "cifar:resnet8")
    data = export.export(given, "weights", ending=ending).data
    state = safetensors.torch.load(data) if ending == ".safetensors" else torch.load(io.BytesIO(data), weights_only=True)
    plain = named("cifar:resnet8", width=8).eval()
    plain.load_state_dict(state)
    assert_close(outputs(plain, images(given, 3))[0], given, images(given, 3))


@pytest.mark.parametrize("method", ["hinge", "fcf"])
def test_weights_of_another_structure_are_refused(method):
    message = r"weights alone do not say what this network is: \S+ is \S+( \S+)?, in a plain cifar:resnet8 .*use --to onnx"
    with pytest.raises(CompactError, match=message):
        export.export(made(method, "cifar:resnet8"), "weights")


def test_weights_of_a_users_own_network_need_its_factory(tmp_path):
    source = tmp_path / "mine.py"
    source.write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))\n"
    )
    given = artefact.fresh(Wishes(f"{source}:make", input_shape=(3, 8, 8)), 0)
    state = safetensors.torch.load(export.export(given, "weights", arch=f"{source}:make").data)
    assert all(torch.equal(tensor, state[name]) for name, tensor in given.module.state_dict().items())
    with pytest.raises(CompactError, match="give it again with --arch"):
        export.export(given, "weights")


@pytest.mark.parametrize("name", ["timm:resnet18", "resnet18"])
def test_timm_loads_what_is_its_own(timm, name, tmp_path):
    given = network(name, (3, 32, 32), num_classes=6)
    lines: list[str] = []
    data = export.export(given, "timm", ending=".safetensors", log=lines.append).data
    path = tmp_path / "net.safetensors"
    path.write_bytes(data)
    assert 'timm.create_model("resnet18", num_classes=6, checkpoint_path=FILE) loads it' in lines
    model = timm.create_model("resnet18", num_classes=6, checkpoint_path=str(path))
    assert_close(outputs(model, images(given, 2))[0], given, images(given, 2))


def test_timm_is_refused_what_it_does_not_have(timm):
    with pytest.raises(CompactError, match="timm has no cifar:resnet8; use --to onnx or --to pt2"):
        export.export(made(None, "cifar:resnet8"), "timm")
    with pytest.raises(CompactError, match=r"weights alone do not say what this network is: .* in timm's resnet18"):
        export.export(compress(network("timm:resnet18", (3, 32, 32)), "hinge", get("hinge")(), Target(0.8)), "timm")


# What is checked, and what is refused


@pytest.mark.parametrize("to", ["pt2", "weights"])
def test_outputs_that_differ_are_refused(to, monkeypatch):
    """A weight is changed on the way."""
    given = made(None, "cifar:resnet8")

    def spoilt(module: nn.Module, log: object) -> None:
        next(module.parameters()).data.mul_(1.01)

    monkeypatch.setattr(export, "_zero_subnormals_", spoilt)
    with pytest.raises(CompactError, match=r"differ at batch 1 and 3 by up to \S+ of the largest output.*nothing was written"):
        export.export(given, to)


def test_outputs_that_are_not_numbers_are_refused():
    given = copy.deepcopy(made(None, "cifar:resnet8"))
    given.module.linear.bias.data[0] = float("nan")
    with pytest.raises(CompactError, match=r"linear\.bias holds NaN or Inf"):
        export.export(given, "weights")


def test_subnormal_numbers_become_zero():
    given = copy.deepcopy(made(None, "cifar:resnet8"))
    given.module.conv1.weight.data.flatten()[:3] = torch.tensor([1e-39, -1e-40, 1.2e-38])  # the last is normal
    given.module.bn1.running_mean[0] = 1e-42
    lines: list[str] = []
    state = safetensors.torch.load(export.export(given, "weights", log=lines.append).data)
    assert "zeroed 3 subnormal numbers, which slow CPUs down" in lines
    assert state["conv1.weight"].flatten()[:3].tolist() == [0, 0, pytest.approx(1.2e-38)]
    assert given.module.bn1.running_mean[0] != 0
    found = artefact.open_model(artefact.dumps(simplify_(given, fold_bn=False)))
    assert found.module.bn1.running_mean[0] == 0
    assert found.recipe.steps == ()
    export.export(found, "weights", log=(quiet := []).append)
    assert not any("subnormal" in line for line in quiet)


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name != "onnx" else object())
    with pytest.raises(CompactError, match=r'^--to onnx needs onnxscript and onnxruntime; pip install "compactcli\[onnx\]"$'):
        export.export(made(None, "cifar:resnet8"), "onnx")
    monkeypatch.setattr("compactcli.architectures.has_timm", lambda: False)
    with pytest.raises(CompactError, match=r'^--to timm needs timm; pip install "compactcli\[timm\]"$'):
        export.export(made(None, "cifar:resnet8"), "timm")


def test_code_that_cannot_be_traced_is_refused_in_one_line():
    given = own(networks.branching(), networks.SHAPE)
    with pytest.raises(CompactError, match=r"^own: torch.export cannot take this network: [^\n]+; try another --to$"):
        export.export(given, "pt2")
