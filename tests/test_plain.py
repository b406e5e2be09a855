"""Layers that hide their channels become others of the same function, whose channels may be cut."""

import re
from collections.abc import Callable

import networks
import pytest
import torch
import torch.nn.functional as F
from networks import AWKWARD, SHAPE, outputs, randomise_, removable
from test_artefact import assert_same, network
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from compactcli import channels, kernels, law, methods, surgery
from compactcli.artefact import dumps, open_model
from compactcli.compress import Target, compress
from compactcli.errors import CompactError
from compactcli.graph import copied
from compactcli.plain import Across, plain_, plained
from compactcli.plan import plan
from compactcli.recipe import Keep, Replace


class Standardised(nn.Conv2d):
    """Weight standardisation, on an image that the module pads itself where `same`."""

    same = False

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        if self.same:
            x = F.pad(x, (0, 1, 1, 2))
        weight = (self.weight - mean) / (std + 1e-3)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _with(layer: nn.Module) -> nn.Module:
    """A layer of 8 to 6 channels between others."""
    return nn.Sequential(
        networks.conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), layer, nn.ReLU(), networks.conv(6, 5), *networks.head(5)
    )


def standardised(**options: object) -> nn.Module:
    return _with(Standardised(8, 6, 3, **{"padding": 1, **options}))


def padded() -> nn.Module:
    layer = Standardised(8, 6, 3, stride=2, bias=False)
    layer.same = True
    return _with(layer)


def depthwise() -> nn.Module:
    layers = [Standardised(8, 8, 3, padding=1, groups=8), nn.ReLU(), Standardised(8, 6, 1)]
    return nn.Sequential(networks.conv(3, 8), nn.ReLU(), *layers, networks.conv(6, 5), *networks.head(5))


def gated(kernel: int = 3, *, biased: bool = False) -> nn.Module:
    layer = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=biased)
    run = networks.Code(lambda s, x: x * s.layer(x.mean((2, 3)).unsqueeze(1)).sigmoid().view(len(x), -1, 1, 1), layer=layer)
    return nn.Sequential(networks.conv(3, 8), nn.ReLU(), networks.conv(8, 6), run, networks.conv(6, 5), *networks.head(5))


def twice() -> nn.Module:
    """One layer, run two times."""
    layer = Standardised(8, 8, 3, padding=1)
    run = networks.Code(lambda s, x: s.layer(s.layer(x).relu()), layer=layer)
    return nn.Sequential(networks.conv(3, 8), nn.ReLU(), run, networks.conv(8, 5), *networks.head(5))


def old_weight_norm() -> nn.Module:
    return _with(nn.utils.weight_norm(networks.conv(8, 6)))


HIDING: dict[str, Callable[[], nn.Module]] = {
    "standardised": standardised,
    "strided": lambda: standardised(stride=2, dilation=2, padding=2),
    "in_groups": lambda: standardised(groups=2),
    "padded": padded,
    "depthwise": depthwise,
    "twice": twice,
    "weight_norm": lambda: _with(parametrizations.weight_norm(networks.conv(8, 6))),
    "spectral_norm": lambda: _with(parametrizations.spectral_norm(networks.conv(8, 6))),
    "orthogonal": lambda: _with(parametrizations.orthogonal(networks.conv(8, 6))),
    "old_weight_norm": pytest.param(old_weight_norm, marks=pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")),
    "gated": gated,
    "gated_by_five": lambda: gated(5, biased=True),
}
PARAMETERS = [value if hasattr(value, "marks") else pytest.param(value, id=name) for name, value in HIDING.items()]


@pytest.mark.parametrize("make", PARAMETERS)
def test_the_function_stays_and_every_channel_between_layers_is_free(make):
    model = randomise_(make()).eval()
    image = torch.randn(4, *SHAPE)
    before = outputs(model, image)[0]
    edits = plain_(model, SHAPE)
    assert edits
    torch.testing.assert_close(outputs(model, image)[0], before, rtol=1e-4, atol=1e-5)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    _, sets = plan(model, SHAPE)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert [sets.reason((f"{name}.weight", 0)) for name in convolutions] == [None] * len(convolutions)
    removed = removable(sets, 0.4)
    assert removed
    assert law.apply_checked_(model, channels.edits(sets, removed, model), sets.consumed, SHAPE) < 1e-9


@pytest.mark.parametrize("make", PARAMETERS)
def test_the_edits_rebuild_it(make):
    """As a file does: the architecture, the edits without their tensors, then the tensors."""
    model = randomise_(make()).eval()
    again = copied(model)
    edits = plain_(model, SHAPE)
    surgery.apply_(again, [Replace(edit.module, edit.layer, edit.options) for edit in edits])
    again.load_state_dict(model.state_dict())
    assert repr(again) == repr(model)
    image = torch.randn(2, *SHAPE)
    assert torch.equal(outputs(again, image)[0], outputs(model, image)[0])


@pytest.mark.parametrize("make", PARAMETERS)
def test_a_copy_is_made_only_where_something_changes(make):
    model = make().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert plained(model, SHAPE) is not model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    ordinary = networks.concatenation()
    assert plained(ordinary, SHAPE) is ordinary
    assert plain_(ordinary, SHAPE) == []


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_networks_keep_their_function_and_the_law(name):
    model = randomise_(AWKWARD[name]()).eval()
    image = torch.randn(2, *SHAPE)
    before = outputs(model, image)
    plain_(model, SHAPE)
    for now, then in zip(outputs(model, image), before, strict=True):
        torch.testing.assert_close(now, then, rtol=1e-4, atol=1e-5)
    _, sets = plan(model, SHAPE)
    edits = channels.edits(sets, removable(sets, 0.3), model)
    assert law.apply_checked_(model, edits, sets.consumed, SHAPE) < 1e-9


def test_a_kernel_that_depends_on_the_image_stays():
    class Dynamic(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight * x.mean(), self.bias, padding=1)

    model = _with(Dynamic(8, 6, 3)).eval()
    assert plain_(model, SHAPE) == []
    assert type(model[3]) is Dynamic


@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(1, 1, 2, stride=2), nn.Conv1d(1, 1, 3), nn.Conv1d(1, 6, 3, padding=1)],
    ids=["strided", "shorter", "wider"],
)
def test_a_filter_that_does_not_give_each_channel_its_own_number_stays(layer):
    run = networks.Code(lambda s, x: s.layer(x.mean((2, 3)).unsqueeze(1)).flatten(1), layer=layer)
    model = nn.Sequential(networks.conv(3, 8), run)
    assert plain_(model.eval(), SHAPE) == []


