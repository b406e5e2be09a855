"""The law: a cut network is the masked network, a replaced layer is its dense form; what breaks it is caught."""

import copy

import networks
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import AWKWARD, SHAPE, masked, named, outputs, random_network, randomise_, removable
from torch import Tensor, nn

from compactcli import channels, surgery
from compactcli.channels import Channels
from compactcli.errors import CompactError
from compactcli.graph import trace
from compactcli.law import apply_checked_, run_double
from compactcli.methods import get
from compactcli.recipe import Edit, Keep, Replace, Set, Share
from compactcli.surgery import LAYERS, LayerKind, apply_

get("hinge")  # registers its layers


def found(model: nn.Module, shape: tuple[int, ...]) -> Channels:
    return channels.find(trace(model, shape), model)


def largest_difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Relative to the largest value of each output."""
    assert [a.shape for a in actual] == [e.shape for e in expected]
    return max(float((a - e).abs().max() / e.abs().max().clamp_min(1e-30)) for a, e in zip(actual, expected, strict=True))


def train_step(model: nn.Module, shape: tuple[int, ...]) -> None:
    """One step of gradient descent: every parameter that takes part in the output moves."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    result = networks.tree_leaves(model(torch.randn(3, *shape)))
    sum(part.square().mean() for part in result).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient is not None for gradient in gradients) > len(gradients) / 2
    optimizer.step()


def assert_law(model: nn.Module, shape: tuple[int, ...], share: float, seed: int = 0) -> int:
    """Cut a random share of the free sets, and hold the result to the law by arithmetic of our own; how many went."""
    sets = found(model, shape)
    removed = removable(sets, share, seed)
    edits = channels.edits(sets, removed, model)
    image = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    expected = outputs(masked(model, edits), image)

    small = copy.deepcopy(model)
    assert apply_checked_(small, edits, sets.consumed, shape) < 1e-9
    actual = outputs(copy.deepcopy(small).double(), image)
    assert largest_difference(actual, expected) < 1e-9
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters()) or not removed
    train_step(small, shape)
    return len(removed)


@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("name", AWKWARD)
def test_cut_equals_mask_in_awkward_networks(name, share):
    torch.manual_seed(0)
    assert assert_law(randomise_(AWKWARD[name]()), SHAPE, share) > 0


CIFAR = [
    *(("resnet20", {"shortcut": shortcut}) for shortcut in ("pad", "append", "pool", "conv")),
    *(("resnet8", {"width": 5, "keys": keys}) for keys in ("akamaster", "csg")),
    *(("resnext20", {}), ("densenet_bc40_36", {}), ("mobilenet_v2", {}), ("shufflenet_v2_x0_5", {}), ("vgg11", {})),
]


@pytest.mark.parametrize(("name", "kwargs"), CIFAR, ids=[f"{name}-{'-'.join(map(str, k.values()))}" for name, k in CIFAR])
def test_cut_equals_mask_in_the_papers_networks(name, kwargs):
    assert assert_law(named(f"cifar:{name}", **kwargs), (3, 32, 32), 0.4) > 20


