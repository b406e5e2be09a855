"""The file is the model: what is loaded is what was saved, bit for bit, with nothing but the file."""

import copy
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import pytest
import safetensors.torch
import torch
from networks import named, outputs
from torch import Tensor, nn

import compactcli
from compactcli import architectures, artefact, methods, report, sources, weights
from compactcli.artefact import Network, Wishes, dumps, fresh, open_model, save
from compactcli.compress import Target, compress
from compactcli.errors import CompactError
from compactcli.methods import get
from compactcli.recipe import Keep, Measures, Preprocessing, Recipe, Replace, Set, Share, Step

GOLDEN = sorted((Path(__file__).parent / "data").glob("golden-*.safetensors"))
NETWORKS = [
    ("cifar:resnet8", {"width": 4}, (3, 32, 32)),
    ("cifar:resnet8", {"width": 8, "shortcut": "conv", "keys": "csg", "num_classes": 7, "in_channels": 1}, (1, 32, 32)),
    ("cifar:densenet_bc40_36", {}, (3, 32, 32)),
    ("cifar:resnext20", {}, (3, 32, 32)),
    ("mobilenet_v3_small", {"num_classes": 12}, (3, 64, 64)),
    ("squeezenet1_1", {}, (3, 64, 64)),
    ("mnasnet0_5", {}, (3, 64, 64)),  # asks for the version of its format
]


def network(name: str = "cifar:resnet8", shape: tuple[int, ...] = (3, 32, 32), **kwargs: object) -> Network:
    """A network with random weights, as a command holds it."""
    architecture = architectures.get(name, kwargs, shape)
    recipe = Recipe(name, dict(architecture.kwargs), shape, Preprocessing((0.5,) * shape[0], (0.25,) * shape[0]))
    return Network(named(name, **kwargs).eval(), recipe, "random")


def smaller(given: Network, ratio: float, mode: str = "auto") -> Network:
    hinge = get("hinge")
    return compress(given, "hinge", hinge(hinge.Options(mode=mode)), Target(ratio))


def image(given: Network) -> Tensor:
    return torch.randn(2, *given.input_shape, generator=torch.Generator().manual_seed(0))


def assert_same(loaded: nn.Module, saved: nn.Module, example: Tensor) -> None:
    assert not loaded.training
    assert torch.equal(outputs(loaded, example)[0], outputs(saved, example)[0])
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {n: t.shape for n, t in saved.state_dict().items()}
    assert repr(loaded) == repr(saved)


@pytest.mark.parametrize(("name", "kwargs", "shape"), NETWORKS, ids=[f"{n}-{len(k)}" for n, k, _ in NETWORKS])
def test_what_is_loaded_is_what_was_saved(tmp_path, name, kwargs, shape):
    model = network(name, shape, **kwargs)
    example = image(model)
    for step in range(3):  # as it is, after one compression, and after another
        path = tmp_path / f"{step}.safetensors"
        assert save(model, str(path)) == path.stat().st_size
        assert_same(compactcli.load(path, channels_last=False), model.module, example)
        laid_out = copy.deepcopy(model.module).to(memory_format=torch.channels_last)
        assert_same(compactcli.load(path), laid_out, example)
        torch.testing.assert_close(outputs(laid_out, example), outputs(model.module, example), rtol=1e-4, atol=1e-5)
        found = open_model(path)
        assert found.recipe == Recipe.loads(model.recipe.dumps())
        assert [entry.command for entry in found.recipe.steps] == ["compress"] * step
        assert dumps(found) == path.read_bytes()
        model = smaller(found, 0.75, ("auto", "decompose")[step % 2])


def test_other_tools_read_the_tensors(tmp_path):
    model = smaller(network(width=8), 0.5)
    save(model, str(tmp_path / "net.safetensors"))
    tensors = safetensors.torch.load_file(tmp_path / "net.safetensors")
    state = model.module.state_dict()
    assert sorted(tensors) == sorted(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())
    with safetensors.safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert set(file.metadata()) == {"format", "compactcli"}
        assert file.metadata()["format"] == "pt"
        assert file.metadata()["compactcli"] == model.recipe.dumps()


def test_a_network_of_torchvision_has_one_name_in_files():
    wishes = (Wishes(name, {"num_classes": 3}, (3, 32, 32)) for name in ("squeezenet1_1", "torchvision:squeezenet1_1"))
    assert len({dumps(fresh(own, 0)) for own in wishes}) == 1


