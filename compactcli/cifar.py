"""The networks of the five papers for 32 x 32 images, as plain modules.

Every network is an `nn.Sequential` of named layers; the names are the keys of the published files.
No two places share a module, activations are modules, and no forward pass holds a channel number:
the ones that channel surgery must change are integer attributes, read at every call.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import CompactError

Shortcut = Literal["pad", "append", "pool", "conv"]
Keys = Literal["akamaster", "csg"]
Layers = Mapping[str, nn.Module]
Block = Callable[[int, int, int], nn.Module]  # (input channels, width, stride)


class ZeroPad(nn.Module):
    """Half the size and more channels without parameters: `before` zero channels in front, `after` behind.

    Option A of He et al., CVPR 2016. `pool` averages 2 x 2 positions instead of taking every second.
    """

    def __init__(self, before: int, after: int, pool: bool = False) -> None:
        super().__init__()
        self.before = before
        self.after = after
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        small = F.avg_pool2d(x, 2) if self.pool else x[:, :, ::2, ::2]
        return F.pad(small, (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"before={self.before}, after={self.after}, pool={self.pool}"


class Branch(nn.Module):
    """Layers one after the other, like `nn.Sequential`, for a block that has other children as well."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.path = tuple(layers)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def follow(self, x: Tensor) -> Tensor:
        for name in self.path:
            x = self.get_submodule(name)(x)
        return x


class Residual(Branch):
    """`last(layers(x) + shortcut(x))`; the shortcut is the child called `shortcut_name`."""

    def __init__(self, layers: Layers, shortcut_name: str, shortcut: nn.Module, last: nn.Module) -> None:
        super().__init__(layers)
        self.shortcut_name = shortcut_name
        self.add_module(shortcut_name, shortcut)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.follow(x) + self.get_submodule(self.shortcut_name)(x))
        return out


class Dense(Branch):
    """The channels of x beside the new ones that the layers make from them (Huang et al., CVPR 2017)."""

    def __init__(self, layers: Layers, new_first: bool) -> None:
        super().__init__(layers)
        self.new_first = new_first

    def forward(self, x: Tensor) -> Tensor:
        new = self.follow(x)
        return torch.cat((new, x) if self.new_first else (x, new), dim=1)