def test_a_channel_that_is_gone_is_a_zero_between_its_neighbours():
    layer = Across(nn.Conv1d(1, 1, 3, padding=1, bias=False), 6)
    full = torch.randn(2, 1, 6)
    full[..., 2] = 0
    wanted = layer.conv(full)[..., [0, 1, 3, 4, 5]]
    surgery.apply_(layer, [Keep(name, 0, (0, 1, 3, 4, 5)) for name in ("place", "present")])
    assert torch.equal(layer(full[..., [0, 1, 3, 4, 5]]), wanted)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Replace("0", "plain.computed", {}), "makes a ReLU plain"),
        (Replace("0", "plain.across", {"size": 4}), "filters 4 channels with a ReLU"),
        (Replace("1", "plain.across", {"size": 0}), "filters 0 channels"),
        (Replace("1", "plain.across", {"size": 1 << 30}), "filters 1073741824 channels"),
    ],
)
def test_what_a_file_may_not_ask_for(edit, message):
    methods.register_layers([edit.layer])
    with pytest.raises(CompactError, match=message):
        surgery.apply_(nn.Sequential(nn.ReLU(), nn.Conv1d(1, 1, 3)), [edit])


@pytest.mark.parametrize("method", ["linearconv", "csg"])
def test_kernels_that_are_made_are_plain_to_the_last_digit(method):
    """In float32 they are what float64 says, rounded once; the file's recipe has no values."""
    given = network(width=16)
    made = compress(given, method, methods.get(method)(), Target(0.4)).module
    wanted = {name: copied(layer).double().dense().weight for name, layer in kernels.layers(made).items()}
    assert wanted
    edits = plain_(made, given.input_shape)
    assert [(edit.module, edit.layer) for edit in edits] == [(name, "plain.folded") for name in wanted]
    assert not kernels.layers(made)
    assert not kernels.shared(made)
    for name, kernel in wanted.items():
        layer = made.get_submodule(name)
        assert type(layer) is nn.Conv2d
        assert torch.equal(layer.weight, kernel.float())
    assert {tensor.dtype for tensor in made.state_dict().values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("method", ["linearconv", "csg"])
def test_another_method_goes_on_from_kernels_that_are_made(method):
    given = compress(network(width=8), method, methods.get(method)(), Target(0.6))
    lines: list[str] = []
    small = compress(given, "hinge", methods.get("hinge")(), Target(0.6), log=lines.append)
    assert re.match(r"hinge: made \d+ layers of an earlier step plain: what it had saved there is undone", lines[0])
    found = open_model(dumps(small))
    assert_same(found.module, small.module, torch.randn(2, 3, 32, 32))
    assert dumps(found) == dumps(small)