def test_the_same_network_gives_the_same_bytes():
    first, second = (dumps(smaller(network(width=8), 0.5)) for _ in range(2))
    assert first == second
    assert dumps(fresh(Wishes("cifar:resnet8"), 3)) == dumps(fresh(Wishes("cifar:resnet8"), 3))
    assert dumps(fresh(Wishes("cifar:resnet8"), 3)) != dumps(fresh(Wishes("cifar:resnet8"), 4))


@pytest.mark.parametrize("method", ["linearconv", "csg"])
def test_methods_that_solve_give_the_same_bytes(method):
    """Wherever in memory the numbers lie."""
    kept = []
    files = set()
    for size in range(4):
        kept.append(torch.rand(1000 * size + 3))
        files.add(dumps(compress(network(width=8), method, get(method)(), Target(0.6))))
    assert len(files) == 1


def test_a_file_needs_nothing_else_and_holds_no_path(tmp_path):
    """A fresh process in another folder gives the same outputs; nothing of this machine is in the bytes."""
    source = tmp_path / "folder" / "original.pt"
    source.parent.mkdir()
    torch.save(named("cifar:resnet8", width=8).state_dict(), source)
    small = smaller(open_model(source), 0.6)
    path = tmp_path / "small.safetensors"
    save(small, str(path))
    source.unlink()
    code = "import sys, compactcli, torch; m = compactcli.load(sys.argv[1], channels_last=False)"
    code += "; print(*m(torch.linspace(-1, 1, 3072).view(1, 3, 32, 32))[0].tolist())"
    result = subprocess.run([sys.executable, "-c", code, path.name], cwd=tmp_path, capture_output=True, text=True, check=True)
    x = torch.linspace(-1, 1, 3072).view(1, 3, 32, 32)
    assert [float(number) for number in result.stdout.split()] == outputs(small.module, x)[0][0].tolist()
    content = path.read_bytes()
    assert b"original.pt" in content
    for place in (str(tmp_path), str(Path.home()), str(Path.cwd()), "/folder", "folder/"):
        assert place.encode() not in content


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_files_of_released_versions_load_forever(path):
    """Written by that version; what it gave for two images is beside it. Add one per release, change none.

    0.1: `network(width=8)`, `smaller(..., 0.5)`, then `smaller(..., 0.8, "decompose")`.
    """
    expected = json.loads(path.with_suffix(".json").read_text())
    found = open_model(path)
    x = torch.linspace(-1, 1, 2 * 3072).view(2, 3, 32, 32)
    assert path.stat().st_size < 60_000
    assert {type(edit) for edit in found.recipe.edits} >= {Keep, Replace, Set}
    torch.testing.assert_close(outputs(found.module, x)[0], torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-5)


def test_there_is_a_golden_file():
    assert GOLDEN


# Checkpoints of others


def test_weights_alone_are_recognised(tmp_path):
    model = named("cifar:resnet8", width=8, num_classes=7)
    torch.save({"state_dict": {f"module.{n}": t for n, t in model.state_dict().items()}}, tmp_path / "net.th")
    found = open_model(tmp_path / "net.th")
    assert found.recipe.architecture == "cifar:resnet8"
    assert (found.recipe.kwargs["width"], found.recipe.kwargs["num_classes"], found.num_classes) == (8, 7, 7)
    assert_same(found.module, model.eval(), torch.randn(2, 3, 32, 32))
    assert found.name == found.recipe.source.name == "net.th"
    assert found.folder == tmp_path
    assert found.sha256 == found.recipe.source.sha256
    assert found.recipe.source.measures.params == sum(p.numel() for p in model.parameters())
    assert "recognised as cifar:resnet8" in found.notes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float(dtype):
    model = named("cifar:resnet8", width=4).to(dtype)
    found = open_model(safetensors.torch.save(model.state_dict())).module
    assert {tensor.dtype for tensor in found.state_dict().values()} == {torch.float32, torch.int64}
    assert all(torch.equal(tensor, model.state_dict()[name].to(tensor.dtype)) for name, tensor in found.state_dict().items())


def test_counters_of_batches_may_be_missing():
    model = named("cifar:resnet8", width=4)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    found = open_model(safetensors.torch.save(state)).module
    assert_same(found, model.eval(), torch.randn(1, 3, 32, 32))
    assert int(found.bn1.num_batches_tracked) == 0


