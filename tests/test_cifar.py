"""The definitions are the published ones: their counts, their keys and their arithmetic."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from compactcli import cifar
from compactcli.errors import CompactError

CHECKPOINTS = Path(__file__).parents[2] / "shared" / "checkpoints"


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return cifar.NETWORKS[name](**kwargs).eval()


# Name, arguments, parameters, MACs of convolutions and linear layers: PAPERS.md 1.8, 2.3, 3.3, 4.4, 5.3.
Count = tuple[str, dict[str, Any], int, int | None]
HINGE: list[Count] = [
    ("resnet20", {"shortcut": "pool", "stem_bias": True}, 269_738, 40_551_040),
    ("resnet56", {"shortcut": "pool", "stem_bias": True}, 853_034, 125_485_696),
    ("resnet20", {"shortcut": "pool", "stem_bias": True, "num_classes": 100}, 275_588, 40_556_800),
    ("resnet164", {}, 1_704_154, 247_646_720),
    ("resnet164", {"num_classes": 100}, 1_727_284, 247_669_760),
    ("vgg16_linear3", {}, 15_253_578, 313_725_952),
    ("vgg16", {}, 14_728_266, 313_201_664),
    ("densenet12_40", {}, 1_059_298, 282_917_328),
    ("resnext20", {}, 211_850, 35_523_072),
    ("resnext164", {}, 1_713_546, 251_005_440),
    ("resnext20", {"num_classes": 100}, 234_980, 35_546_112),
    ("resnext164", {"num_classes": 100}, 1_736_676, 251_028_480),
    ("wrn16_10", {"num_classes": 100}, 17_179_940, 3_120_019_968),
]
FCF: list[Count] = [
    ("resnet20", {"shortcut": "conv"}, 272_474, 40_812_544 + 640),
    ("resnet32", {"shortcut": "conv"}, 466_906, 69_124_096 + 640),
    ("resnet56", {"shortcut": "conv"}, 855_770, 125_747_200 + 640),
    ("resnet110", {"shortcut": "conv"}, 1_730_714, 253_149_184 + 640),
]
LINEARCONV: list[Count] = [
    ("base", {}, 399_626, None),
    ("vgg11", {}, 9_231_114, None),
    ("allconv", {}, 1_369_738, None),
    ("resnet18", {}, 11_173_962, None),
    ("resnext29_2x64d", {}, 9_128_778, None),
    ("mobilenet_v2", {}, 2_296_922, None),
]
CSG: list[Count] = [
    ("resnet20", {"keys": "csg"}, 269_722, 40_551_040),
    ("resnet56", {"keys": "csg"}, 853_018, 125_485_696),
    ("resnet110", {"keys": "csg"}, 1_727_962, None),
    ("densenet_bc40_36", {}, 1_542_682, None),
    ("densenet_bc40_48", {}, 2_733_130, None),
    ("shufflenet_v2_x0_5", {}, 352_042, None),
]
HETCONV: list[Count] = [("vgg16_hetconv", {}, 14_987_786, 313_463_808)]


@pytest.mark.parametrize(("name", "kwargs", "params", "macs"), HINGE + FCF + LINEARCONV + CSG + HETCONV)
def test_counts_are_those_of_the_papers(name: str, kwargs: dict[str, Any], params: int, macs: int | None) -> None:
    network = on_meta(name, **kwargs)
    assert sum(parameter.numel() for parameter in network.parameters()) == params
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 3, 32, 32, device="meta"))
    if macs is not None:
        assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize("name", cifar.NETWORKS)
def test_classes_and_channels_are_arguments(name: str) -> None:
    network = on_meta(name, num_classes=7, in_channels=1)
    with torch.no_grad():
        assert network(torch.empty(2, 1, 32, 32, device="meta")).shape == (2, 7)


class CountRelus(TorchDispatchMode):  # type: ignore[no-untyped-call]
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.relu.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", cifar.NETWORKS)
def test_every_module_is_used_once_and_every_relu_is_a_module(name: str) -> None:
    network = on_meta(name)
    used: dict[nn.Module, int] = dict.fromkeys((m for m in network.modules() if not list(m.children())), 0)

    def note(module: nn.Module, *_: Any) -> None:
        used[module] += 1

    for module in used:
        module.register_forward_hook(note)
    relus = CountRelus()  # type: ignore[no-untyped-call]
    with relus, torch.no_grad():
        network(torch.empty(1, 3, 32, 32, device="meta"))
    assert set(used.values()) == {1}
    assert relus.count == sum(isinstance(module, nn.ReLU) for module in used)


def test_zero_pad_halves_the_size_and_reads_its_numbers_at_every_call() -> None:
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    pad = cifar.ZeroPad(1, 2)
    out = pad(x)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert out.shape == (1, 5, 2, 2)
    assert not out[:, [0, 3, 4]].any()
    pad.before, pad.after = 0, 1
    assert torch.equal(pad(x), torch.cat((x[:, :, ::2, ::2], torch.zeros(1, 1, 2, 2)), dim=1))
    assert torch.equal(cifar.ZeroPad(0, 0, pool=True)(x)[0, 0, 0], torch.tensor([2.5, 4.5]))


@pytest.mark.parametrize(
    ("kwargs", "zeros"),
    [
        ({}, (8, 8, False)),
        ({"keys": "csg"}, (0, 16, False)),
        ({"shortcut": "pool"}, (8, 8, True)),
        ({"keys": "csg", "shortcut": "pad"}, (8, 8, False)),
    ],
)
def test_the_shortcut_kinds(kwargs: dict[str, Any], zeros: tuple[int, int, bool]) -> None:
    found = [m for m in on_meta("resnet20", **kwargs).modules() if isinstance(m, cifar.ZeroPad)]
    assert [(m.before, m.after, m.pool) for m in found] == [zeros, (2 * zeros[0], 2 * zeros[1], zeros[2])]


def test_shuffle_unit_interleaves_the_halves() -> None:
    unit = cifar.ShuffleUnit({"negative": Negative()})
    assert unit(torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)).flatten().tolist() == [1, -3, 2, -4]


def test_dense_puts_new_channels_first_or_last() -> None:
    x = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1)
    assert cifar.Dense({"negative": Negative()}, new_first=True)(x).flatten().tolist() == [-1, -2, 1, 2]
    assert cifar.Dense({"negative": Negative()}, new_first=False)(x).flatten().tolist() == [1, 2, -1, -2]


class Negative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


def test_unknown_choices_are_named() -> None:
    with pytest.raises(CompactError, match="shortcut is 'zero', not one of pad, append, pool, conv"):
        cifar.NETWORKS["resnet20"](shortcut="zero")
    with pytest.raises(CompactError, match="keys is 'mine', not one of akamaster, csg"):
        cifar.NETWORKS["resnet20"](keys="mine")


def published(file: str) -> dict[str, Tensor]:
    if not CHECKPOINTS.is_dir():
        pytest.skip(f"no {CHECKPOINTS}")
    content = torch.load(CHECKPOINTS / file, weights_only=True, map_location="cpu")
    tensors = content.get("state_dict") or content["net"]
    return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}


def by_hand(tensors: dict[str, Tensor], x: Tensor, stages: list[str], parts: list[str], zeros_before: bool) -> Tensor:
    """A CIFAR ResNet written down from the tensors alone."""
    stem, stem_norm, conv_a, norm_a, conv_b, norm_b, head = parts

    def norm(y: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (tensors[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, mean, var, weight, bias)

    x = norm(F.conv2d(x, tensors[f"{stem}.weight"], padding=1), stem_norm).relu()
    for number, stage in enumerate(stages):
        block = 0
        while f"{stage}.{block}.{conv_a}.weight" in tensors:
            stride = 2 if number and not block else 1
            name = f"{stage}.{block}"
            y = norm(F.conv2d(x, tensors[f"{name}.{conv_a}.weight"], stride=stride, padding=1), f"{name}.{norm_a}").relu()
            y = norm(F.conv2d(y, tensors[f"{name}.{conv_b}.weight"], padding=1), f"{name}.{norm_b}")
            if stride == 2:
                x = x[:, :, ::2, ::2]
                zeros = torch.zeros_like(x)
                half = zeros[:, : zeros.shape[1] // 2]
                x = torch.cat((half, x, half) if zeros_before else (x, zeros), dim=1)
            x = (x + y).relu()
            block += 1
    return F.linear(x.mean(dim=(2, 3)), tensors[f"{head}.weight"], tensors[f"{head}.bias"])


@pytest.mark.parametrize(
    ("file", "name", "keys"),
    [
        ("resnet20-12fca82f.th", "resnet20", "akamaster"),
        ("resnet56-4bfd9763.th", "resnet56", "akamaster"),
        ("resnet20-cifar10jpeg.th", "resnet20", "akamaster"),
        ("resnet56-cifar10jpeg.th", "resnet56", "akamaster"),
        ("csg-rn56_org.t7", "resnet56", "csg"),
    ],
)
def test_published_files_load_and_compute_as_their_authors_do(file: str, name: str, keys: cifar.Keys) -> None:
    tensors = published(file)
    network = cifar.NETWORKS[name](keys=keys).eval()
    missing, unexpected = network.load_state_dict(tensors, strict=False)
    assert unexpected == []
    assert all(key.endswith("num_batches_tracked") for key in missing)
    if keys == "csg":
        stages, parts = (
            ["stage_1", "stage_2", "stage_3"],
            ["conv_1_3x3", "bn_1", "conv_a", "bn_a", "conv_b", "bn_b", "classifier"],
        )
    else:
        stages, parts = ["layer1", "layer2", "layer3"], ["conv1", "bn1", "conv1", "bn1", "conv2", "bn2", "linear"]
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = by_hand(tensors, x, stages, parts, zeros_before=keys == "akamaster")
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)