class ShuffleUnit(Branch):
    """One half of the channels kept, the other half through the layers, then both interleaved.

    ShuffleNetV2 (Ma et al., ECCV 2018). With `left`, a unit that halves the size: all channels go
    through `left` and through the layers.
    """

    def __init__(self, layers: Layers, left: Layers | None = None) -> None:
        super().__init__({**(left or {}), **layers})
        self.path = tuple(layers)
        self.left = tuple(left or ())

    def forward(self, x: Tensor) -> Tensor:
        kept, used = (x, x) if self.left else x.chunk(2, dim=1)
        for name in self.left:
            kept = self.get_submodule(name)(kept)
        both = torch.cat((kept, self.follow(used)), dim=1)
        batch, channels, height, width = both.shape
        return both.view(batch, 2, channels // 2, height, width).transpose(1, 2).flatten(1, 2)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)


def _conv_norm(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """The shortcut with parameters: a 1 x 1 convolution and its batch-norm."""
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def _stage(block: Block, inputs: int, width: int, outputs: int, count: int, stride: int) -> nn.Sequential:
    """`count` blocks of one width; the first takes `inputs` channels and the stride."""
    rest = (block(outputs, width, 1) for _ in range(count - 1))
    return nn.Sequential(block(inputs, width, stride), *rest)


def _stages(
    block: Block, name: str, inputs: int, plan: Sequence[tuple[int, int, int]], expansion: int = 1
) -> dict[str, nn.Module]:
    """Stages `name` + 1, 2, ... from a plan of (width, count of blocks, stride)."""
    stages: dict[str, nn.Module] = {}
    for number, (width, count, stride) in enumerate(plan, start=1):
        stages[f"{name}{number}"] = _stage(block, inputs, width, expansion * width, count, stride)
        inputs = expansion * width
    return stages


def _head(name: str, features: int, num_classes: int) -> dict[str, nn.Module]:
    return {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), name: nn.Linear(features, num_classes)}


def _network(*parts: Layers) -> nn.Sequential:
    network = nn.Sequential()
    for part in parts:
        for name, layer in part.items():
            network.add_module(name, layer)
    return network


class _Names(NamedTuple):
    stem: str
    stem_norm: str
    stage: str
    conv: tuple[str, str]
    norm: tuple[str, str]
    shortcut: str
    head: str


_NAMES: dict[Keys, _Names] = {
    "akamaster": _Names("conv1", "bn1", "layer", ("conv1", "conv2"), ("bn1", "bn2"), "shortcut", "linear"),
    "csg": _Names("conv_1_3x3", "bn_1", "stage_", ("conv_a", "conv_b"), ("bn_a", "bn_b"), "downsample", "classifier"),
}


def _shortcut(kind: Shortcut, inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if kind == "conv":
        return _conv_norm(inputs, outputs, stride)
    before = 0 if kind == "append" else (outputs - inputs) // 2
    return ZeroPad(before, outputs - inputs - before, pool=kind == "pool")


def _basic_block(names: _Names, kind: Shortcut, inputs: int, width: int, stride: int) -> Residual:
    layers = {
        names.conv[0]: _conv(inputs, width, 3, stride),
        names.norm[0]: nn.BatchNorm2d(width),
        "relu": nn.ReLU(),
        names.conv[1]: _conv(width, width, 3),
        names.norm[1]: nn.BatchNorm2d(width),
    }
    return Residual(layers, names.shortcut, _shortcut(kind, inputs, width, stride), nn.ReLU())


def _basic_resnet(
    plan: Sequence[tuple[int, int, int]], names: _Names, kind: Shortcut, in_channels: int, num_classes: int, stem_bias: bool
) -> nn.Sequential:
    width = plan[0][0]
    stem = {names.stem: _conv(in_channels, width, 3, bias=stem_bias), names.stem_norm: nn.BatchNorm2d(width), "relu": nn.ReLU()}
    stages = _stages(partial(_basic_block, names, kind), names.stage, width, plan)
    return _network(stem, stages, _head(names.head, plan[-1][0], num_classes))


def resnet(
    depth: int,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    width: int = 16,
    shortcut: Shortcut | None = None,
    keys: Keys = "akamaster",
    stem_bias: bool = False,
) -> nn.Sequential:
    """ResNet of depth 6n + 2 (He et al., CVPR 2016, section 4.2), with the key names of one of two sources.

    The shortcut where the size halves: "pad" takes every second position and adds zero channels on
    both sides (the default of akamaster's keys), "append" adds them all behind (that of CSG's), "pool"
    averages 2 x 2 and pads both sides (Hinge), "conv" is a 1 x 1 convolution with batch-norm (FCF).
    Raises CompactError for another shortcut or other keys.
    """
    if keys not in _NAMES:
        raise CompactError(f"keys is {keys!r}, not one of {', '.join(_NAMES)}")
    kind = shortcut or DEFAULT_SHORTCUT[keys]
    if kind not in SHORTCUTS:
        raise CompactError(f"shortcut is {kind!r}, not one of {', '.join(SHORTCUTS)}")
    blocks = (depth - 2) // 6
    plan = [(width, blocks, 1), (2 * width, blocks, 2), (4 * width, blocks, 2)]
    return _basic_resnet(plan, _NAMES[keys], kind, in_channels, num_classes, stem_bias)


def resnet18(*, num_classes: int = 10, in_channels: int = 3) -> nn.Sequential:
    """ResNet-18 for 32 x 32 (LinearConv): a 3 x 3 stem and no pooling before the four stages."""
    plan = [(64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2)]
    return _basic_resnet(plan, _NAMES["akamaster"], "conv", in_channels, num_classes, stem_bias=False)


def _bottleneck(shortcut_name: str, expansion: int, cardinality: int, inputs: int, width: int, stride: int) -> Residual:
    """1 x 1 to `width`, 3 x 3 in `cardinality` groups, 1 x 1 to `expansion` times the width."""
    outputs = expansion * width
    layers = {
        "conv1": _conv(inputs, width, 1),
        "bn1": nn.BatchNorm2d(width),
        "relu1": nn.ReLU(),
        "conv2": _conv(width, width, 3, stride, groups=cardinality),
        "bn2": nn.BatchNorm2d(width),
        "relu2": nn.ReLU(),
        "conv3": _conv(width, outputs, 1),
        "bn3": nn.BatchNorm2d(outputs),
    }
    return Residual(layers, shortcut_name, _shortcut("conv", inputs, outputs, stride), nn.ReLU())


def resnet164(*, num_classes: int = 10, in_channels: int = 3) -> nn.Sequential:
    """ResNet-164 with bottlenecks and convolutions as shortcuts (Hinge)."""
    stem = {"conv1": _conv(in_channels, 16, 3), "bn1": nn.BatchNorm2d(16), "relu": nn.ReLU()}
    plan = [(16, 18, 1), (32, 18, 2), (64, 18, 2)]
    stages = _stages(partial(_bottleneck, "downsample", 4, 1), "layer", 16, plan, expansion=4)
    return _network(stem, stages, _head("fc", 256, num_classes))


def resnext(blocks: int, cardinality: int, group_width: int, *, num_classes: int = 10, in_channels: int = 3) -> nn.Sequential:
    """ResNeXt of three stages (Hinge, LinearConv; Xie et al., CVPR 2017); `group_width` doubles with each."""
    width = cardinality * group_width
    stem = {"conv1": _conv(in_channels, 64, 1), "bn1": nn.BatchNorm2d(64), "relu": nn.ReLU()}
    plan = [(width, blocks, 1), (2 * width, blocks, 2), (4 * width, blocks, 2)]
    stages = _stages(partial(_bottleneck, "shortcut", 2, cardinality), "layer", 64, plan, expansion=2)
    return _network(stem, stages, _head("linear", 8 * width, num_classes))


def _wide_block(inputs: int, width: int, stride: int) -> Residual:
    layers = {
        "bn1": nn.BatchNorm2d(inputs),
        "relu1": nn.ReLU(),
        "conv1": _conv(inputs, width, 3, bias=True),
        "bn2": nn.BatchNorm2d(width),
        "relu2": nn.ReLU(),
        "conv2": _conv(width, width, 3, stride, bias=True),
    }
    same = stride == 1 and inputs == width
    shortcut = nn.Identity() if same else nn.Sequential(_conv(inputs, width, 1, stride, bias=True))
    return Residual(layers, "shortcut", shortcut, nn.Identity())


def wide_resnet(depth: int, widen: int, *, num_classes: int = 10, in_channels: int = 3) -> nn.Sequential:
    """Wide ResNet of depth 6n + 4 with biases and the stride in the second convolution, as Hinge has it."""
    blocks = (depth - 4) // 6
    plan = [(16 * widen, blocks, 1), (32 * widen, blocks, 2), (64 * widen, blocks, 2)]
    stages = _stages(_wide_block, "layer", 16, plan)
    last = {"bn1": nn.BatchNorm2d(64 * widen), "relu": nn.ReLU()}
    return _network({"conv1": _conv(in_channels, 16, 3, bias=True)}, stages, last, _head("linear", 64 * widen, num_classes))


def _conv_norm_relu(inputs: int, outputs: int, bias: bool = True) -> list[nn.Module]:
    return [_conv(inputs, outputs, 3, bias=bias), nn.BatchNorm2d(outputs), nn.ReLU()]


def _staged_vgg(stages: Sequence[Sequence[int]], features: int, num_classes: int, in_channels: int) -> nn.Sequential:
    """LinearConv's VGG family: `feat` holds one Sequential per pooling, `fc` the classifier."""
    feat = nn.Sequential()
    inputs = in_channels
    for widths in stages:
        layers: list[nn.Module] = []
        for width in widths:
            layers += _conv_norm_relu(inputs, width)
            inputs = width
        feat.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
    return _network({"feat": feat, "flatten": nn.Flatten(), "fc": nn.Linear(features, num_classes)})


def base(*, num_classes: int = 10, in_channels: int = 3) -> nn.Sequential:
    """LinearConv's Base: four convolutions, each pooled, and one linear layer on 2 x 2 positions."""
    return _staged_vgg([[32], [64], [128], [256]], 1024, num_classes, in_channels)


def vgg11(*, num_classes: int = 10, in_channels: int = 3) -> nn.Sequential:
    """VGG-11 with batch-norm and one linear layer (LinearConv)."""
    return _staged_vgg([[64], [128], [256, 256], [512, 512], [512, 512]], 512, num_classes, in_channels)


def vgg16(
    classifier: Literal["linear", "linear3", "hetconv"] = "linear", *, num_classes: int = 10, in_channels: int = 3
) -> nn.Sequential:
    """VGG-16 with batch-norm and one of three classifiers.

    "linear" is one layer and "linear3" three without activations between (both Hinge); "hetconv" is two
    with batch-norm and ReLU, and only the first convolution has a bias.
    """
    layers: list[nn.Module] = []
    inputs = in_channels
    for widths in ([64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3):
        for width in widths:
            layers += _conv_norm_relu(inputs, width, bias=classifier != "hetconv" or not layers)
            inputs = width
        layers.append(nn.MaxPool2d(2))
    heads: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(512, num_classes),
        "linear3": lambda: nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, num_classes)),
        "hetconv": lambda: nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, num_classes)),
    }
    return _network({"features": nn.Sequential(*layers), "flatten": nn.Flatten(), "classifier": heads[classifier]()})


