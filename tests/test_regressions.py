"""What users of other tools report as broken, one test each. Each docstring says what goes wrong there."""

import copy
import os
import re

import networks
import pytest
import torch
from networks import AWKWARD, SHAPE, named, outputs, randomise_, removable
from test_artefact import network, smaller
from test_cli import one_line, run
from test_compress import hinge, own
from test_graph import Caching
from test_surgery import assert_law, found, largest_difference
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from compactcli import channels, law, measure, surgery
from compactcli.analysis import analyse
from compactcli.artefact import Wishes, open_model
from compactcli.budget import Budget
from compactcli.channels import Channels
from compactcli.compress import Target, compress
from compactcli.graph import run_fake, trace
from compactcli.recipe import Keep, Replace


def awkward(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise_(AWKWARD[name]())


def cut(model: nn.Module, sets: Channels, share: float, shape: tuple[int, ...]) -> nn.Module:
    """A copy without a random share of the free sets, held to the law."""
    small = copy.deepcopy(model)
    law.apply_checked_(small, channels.edits(sets, removable(sets, share), model), sets.consumed, shape)
    return small


# Which channels go together


def test_shufflenet_is_cut_exactly():
    """Dependency graphs lose track of channels at its shuffles: the cut network fails or computes something else."""
    assert assert_law(named("shufflenet_v2_x0_5"), (3, 32, 32), 0.4) > 100


@pytest.mark.parametrize("name", ["shuffled", "shuffle_module"])
def test_channel_shuffles_are_followed(name):
    """A view and a transpose, or nn.ChannelShuffle, are taken for an operation that leaves channels in their places."""
    assert assert_law(awkward(name), SHAPE, 0.5) > 0


@pytest.mark.parametrize("name", ["pixels", "transposed_grouped", "transposed_depthwise"])
def test_pixel_shuffles_and_grouped_transposed_convolutions_are_cut(name):
    """A sub-pixel layer loses single channels, and a grouped transposed convolution its axes mistaken for each other."""
    assert assert_law(awkward(name), SHAPE, 0.5) > 0


@pytest.mark.parametrize("name", ["grouped", "wide_groups", "depthwise", "depthwise_multiplier"])
def test_groups_are_cut_exactly(name):
    """Grouped convolutions are cut into groups of unequal size, or their number of groups stays."""
    assert assert_law(awkward(name), SHAPE, 0.5) > 0


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0"])
def test_mobile_networks_are_cut_exactly(name):
    """Depthwise layers and squeeze and excitation gates are cut apart from the channels that they belong to."""
    assert assert_law(named(name), (3, 32, 32), 0.3) > 100


def test_one_channel_is_not_a_depthwise_convolution():
    """A convolution from one channel to one is taken for depthwise, as its groups equal its inputs and its outputs."""
    model = awkward("one_channel")
    sets = found(model, SHAPE)
    assert sets.slots == ()
    assert sets.axes["1.weight", 0] != sets.axes["1.weight", 1]
    assert assert_law(model, SHAPE, 0.8) > 0


@pytest.mark.parametrize("name", ["functional", "borrowed", "product"])
def test_functional_weights_are_cut(name):
    """Weights that F.conv2d or a product takes, outside a layer's own forward, are left as they are or break the cut."""
    model = awkward(name)
    (at,) = [index for index, part in enumerate(model) if isinstance(part, networks.Code)]
    small = cut(model, found(model, SHAPE), 0.5, SHAPE)
    assert sum(p.numel() for p in small[at].parameters()) < sum(p.numel() for p in model[at].parameters())


# What may not be cut, and what is done then


@pytest.mark.parametrize(("name", "classes"), [("squeezenet1_1", 1000), ("squeezenet1_1", 13), ("resnet18", 7)])
def test_the_classes_stay(name, classes):
    """The classifier is found by its width of 1000, or as the last linear layer: SqueezeNet's convolution is cut."""
    model = named(name, num_classes=classes)
    sets = found(model, (3, 64, 64))
    last = "classifier.1.weight" if name == "squeezenet1_1" else "fc.weight"
    assert sets.reason((last, 0)) == "the network's output"
    assert outputs(cut(model, sets, 0.5, (3, 64, 64)), torch.randn(2, 3, 64, 64))[0].shape == (2, classes)


@pytest.mark.parametrize(("name", "size", "head"), [("googlenet", 32, "aux1"), ("inception_v3", 299, "AuxLogits")])
def test_auxiliary_heads_train_after_a_cut(name, size, head):
    """Heads that run only in training are not seen in a trace of the evaluation; the first training step then fails."""
    model, shape = named(name, aux_logits=True, num_classes=10), (3, size, size)
    sets = found(model, shape)
    edits = channels.edits(sets, removable(sets, 0.4), model)
    assert any(edit.module.startswith(head) and edit.axis == 1 for edit in edits if isinstance(edit, Keep))
    run_fake(model, shape, train=True, change=lambda shadow: surgery.apply_(shadow, edits))  # test_surgery.py trains one


FACTORY = """
from torch import nn

class Flat(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)).view(-1, 512)

def make():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 512, 1), Flat(), nn.Linear(512, 5)
    )
"""
FRESH = ("--fresh", "--arch", "net.py:make", "--input-shape", "3x8x8")


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_width_in_the_code_is_found_and_the_rest_is_cut(factory):
    """A reshape to 512 in the code fails after the weights were cut: half a network is left behind."""
    result = run("compress", *FRESH, "--method", "hinge", "--ratio", "0.6", "--set", "mode=prune", "-o", "small.safetensors")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"^4\.\w+: left alone, its number is written in code: .*512", result.stderr, re.MULTILINE)
    small = open_model("small.safetensors", Wishes(arch="net.py:make")).module
    assert small[4].out_channels == 512
    assert small[0].out_channels + small[2].out_channels < 16 + 24
    assert outputs(small, torch.randn(2, *SHAPE))[0].shape == (2, 5)


