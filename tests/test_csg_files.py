"""Files of CSG's authors: recognised, computed as the authors do, kept in the recipe, trained and compressed further."""

import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from networks import named, outputs
from test_cli import run
from torch import Tensor, nn

import compactcli
from compactcli import architectures, artefact, data, finetune, kernels, measure, methods, report, sources
from compactcli.artefact import Wishes, dumps, open_model
from compactcli.compress import Target, compress
from compactcli.errors import CompactError, UsageError
from compactcli.methods import _csg_files, csg, get
from compactcli.optim import Settings
from compactcli.recipe import Recipe, Replace, Share

RESNET = {"code": "conv_a", "code2": "conv_b"}  # by the code's name, the kernel beside it
DENSENET = {"code2": "conv2"}
FILES = {
    "csg-rn56_1616-128.t7": ("cifar:resnet56", RESNET, "16x16x3x3, code 128", 347_162),
    "csg-rn20_1616-128.t7": ("cifar:resnet20", RESNET, "16x16x3x3, code 72", 176_698),
    "csg-dnbc4036-csg1212-72.t7": ("cifar:densenet_bc40_36", DENSENET, "12x12x3x3, code 72", 842_842),
}  # PAPERS.md, 4.4
SHARED = "compactcli_shared.csg_3x3.weight"
SMALL = {"keys": "csg", "width": 4, "in_channels": 1}


def theirs(network: nn.Module, places: dict[str, str], side: int, code: int, generator: str = "CLG.weight") -> dict[str, Tensor]:
    """The network's tensors as the authors have them: random codes for some kernels, and under every block the generator."""
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(side * side * 9, code, generator=draw) / math.sqrt(code)
    tensors: dict[str, Tensor] = {}
    for key, tensor in network.state_dict().items():
        block, _, layer = key.removesuffix(".weight").rpartition(".")
        name = next((name for name, place in places.items() if place == layer and tensor.ndim == 4 and block), None)
        if name is None:
            tensors[key] = tensor
            continue
        outputs, inputs = tensor.shape[:2]
        scale = 1 / math.sqrt(9 * inputs)
        slices = math.ceil(outputs / side) * math.ceil(inputs / side)
        tensors[f"{block}.{name}"] = scale * torch.randn(slices, code, generator=draw)
        tensors[f"{block}.{generator}"] = weight
    return {f"module.{key}": tensor for key, tensor in tensors.items()}