def allconv(*, num_classes: int = 10, in_channels: int = 3) -> nn.Sequential:
    """All-convolutional network without batch-norm (LinearConv; Springenberg et al., 2015)."""
    plan = [(96, 3, 1), (96, 3, 1), (96, 3, 2), (192, 3, 1), (192, 3, 1), (192, 3, 2), (192, 3, 1), (192, 1, 1)]
    layers: dict[str, nn.Module] = {"drop1": nn.Dropout(0.2)}
    inputs = in_channels
    for number, (width, kernel, stride) in enumerate(plan, start=1):
        layers[f"conv{number}"] = _conv(inputs, width, kernel, stride, bias=True)
        layers[f"relu{number}"] = nn.ReLU()
        if stride == 2:
            layers[f"drop{number}"] = nn.Dropout(0.5)
        inputs = width
    layers |= {"class_conv": _conv(inputs, num_classes, 1, bias=True), "class_relu": nn.ReLU()}
    return _network(layers, {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()})


def densenet(*, num_classes: int = 10, in_channels: int = 3) -> nn.Sequential:
    """DenseNet-12-40 (Hinge): growth 12, three blocks of twelve 3 x 3 layers, transitions keep the width."""
    growth, count, width = 12, 12, 24
    features = nn.Sequential(_conv(in_channels, width, 3))
    for number in range(3):
        block = nn.Sequential()
        for _ in range(count):
            layer = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), _conv(width, growth, 3))
            block.append(Dense({"body": layer}, new_first=False))
            width += growth
        features.append(block)
        if number < 2:
            features.append(nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), _conv(width, width, 1), nn.AvgPool2d(2)))
    features.extend([nn.BatchNorm2d(width), nn.ReLU()])
    return _network({"features": features}, _head("classifier", width, num_classes))


