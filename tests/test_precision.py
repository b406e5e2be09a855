"""Half the bytes: what is read is what was rounded, bit for bit, and what that costs is measured."""

import copy
import functools
import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from networks import outputs
from test_artefact import Tied, assert_same, image, network, smaller
from test_compress import own
from torch import nn

from compactcli import data, kernels, measure, methods, report, sources, weights
from compactcli.artefact import Network, dumps, open_model, stored
from compactcli.compress import Target, compress
from compactcli.errors import CompactError
from compactcli.finetune import finetune
from compactcli.optim import Settings
from compactcli.precision import cast_, uncast_
from compactcli.recipe import DTYPES, Preprocessing

FORMS = ["plain", "hinge", "linearconv", "csg"]


@functools.cache
def _made(form: str, ratio: float, name: str) -> Network:
    given = network(name)
    if form == "plain":
        return given
    return smaller(given, ratio) if form == "hinge" else compress(given, form, methods.get(form)(), Target(ratio))


def made(form: str, ratio: float = 0.6, name: str = "cifar:resnet8") -> Network:
    """A network that a method has made, for a test's own use."""
    return copy.deepcopy(_made(form, ratio, name))


def held(given: Network) -> int:
    """Bytes of the file's tensors, without its header."""
    content = dumps(given)
    return len(content) - 8 - int.from_bytes(content[:8], "little")


@pytest.fixture(scope="module")
def digits():
    return sources.open_dataset("digits", input_shape=(1, 32, 32), preprocessing=Preprocessing((0.5,), (0.5,)), limit=60)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("method", ["linearconv", "csg"])
def test_a_file_is_as_large_as_what_it_stores(method, ratio):
    """Bytes follow parameters within 5 %, and are half as many in half precision."""
    given = made(method, ratio, "cifar:resnet20")
    params, whole = measure.params(given.module), held(given)
    assert params <= ratio * measure.params(network("cifar:resnet20").module)
    assert 4 * params <= whole <= 1.05 * 4 * params
    for dtype in DTYPES:
        half = held(cast_(copy.deepcopy(given), dtype))
        assert 2 * params <= half <= 1.05 * 2 * params
        assert whole / 2 <= half <= 1.05 * whole / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_read_is_what_was_rounded(form, dtype):
    given = made(form)
    before = {name: tensor.clone() for name, tensor in given.module.state_dict().items()}
    assert cast_(given, dtype) is given
    content = dumps(given)
    found = open_model(content)
    assert found.recipe.dtype == dtype
    assert_same(found.module, given.module, image(given))
    state = found.module.state_dict()
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float32}
    for name, tensor in given.module.state_dict().items():
        assert torch.equal(state[name], tensor), name
        expected = before[name].to(getattr(torch, dtype)).float() if tensor.is_floating_point() else before[name]
        assert torch.equal(tensor, expected), name
    assert dumps(found) == content
    for name, tensor in safetensors.torch.load(content).items():
        assert tensor.dtype == (getattr(torch, dtype) if state[name].is_floating_point() else before[name].dtype), name


def test_the_step_says_what_it_did():
    given = made("linearconv")
    steps, shape = len(given.recipe.steps), given.input_shape
    original = copy.deepcopy(given.module)
    lines: list[str] = []
    cast_(given, "bfloat16", log=lines.append)
    step = given.recipe.steps[-1]
    assert len(given.recipe.steps) == steps + 1
    assert (step.command, step.method, step.options, step.edits) == ("export", None, {"dtype": "bfloat16"}, ())
    assert (step.measures.params, step.measures.macs) == (measure.params(original), measure.macs(original, shape))
    assert step.measures.accuracy is None
    x = torch.randn(measure.PROBES, *shape, generator=torch.Generator().manual_seed(0))
    before, now = (outputs(module, x)[0] for module in (original, given.module))
    assert step.error == pytest.approx(float((now - before).norm() / before.norm()), rel=1e-5)
    assert 1e-5 < step.error < 0.1
    assert lines == [f"bfloat16: output error {step.error:.1e} on random images"]


def test_rounding_twice_is_rounding_once():
    given = cast_(made("csg"), "float16")
    before = {name: tensor.clone() for name, tensor in given.module.state_dict().items()}
    cast_(given, "float16")
    assert given.recipe.steps[-1].error == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.module.state_dict().items())


def test_what_is_beyond_the_range_stays_as_it_is():
    given = made("plain")
    given.module.bn1.running_var[:2] = torch.tensor([1e6, 0.1])
    given.module.layer1[0].bn1.running_var[0] = float("inf")  # no half type is to blame for that
    variance, wide = given.module.bn1.running_var.clone(), copy.deepcopy(given)
    lines: list[str] = []
    cast_(given, "float16", log=lines.append)
    assert lines[0] == "float16: bn1.running_var is beyond its range: kept as float32"
    assert torch.equal(given.module.bn1.running_var, variance)
    tensors = safetensors.torch.load(dumps(given))
    floats = {name: tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()}
    assert [name for name, dtype in floats.items() if dtype != torch.float16] == ["bn1.running_var"]
    assert_same(open_model(dumps(given)).module, given.module, image(given))
    cast_(wide, "bfloat16")
    assert {t.dtype for t in safetensors.torch.load(dumps(wide)).values() if t.is_floating_point()} == {torch.bfloat16}
    wide.module.bn1.running_var[0] = 3.4e38  # the largest of bfloat16 is smaller
    assert stored(wide.module.bn1.running_var, "bfloat16").dtype == torch.float32