def test_counters_of_batches_may_be_averages():
    model = named("cifar:resnet8", width=4)
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    found = open_model(safetensors.torch.save(state)).module
    assert found.bn1.num_batches_tracked.dtype == torch.int64
    assert torch.equal(found.bn1.num_batches_tracked, model.bn1.num_batches_tracked)


@pytest.mark.parametrize("arch", [None, "cifar:resnet8"])
@pytest.mark.parametrize("prefix", ["encoder.", "resnet.", "ema.student.model."])
def test_what_all_names_begin_with_is_no_part_of_a_known_network(prefix, arch):
    model = named("cifar:resnet8", width=8).eval()
    content = safetensors.torch.save({f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()})
    found = open_model(content, Wishes(arch=arch, arch_kwargs={"width": 8} if arch else None))
    assert_same(found.module, model, torch.randn(2, 3, 32, 32))
    assert any(prefix in note for note in found.notes) or arch or prefix.endswith("model.")
    with pytest.raises(CompactError, match="cannot name the architecture"):
        open_model(safetensors.torch.save({"a.b.weight": torch.zeros(3), "a.b.c.bias": torch.zeros(3)}))


def test_another_input_shape_is_that_of_the_original():
    """Images are scaled to it, and no part of them is cut off that is not of the original's."""
    model = named("squeezenet1_1", num_classes=4)
    first = open_model(safetensors.torch.save(model.state_dict()))
    again = dumps(first)
    for shape in (None, (3, 96, 96), (3, 224, 224)):
        wishes = Wishes(input_shape=shape)
        wanted = open_model(safetensors.torch.save(model.state_dict()), wishes)
        found = open_model(again, wishes)
        assert (found.input_shape, found.recipe.preprocessing) == (wanted.input_shape, wanted.recipe.preprocessing)


class Tied(nn.Module):
    """Two layers with one weight, and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = networks.conv(3, 3), networks.conv(3, 3)
        self.second.weight = self.first.weight
        self.body = nn.Sequential(networks.conv(3, 8), nn.ReLU(), networks.conv(8, 6), nn.ReLU())
        self.head = nn.Sequential(*networks.head(6))
        self.alias = self.head[2]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.second(torch.sigmoid(self.first(x)))))


FACTORY = "from test_artefact import Tied as make\n"


def test_tied_weights_are_stored_once_and_tied_after_loading(tmp_path):
    (tmp_path / "factory.py").write_text(FACTORY)
    wishes = Wishes(f"{tmp_path / 'factory.py'}:make", input_shape=(3, 8, 8))
    given = fresh(wishes, 0)
    networks.randomise_(given.module)
    model = smaller(given, 0.8)
    names = set(safetensors.torch.load(dumps(model)))
    assert "second.weight" not in names
    assert "first.weight" in names
    assert "alias.weight" not in names
    found = open_model(dumps(model), wishes).module
    assert found.second.weight is found.first.weight
    assert found.alias is found.head[2]
    assert_same(found, model.module, torch.randn(2, 3, 8, 8))
    assert sum(p.numel() for p in found.parameters()) == sum(p.numel() for p in model.module.parameters())


class Gated(nn.Module):
    """The head is registered first, and a linear layer behind it is not one."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)
        self.body = nn.Conv2d(3, 8, 3)
        self.gate = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.body(x).mean((2, 3))
        scores = self.head(x * self.gate(x).sigmoid())
        return scores.argmax(1), scores, x


def test_the_classes_are_the_numbers_that_come_out():
    assert Network(Gated(), network().recipe, "gated").num_classes == 5
    for name, shape, classes in (("cifar:resnet8", (3, 32, 32), 7), ("squeezenet1_1", (3, 64, 64), 3)):
        assert network(name, shape, num_classes=classes).num_classes == classes


