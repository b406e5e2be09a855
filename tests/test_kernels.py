"""Layers that make their kernels: each equals its plain convolution, trains, and stays in step with what it shares."""

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Code, outputs
from torch import Tensor, nn

from compactcli import kernels, surgery, weights
from compactcli.errors import CompactError
from compactcli.kernels import KernelLayer
from compactcli.methods import get, names, register_layers
from compactcli.methods._slices import Slicing
from compactcli.recipe import Edit, Replace, Share
from compactcli.surgery import LAYERS

register_layers(["linearconv.full", "csg.coded", "plain.folded"])

KINDS = ("linearconv.full", "linearconv.lowrank", "linearconv.sparse", "csg tiled", "csg rows")
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"padding": 1},
    "strides": {"stride": (2, 1), "padding": (0, 2)},
    "dilated": {"dilation": 2, "padding": "same"},
    "valid": {"padding": "valid"},
    "groups": {"groups": 3, "padding": 1},
    "depthwise": {"groups": 6, "padding": 1},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": "same", "padding_mode": "circular", "kernel_size": (3, 5)},
    "replicate": {"padding": (1, 0), "padding_mode": "replicate", "stride": 2},
    "1x1": {"kernel_size": 1},
    "5x5": {"kernel_size": 5, "padding": 2},
    "3x1": {"kernel_size": (3, 1), "padding": "same"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES)