def test_what_breaks_the_law_leaves_no_file(factory, monkeypatch):
    """A file is written before anyone checks that the cut network runs, or computes the same."""
    before = sorted(os.listdir(factory))
    monkeypatch.setattr(law, "_masks", lambda model, edits, consumed: {})  # an error that the check is there to find
    line = one_line(run("compress", "-q", *FRESH, "--method", "hinge", "--ratio", "0.5", "-o", "small.safetensors"))
    assert "nothing was written" in line
    assert [name for name in sorted(os.listdir(factory)) if name != "__pycache__"] == before


def test_an_operation_without_a_rule_locks_its_channels_alone():
    """One unsupported operation ends the whole run with a traceback."""
    given = own(awkward("cumulated"))
    reasons = {layer["name"]: layer["locked"] for layer in analyse(given)["layers"]}
    assert reasons["2"] == "no rule for the operation cumsum"
    assert reasons["0"] is None
    small = compress(given, "hinge", hinge("prune"), Target(0.7)).module
    assert small[2].out_channels == 6
    assert small[0].out_channels < 8


@pytest.mark.parametrize("name", [*AWKWARD, "cifar:resnet8", "cifar:mobilenet_v2"])
def test_no_layer_is_left_in_silence(name):
    """Layers that a tool cannot handle stay whole without a word."""
    given = network(name) if name.startswith("cifar:") else own(awkward(name))
    layers = analyse(given)["layers"]
    assert layers
    for layer in layers:
        assert (layer["sets"] > 0) != bool(layer["locked"]), layer


# What it computes


def test_zeroing_the_filters_is_not_the_cut_network():
    """A mask that zeroes filters leaves the shift of the batch normalisation: masked and cut accuracy differ."""
    torch.manual_seed(0)
    body = [networks.conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), networks.conv(8, 6)]
    model = randomise_(nn.Sequential(*body, nn.ReLU(), *networks.head(6))).eval()
    sets = found(model, SHAPE)
    gone = sets.axes["0.weight", 0][:4].tolist()
    small, naive = copy.deepcopy(model), copy.deepcopy(model).double()
    edits = channels.edits(sets, gone, model)
    assert law.apply_checked_(small, edits, sets.consumed, SHAPE) < 1e-9
    naive[0].weight.data[:4], naive[0].bias.data[:4] = 0, 0
    image = torch.randn(2, *SHAPE, dtype=torch.float64)
    actual = outputs(copy.deepcopy(small).double(), image)
    assert largest_difference(actual, outputs(networks.masked(model, edits), image)) < 1e-9
    assert largest_difference(actual, outputs(naive, image)) > 1e-3