def test_a_factory_of_ones_own_is_never_run_unasked(tmp_path):
    (tmp_path / "factory.py").write_text(FACTORY)
    factory = f"{tmp_path / 'factory.py'}:make"
    made = fresh(Wishes(factory, input_shape=(3, 8, 8)), 0)
    content = dumps(made)
    assert str(tmp_path).encode() not in content
    with pytest.raises(CompactError, match=r"was built by your own factory\.py:make, which is never run unasked; .* --arch"):
        open_model(content)
    (tmp_path / "own.safetensors").write_bytes(content)
    asked = compactcli.load(tmp_path / "own.safetensors", arch=factory, channels_last=False)
    assert_same(asked, made.module, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("names", [("conv1.weight",), None])
def test_any_floats_are_computed_in_float32(dtype, names):
    """All of a checkpoint, or one of its tensors."""
    state = named("cifar:resnet8", width=4).eval().state_dict()
    cast = {name: t.to(dtype) if t.is_floating_point() and name in (names or state) else t for name, t in state.items()}
    buffer = io.BytesIO()
    torch.save(cast, buffer)
    found = open_model(buffer.getvalue())
    assert {t.dtype for t in found.module.state_dict().values()} == {torch.float32, torch.int64}
    expected = named("cifar:resnet8", width=4).eval()
    expected.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in cast.items()})
    assert_same(found.module, expected, image(found))
    open_model(dumps(smaller(found, 0.8)))


def test_one_tensor_under_two_names_becomes_two():
    """A checkpoint may hold the zeros of all biases once; what is trained is each of them."""
    state = dict(named("cifar:resnet8", width=4).eval().state_dict())
    zeros = torch.zeros(4)
    biases = [name for name, tensor in state.items() if name.endswith("bn1.bias") and tensor.shape == zeros.shape]
    assert len(biases) > 1
    buffer = io.BytesIO()
    torch.save(state | dict.fromkeys(biases, zeros) | {"bn1.weight": torch.ones(1).expand(4)}, buffer)
    found = open_model(buffer.getvalue())
    assert torch.equal(found.module.bn1.weight, torch.ones(4))
    with torch.no_grad():
        found.module.bn1.weight[0] = 2
        found.module.get_parameter(biases[0]).add_(1)
    assert torch.equal(found.module.bn1.weight, torch.tensor([2.0, 1.0, 1.0, 1.0]))
    assert not found.module.get_parameter(biases[1]).any()
    assert_same(open_model(dumps(found)).module, found.module, image(found))