TORCHVISION = ["resnet18", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1", "densenet121", "shufflenet_v2_x0_5"]


@pytest.mark.parametrize("name", TORCHVISION)
def test_cut_equals_mask_in_torchvisions_networks(name):
    assert assert_law(named(name), (3, 64, 64), 0.4) > 100


def test_heads_that_only_train_follow_the_trunk():
    """GoogLeNet's auxiliary classifiers do not run in eval mode; in train mode they must go on working."""
    model = named("googlenet", aux_logits=True, num_classes=10)
    sets = found(model, (3, 64, 64))
    edits = channels.edits(sets, removable(sets, 0.4), model)
    assert any(edit.module.startswith("aux") and edit.axis == 1 for edit in edits if isinstance(edit, Keep))
    apply_checked_(model, edits, sets.consumed, (3, 64, 64))
    train_step(model, (3, 64, 64))


blocks = st.lists(st.tuples(st.integers(0, len(networks.BLOCKS) - 1), st.integers(0, 41)), min_size=1, max_size=4)


@settings(max_examples=40)
@given(blocks=blocks, flat=st.booleans(), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_cut_equals_mask_in_random_networks(blocks, flat, share, seed):
    torch.manual_seed(seed)
    assert_law(randomise_(random_network(blocks, flat), seed), SHAPE, share, seed)


# What breaks the law is caught


@pytest.fixture
def small() -> tuple[nn.Module, Channels, list[Edit]]:
    """A network, its sets, and edits that cut some of its channels."""
    model = nn.Sequential(
        *(networks.conv(3, 8), nn.BatchNorm2d(8), nn.Sigmoid(), networks.conv(8, 6), nn.ReLU(), *networks.head(6))
    )
    randomise_(model)
    sets = found(model, SHAPE)
    return model, sets, channels.edits(sets, removable(sets, 0.5), model)


DIFFERS = "the smaller network differs from the masked one by .*; nothing was written, please report this"


def test_wrong_channels_are_caught(small, monkeypatch):
    model, sets, edits = small
    keep_ = surgery._keep_
    for module in ("0", "1", "3"):

        def wrong_(model: nn.Module, edit: Keep, done: dict, holders: dict, module: str = module) -> None:
            size = surgery._tensor(*surgery.targets(model, edit)[0][:2]).shape[surgery.targets(model, edit)[0][2]]
            other = tuple(sorted((i + 1) % size for i in edit.index))
            chosen = Keep(edit.module, edit.axis, other) if edit.module == module and edit.axis == 0 else edit
            keep_(model, chosen, done, holders)

        monkeypatch.setattr(surgery, "_keep_", wrong_)
        with pytest.raises(CompactError, match=DIFFERS):
            apply_checked_(copy.deepcopy(model), edits, sets.consumed, SHAPE)


def test_values_that_are_not_numbers_are_caught(small, monkeypatch):
    model, sets, edits = small
    keep_ = surgery._keep_

    def spoil_(model: nn.Module, edit: Keep, done: dict, holders: dict) -> None:
        keep_(model, edit, done, holders)
        if edit.module == "3" and edit.axis == 0:
            model[3].bias.data.fill_(float("nan"))

    monkeypatch.setattr(surgery, "_keep_", spoil_)
    with pytest.raises(CompactError, match="nothing was written"):
        apply_checked_(model, edits, sets.consumed, SHAPE)


def test_every_missing_edit_is_caught(small):
    model, sets, edits = small
    assert len(edits) > 4
    for missing in edits:
        rest = [edit for edit in edits if edit is not missing]
        with pytest.raises(CompactError, match=r"does not run|differs"):
            apply_checked_(copy.deepcopy(model), rest, sets.consumed, SHAPE)


def test_a_consumer_nobody_masks_is_caught(small):
    """The sigmoid of a removed channel is 1/2 and more: unmasked, it would change what its consumer gives."""
    model, _, edits = small
    with pytest.raises(CompactError, match=DIFFERS):
        apply_checked_(model, edits, frozenset(), SHAPE)


def test_an_output_of_another_shape_is_caught():
    model = networks.convolution_as_classifier()
    with pytest.raises(CompactError, match=r"output has shape \(2, 2\), the original's \(2, 5\)"):
        apply_checked_(model, [Keep("2", 0, (0, 3))], frozenset(), SHAPE)


def test_a_layer_unlike_its_dense_form_is_caught(monkeypatch):
    model = randomise_(nn.Sequential(networks.conv(3, 8), nn.ReLU(), networks.conv(8, 6), *networks.head(6)))
    kind = LAYERS["hinge.decomposed"]

    def scaled(pair: nn.Module) -> nn.Module:
        layer = kind.dense(pair)
        with torch.no_grad():
            layer.weight.mul_(1 + 1e-6)
        return layer

    edits = [Replace("2", "hinge.decomposed", {"rank": 3})]
    assert apply_checked_(copy.deepcopy(model), edits, frozenset(), SHAPE) < 1e-12
    monkeypatch.setitem(LAYERS, "hinge.decomposed", LayerKind(kind.build, scaled))
    with pytest.raises(CompactError, match="differs"):
        apply_checked_(model, edits, frozenset(), SHAPE)


def test_a_network_that_breaks_only_in_train_mode_is_caught():
    def run(self: networks.Code, x: Tensor) -> Tensor:
        return x.view(len(x), 8, *x.shape[2:]) if self.training else x

    model = nn.Sequential(networks.conv(3, 8), networks.Code(run), networks.conv(8, 5), *networks.head(5))
    sets = found(model, SHAPE)
    edits = channels.edits(sets, [int(sets.axes["0.weight", 0][0])], model)
    with pytest.raises(CompactError, match="does not run in train mode"):
        apply_checked_(model, edits, sets.consumed, SHAPE)


# Running in float64


@pytest.mark.parametrize("name", ["twice", "functional", "borrowed", "transposed", "several_outputs", "tied_parameter"])
def test_run_double_is_the_network_in_float64(name):
    model = randomise_(AWKWARD[name]())
    image = torch.randn(2, *SHAPE, dtype=torch.float64)
    expected = outputs(copy.deepcopy(model).double(), image)
    assert largest_difference(run_double(model, image), expected) < 1e-15


SINGLE = torch.linspace(0, 1, 8 * 8).view(8, 8)


@pytest.mark.parametrize(
    "named_dtype",
    [
        lambda x: x.float(),
        lambda x: x.half().float(),
        lambda x: x.to(torch.float32),
        lambda x: x.to(dtype=torch.bfloat16).float(),
        lambda x: x.argmax(2, keepdim=True).float().expand_as(x),
        lambda x: F.prelu(x, torch.ones(1)),
        lambda x: x @ SINGLE,
        lambda x: x * torch.arange(8, dtype=torch.float32),
        lambda x: F.grid_sample(x, torch.zeros(len(x), 8, 8, 2), align_corners=False),
    ],
)
def test_code_that_names_another_dtype_is_held_to_the_law_in_float64(named_dtype):
    model = nn.Sequential(networks.conv(3, 8), nn.Sigmoid(), networks.Code(lambda s, x: named_dtype(x)), networks.conv(8, 6))
    model, shape, default = randomise_(nn.Sequential(*model, *networks.head(6))), SHAPE, torch.get_default_dtype()
    sets = found(model, shape)
    edits = channels.edits(sets, removable(sets, 0.4), model)
    assert apply_checked_(model, edits, sets.consumed, shape) < 1e-12
    assert torch.get_default_dtype() == default
    assert model.eval()(torch.rand(2, *shape)).dtype == torch.float32
    image = torch.rand(2, *shape, dtype=torch.float64)
    (double,), single = run_double(model, image), model(image.float())
    assert double.dtype == torch.float64
    assert torch.allclose(double.float(), single, rtol=0.02, atol=1e-2)  # half types round


def test_run_double_casts_one_layer_at_a_time():
    """No copy of the model: every layer is as it was again before the next one runs."""
    model = named("cifar:resnet8")
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    cast: list[int] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: cast.append(sum(own.weight.dtype == torch.float64 for own in layers)))
    run_double(model, torch.randn(1, *SHAPE, dtype=torch.float64))
    assert max(cast) <= 1
    assert len(cast) == len(layers)


def test_run_double_leaves_no_trace():
    model = randomise_(nn.Sequential(networks.conv(3, 4), nn.BatchNorm2d(4), networks.transposed()[2:3], *networks.head(6)))
    model[2] = networks.conv(4, 6)
    model[1].train()
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    image = torch.randn(2, *SHAPE, dtype=torch.float64)
    masks = {("2.weight", 1): torch.tensor([0])}
    run_double(model, image, masks)
    with pytest.raises(RuntimeError):
        run_double(model, image[:, :2])  # fails in the middle of the forward pass
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
        assert tensor.data_ptr() == places[name]
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_run_double_masks_what_it_is_told():
    model = randomise_(nn.Sequential(networks.conv(3, 4), nn.Sigmoid(), networks.conv(4, 6)))
    image = torch.randn(2, *SHAPE, dtype=torch.float64)
    expected = outputs(masked(model, [Keep("2", 1, (0, 3))]), image)
    actual = run_double(model, image, {("2.weight", 1): torch.tensor([1, 2])})
    assert largest_difference(actual, expected) < 1e-15


# Edits that do not fit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Keep("9", 0, (0,)), "edits '9', which the architecture does not have"),
        (Keep("0.nothing", 0, (0,)), "edits '0.nothing', which the architecture does not have"),
        (Keep("", 0, (0,)), "edits ''|a Sequential, which has no such axis"),
        (Keep("0", 0, (0, 8)), r"keeps channels of '0' that its weight \(8, 3, 3, 3\) does not have"),
        (Keep("1", 1, (0,)), "cuts axis 1 of '1', a BatchNorm2d, which has no such axis"),
        (Keep("2", 0, (0,)), "cuts axis 0 of '2', a Sigmoid, which has no such axis"),
        (Keep("0.bias", 1, (0,)), r"keeps channels of '0.bias' that its bias \(8,\) does not have"),
        (Set("0", "groups", 2), "sets groups of '0' to 2; it is 1"),
        (Set("0", "before", 0), "sets before of '0' to 0; it is None"),
        (Set("0", "training", 0), "sets training of '0' to 0"),
        (Set("0", "__class__", 0), "sets __class__ of '0'"),
        (Set("4.4", "groups", 1), "edits '4.4', which the architecture does not have"),
        (Replace("2", "hinge.decomposed", {"rank": 2}), "decomposes a Sigmoid, which cannot be"),
        (Replace("0", "hinge.decomposed", {"rank": 9}), "asks for rank 9 of a layer whose rank is at most 8"),
        (Replace("0", "hinge.decomposed", {"rank": 0}), "asks for rank 0"),
        (Replace("0", "hinge.decomposed", {}), "asks for rank 0"),
        (Replace("0", "os.system", {}), "a layer of unknown kind 'os.system'; it needs a newer compactcli"),
        (Replace("nowhere", "hinge.decomposed", {"rank": 1}), "edits 'nowhere', which the architecture does not have"),
        (Share("generator", "csg.generator", {}), "unknown kind|a generator of slices 0x0x0x0"),
    ],
)
def test_edits_that_do_not_fit_are_refused(small, edit, message):
    with pytest.raises(CompactError, match=message) as caught:
        apply_(small[0], [edit])
    assert "\n" not in str(caught.value)


