"""Channels that a layer normalisation takes its statistics over stay, or go with `--set soft=true`, under a law of their own."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import CLASSES, SHAPE, Code, conv, head, outputs, randomise_, removable
from test_compress import own
from torch import Tensor, nn

from compactcli import artefact, channels, law, measure, surgery
from compactcli.compress import Calibration, Search, Target, compress, planned
from compactcli.data import Dataset, from_tensors
from compactcli.errors import CompactError
from compactcli.methods import get, parse_options
from compactcli.optim import Settings
from compactcli.plan import plan

HINT = "they may go with --set soft=true"


class Norm2d(nn.LayerNorm):
    """Over the channels of images, as ConvNeXt's (torchvision, timm)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


def block(width: int, **options: bool) -> nn.Module:
    """Of ConvNeXt: depthwise, normalised, wide and narrow again, on top of what was there."""
    depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
    inner = nn.Sequential(nn.LayerNorm(width, **options), nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))
    return Code(lambda s, x: x + s.inner(s.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2), first=depthwise, inner=inner)


def stages() -> nn.Module:
    return nn.Sequential(conv(3, 8), Norm2d(8), block(8), Norm2d(8), conv(8, 12), block(12), *head(12))


def tokens() -> nn.Module:
    """Positions in a row, a normalisation before and one behind."""
    mlp = nn.Sequential(nn.LayerNorm(10), nn.Linear(10, 14), nn.GELU(), nn.Linear(14, 10))
    body = Code(lambda s, x: s.last(x + s.mlp(x)).mean(1), mlp=mlp, last=nn.LayerNorm(10, bias=False))
    return nn.Sequential(conv(3, 10), nn.Flatten(2), Code(lambda s, x: x.transpose(1, 2)), body, nn.Linear(10, 4))


def of_one_group() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.GroupNorm(1, 8), nn.ReLU(), conv(8, 12), nn.GroupNorm(1, 12), nn.ReLU(), *head(12))


def cast() -> nn.Module:
    """Named in float32, so that the law needs a copy in float64."""
    one = torch.ones(1, dtype=torch.float32)
    run = Code(lambda s, x: s.norm(x.float() * one), norm=Norm2d(8))
    return nn.Sequential(conv(3, 8), run, conv(8, 6), *head(6))


SOFT: dict[str, Callable[[], nn.Module]] = {
    "stages": stages,
    "unbiased": lambda: nn.Sequential(conv(3, 8), block(8, bias=False), *head(8)),
    "tokens": tokens,
    "of one group": of_one_group,
    "cast": cast,
}


def soft(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise_(SOFT[name]()).eval()


@pytest.mark.parametrize("name", SOFT)
def test_they_are_locked_and_the_reason_names_the_way_out(name):
    _, hard = plan(soft(name), SHAPE)
    _, sets = plan(soft(name), SHAPE, soft=True)
    assert any(HINT in reason for reason in hard.locked.values())
    assert not any(HINT in reason for reason in sets.locked.values())
    assert len(sets.free()) > len(hard.free())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", SOFT)
def test_cut_equals_mask_with_the_statistics_of_what_is_kept(name, seed):
    module = soft(name)
    _, sets = plan(module, SHAPE, soft=True)
    edits = channels.edits(sets, removable(sets, 0.4, seed), module)
    assert law.apply_checked_(module, edits, sets.consumed, SHAPE) < law.TOLERANCE
    for each in module.modules():
        if isinstance(each, nn.LayerNorm):
            assert each.normalized_shape == tuple(each.weight.shape)


@pytest.mark.parametrize("name", SOFT)
def test_without_those_statistics_the_law_is_broken(name, monkeypatch):
    module = soft(name)
    _, sets = plan(module, SHAPE, soft=True)
    edits = channels.edits(sets, removable(sets, 0.4), module)
    monkeypatch.setattr(law, "_statistics", lambda model, edits: {})
    with pytest.raises(CompactError, match="differs from the masked one"):
        law.apply_checked_(module, edits, sets.consumed, SHAPE)


def own_norm() -> nn.Module:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x.permute(0, 2, 3, 1), (8,), self.weight, self.bias).permute(0, 3, 1, 2)

    return Norm()