def test_what_the_user_says_goes():
    content = safetensors.torch.save(named("cifar:resnet8", width=4).state_dict())
    wishes = Wishes(arch_kwargs={"shortcut": "append"}, input_shape=(3, 40, 40), mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    found = open_model(content, wishes)
    assert found.recipe.kwargs["shortcut"] == "append"
    assert found.input_shape == (3, 40, 40)
    assert (found.recipe.preprocessing.mean, found.recipe.preprocessing.std) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    with pytest.raises(CompactError, match="--mean has 1 numbers, the network's input 3 channels"):
        open_model(content, Wishes(mean=(0.5,)))


def test_what_a_file_says_itself_stays_and_its_input_may_be_another():
    given = smaller(network(width=4), 0.8)
    found = open_model(dumps(given), Wishes(input_shape=(3, 48, 40)))
    assert (found.input_shape, found.notes) == ((3, 48, 40), ())
    assert_same(open_model(dumps(found)).module, found.module, image(found))
    for wishes, flags in (
        (Wishes(arch="cifar:resnet20"), "--arch"),
        (Wishes(arch="resnet50", arch_kwargs={"width": 3}), "--arch and --arch-kwargs"),
    ):
        found = open_model(dumps(given), wishes)
        assert found.notes == (f"the file says itself that it began as cifar:resnet8; {flags} left out",)
        assert_same(found.module, given.module, image(given))
    assert open_model(dumps(given), Wishes(arch="cifar:resnet8")).notes == ()
    with pytest.raises(CompactError, match="the recipe normalises 3 channels of an input with 1"):
        open_model(dumps(given), Wishes(input_shape=(1, 32, 32)))


def test_weights_that_do_not_fit_say_which():
    state = named("cifar:resnet8", width=4).state_dict()
    for change, message in (
        ({"linear.weight": torch.zeros(10, 9)}, r"linear\.weight is 10x9, the architecture's 10x16"),
        ({"extra": torch.zeros(1)}, "extra is not in the architecture"),
        ({"linear.bias": None}, r"linear\.bias is missing"),
        ({"linear.bias": torch.zeros(10, dtype=torch.int64)}, r"linear\.bias is torch\.int64, the architecture's torch\.float32"),
    ):
        changed = {name: tensor for name, tensor in {**state, **change}.items() if tensor is not None}
        with pytest.raises(CompactError, match=message):
            open_model(safetensors.torch.save(changed), Wishes("cifar:resnet8", {"width": 4}))


def test_nonfinite_tensors_are_named():
    module = named("cifar:resnet8", width=4)
    assert artefact.nonfinite(module) == ([], [])
    module.bn1.running_var[0] = float("inf")
    module.linear.bias.data[1] = float("-inf")
    module.layer1[0].bn1.running_var[0] = float("nan")
    assert artefact.nonfinite(module) == (["layer1.0.bn1.running_var", "linear.bias"], ["bn1.running_var"])


# Hostile recipes: each is one line


def with_recipe(model: Network, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The file of a network with something else in its recipe."""
    tree = json.loads(model.recipe.dumps())
    change(tree)
    metadata = {"format": "pt", "compactcli": json.dumps(tree)}
    return safetensors.torch.save(weights.state(model.module), metadata)


def edited(*edits: object) -> bytes:
    model = network(width=4)
    step = Step("compress", "hinge", {}, tuple(edits), Measures(), None, "0.1.0")
    return dumps(replace(model, recipe=model.recipe.then(step)))


@pytest.mark.parametrize(
    "edit",
    [
        Keep("nowhere", 0, (0,)),
        Keep("conv1", 0, (0, 4)),
        Keep("conv1", 0, (0, 1)),  # fits the layer, not the tensors in the file
        Keep("conv1", 0, tuple(range(1 << 12))),
        Keep("relu", 0, (0,)),
        Keep("conv1.weight", 3, (0,)),
        Set("layer2.0.shortcut", "before", 99),
        Set("layer2.0.shortcut", "before", 1),  # does not run
        Set("conv1", "groups", 0),
        Replace("conv1", "hinge.decomposed", {"rank": 1 << 30}),
        Replace("conv1", "hinge.decomposed", {"rank": 2}),  # its tensors are not in the file
        Replace("relu", "hinge.decomposed", {"rank": 2}),
        Replace("conv1", "os.system", {}),
        Replace("", "hinge.decomposed", {"rank": 1}),
        Replace("layer1.0", "hinge.decomposed", {"rank": 1}),
        Share("net", "csg.generator", {"code": 3}),
        Keep("conv1.bias", 0, (0,)),  # a convolution without one
    ],
    ids=str,
)
def test_edits_that_do_not_fit_are_one_line(edit):
    with pytest.raises(CompactError) as caught:
        report.report(open_model(edited(edit)), None, None)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "unknown architecture": lambda t: t.update(architecture="cifar:resnet9000"),
    "code for an architecture": lambda t: t.update(architecture="os:system", kwargs={"command": "true"}),
    "a file for an architecture": lambda t: t.update(architecture="evil.py:make"),
    "unknown argument": lambda t: t.update(kwargs={"pretrained": True}),
    "huge argument": lambda t: t["kwargs"].update(num_classes=1 << 60),
    "text for an argument": lambda t: t["kwargs"].update(width="many"),
    "text that cannot be printed": lambda t: t["kwargs"].update(shortcut="a\0b\n\x1b[2J", keys="x" * 5000),
    "list for an argument": lambda t: t["kwargs"].update(num_classes=[1, 2]),
    "arguments as a list": lambda t: t.update(kwargs=[1]),
    "two numbers for an input": lambda t: t.update(input_shape=[3, 32]),
    "four numbers for an input": lambda t: t.update(input_shape=[1, 3, 32, 32]),
    "an input that does not fit": lambda t: t.update(input_shape=[4, 32, 32]),
    "a mean too few": lambda t: t["preprocessing"].update(mean=[0.5, 0.5]),
    "a mean that is no number": lambda t: t["preprocessing"].update(mean=[float("nan")] * 3),
    "unknown interpolation": lambda t: t["preprocessing"].update(interpolation="magic"),
    "measures that are no numbers": lambda t: t.update(
        source={"name": "a", "sha256": "b", "measures": {"params": "many", "macs": [], "size_bytes": {}}}
    ),
    "steps that are no list": lambda t: t.update(steps={"a": 1}),
    "a newer format": lambda t: t.update(format=2),
    "a method that there is not": lambda t: t["steps"].append(
        {"command": "compress", "method": "\x1b[2J" * 999, "options": {}, "edits": [], "measures": {}, "version": "0"}
    ),
    "options of another kind": lambda t: t["steps"].append(
        {"command": "compress", "method": "csg", "options": {"slice": 5}, "edits": [], "measures": {}, "version": "0"}
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_hostile_recipes_are_one_line(name):
    """Refused at the latest by the first command that uses what is wrong; never a traceback."""
    content = with_recipe(network(width=4), CHANGES[name])

    def use() -> None:
        found = open_model(content)
        report.report(found, None, None)
        methods.attached(found.recipe, found.module)
        shape, preprocessing = found.input_shape, found.recipe.preprocessing
        report.evaluate(found, sources.open_dataset("digits", input_shape=shape, preprocessing=preprocessing, limit=20))

    with pytest.raises(CompactError) as caught:
        use()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_channels_of_what_is_shared_and_not_used_do_no_harm():
    shared = Share("csg_3x3", "csg.generator", {"outputs": 4, "inputs": 4, "code": 3, "height": 3, "width": 3})
    found = open_model(edited(shared, Keep("compactcli_shared.csg_3x3.weight", 0, (0,))))
    assert found.module.state_dict().keys() == network(width=4).module.state_dict().keys()


def test_a_small_file_of_a_large_network_takes_no_memory():
    """What edits would leave of it is seen before anything of it is copied."""
    wide = network(width=4)
    step = Step("compress", "hinge", {}, (Keep("layer3.0.conv2", 1, tuple(range(4000))),), Measures(), None, "0.1.0")
    recipe = replace(wide.recipe, kwargs={**wide.recipe.kwargs, "width": 1024}).then(step)
    content = dumps(replace(wide, recipe=recipe))
    code = (
        "import resource, sys\nfrom compactcli.artefact import open_model\nfrom compactcli.errors import CompactError\n"
        "open_model(sys.argv[2])\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    open_model(sys.argv[1])\nexcept CompactError as problem:\n    print(problem)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "hostile.safetensors", Path(folder) / "honest.safetensors"]
        for file, data in zip(files, (content, dumps(wide)), strict=True):
            file.write_bytes(data)
        done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    problem, grown = done.stdout.splitlines()
    assert "the weights do not fit the architecture" in problem
    assert int(grown) < 100_000  # kilobytes


WRAPPED = """
import torch
from torch import nn

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))

    def forward(self, x):
        return self.model(x)