def test_apply_works_without_memory(small):
    model, _, edits = small
    on_meta = copy.deepcopy(model).to("meta")
    edits = [*edits, Replace("3", "hinge.decomposed", {"rank": 2})]
    apply_(model, edits)
    apply_(on_meta, edits)
    assert {n: t.shape for n, t in on_meta.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert all(tensor.is_meta for tensor in on_meta.state_dict().values())


def test_the_numbers_that_layers_keep_follow_their_tensors():
    model = nn.Sequential(networks.conv(3, 8), nn.BatchNorm2d(8), networks.conv(8, 8, groups=8), nn.ConvTranspose2d(8, 6, 2))
    sets = found(model, SHAPE)
    edits = channels.edits(sets, sorted(set(sets.axes["0.weight", 0].tolist()))[:3], model)
    apply_(model, edits)
    assert (model[0].in_channels, model[0].out_channels) == (3, 5)
    assert model[1].num_features == 5
    assert (model[2].in_channels, model[2].out_channels, model[2].groups) == (5, 5, 5)
    assert (model[3].in_channels, model[3].out_channels) == (5, 6)
    linear = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    apply_(linear, [Keep("0", 0, (1, 2)), Keep("1", 1, (1, 2))])
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(4, 2), (2, 2)]


def test_frozen_parameters_stay_frozen(small):
    model, _, edits = small
    model[0].requires_grad_(False)
    apply_(model, edits)
    assert not model[0].weight.requires_grad
    assert model[3].weight.requires_grad