def conv(geometry: str = "plain", bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(6, 12, **{"kernel_size": 3, "bias": bias, **GEOMETRIES[geometry]})


def edits(path: str, plain: nn.Conv2d, kind: str) -> list[Edit]:
    """5 of 12 filters are primary; slices of 5 x 4, which divide nothing, from 3 numbers."""
    if kind.startswith("linearconv"):
        size = {"linearconv.full": {}, "linearconv.lowrank": {"rank": 3}, "linearconv.sparse": {"kept": 17}}[kind]
        return [Replace(path, kind, {"primary": 5, **size})]
    cut, (height, width) = {"outputs": 5, "inputs": 4, "code": 3}, plain.kernel_size
    generator = Share(f"csg_{height}x{width}", "csg.generator", cut | {"height": height, "width": width})
    return [generator, Replace(path, "csg.coded", cut | {"rows": int(kind == "csg rows")})]


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random numbers in every tensor that a kernel is made from."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        for layer in kernels.layers(model).values():
            if hasattr(layer, "place"):
                layer.place.copy_(torch.randperm(len(layer.place), generator=generator))
            if hasattr(layer, "mask"):
                bits = torch.zeros(layer.secondary * len(layer.primary), dtype=torch.uint8)
                bits[torch.randperm(len(bits), generator=generator)[: len(layer.values)]] = 1
                layer.mask.copy_(torch.from_numpy(np.packbits(bits.numpy(), bitorder="little")))
    return model


def network(kind: str, geometry: str = "plain", bias: bool = True, seed: int = 0) -> nn.Module:
    """One layer of the kind, in float64."""
    plain = conv(geometry, bias)
    model = nn.Sequential(plain)
    surgery.apply_(model, edits("0", plain, kind))
    return filled(model, seed).double()


def several(seed: int = 0) -> nn.Module:
    """Two layers from one generator, one of linearconv, and plain ones."""
    torch.manual_seed(seed)
    plain = [nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 12, 3, padding=1), nn.Conv2d(12, 12, 3, groups=2), nn.Conv2d(12, 12, 1)]
    model = nn.Sequential(*plain, nn.BatchNorm2d(12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
    generator, first = edits("1", plain[1], "csg tiled")
    surgery.apply_(model, [generator, first, edits("2", plain[2], "csg tiled")[1], *edits("3", plain[3], "linearconv.full")])
    return filled(model, seed).eval()


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(model: nn.Module, name: str = "0") -> Any:
    layer = model.get_submodule(name)
    assert isinstance(layer, KernelLayer)
    return layer


# A layer and its plain equal


@every_kind
@every_geometry
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_equals_its_plain_convolution(kind, geometry, bias):
    layer, x = made(network(kind, geometry, bias)), image(6, 9, 10)
    dense = layer.dense()
    assert type(dense) is nn.Conv2d
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-12, atol=1e-12)
    assert dense.bias is layer.bias
    assert str(dense) == str(conv(geometry, bias))


@every_kind
@every_geometry
def test_a_hollow_layer_has_the_shape_alone(kind, geometry):
    layer = made(network(kind, geometry)).eval()
    hollow = layer.hollow()
    assert str(hollow) == str(conv(geometry))
    assert (hollow.weight.shape, hollow.weight.dtype) == (conv(geometry).weight.shape, torch.float64)
    assert hollow.bias is layer.bias
    assert not hollow.training
    assert (layer.outputs, layer.reads) == (12, conv(geometry).weight[0].numel())


def flat(layer: Any, name: str) -> Any:
    return getattr(layer, name).detach().flatten(1).numpy()


def coefficients(layer: Any) -> Any:
    """Of linearconv, by numpy."""
    if hasattr(layer, "mask"):
        bits = np.unpackbits(layer.mask.numpy(), bitorder="little", count=layer.secondary * len(layer.primary))
        result = np.zeros(len(bits))
        result[bits == 1] = layer.values.detach().numpy()
        return result.reshape(layer.secondary, -1)
    return flat(layer, "outer") @ flat(layer, "inner") if hasattr(layer, "outer") else flat(layer, "coefficients")


@pytest.mark.parametrize("kind", KINDS[:3])
@every_geometry
def test_primary_filters_and_combinations_lie_where_place_says(kind, geometry):
    layer = made(network(kind, geometry))
    rows = np.concatenate([flat(layer, "primary"), coefficients(layer) @ flat(layer, "primary")])
    for filter_, place in zip(layer.dense().weight.detach().flatten(1).numpy(), layer.place.tolist(), strict=True):
        np.testing.assert_allclose(filter_, rows[place], rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS[3:])
@every_geometry
def test_every_number_of_a_kernel_is_of_one_slice(kind, geometry):
    """Tiles of 5 filters by 4 inputs; or, by rows, as the authors' view of all slices one after the other."""
    layer = made(network(kind, geometry))
    weight = layer.dense().weight.detach().numpy()
    o, i, *k = weight.shape
    slices = flat(layer, "code") @ layer.generator.weight.detach().numpy().T
    along = -(-i // 4)
    if kind == "csg rows":
        expected = slices.reshape(-(-o // 5) * 5, along * 4, *k)[:o, :i]
    else:
        blocks = slices.reshape(-1, 5, 4, *k)
        expected = np.empty_like(weight)
        for out, into in np.ndindex(o, i):
            expected[out, into] = blocks[out // 5 * along + into // 4][out % 5, into % 4]
    np.testing.assert_allclose(weight, expected, rtol=1e-12)


@every_kind
def test_gradients_reach_every_parameter(kind):
    model = network(kind)
    model(image(6, 5, 5)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@every_kind
def test_gradients_are_those_of_the_plain_kernel(kind):
    model = network(kind, "groups")
    dense, layer, x = made(model).dense(), made(model), image(6, 5, 5)
    dense(x).square().sum().backward()
    layer(x).square().sum().backward()
    theirs = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if "bias" not in name}
    model.zero_grad()
    layer.kernel().backward(dense.weight.grad)
    for name, gradient in theirs.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kept", [0, 1, 35])
def test_sparse_coefficients_may_be_none_or_all(kept):
    model = nn.Sequential(conv())
    surgery.apply_(model, [Replace("0", "linearconv.sparse", {"primary": 5, "kept": kept})])
    layer = made(filled(model).double())
    assert np.count_nonzero(coefficients(layer)) == kept == int(layer.bits().sum())
    torch.testing.assert_close(layer(image(6, 5, 5)), layer.dense()(image(6, 5, 5)), rtol=1e-12, atol=1e-12)


# Copies, and what layers share


def in_step(model: nn.Module) -> bool:
    """Whether every layer makes its kernel with the generator that the network's state holds, and there is one."""
    own = kernels.shared(model)
    parameters = dict(model.named_parameters())
    return len(own) == 1 and all(
        made(model, path).generator is own["csg_3x3"]
        and made(model, path).generator.weight is parameters["compactcli_shared.csg_3x3.weight"]
        for path in ("1", "2")
    )


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(model: nn.Module, *, assign: bool) -> nn.Module:
    result = several(seed=1)
    result.load_state_dict(model.state_dict(), assign=assign)
    return result


def through_meta(model: nn.Module) -> nn.Module:
    """As large models are loaded: emptied, then filled."""
    result = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    result.load_state_dict(model.state_dict())
    return result


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "load_state_dict": lambda model: loaded(model, assign=False),
    "assign": lambda model: loaded(model, assign=True),
    "meta": through_meta,
    "deepcopy of a deepcopy": lambda model: copy.deepcopy(copy.deepcopy(model)),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copys_layers_share_the_copys_generator(way):
    model, x = several(), image(3, 8, 8).float()
    before = model(x)
    twin = COPIES[way](model)
    assert in_step(model)
    assert in_step(twin)
    assert torch.equal(twin.eval()(x), before)
    with torch.no_grad():
        twin.get_parameter("compactcli_shared.csg_3x3.weight").mul_(2)
    assert not torch.equal(twin(x), before)
    assert torch.equal(model(x), before) is (way != "assign")  # whose tensors are the very same


@every_kind
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_makes_the_same_kernel(kind, assign):
    first, second = network(kind), network(kind, seed=1)
    assert not torch.equal(made(first).kernel(), made(second).kernel())
    second.load_state_dict(first.state_dict(), assign=assign)
    assert torch.equal(made(first).kernel(), made(second).kernel())
    assert torch.equal(made(first).kernel(), made(copy.deepcopy(first)).kernel())


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_cast_leaves_layers_in_step(overwrite):
    model = several()
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        assert in_step(model.double())
        assert model(image(3, 8, 8)).dtype == torch.float64
        assert in_step(model.to("meta"))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_a_state_holds_a_generator_once():
    model = several()
    assert [name for name in model.state_dict() if "csg_3x3" in name] == ["compactcli_shared.csg_3x3.weight"]
    assert sum("csg_3x3" in name for name, _ in model.named_parameters(remove_duplicate=False)) == 1
    assert not any("generator" in name or "_shared" in name.split(".")[-2:-1] for name, _ in made(model, "1").named_modules())


def test_tensors_put_in_for_a_call_are_used():
    """As the tracer and torch.func do."""
    model, x = several(), image(3, 8, 8).float()
    other = loaded(several(seed=2), assign=False)
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert torch.equal(torch.func.functional_call(model, tensors, (x,)), other(x))


def test_a_layer_may_be_copied_alone():
    model = network("csg tiled")
    layer = copy.deepcopy(made(model))
    assert layer.generator is not made(model).generator
    assert torch.equal(layer(image(6, 5, 5)), made(model)(image(6, 5, 5)))


def test_a_generator_that_takes_anothers_place_is_what_layers_use():
    model = several()
    surgery.apply_(model, [edits("1", conv(), "csg tiled")[0]])
    assert in_step(model)


def test_a_generator_of_another_size_does_not_take_the_place_of_one_in_use():
    wrong = Share("csg_3x3", "csg.generator", {"outputs": 5, "inputs": 4, "code": 2, "height": 3, "width": 3})
    with pytest.raises(CompactError, match="the recipe has no generator of"):
        surgery.apply_(several(), [wrong])


def test_a_layer_without_its_generator_is_refused():
    model = nn.Sequential(conv())
    with pytest.raises(CompactError, match="the recipe has no generator of 180x3 for a kernel 12x6x3x3"):
        surgery.apply_(model, edits("0", conv(), "csg tiled")[1:])


# Folding


def test_a_folded_network_is_the_same_and_shares_all_else():
    model, x = several(), image(3, 8, 8).float()
    before, state = str(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = kernels.folded(model)
    torch.testing.assert_close(plain(x), model(x))
    assert not kernels.layers(plain)
    assert not hasattr(plain, kernels.SHARED)
    own = {name: parameter for name, parameter in plain.named_parameters()}
    assert {name for name in own if own[name] is not dict(model.named_parameters()).get(name)} == {
        *("1.weight", "2.weight", "3.weight"),
    }
    assert all(buffer is dict(model.named_buffers())[name] for name, buffer in plain.named_buffers())
    assert str(model) == before
    assert in_step(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_plain_network_is_folded_as_it_is():
    model = nn.Sequential(conv(), nn.ReLU())
    assert kernels.folded(model) is model
    kernels.fold_(model)
    assert type(model[0]) is nn.Conv2d


def test_what_holds_results_of_operations_can_be_folded():
    """A layer with the older weight norm keeps its weight, which is no leaf, as an attribute."""
    model = several()
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model[0])
    x = image(3, 8, 8).float()
    expected = model(x)
    torch.testing.assert_close(kernels.folded(model)(x), expected)


def test_the_last_layer_takes_the_generator_with_it():
    model = several()
    for path in ("1", "2"):
        assert hasattr(model, kernels.SHARED)
        surgery.apply_(model, [Replace(path, "plain.folded", {})])
    assert not hasattr(model, kernels.SHARED)


def test_a_generator_that_nothing_uses_is_not_kept():
    model = nn.Sequential(conv())
    surgery.apply_(model, edits("0", conv(), "csg tiled")[:1])
    assert not hasattr(model, kernels.SHARED)
    assert kernels.shared(model) == {}


def test_the_root_may_be_any_module():
    model = Code(lambda s, x: s.layer(x) + 1, layer=conv())
    surgery.apply_(model, edits("layer", model.layer, "csg rows"))
    filled(model)
    torch.testing.assert_close(kernels.folded(model)(image(6, 5, 5).float()), model(image(6, 5, 5).float()))


def test_hollow_folding_makes_no_kernel(monkeypatch):
    model = several()
    shapes = {name: layer.shape for name, layer in kernels.layers(model).items()}
    for layer in kernels.layers(model).values():
        monkeypatch.setattr(type(layer), "kernel", None)
    kernels.fold_(model, hollow=True)
    assert {name: model.get_submodule(name).weight.shape for name in shapes} == shapes


@pytest.mark.parametrize("name", ["", "a.b", "../x", "1"])
def test_what_is_shared_has_a_name_that_a_module_can_have(name):
    with pytest.raises(CompactError, match="which is none"):
        kernels.share_(nn.Sequential(), name, nn.Identity())


def test_what_layers_share_hands_values_on():
    assert outputs(kernels.Shared({"a": nn.Identity()}), torch.ones(2))[0].equal(torch.ones(2))


# Slices

sizes = st.integers(1, 13)


@given(sizes, sizes, st.integers(1, 3), st.integers(1, 3), sizes, sizes, st.booleans())
def test_what_is_cut_is_pasted(o, i, height, width, outputs_, inputs, rows):
    slicing = Slicing((o, i, height, width), outputs_, inputs, rows)
    kernel = torch.arange(1.0, o * i * height * width + 1).view(o, i, height, width)
    slices = slicing.cut(kernel)
    assert slices.shape == (slicing.count, slicing.size)
    assert torch.equal(slicing.paste(slices), kernel)
    assert np.count_nonzero(slices) == kernel.numel()  # each once, and zeros beside


def live(slicing: Slicing) -> int:
    """How many slices make anything of the kernel."""
    return int(slicing.cut(torch.ones(slicing.shape)).any(1).sum())


@pytest.mark.parametrize(
    ("o", "i", "used", "count"), [(16, 16, 3, 4), (32, 16, 6, 6), (32, 32, 8, 9), (64, 32, 16, 18), (64, 64, 32, 36)]
)
def test_codes_that_make_nothing_are_only_in_the_authors_order(o, i, used, count):
    """PAPERS.md 4.5: slices of 12 x 12 on the widths of ResNets."""
    assert (live(Slicing((o, i, 3, 3), 12, 12, by_rows=True)), Slicing((o, i, 3, 3), 12, 12).count) == (used, count)


@given(sizes, sizes, sizes, sizes)
def test_tiles_all_make_something(o, i, outputs_, inputs):
    slicing = Slicing((o, i, 1, 1), outputs_, inputs)
    assert live(slicing) == slicing.count


# Buffers that hold positions

INDEXED: dict[str, dict[str, int]] = {
    "linearconv.full": {"primary": 5},
    "linearconv.lowrank": {"primary": 5, "rank": 3},
    "linearconv.sparse": {"primary": 5, "kept": 17},
    "fcf.squeeze": {"filters": 4, "inputs": 3},
    "plain.across": {"size": 12},
}
WITHOUT = {"csg.coded", "csg.generator", "hetconv.parts", "hinge.decomposed", "hinge.two_slope", "plain.computed", "plain.folded"}


def out_of_range(places: Tensor) -> Tensor:
    return places.index_fill(0, torch.tensor([1]), 1_000_000 if places.dtype != torch.uint8 else 255)


def negative(places: Tensor) -> Tensor:
    return places.index_fill(0, torch.tensor([0]), -1 if places.dtype != torch.uint8 else 254)


def repeated(places: Tensor) -> Tensor:
    return places.index_fill(0, torch.tensor([1]), int(places[0]))


def other_type(places: Tensor) -> Tensor:
    return places.to(torch.int16)


def indexed(kind: str) -> nn.Sequential:
    """One layer of the kind, with numbers that it may hold."""
    old = nn.Conv1d(1, 1, 3, padding=1) if kind == "plain.across" else conv()
    model = nn.Sequential(LAYERS[kind].build(old, INDEXED[kind]))
    mask = dict(model.named_buffers()).get("0.mask")
    if mask is not None:
        mask[:3] = torch.tensor([255, 127, 3])  # 17 bits
    return model


def test_every_kind_of_layer_with_positions_is_known():
    for method in names():
        get(method)
    own = {kind for kind in LAYERS if kind.partition(".")[0] in (*names(), "plain")}  # other tests make some more
    assert own == INDEXED.keys() | WITHOUT
    for kind in INDEXED:
        assert any(not tensor.is_floating_point() for tensor in indexed(kind).state_dict().values())


@pytest.mark.parametrize("damage", [out_of_range, negative, repeated, other_type])
@pytest.mark.parametrize("kind", INDEXED)
def test_positions_that_there_are_not_are_refused_in_one_line(kind, damage):
    model = indexed(kind)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights.load_(model, state)
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            with pytest.raises(CompactError, match=f"^{name} does not (hold|have) ") as raised:
                weights.load_(indexed(kind), {**state, name: damage(tensor)})
            assert "\n" not in str(raised.value)