class Counts(Wrapped):
    def __init__(self):
        super().__init__()
        self.register_buffer("step", torch.zeros(()))

def parallel():
    return nn.DataParallel(Wrapped())
"""


@pytest.mark.parametrize("saved", ["Wrapped", "Counts", "parallel"])
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
def test_names_of_ones_own_network_may_be_those_of_wrappers(saved, wrapper, tmp_path, monkeypatch):
    """What is taken off the names of a file for a known network is put back where one's own has it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_net.py").write_text(WRAPPED)
    first = architectures.user(f"{tmp_path}/own_net.py:{saved}", None, (3, 8, 8)).build(initialise=True)
    first.eval()
    torch.save({f"{wrapper}{name}": tensor for name, tensor in first.state_dict().items()}, tmp_path / "net.pt")
    found = open_model(tmp_path / "net.pt", Wishes(arch=f"{tmp_path}/own_net.py:{saved}", input_shape=(3, 8, 8)))
    example = torch.randn(2, 3, 8, 8)
    assert torch.equal(found.module(example), first(example))
    assert found.module.state_dict().keys() == first.state_dict().keys()


def test_numbers_of_a_training_run_are_no_weights(tmp_path):
    model = named("cifar:resnet8", width=4)
    torch.save({**model.state_dict(), "epoch": torch.tensor(3), "best_acc": torch.tensor(0.5)}, tmp_path / "net.pt")
    assert open_model(tmp_path / "net.pt").module.state_dict().keys() == model.state_dict().keys()


def test_text_that_is_no_recipe_is_one_line():
    for text in ("", "{", "[1]", "null", "x" * 10_000):
        content = safetensors.torch.save({"a": torch.zeros(1)}, {"compactcli": text})
        with pytest.raises(CompactError, match=r"stdin: the recipe in this file"):
            open_model(content)


def test_fresh_needs_a_name():
    with pytest.raises(CompactError, match="say which with --arch NAME"):
        fresh(Wishes(), 0)