OUTPUTS = {
    "tuple": lambda s, x: (s.main(x), s.aux(x)),
    "list": lambda s, x: [s.main(x), [s.aux(x)]],
    "dict": lambda s, x: {"main": s.main(x), "aux": s.aux(x)},
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_every_structure_and_branches_on_sizes(kind):
    """Symbolic tracing refuses a branch on a size, and dependency graphs an output that is no tensor."""

    def run_(s: networks.Code, x: Tensor) -> object:
        x = s.wide(x) if x.shape[-1] > 4 and len(x) > 0 else x
        for _ in range(x.shape[-1] // 4):
            x = torch.relu(x) + 0.1
        return OUTPUTS[kind](s, x)

    layers = {"wide": networks.conv(8, 6), "main": nn.Sequential(*networks.head(6)), "aux": networks.conv(6, 4)}
    model = randomise_(nn.Sequential(networks.conv(3, 8), nn.SiLU(), networks.Code(run_, **layers)))
    assert assert_law(model, SHAPE, 0.5) > 0


def test_no_gradients_are_needed():
    """Graphs made from autograd need gradients: under no_grad, or with frozen weights, nothing is found."""
    model = awkward("concatenation").requires_grad_(False)
    with torch.no_grad():
        sets = found(model, SHAPE)
        assert len(sets.free()) == 22
        cut(model, sets, 0.5, SHAPE)


# How much is cut


@pytest.mark.parametrize(("round_to", "step"), [(None, 8), (16, 16)])
def test_widths_are_rounded_within_the_budget(round_to, step):
    """Odd channel counts run slower than the whole network; rounding them afterwards misses the budget."""
    given = network("cifar:vgg11")
    before = {name: m.out_channels for name, m in given.module.named_modules() if isinstance(m, nn.Conv2d)}
    lines: list[str] = []
    small = compress(given, "hinge", hinge("prune"), Target(0.5, round_to=round_to), log=lines.append)
    after = {name: m.out_channels for name, m in small.module.named_modules() if isinstance(m, nn.Conv2d)}
    assert all(after[name] % step == 0 for name, width in before.items() if width > 64 or round_to)
    assert after != before
    whole = measure.macs(network("cifar:vgg11").module, (3, 32, 32))
    kept = small.recipe.steps[-1].measures.macs / whole
    assert 0.48 < kept <= 0.5
    assert f"hinge: {100 * kept:.1f} % of macs kept" in lines


def test_no_layer_is_decomposed_that_would_be_slower():
    """Every layer becomes two at the same ratio, and the network with fewer operations is the slower one."""
    given = network(width=16)
    model = copy.deepcopy(given.module)
    graph = trace(model, given.input_shape)
    budget = Budget(graph, channels.find(graph, model), model, ratio=0.5)
    most = {layer.name: budget.most_rank(index, budget.along()) for index, layer in enumerate(budget.layers)}
    ranks = {e.module: e.options["rank"] for e in smaller(given, 0.6, "decompose").recipe.edits if isinstance(e, Replace)}
    assert ranks
    assert all(rank <= most[name] for name, rank in ranks.items())


# What is left behind


def test_counters_of_a_profiler_are_dropped_and_reported(tmp_path):
    """A checkpoint saved after profiling has total_ops among its weights, and does not load any more."""
    model = named("cifar:resnet8", width=4)
    left = {"total_ops": torch.zeros(1), "conv1.total_params": torch.zeros(1)}
    torch.save({**model.state_dict(), **left}, tmp_path / "profiled.pt")
    given = open_model(tmp_path / "profiled.pt")
    assert not any(name.endswith(("total_ops", "total_params")) for name in given.module.state_dict())
    assert any(re.match("dropped 2 counters", note) for note in given.notes)


def test_the_analysis_leaves_nothing_behind():
    """Fake tensors stay in attributes that a forward pass caches, and the next real pass fails."""
    for model, shape in ((named("resnet18"), (3, 64, 64)), (Caching(), SHAPE)):
        model.eval()
        image = torch.randn(1, *shape)
        before = outputs(model, image)  # fills the cache, if there is one
        held = [dict(vars(module)) for module in model.modules()]
        found(model, shape)
        for module, attributes in zip(model.modules(), held, strict=True):
            assert vars(module).keys() == attributes.keys()
            assert all(vars(module)[name] is value for name, value in attributes.items())
            tensors = [value for value in networks.tree_leaves(vars(module)) if isinstance(value, Tensor)]
            assert not any(isinstance(tensor, FakeTensor) for tensor in tensors)
        assert torch.equal(outputs(model, image)[0], before[0])
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