def test_what_is_shared_stays_shared():
    tied = own(Tied(), (3, 8, 8))
    cast_(tied, "float16")
    assert tied.module.second.weight is tied.module.first.weight
    assert tied.module.alias is tied.module.head[2]
    given = cast_(made("csg"), "float16")
    (generator,) = kernels.shared(given.module).values()
    assert {id(layer.generator) for layer in kernels.layers(given.module).values()} == {id(generator)}
    assert torch.equal(generator.weight, generator.weight.half().float())


def test_what_the_file_does_not_hold_is_not_rounded():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 5))
    module[0].register_buffer("third", torch.tensor(1 / 3), persistent=False)
    cast_(own(module, (3, 8, 8)), "bfloat16")
    assert torch.equal(module[0].third, torch.tensor(1 / 3))
    assert torch.equal(module[0].weight, module[0].weight.bfloat16().float())


def test_a_weight_that_is_not_finite_is_refused():
    given = made("plain")
    given.module.linear.bias.data[1] = float("nan")
    with pytest.raises(CompactError, match=r"random: linear\.bias holds NaN or Inf"):
        cast_(given, "float16")


def test_half_precision_in_a_file_without_a_recipe_for_it_is_computed_in_float32():
    """As a file may be that others have made smaller."""
    given = made("plain")
    halves = {name: t.half() if t.is_floating_point() else t for name, t in weights.state(given.module).items()}
    found = open_model(safetensors.torch.save(halves, {"compactcli": given.recipe.dumps()}))
    assert found.recipe.dtype is None
    assert {t.dtype for t in found.module.state_dict().values()} == {torch.float32, torch.int64}
    outputs(found.module, image(given))


# What trains and compresses


def test_a_network_that_is_changed_is_stored_in_float32_again():
    given = cast_(made("plain"), "float16")
    lines: list[str] = []
    small = compress(given, "hinge", methods.get("hinge")(), Target(0.6), log=lines.append)
    assert lines[0] == "random: no longer stored in float16, but in float32; --dtype rounds what comes of it"
    assert small.recipe.dtype is None
    assert torch.float16 not in {tensor.dtype for tensor in safetensors.torch.load(dumps(small)).values()}
    assert [step.command for step in small.recipe.steps] == ["export", "compress"]
    uncast_(small, lines.append)
    assert sum("no longer" in line for line in lines) == 1


def trainable(**kwargs: object) -> Network:
    return network(width=4, shape=(1, 32, 32), in_channels=1, **kwargs)


SETTINGS = Settings(epochs=1, batch_size=20)


def test_fine_tuning_keeps_no_rounding(digits):
    given = finetune(cast_(trainable(), "bfloat16"), digits, SETTINGS)
    assert given.recipe.dtype is None
    weight = given.module.conv1.weight
    assert not torch.equal(weight, weight.bfloat16().float())
    assert torch.equal(open_model(dumps(given)).module.conv1.weight, weight)


@pytest.mark.parametrize("tested", [True, False])
def test_the_accuracy_after_fine_tuning_is_that_of_what_is_stored(digits, tested):
    dataset = digits if tested else replace(digits, test=None)
    given = finetune(trainable(), dataset, SETTINGS, dtype="bfloat16")
    assert [step.command for step in given.recipe.steps] == ["finetune", "export"]
    last = given.recipe.steps[-1].measures
    found = open_model(dumps(given))
    if tested:
        assert last.accuracy == report.evaluate(found, digits).accuracy.top1
        assert last.evaluated == {"dataset": "digits", "split": "test", "images": 60}
    else:
        _, held_out = data.training_parts(dataset, 0.1, 5000, 0)
        assert last.accuracy == report.evaluate(found, replace(dataset, train=held_out)).accuracy.top1
        assert last.evaluated == {"dataset": "digits", "split": "validation", "images": 6}
    tree = report.report(found, None, None)
    assert (tree["model"]["accuracy"], tree["model"]["evaluated"]) == (last.accuracy, last.evaluated)


def test_both_accuracies_are_told(digits):
    given = trainable()
    before = report.evaluate(given, digits).accuracy.top1
    lines: list[str] = []
    cast_(given, "bfloat16", digits, log=lines.append)
    after = report.evaluate(given, digits).accuracy.top1
    images = "60 test images of digits"
    assert lines == [f"bfloat16: accuracy {after:.2f} %, {after - before:+.2f} points, before {before:.2f} %, on {images}"]
    assert given.recipe.steps[-1].measures.accuracy == after


def test_a_recipe_with_a_type_nobody_knows_is_refused():
    given = cast_(made("plain"), "float16")
    tree = json.loads(given.recipe.dumps()) | {"dtype": "float8_e4m3fn"}
    content = safetensors.torch.save(weights.state(given.module), {"compactcli": json.dumps(tree)})
    with pytest.raises(CompactError, match="stdin: the recipe stores numbers as 'float8_e4m3fn'; it needs a newer compactcli"):
        open_model(content)