class Computed(nn.LayerNorm):
    """Scales by what it makes of its weight, as Gemma's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, 1 + self.weight, self.bias).permute(0, 3, 1, 2)


def parametrized() -> nn.Module:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    norm = Norm2d(8)
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", Doubled())
    return norm


@pytest.mark.parametrize(
    "norm",
    [own_norm, lambda: Computed(8), parametrized, lambda: Norm2d(8, elementwise_affine=False), lambda: nn.LayerNorm((8, 8, 8))],
    ids=["own", "computed", "parametrized", "plain", "all"],
)
def test_a_normalisation_that_is_not_told_of_their_number_holds_them(norm):
    module = randomise_(nn.Sequential(conv(3, 8), norm(), conv(8, 6), *head(6))).eval()
    for chosen in (False, True):
        _, sets = plan(module, SHAPE, soft=chosen)
        reason = sets.reason(("0.weight", 0))
        assert reason is not None
        assert "a layer normalisation takes statistics over" in reason
        assert HINT not in reason
        assert len(sets.free()) == 6


def test_the_hint_yields_to_any_other_reason():
    """It would not help."""
    norm = Code(lambda s, x: s.norm(x) + x.cumsum(1), norm=Norm2d(8))
    _, sets = plan(randomise_(nn.Sequential(conv(3, 8), norm, *head(8))).eval(), SHAPE)
    assert sets.reason(("0.weight", 0)) == "no rule for the operation cumsum"


def test_a_method_without_the_option_does_not_hint_at_it():
    told = planned(own(soft("stages")), "csg", get("csg")(), Target(0.9, nearest=True))["layers"]
    assert any("takes statistics over" in row["why"] for row in told)
    assert not any(HINT in row["why"] for row in told)


def test_a_gain_of_a_subclass_goes_whatever_the_normalisation_scales():
    class Gain(nn.LayerNorm):
        def __init__(self) -> None:
            super().__init__(64, elementwise_affine=False)
            self.gain = nn.Parameter(torch.ones(8, 1))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(2)) * self.gain

    body = Code(lambda s, x: s.norm(x).mean(2), norm=Gain())
    module = randomise_(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), body, nn.Linear(8, 4))).eval()
    _, sets = plan(module, SHAPE)
    assert sets.reason(("0.weight", 0)) is None
    law.apply_checked_(module, channels.edits(sets, removable(sets, 0.4), module), sets.consumed, SHAPE)


def test_layers_that_read_the_images_stay():
    module = randomise_(nn.Sequential(nn.GroupNorm(1, 3), conv(3, 8), nn.ReLU(), *head(8)))
    _, sets = plan(module, SHAPE, soft=True)
    assert sets.reason(("0.weight", 0)) is not None
    assert len(sets.free()) == 8


def noise(count: int = 48) -> Tensor:
    return torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("method", ["hinge", "fcf"])
@pytest.mark.parametrize("name", SOFT)
def test_they_go_and_the_recorded_edits_make_the_same_network(name, method, images):
    """With the choices that may prune what shortcuts share."""
    given, options = own(soft(name)), {"hinge": ["mode=prune", "favour=speed"], "fcf": ["residual=prune"]}[method]
    widths = [layer.weight.numel() for layer in given.module.modules() if isinstance(layer, nn.LayerNorm | nn.GroupNorm)]
    calibration = Calibration(noise(), "noise") if images else None
    made = get(method)(parse_options(get(method), ["soft=true", *options]))
    compress(given, method, made, Target(0.4, nearest=True), calibration=calibration)
    after = [layer.weight.numel() for layer in given.module.modules() if isinstance(layer, nn.LayerNorm | nn.GroupNorm)]
    assert sum(after) < sum(widths)
    assert given.recipe.steps[-1].options["soft"] is True
    again = soft(name)
    surgery.apply_(again, given.recipe.steps[-1].edits)
    again.load_state_dict(given.module.state_dict())
    image = torch.randn(2, *SHAPE)
    for ours, theirs in zip(outputs(again.eval(), image), outputs(given.module, image), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", ["hinge", "fcf"])
def test_a_search_chooses_among_them(method):
    given, kind = own(soft("of one group")), get(method)
    labels = torch.arange(48) % CLASSES
    dataset = Dataset("noise", False, tuple("abcde"), from_tensors(noise(), labels, "train"), None)
    search = Search(dataset, Settings(epochs=1, batch_size=16, precision="float32"))
    before = measure.macs(given.module, SHAPE)
    calibration = Calibration(noise(), "noise")
    made = kind(parse_options(kind, ["soft=true"]))
    compress(given, method, made, Target(0.5, nearest=True), calibration=calibration, search=search)
    assert measure.macs(given.module, SHAPE) < 0.75 * before
    norms = [layer for layer in given.module.modules() if isinstance(layer, nn.GroupNorm)]
    assert [norm.num_channels for norm in norms] == [len(norm.weight) for norm in norms]
    assert sum(norm.num_channels for norm in norms) < 8 + 12


def test_convnext_goes_through_the_file(tmp_path):
    """Under its own name, with its stem's and its blocks' channels cut."""
    network = artefact.fresh(artefact.Wishes("convnext_tiny", input_shape=(3, 64, 64)), 0)
    kind = get("hinge")
    before = network.module.classifier[0].weight.numel()
    compress(network, "hinge", kind(parse_options(kind, ["soft=true", "mode=prune", "floor=0.5"])), Target(0.4, nearest=True))
    assert network.module.classifier[0].weight.numel() < before
    path = tmp_path / "small.safetensors"
    path.write_bytes(artefact.dumps(network))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(artefact.open_model(path).module(image), network.module(image))