def _dense_bottleneck(inputs: int, growth: int) -> Dense:
    layers = {
        "bn1": nn.BatchNorm2d(inputs),
        "relu1": nn.ReLU(),
        "conv1": _conv(inputs, 4 * growth, 1),
        "bn2": nn.BatchNorm2d(4 * growth),
        "relu2": nn.ReLU(),
        "conv2": _conv(4 * growth, growth, 3),
    }
    return Dense(layers, new_first=True)


def densenet_bc(growth: int, *, num_classes: int = 10, in_channels: int = 3) -> nn.Sequential:
    """DenseNet-BC of depth 40 (CSG): three blocks of six bottlenecks, transitions halve the width."""
    count, width = 6, 2 * growth
    layers: dict[str, nn.Module] = {"conv1": _conv(in_channels, width, 3)}
    for number in (1, 2, 3):
        layers[f"dense{number}"] = nn.Sequential(*(_dense_bottleneck(width + i * growth, growth) for i in range(count)))
        width += count * growth
        layers[f"trans{number}"] = transition = nn.Sequential()
        transition.add_module("bn", nn.BatchNorm2d(width))
        transition.add_module("relu", nn.ReLU())
        if number < 3:
            transition.add_module("conv", _conv(width, width // 2, 1))
            transition.add_module("pool", nn.AvgPool2d(2))
            width //= 2
    return _network(layers, _head("linear", width, num_classes))


def _inverted(inputs: int, width: int, outputs: int, stride: int) -> nn.Module:
    layers = {
        "conv1": _conv(inputs, width, 1),
        "bn1": nn.BatchNorm2d(width),
        "relu1": nn.ReLU(),
        "conv2": _conv(width, width, 3, stride, groups=width),
        "bn2": nn.BatchNorm2d(width),
        "relu2": nn.ReLU(),
        "conv3": _conv(width, outputs, 1),
        "bn3": nn.BatchNorm2d(outputs),
    }
    if stride == 2:
        return _network(layers)
    return Residual(layers, "shortcut", _shortcut("conv", inputs, outputs, stride), nn.Identity())


def mobilenet_v2(*, num_classes: int = 10, in_channels: int = 3) -> nn.Sequential:
    """MobileNetV2 for 32 x 32 (LinearConv, CSG; Sandler et al., CVPR 2018): three strides instead of five."""
    plan = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    blocks = nn.Sequential()
    inputs = 32
    for expansion, outputs, count, stride in plan:
        for number in range(count):
            blocks.append(_inverted(inputs, expansion * inputs, outputs, stride if number == 0 else 1))
            inputs = outputs
    stem = {"conv1": _conv(in_channels, 32, 3), "bn1": nn.BatchNorm2d(32), "relu1": nn.ReLU()}
    last = {"conv2": _conv(inputs, 1280, 1), "bn2": nn.BatchNorm2d(1280), "relu2": nn.ReLU()}
    return _network(stem, {"layers": blocks}, last, _head("linear", 1280, num_classes))


def _shuffle_basic(width: int) -> ShuffleUnit:
    half = width // 2
    layers = {
        "conv1": _conv(half, half, 1),
        "bn1": nn.BatchNorm2d(half),
        "relu1": nn.ReLU(),
        "conv2": _conv(half, half, 3, groups=half),
        "bn2": nn.BatchNorm2d(half),
        "conv3": _conv(half, half, 1),
        "bn3": nn.BatchNorm2d(half),
        "relu3": nn.ReLU(),
    }
    return ShuffleUnit(layers)


def _shuffle_down(inputs: int, width: int) -> ShuffleUnit:
    half = width // 2
    left = {
        "conv1": _conv(inputs, inputs, 3, 2, groups=inputs),
        "bn1": nn.BatchNorm2d(inputs),
        "conv2": _conv(inputs, half, 1),
        "bn2": nn.BatchNorm2d(half),
        "relu2": nn.ReLU(),
    }
    layers = {
        "conv3": _conv(inputs, half, 1),
        "bn3": nn.BatchNorm2d(half),
        "relu3": nn.ReLU(),
        "conv4": _conv(half, half, 3, 2, groups=half),
        "bn4": nn.BatchNorm2d(half),
        "conv5": _conv(half, half, 1),
        "bn5": nn.BatchNorm2d(half),
        "relu5": nn.ReLU(),
    }
    return ShuffleUnit(layers, left)


def shufflenet_v2(widths: tuple[int, int, int, int], *, num_classes: int = 10, in_channels: int = 3) -> nn.Sequential:
    """ShuffleNetV2 for 32 x 32 (CSG; Ma et al., ECCV 2018): no stride in the stem and no pooling after it."""
    layers: dict[str, nn.Module] = {"conv1": _conv(in_channels, 24, 3), "bn1": nn.BatchNorm2d(24), "relu1": nn.ReLU()}
    inputs = 24
    for number, (width, count) in enumerate(zip(widths[:3], (3, 7, 3), strict=True), start=1):
        units = (_shuffle_basic(width) for _ in range(count))
        layers[f"layer{number}"] = nn.Sequential(_shuffle_down(inputs, width), *units)
        inputs = width
    last = {"conv2": _conv(inputs, widths[3], 1), "bn2": nn.BatchNorm2d(widths[3]), "relu2": nn.ReLU()}
    return _network(layers, last, _head("linear", widths[3], num_classes))


SHORTCUTS: tuple[Shortcut, ...] = ("pad", "append", "pool", "conv")
DEFAULT_SHORTCUT: dict[Keys, Shortcut] = {"akamaster": "pad", "csg": "append"}

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(resnet, depth) for depth in range(8, 111, 6)},
    "resnet18": resnet18,
    "resnet164": resnet164,
    "resnext20": partial(resnext, 2, 32, 1),
    "resnext29_2x64d": partial(resnext, 3, 2, 64),
    "resnext164": partial(resnext, 18, 32, 1),
    "wrn16_10": partial(wide_resnet, 16, 10),
    "base": base,
    "vgg11": vgg11,
    "vgg16": vgg16,
    "vgg16_linear3": partial(vgg16, "linear3"),
    "vgg16_hetconv": partial(vgg16, "hetconv"),
    "allconv": allconv,
    "densenet12_40": densenet,
    "densenet_bc40_36": partial(densenet_bc, 36),
    "densenet_bc40_48": partial(densenet_bc, 48),
    "mobilenet_v2": mobilenet_v2,
    "shufflenet_v2_x0_5": partial(shufflenet_v2, (48, 96, 192, 1024)),
    "shufflenet_v2_x1_0": partial(shufflenet_v2, (116, 232, 464, 1024)),
}
"""Name (without `cifar:`) -> factory. All take `num_classes` and `in_channels`; `resnet` takes more."""