def plain(name: str, tensors: dict[str, Tensor], places: dict[str, str], **kwargs: Any) -> nn.Module:
    """The network by hand: each kernel is the row-major view of what the generator makes, cropped."""
    network = architectures.get(name, kwargs).build()
    state = network.state_dict()
    own = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    for key in [*own]:
        block, _, last = key.rpartition(".")
        if last in places:
            target = f"{block}.{places[last]}.weight"
            generator = next(own[f"{block}.{kind}.weight"] for kind in ("CLG", "CSG") if f"{block}.{kind}.weight" in own)
            (o, i, height, width), side = state[target].shape, math.isqrt(len(generator) // 9)
            down, along = math.ceil(o / side) * side, math.ceil(i / side) * side
            own[target] = (own.pop(key) @ generator.T).reshape(down, along, height, width)[:o, :i]
    network.load_state_dict({key: tensor for key, tensor in own.items() if not key.endswith(("CLG.weight", "CSG.weight"))})
    return network


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save({"net": tensors, "acc": 92.96, "epoch": 156}, path)
    return path


def image(network: artefact.Network) -> Tensor:
    return torch.randn(4, *network.input_shape, generator=torch.Generator().manual_seed(0))


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A narrow ResNet-8 of theirs, for digits."""
    return write(tmp_path / "small.t7", theirs(named("cifar:resnet8", **SMALL), RESNET, 4, 6))


@pytest.mark.parametrize(
    ("name", "kwargs", "places", "side", "code", "generator"),
    [
        ("cifar:resnet20", {"keys": "csg"}, RESNET, 16, 20, "CLG.weight"),
        ("cifar:resnet20", {"keys": "csg"}, RESNET, 12, 9, "CSG.weight"),  # of which some codes make nothing
        ("cifar:resnet20", {"keys": "csg", "width": 8, "num_classes": 7, "in_channels": 1}, RESNET, 6, 5, "CSG.weight"),
        ("cifar:resnet20", {}, {"code": "conv1", "code2": "conv2"}, 16, 20, "CSG.weight"),  # and of others' names
        ("cifar:densenet_bc40_36", {}, DENSENET, 12, 8, "CLG.weight"),
    ],
)
def test_a_file_of_theirs_is_the_network_that_it_is_by_hand(tmp_path, name, kwargs, places, side, code, generator):
    tensors = theirs(named(name, **kwargs), places, side, code, generator)
    found = open_model(write(tmp_path / "theirs.t7", tensors))
    assert found.recipe.architecture == name
    assert found.recipe.kwargs.items() >= kwargs.items()
    assert f"recognised as {name} with csg slices {side}x{side}x3x3, code {code}" in found.notes
    state = found.module.state_dict()
    assert [key for key in state if key.startswith("compactcli_shared")] == [SHARED]
    assert torch.equal(state[SHARED], next(tensor for key, tensor in tensors.items() if key.endswith(generator)))
    assert not any(key.endswith(generator) for key in state)
    counted = {id(tensor): tensor.numel() for key, tensor in tensors.items() if "running_" not in key and "num_b" not in key}
    assert measure.params(found.module) == sum(counted.values()) == found.recipe.source.measures.params
    assert_near(*outputs(found.module, image(found)), *outputs(plain(name, tensors, places, **kwargs), image(found)))


def test_the_shortcut_may_be_chosen_otherwise(small):
    found = open_model(small)
    assert found.notes[-1].startswith('shortcut taken as "append"')
    other = open_model(small, Wishes(arch_kwargs={"shortcut": "pool"}))
    assert other.recipe.kwargs["shortcut"] == "pool"
    assert other.notes[-1] == "recognised as cifar:resnet8 with csg slices 4x4x3x3, code 6"
    assert not torch.equal(*outputs(found.module, image(found)), *outputs(other.module, image(found)))


def test_half_precision_becomes_single(tmp_path, small):
    tensors = torch.load(small, weights_only=True)["net"]
    halves = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    found = open_model(write(tmp_path / "half.t7", halves))
    assert {parameter.dtype for parameter in found.module.parameters()} == {torch.float32}
    assert torch.equal(found.module.state_dict()[SHARED], halves["module.stage_1.0.CLG.weight"].float())
    assert measure.params(found.module) == measure.params(open_model(small).module)


def test_the_artefact_is_the_same_network(tmp_path, small):
    found = open_model(small)
    path = tmp_path / "saved.safetensors"
    artefact.save(found, str(path))
    again = open_model(path)
    assert torch.equal(*outputs(again.module, image(found)), *outputs(found.module, image(found)))
    assert dumps(again) == path.read_bytes()
    assert again.recipe == Recipe.loads(found.recipe.dumps())
    (step,) = again.recipe.steps
    assert (step.command, step.method, step.error) == ("open", "csg", None)
    assert step.options == {"slice": "4x4", "code": 6, "order": "rows"}
    assert (step.measures.params, step.measures.macs) == (
        measure.params(found.module),
        measure.macs(found.module, found.input_shape),
    )
    assert [type(edit) for edit in step.edits] == [Share, *[Replace] * 6]
    assert_near(*outputs(compactcli.load(path, channels_last=False), image(found)), *outputs(found.module, image(found)))
    assert again.module.state_dict().keys() == compactcli.load(path, fold=False).state_dict().keys()


def change(key: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def changed(tensors: dict[str, Tensor]) -> None:
        tensors[f"module.{key}"] = value(tensors[f"module.{key}"])

    return changed


def drop(*keys: str) -> Callable[[dict[str, Tensor]], None]:
    def dropped(tensors: dict[str, Tensor]) -> None:
        for key in keys:
            del tensors[f"module.{key}"]

    return dropped


def resized(shape: tuple[int, ...]) -> Callable[[dict[str, Tensor]], None]:
    def changed(tensors: dict[str, Tensor]) -> None:
        tensors |= {key: torch.zeros(shape) for key in tensors if key.endswith("CLG.weight")}

    return changed


NONE = "no known network has the other tensors and just those kernels besides"
REFUSALS: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "another generator": (
        change("stage_2.0.CLG.weight", lambda weight: weight + 1e-7),
        "stage_2.0.CLG.weight is not the generator of csg that stage_1.0.CLG.weight is",
    ),
    "a shorter generator": (change("stage_3.0.CLG.weight", lambda weight: weight[:-1]), "stage_3.0.CLG.weight is not"),
    "a code too few": (drop("stage_2.0.code"), f"codes of csg for 5 kernels, but {NONE}"),
    "a code in another block": (
        lambda tensors: tensors.update({"module.stage_1.0.code3": tensors.pop("module.stage_2.0.code")}),
        NONE,
    ),
    "a row too few": (
        change("stage_3.0.code2", lambda code: code[1:]),
        "stage_3.0.code2 is 15x6, and a kernel 16x16x3x3 in slices 4x4 has codes 16x6",
    ),
    "longer codes": (change("stage_1.0.code", lambda code: torch.cat([code, code], 1)), "stage_1.0.code is 1x12, and"),
    "a flat code": (change("stage_1.0.code", lambda code: code.flatten()), "stage_1.0.code is 6, and"),
    "a norm too few": (drop("stage_2.0.bn_a.bias"), NONE),
    "a wider norm": (change("stage_2.0.bn_a.bias", lambda bias: torch.cat([bias, bias])), NONE),
    "no square": (resized((9 * 15, 6)), "a generator of 135 numbers makes no square slices for a kernel 4x4x3x3"),
    "nothing": (resized((0, 6)), "a generator of 0 numbers makes no square slices for a kernel 4x4x3x3"),
    "a flat generator": (resized((144,)), "stage_1.0.CLG.weight is 144, and no generator of csg"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_file_that_does_not_hold_together_is_refused_in_one_line(tmp_path, small, changed, message):
    tensors = torch.load(small, weights_only=True)["net"]
    changed(tensors)
    with pytest.raises(CompactError) as caught:
        open_model(write(tmp_path / "damaged.t7", tensors))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_other_files_are_nobody_s():
    state = dict(named("cifar:resnet8", keys="csg").state_dict())
    assert methods.recognise(state) is None
    assert methods.recognise({}) is None
    assert methods.recognise(state | {"stage_1.0.CLG.weight": torch.zeros(144, 6)}) is None
    assert methods.recognise(state | {"stage_1.0.code": torch.zeros(1, 6)}) is None


def test_a_report_compares_with_the_file_as_it_was(monkeypatch, small):
    monkeypatch.setattr(report, "LATENCY_SECONDS", 0.01)
    found = open_model(small)
    tree = report.report(found, None, None)
    assert (tree["ratios"]["params"], tree["ratios"]["macs"], tree["ratios"]["size_bytes"]) == (1, 1, 1)
    assert [(step["command"], step["method"]) for step in tree["steps"]] == [("open", "csg")]
    assert all(layer["before"] == layer["after"] for layer in tree["layers"])


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    preprocessing = architectures.get("cifar:resnet8", SMALL).preprocessing
    return sources.open_dataset("digits", input_shape=(1, 32, 32), preprocessing=preprocessing, limit=200)


def test_such_a_network_is_finetuned(tmp_path, small, digits):
    found = open_model(small)
    assert finetune.find_teacher(found, None) is None  # it is the original
    before = {key: tensor.clone() for key, tensor in found.module.state_dict().items()}
    tuned = finetune.finetune(found, digits, Settings(epochs=2, lr=0.05, batch_size=32, precision="float32"), keep="last")
    after = tuned.module.state_dict()
    assert all(not torch.equal(after[key], before[key]) for key in before if key.endswith((".code", SHARED)))
    path = tmp_path / "tuned.safetensors"
    artefact.save(tuned, str(path))
    again = open_model(path)
    assert torch.equal(*outputs(again.module, image(again)), *outputs(tuned.module, image(again)))
    teacher = finetune.find_teacher(again, None)
    assert teacher is not None
    assert_near(*outputs(teacher.module, image(again)), *outputs(open_model(small).module, image(again)))


@pytest.mark.parametrize("method", ["linearconv", "csg"])
def test_such_a_network_is_compressed_by_folding_it_first(tmp_path, small, method):
    found, lines = open_model(small), []
    kind = get(method)
    compress(found, method, kind(kind.Options()), Target(0.9, nearest=True), log=lines.append)
    assert lines[0] == f"{method}: made 6 layers of an earlier step plain: what it had saved there is undone"
    assert [step.command for step in found.recipe.steps] == ["open", "compress"]
    path = tmp_path / "small.safetensors"
    artefact.save(found, str(path))
    again = open_model(path)
    assert torch.equal(*outputs(again.module, image(found)), *outputs(found.module, image(found)))
    hooks = methods.attached(again.recipe, again.module)
    assert [type(hook).__name__ for hook in hooks] == ["CSG", kind.__name__]
    assert all(parameter.requires_grad for parameter in again.module.parameters())
    assert report._layers(again)


def test_a_compressed_one_finds_the_file_as_its_baseline(tmp_path, small):
    found = open_model(small)
    kind = get("linearconv")
    compress(found, "linearconv", kind(kind.Options()), Target(0.9, nearest=True))
    baseline = artefact.open_beside(small, found)
    assert len(kernels.layers(baseline.module)) == 6
    assert baseline.recipe == open_model(small).recipe


def test_generators_are_read_from_their_files(tmp_path, small):
    (kernel, given), *others = _csg_files.generators(str(small)).items()
    assert (kernel, given.shape, others) == ((3, 3), (4, 4), [])
    artefact.save(open_model(small), str(tmp_path / "ours.safetensors"))
    (ours,) = _csg_files.generators(str(tmp_path / "ours.safetensors")).values()
    assert torch.equal(ours.weight, given.weight)
    torch.save(named("cifar:resnet8").state_dict(), tmp_path / "plain.pt")
    with pytest.raises(CompactError, match=r"plain\.pt: there is no generator of csg in it"):
        _csg_files.generators(str(tmp_path / "plain.pt"))


@pytest.mark.parametrize(
    "broken",
    [
        *({key: None} for key in ("height", "width", "outputs", "inputs", "code")),
        *({key: value} for key in ("height", "outputs", "code") for value in (0, 5)),
    ],
    ids=str,
)
def test_a_generator_that_is_not_what_its_recipe_says_is_one_line(tmp_path, small, broken):
    """Whichever of the sizes is absent or another: never a traceback."""
    found, name = open_model(small), tmp_path / "broken.safetensors"
    content = dumps(found)
    tensors = safetensors.torch.load(content)
    tree = json.loads(found.recipe.dumps())
    for edit in (edit for step in tree["steps"] for edit in step["edits"] if edit["kind"] == "share"):
        edit["options"] = {key: value for key, value in (edit["options"] | broken).items() if value is not None}
    safetensors.torch.save_file(tensors, name, {"compactcli": json.dumps(tree)})
    with pytest.raises(CompactError, match=r"broken\.safetensors: the generator csg_3x3 is 144x6, which is not what its"):
        _csg_files.generators(str(name))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_generator_is_of_finite_numbers(tmp_path, value):
    tensors = theirs(named("cifar:resnet8", **SMALL), RESNET, 4, 6)
    for name in tensors:
        if name.endswith("CLG.weight"):
            tensors[name][0, 0] = value
    with pytest.raises(CompactError, match=r"broken\.t7: the generator of csg in it is not of finite numbers"):
        _csg_files.generators(str(write(tmp_path / "broken.t7", tensors)))


@pytest.mark.parametrize("pair", ["slice=4x4", "code=6"])
def test_what_a_generator_from_a_file_says_is_not_asked_for(small, pair):
    """It would be left aside, and yet be in the history."""
    method = get("csg")(methods.parse_options(get("csg"), [f"generator={small}", pair]))
    network = artefact.fresh(Wishes("cifar:resnet8"), 0)
    with pytest.raises(UsageError, match=f"--set {pair.partition('=')[0]}: the generator from a file says that; leave it out"):
        compress(network, "csg", method, Target(0.9, nearest=True))


# The published files


@pytest.fixture(scope="module")
def jpeg() -> Path:
    """CIFAR-10 as JPEG images in class folders, unpacked by the benchmarks; skips where it is not."""
    folder = Path(os.environ.get("COMPACTCLI_BENCH_DATA", Path(tempfile.gettempdir()) / "compactcli-cifar10-jpeg"))
    if not (folder / "test").is_dir():
        pytest.skip("there are no JPEG images of CIFAR-10 on this machine")
    return folder


@pytest.mark.parametrize("file", FILES)
def test_the_published_files_load_without_a_flag(checkpoints, file):
    name, places, what, params = FILES[file]
    found = open_model(checkpoints / file)
    assert f"recognised as {name} with csg slices {what}" in found.notes
    assert measure.params(found.module) == found.recipe.source.measures.params == params
    tensors = torch.load(checkpoints / file, weights_only=True, map_location="cpu")["net"]
    kwargs = {"keys": "csg"} if places is RESNET else {}
    assert_near(*outputs(found.module, image(found)), *outputs(plain(name, tensors, places, **kwargs), image(found)))


@pytest.mark.slow
@pytest.mark.parametrize(("file", "least"), [*zip(FILES, (78, 75, 78), strict=True)])
def test_the_published_files_know_the_images(checkpoints, jpeg, file, least):
    found = open_model(checkpoints / file)
    images = sources.open_dataset(str(jpeg), input_shape=(3, 32, 32), preprocessing=found.recipe.preprocessing, limit=250)
    assert least < report.evaluate(found, images).accuracy.top1 < 96


@pytest.mark.slow
def test_a_published_generator_is_stored_once(checkpoints, tmp_path):
    path = tmp_path / "reused.safetensors"
    options = ["--method", "csg", "--ratio", "0.4", "--nearest", "--set", f"generator={checkpoints / 'csg-rn56_1616-128.t7'}"]
    result = run("compress", checkpoints / "resnet56-cifar10jpeg.th", *options, "-o", path)
    assert result.exit_code == 0, result.output
    found = open_model(path)
    theirs = torch.load(checkpoints / "csg-rn56_1616-128.t7", weights_only=True, map_location="cpu")["net"]
    assert torch.equal(found.module.state_dict()[SHARED], theirs["module.stage_1.0.CLG.weight"])
    assert [key for key in found.module.state_dict() if key.startswith("compactcli_shared")] == [SHARED]
    assert found.recipe.steps[0].options["generator"] == "csg-rn56_1616-128.t7"
    assert measure.params(found.module) < 0.5 * found.recipe.source.measures.params


def test_a_generator_is_bounded_before_it_is_built():
    """Each number by itself could be one of a network's."""
    cut = {"outputs": 1024, "inputs": 1024, "height": 3, "width": 3}
    with pytest.raises(CompactError, match="the recipe has a generator of slices 1024x1024x3x3 from 65536 numbers"):
        csg.Generator({**cut, "code": 1 << 16})
