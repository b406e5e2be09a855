"""Small networks for the tests: the awkward ones by name, and random ones from a list of numbers."""

import copy
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from compactcli import architectures
from compactcli.channels import Channels
from compactcli.cifar import ZeroPad
from compactcli.recipe import Edit, Keep

SHAPE = (3, 8, 8)
CLASSES = 5


class Code(nn.Module):
    """A forward pass given as a function of the module and its input; layers, parameters and numbers by name."""

    def __init__(self, run: Callable[["Code", Tensor], object], **parts: nn.Module | nn.Parameter | int) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def concatenation() -> nn.Module:
    branches = Code(lambda s, x: torch.cat([s.a(x), s.b(x), x], 1), a=conv(6, 4), b=conv(6, 5, 1))
    return nn.Sequential(conv(3, 6), nn.ReLU(), branches, nn.BatchNorm2d(15), nn.ReLU(), conv(15, 7), *head(7))


def gate() -> nn.Module:
    """Squeeze and excitation: a product with (n, c, 1, 1)."""
    path = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(8, 4, 1), nn.ReLU(), conv(4, 8, 1), nn.Sigmoid())
    return nn.Sequential(conv(3, 8), nn.ReLU(), Code(lambda s, x: x * s.path(x), path=path), conv(8, 6), *head(6))


def gate_linear() -> nn.Module:
    path = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8), nn.Sigmoid())
    run = Code(lambda s, x: x * s.path(x.mean((2, 3)))[:, :, None, None], path=path)
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.SiLU(), run, conv(8, 6), *head(6))


def depthwise() -> nn.Module:
    body = [conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.Hardswish(), conv(8, 10, 1)]
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU6(), *body, *head(10))


def depthwise_multiplier() -> nn.Module:
    return nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 12, groups=6), nn.Sigmoid(), conv(12, 5), *head(5))


def grouped() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 12, groups=4), nn.ReLU(), conv(12, 5), *head(5))


def flattened() -> nn.Module:
    """A linear layer that reads every channel at 2 x 2 positions."""
    return nn.Sequential(conv(3, 7), nn.Sigmoid(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(28, 9), nn.ReLU(), nn.Linear(9, 5))


def shuffled() -> nn.Module:
    shuffle = Code(lambda s, x: x.view(len(x), 2, x.shape[1] // 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2))
    return nn.Sequential(conv(3, 8), nn.ReLU(), shuffle, conv(8, 6), *head(6))


def prelu() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.PReLU(8), conv(8, 6), nn.PReLU(), conv(6, 6), *head(6))


def transposed() -> nn.Module:
    up = nn.ConvTranspose2d(8, 6, 2, 2)
    return nn.Sequential(conv(3, 8, stride=2), nn.ReLU(), up, nn.BatchNorm2d(6), nn.Sigmoid(), conv(6, 7), *head(7))


def one_channel() -> nn.Module:
    """The middle convolution goes from one channel to one: that is no depthwise convolution."""
    return nn.Sequential(conv(3, 1), conv(1, 1), nn.ReLU(), conv(1, 8), *head(8))


def twice() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), Code(lambda s, x: s.layer(torch.sigmoid(s.layer(x))), layer=conv(8, 8)), conv(8, 6), *head(6)
    )


def functional() -> nn.Module:
    run = Code(lambda s, x: F.conv2d(x, s.kernel, s.shift, padding=1), kernel=parameter(6, 8, 3, 3), shift=parameter(6))
    return nn.Sequential(conv(3, 8), nn.ReLU(), run, nn.Sigmoid(), conv(6, 5), *head(5))


def borrowed() -> nn.Module:
    """The inner layer's tensors are read by its parent, as torchvision's attention does; its forward never runs."""
    run = Code(lambda s, x: F.conv2d(x, s.layer.weight, s.layer.bias, padding=1), layer=conv(8, 6))
    return nn.Sequential(conv(3, 8), nn.ReLU(), run, nn.ReLU(), conv(6, 5), *head(5))


def product() -> nn.Module:
    run = Code(lambda s, x: x @ s.matrix, matrix=parameter(8, 6))
    return nn.Sequential(conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), run, nn.ReLU(), nn.Linear(6, 5))


def product_from_the_left() -> nn.Module:
    """Images come from the right of a matrix product."""
    run = Code(lambda s, x: torch.mm(s.kernel, x.t()).t(), kernel=parameter(6, 8))
    return nn.Sequential(conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), run, nn.ReLU(), nn.Linear(6, 5))


def sorted_channels() -> nn.Module:
    """Channels in the order of their values, by an operation that is told the axis by name."""
    return nn.Sequential(conv(3, 8), nn.Sigmoid(), Code(lambda s, x: x.sort(dim=1, stable=True)[0]), conv(8, 6), *head(6))


def script(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        return torch.jit.script(module)


def scripted() -> nn.Module:
    """An activation that TorchScript runs: no hooks can be put on it."""
    return nn.Sequential(conv(3, 8), script(nn.SiLU()), conv(8, 6), *head(6))


def tied_layers() -> nn.Module:
    """Two convolutions with one weight; the one that runs first is registered last."""
    run = Code(lambda s, x: torch.relu(s.a(torch.relu(s.b(x)))), a=conv(8, 8), b=conv(8, 8))
    run.b.weight = run.a.weight
    return nn.Sequential(conv(3, 8), nn.Sigmoid(), run, conv(8, 6), *head(6))


def filters_as_rows() -> nn.Module:
    """A kernel kept as a matrix."""
    run = Code(lambda s, x: F.conv2d(x, s.kernel.view(len(s.kernel), -1, 3, 3), padding=1), kernel=parameter(6, 72))
    return nn.Sequential(conv(3, 8), nn.Sigmoid(), run, nn.Sigmoid(), conv(6, 6), *head(6))


def scalar_gain() -> nn.Module:
    """A parameter of one element, as a number."""
    run = Code(lambda s, x: x * s.gain.view(()) + s.shift.reshape([]), gain=parameter(1), shift=parameter(1, 1))
    return nn.Sequential(conv(3, 8), nn.Sigmoid(), run, conv(8, 6), *head(6))


def tokens() -> nn.Module:
    run = Code(lambda s, x: s.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), mix=nn.Linear(8, 6))
    return nn.Sequential(conv(3, 8), nn.GELU(), run, conv(6, 5), *head(5))


def convolution_as_classifier() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, CLASSES, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def layer_scale() -> nn.Module:
    run = Code(lambda s, x: x + s.scale * s.body(x), scale=parameter(8, 1, 1), body=conv(8, 8))
    return nn.Sequential(conv(3, 8), run, conv(8, 5), *head(5))


def pad_module() -> nn.Module:
    """Option A: the padded channels of the shortcut are counted by a module."""
    block = Code(lambda s, x: torch.relu(s.long(x) + s.short(x)), long=conv(4, 8, stride=2), short=ZeroPad(2, 2))
    return nn.Sequential(conv(3, 4), nn.ReLU(), block, conv(8, 5), *head(5))


def pad_code() -> nn.Module:
    pad = Code(lambda s, x: F.pad(x, (0, 0, 0, 0, 1, 3)))
    return nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 4), pad, conv(8, 5), nn.ReLU(), conv(5, 5), *head(5))


def cumulated() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), Code(lambda s, x: x.cumsum(1)), conv(6, 5), *head(5))


def rolled() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), Code(lambda s, x: x.roll(2, 1)), conv(6, 5), *head(5))


def group_norm() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), nn.GroupNorm(2, 6), nn.ReLU(), conv(6, 5), *head(5))


def instance_norm() -> nn.Module:
    body = [conv(8, 6), nn.InstanceNorm2d(6, affine=True), nn.ReLU()]
    return nn.Sequential(conv(3, 8), nn.ReLU(), *body, conv(6, 5), *head(5))


def part_of_channels() -> nn.Module:
    pick = Code(lambda s, x: torch.cat([x[:, 2:], x[:, :2]], 1))
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), pick, conv(6, 5), *head(5))


def expanded() -> nn.Module:
    """One channel spread over as many as the other factor has."""
    run = Code(lambda s, x: x * s.mask(x).expand(-1, x.shape[1], -1, -1), mask=conv(8, 1))
    return nn.Sequential(conv(3, 8), nn.ReLU(), run, conv(8, 5), *head(5))


def power_of_two() -> nn.Module:
    """The number comes before the tensor."""
    return nn.Sequential(conv(3, 8), nn.Tanh(), Code(lambda s, x: 2**x), conv(8, 5), *head(5))


def clamp_per_channel() -> nn.Module:
    run = Code(lambda s, x: torch.clamp(x, min=s.floor), floor=parameter(1, 8, 1, 1))
    return nn.Sequential(conv(3, 8), run, conv(8, 5), *head(5))


def power_per_channel() -> nn.Module:
    run = Code(lambda s, x: x.sigmoid() ** s.power, power=parameter(1, 8, 1, 1))
    return nn.Sequential(conv(3, 8), run, conv(8, 5), *head(5))


def weight_norm() -> nn.Module:
    layer = nn.utils.parametrizations.weight_norm(conv(8, 6))
    return nn.Sequential(conv(3, 8), nn.ReLU(), layer, nn.ReLU(), conv(6, 5), *head(5))


def transposed_grouped() -> nn.Module:
    up = nn.ConvTranspose2d(8, 8, 2, 2, groups=2)
    return nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 8), up, nn.ReLU(), conv(8, 5), *head(5))


def hard_coded_view() -> nn.Module:
    """The last width is a number in the code; the one before it is not."""
    flat = Code(lambda s, x: x.mean((2, 3)).view(-1, 6))
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), nn.ReLU(), flat, nn.Linear(6, CLASSES))


def hard_coded_shuffle() -> nn.Module:
    """Six channels in three groups of two, and the three is in the code; the width before them is in no code."""
    shuffle = Code(lambda s, x: x.unflatten(1, (3, -1)).transpose(1, 2).flatten(1, 2))
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), shuffle, nn.ReLU(), conv(6, 6), *head(6))


def tied_parameter() -> nn.Module:
    """Two layers with one weight."""
    network = nn.Sequential(conv(3, 8), conv(8, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 5), *head(5))
    network[3].weight = network[1].weight
    return network


def several_outputs() -> nn.Module:
    run = Code(lambda s, x: {"main": s.main(x), "aux": [s.aux(x).relu()]}, main=conv(8, 5), aux=conv(8, 4, 1))
    return nn.Sequential(conv(3, 8), nn.Sigmoid(), run)


def reads_its_input() -> nn.Module:
    run = Code(lambda s, x: torch.cat([s.norm(x), s.layer(x)], 1), norm=nn.BatchNorm2d(3), layer=conv(3, 5))
    return nn.Sequential(run, nn.ReLU(), conv(8, 6), *head(6))


def chunked() -> nn.Module:
    run = Code(lambda s, x: torch.cat([s.layer(x.chunk(2, 1)[1]), x.chunk(2, 1)[0]], 1), layer=conv(4, 5))
    return nn.Sequential(conv(3, 8), nn.ReLU(), run, conv(9, 6), *head(6))


def split_by_width() -> nn.Module:
    """The pieces' size is an attribute; a piece more each time, as in Res2Net."""

    def run(s: Code, x: Tensor) -> Tensor:
        a, b, c = torch.split(x, s.width, 1)
        return torch.cat([a, s.first(b), s.second(c + s.first(b))], 1)

    layers = Code(run, first=conv(4, 4), second=conv(4, 4), width=4)
    return nn.Sequential(conv(3, 12), nn.Sigmoid(), layers, conv(12, 6), *head(6))


def split_by_half() -> nn.Module:
    """The size of both pieces together is an attribute."""
    run = Code(lambda s, x: torch.cat(x.split(s.expand_chs // 2, 1)[::-1], 1), expand_chs=8)
    return nn.Sequential(conv(3, 8), nn.ReLU(), run, conv(8, 6), *head(6))


def split_unevenly() -> nn.Module:
    """Each size is an attribute: partial convolution."""

    def run(s: Code, x: Tensor) -> Tensor:
        a, b = torch.split(x, [s.dim_conv3, s.dim_untouched], 1)
        return torch.cat([s.layer(a), b], 1)

    return nn.Sequential(conv(3, 8), nn.ReLU(), Code(run, layer=conv(3, 3), dim_conv3=3, dim_untouched=5), conv(8, 6), *head(6))


def split_by_number() -> nn.Module:
    run = Code(lambda s, x: torch.cat(x.split(3, 1)[::-1], 1))
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), run, conv(6, 5), *head(5))


def first_channels() -> nn.Module:
    """A shortcut onto the first channels alone; their number is an attribute."""
    run = Code(
        lambda s, x: torch.cat([s.layer(x)[:, : s.in_channels] + x, s.layer(x)[:, s.in_channels :]], 1),
        layer=conv(5, 8),
        in_channels=5,
    )
    return nn.Sequential(conv(3, 5), nn.ReLU(), run, conv(8, 6), *head(6))


def reversed_channels() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(), Code(lambda s, x: x.flip(1) + s.scale, scale=parameter(8, 1, 1)), *head(8))


def layer_norm() -> nn.Module:
    mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    run = Code(lambda s, x: x + s.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), mlp=mlp)
    return nn.Sequential(conv(3, 8), run, conv(8, 5), *head(5))


def layer_norm_of_positions() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.LayerNorm((8, 8)), nn.ReLU(), conv(8, 5), *head(5))


def group_norm_of_all() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), nn.GroupNorm(1, 6), conv(6, 5), *head(5))


def wide_groups() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.Sigmoid(), conv(8, 12, groups=2), nn.Sigmoid(), conv(12, 5), *head(5))


def transposed_depthwise() -> nn.Module:
    up = nn.ConvTranspose2d(8, 16, 2, 2, groups=8, bias=False)
    return nn.Sequential(conv(3, 8), nn.Sigmoid(), up, nn.Sigmoid(), conv(16, 5), *head(5))


class Standardised(nn.Conv2d):
    """A convolution whose kernel is normalised per output, with a gain beside the weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.gain = parameter(outputs, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        kernel = F.batch_norm(flat, None, None, self.gain.view(-1), training=True).reshape_as(self.weight)
        return F.conv2d(x, kernel, self.bias, padding=1)


def standardised() -> nn.Module:
    return nn.Sequential(conv(3, 9), nn.ReLU(), conv(9, 6), Standardised(6, 8), nn.ReLU(), conv(8, 5), *head(5))


def neighbours() -> nn.Module:
    """Efficient channel attention: each channel's gate reads its neighbours, and a removed one would change them."""
    run = Code(
        lambda s, x: x * s.layer(x.mean((2, 3)).unsqueeze(1)).sigmoid().view(len(x), -1, 1, 1), layer=nn.Conv1d(1, 1, 3, 1, 1)
    )
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), run, conv(6, 5), *head(5))


def selected() -> nn.Module:
    """Two branches, weighed against each other channel by channel: selective kernels."""

    def run(s: Code, x: Tensor) -> Tensor:
        both = torch.stack([s.a(x), s.b(x)], 1)
        weights = s.gate(both.sum(1).mean((2, 3), keepdim=True)).view(len(x), 2, -1, 1, 1)
        return (both * weights.softmax(1)).sum(1)

    return nn.Sequential(conv(3, 8), nn.ReLU(), Code(run, a=conv(8, 6), b=conv(8, 6), gate=conv(6, 12, 1)), conv(6, 5), *head(5))


def softmax_of_channels() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), nn.Softmax(1), conv(6, 5), *head(5))


def largest_channel() -> nn.Module:
    """Spatial attention: a mask from the mean and the maximum over channels."""
    run = Code(lambda s, x: x * s.mask(torch.cat([x.mean(1, True), x.max(1, True)[0]], 1)).sigmoid(), mask=conv(2, 1))
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), run, conv(6, 5), *head(5))


def attention() -> nn.Module:
    def run(s: Code, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return (F.scaled_dot_product_attention(s.q(tokens), s.k(tokens), tokens)).transpose(1, 2).reshape(x.shape)

    layers = Code(run, q=nn.Linear(6, 6), k=nn.Linear(6, 6))
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), layers, conv(6, 5), *head(5))


def pixels() -> nn.Module:
    fine, coarse = nn.PixelShuffle(2), nn.PixelUnshuffle(2)
    return nn.Sequential(conv(3, 12), nn.ReLU(), fine, conv(3, 4), nn.Sigmoid(), coarse, conv(16, 5), *head(5))


def shuffle_module() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(), nn.ChannelShuffle(2), conv(8, 6), *head(6))


def unpooled() -> nn.Module:
    run = Code(lambda s, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2))
    return nn.Sequential(conv(3, 8), nn.Sigmoid(), run, conv(8, 6), *head(6))


def edges() -> nn.Module:
    """Padding, moving and resampling positions leaves the channels alone."""
    run = Code(
        lambda s, x: F.interpolate(
            F.pad(F.pad(F.pad(x, (1, 1, 1, 1), "reflect"), (2, 0, 1, 1)), (1, 1, 0, 0), "replicate"), (8, 8)
        ).roll(3, -1)
    )
    return nn.Sequential(conv(3, 8), nn.Sigmoid(), run, conv(8, 6), *head(6))


def linear_unit() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.GLU(1), conv(4, 6), *head(6))


def unfolded() -> nn.Module:
    run = Code(
        lambda s, x: s.layer(F.unfold(x, 2, stride=2).transpose(1, 2)).transpose(1, 2).reshape(len(x), -1, 4, 4),
        layer=nn.Linear(32, 6),
    )
    return nn.Sequential(conv(3, 8), nn.Sigmoid(), run, conv(6, 5), *head(5))


def taken_apart() -> nn.Module:
    """Rows, pieces of positions and both ends put together: the channels stay."""
    run = Code(lambda s, x: torch.cat([*(row.unsqueeze(2) for row in x.unbind(2)), x[:, :, 0:1], x[:, :, 2].unsqueeze(2)], 2))
    return nn.Sequential(conv(3, 8), nn.Sigmoid(), run, conv(8, 6), *head(6))


def picked() -> nn.Module:
    run = Code(lambda s, x: x.index_select(1, s.order).index_select(2, s.order))
    run.register_buffer("order", torch.tensor([3, 1, 0, 2, 5, 4]))
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), run, conv(6, 5), *head(5))


def scaled_by_a_value() -> nn.Module:
    """The code reads a number out of a tensor."""
    scale = Code(lambda s, x: s.conv(x) * float(x.amax()), conv=conv(8, 6))
    return nn.Sequential(conv(3, 8), nn.ReLU(), scale, conv(6, 5), nn.ReLU(), conv(5, 7), *head(7))


def branching() -> nn.Module:
    """Which way the code takes depends on the image; both use the same layer."""
    run = Code(lambda s, x: s.conv(x) if x.mean() > 0 else s.conv(x.relu()), conv=conv(8, 6))
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), run, conv(6, 5), nn.ReLU(), conv(5, 7), *head(7))


def branching_apart() -> nn.Module:
    """Each way has a layer of its own: what the one that was not taken reads is not known."""
    run = Code(lambda s, x: s.a(x) if x.mean() > 0 else s.b(x), a=conv(8, 6), b=conv(8, 6))
    return nn.Sequential(conv(3, 8), nn.ReLU(), run, conv(6, 5), *head(5))


VALUE_DEPENDENT = {function.__name__: function for function in (scaled_by_a_value, branching, branching_apart)}


def encoded_positions() -> nn.Module:
    """A convolution of where things are, made anew for every image and from none."""

    def run(s: Code, x: Tensor) -> Tensor:
        places = torch.ones(len(x), 1, *x.shape[2:], device=x.device, dtype=x.dtype).cumsum(2)
        return s.a(x) + s.b(places)

    return nn.Sequential(conv(3, 8), nn.ReLU(), Code(run, a=conv(8, 6), b=conv(1, 6)), conv(6, 5), *head(5))


def log_sigmoid() -> nn.Module:
    """An operation with two results, the first of which is used."""
    return nn.Sequential(conv(3, 8), nn.LogSigmoid(), conv(8, 6), *head(6))


def condition() -> nn.Module:
    """Operands, masks and weights of every kind go with the channels that they meet."""

    def run(s: Code, x: Tensor) -> Tensor:
        first = torch.where(s.mask(x) > s.floor, s.a(x), s.b(x))
        second = torch.lerp(s.c(x), first, s.weight).masked_fill(s.d(x) < s.floor, 0.5)
        return second.remainder(s.weight.abs() + 1) + torch.rsub(second, s.floor)

    layers = {name: conv(8, 6) for name in ("mask", "a", "b", "c", "d")}
    run_ = Code(run, **layers, floor=parameter(6, 1, 1), weight=parameter(6, 1, 1))
    return nn.Sequential(conv(3, 8), nn.SiLU(), run_, conv(6, 5), *head(5))


def input_in_place() -> nn.Module:
    """One that overwrites the images that it is given."""
    return nn.Sequential(
        Code(lambda s, x: x.sub_(0.5).mul_(2.0)), nn.ReLU(inplace=True), conv(3, 8), nn.ReLU(), conv(8, 6), *head(6)
    )


def in_place() -> nn.Module:
    """A chain of operations that overwrite their first operand."""

    def run(s: Code, x: Tensor) -> Tensor:
        y = s.a(x).add_(s.b(x)).mul_(s.scale).clamp_min_(0.1)
        return y.masked_fill_(s.c(x) > 0.2, 0.3).lerp_(s.d(x), 0.5)

    layers = {name: conv(8, 6) for name in ("a", "b", "c", "d")}
    return nn.Sequential(conv(3, 8), nn.SiLU(), Code(run, **layers, scale=parameter(6, 1, 1)), conv(6, 5), *head(5))


def copied() -> nn.Module:
    """What is written over another tensor keeps its channels, and goes with those that it meets."""

    def run(s: Code, x: Tensor) -> Tensor:
        y = s.a(x)
        y.copy_(s.b(x).flip(1))
        z = torch.zeros_like(y)
        z.copy_(s.scale)
        return y + z

    layers = Code(run, a=conv(8, 6), b=conv(8, 6), scale=parameter(6, 1, 1))
    return nn.Sequential(conv(3, 8), nn.SiLU(), layers, conv(6, 5), *head(5))


def written_through_views() -> nn.Module:
    """Each view is overwritten and the tensor under it is read: its pieces, its rows, flat, turned and detached."""

    def run(s: Code, x: Tensor) -> Tensor:
        y = s.a(x)
        y[:, : s.in_channels].add_(s.first)
        y[:, s.in_channels :] *= 0.5
        y.flatten(2).mul_(s.gain)
        y.permute(0, 2, 3, 1).add_(s.shift)
        y[:, :, 2].copy_(s.b(x)[:, :, 1])
        y.detach().mul_(s.scale)
        return y

    layers = {"a": conv(8, 6), "b": conv(8, 6), "in_channels": 4, "first": parameter(4, 1, 1)}
    vectors = {"gain": parameter(6, 1), "shift": parameter(6), "scale": parameter(6, 1, 1)}
    return nn.Sequential(conv(3, 8), nn.SiLU(), Code(run, **layers, **vectors), conv(6, 5), *head(5))


def written_in_pieces() -> nn.Module:
    """Two branches are copied into a tensor that has another's channels."""

    def run(s: Code, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        y[:, : s.in_channels] = s.a(x)
        y[:, s.in_channels :] = s.b(x)
        return y

    return nn.Sequential(conv(3, 8), nn.SiLU(), Code(run, a=conv(8, 5), b=conv(8, 3), in_channels=5), conv(8, 6), *head(6))


def written_into_zeros() -> nn.Module:
    """Two branches are copied into a tensor whose width is in the code."""

    def run(s: Code, x: Tensor) -> Tensor:
        y = x.new_zeros(len(x), 8, *x.shape[2:])
        y[:, :4], y[:, 4:] = s.a(x), s.b(x)
        return y

    return nn.Sequential(conv(3, 7), nn.SiLU(), Code(run, a=conv(7, 4), b=conv(7, 4)), conv(8, 6), *head(6))


def written_to_out() -> nn.Module:
    """The results go into views of tensors with other channels, which are what is read."""

    def run(s: Code, x: Tensor) -> Tensor:
        y, z = torch.zeros_like(x), torch.zeros_like(x)
        with torch.no_grad():
            torch.cat([s.a(x), s.b(x)], 1, out=y.view(x.shape))
            torch.sort(s.d(x), 2, out=(z.view(x.shape), torch.empty_like(x, dtype=torch.int64)))
        return s.c(y + z + x)

    layers = Code(run, a=conv(8, 4), b=conv(8, 4), c=conv(8, 7), d=conv(8, 8))
    return nn.Sequential(conv(3, 8), nn.SiLU(), layers, conv(7, 6), nn.ReLU(), conv(6, 6), *head(6))


def sampled() -> nn.Module:
    """Positions that channels tell: those channels may not go."""
    run = Code(lambda s, x: F.grid_sample(s.a(x), s.b(x).permute(0, 2, 3, 1), align_corners=False), a=conv(8, 6), b=conv(8, 2))
    return nn.Sequential(conv(3, 8), nn.Tanh(), run, conv(6, 5), *head(5))


def groups_of_the_input() -> nn.Module:
    return nn.Sequential(nn.GroupNorm(3, 3), conv(3, 8), nn.ReLU(), conv(8, 5), *head(5))


def folded() -> nn.Module:
    run = Code(lambda s, x: F.fold(x.flatten(2), (16, 16), 2, stride=2))
    return nn.Sequential(conv(3, 32), nn.Sigmoid(), run, conv(8, 5), *head(5))


def uneven_groups() -> nn.Module:
    """Groups narrow where they read and wide where they write."""
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 32, groups=4), nn.ReLU(), conv(32, 5), *head(5))


def padded_tokens() -> nn.Module:
    """A token before the others."""
    run = Code(lambda s, x: s.layer(F.pad(x.flatten(2).transpose(1, 2), (0, 0, 1, 0))).mean(1), layer=nn.Linear(8, 6))
    return nn.Sequential(conv(3, 8), nn.Sigmoid(), run, nn.ReLU(), nn.Linear(6, 4))


def computed_linear() -> nn.Module:
    """A linear layer that reads the image, of rows that are made equally long first."""
    run = Code(
        lambda s, x: F.linear(x.flatten(1), F.normalize(s.layer.weight) * s.gain),
        layer=nn.Linear(192, 12, bias=False),
        gain=parameter(12, 1),
    )
    return nn.Sequential(run, nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4))


def largest_positions() -> nn.Module:
    run = Code(lambda s, x: x.flatten(2).topk(16)[0].view(len(x), -1, 4, 4))
    return nn.Sequential(conv(3, 8), nn.Sigmoid(), run, conv(8, 6), *head(6))


def largest_channels() -> nn.Module:
    """Which channels are handed on depends on their values."""
    return nn.Sequential(conv(3, 8), nn.Sigmoid(), Code(lambda s, x: x.topk(6, 1)[0]), conv(6, 5), *head(5))


def pooled_channels() -> nn.Module:
    run = Code(lambda s, x: F.avg_pool2d(x.flatten(2)[:, None], (2, 1)).view(len(x), 4, 8, 8))
    return nn.Sequential(conv(3, 8), nn.Sigmoid(), run, conv(4, 6), *head(6))


def squeezed() -> nn.Module:
    """Axes of one position are left out, one by one and together."""

    def run(s: Code, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        return s.a(means.squeeze(-1).squeeze(2)) + s.b(means.squeeze((2, 3)))

    return nn.Sequential(conv(3, 8), nn.Sigmoid(), Code(run, a=nn.Linear(8, 5), b=nn.Linear(8, 5)), nn.ReLU(), nn.Linear(5, 4))


def one_channel_repeated() -> nn.Module:
    """One channel, over more positions."""
    return nn.Sequential(conv(3, 1), nn.Sigmoid(), Code(lambda s, x: x.repeat(1, 1, 2, 2)), conv(1, 5), *head(5))


def normalised_with_constants() -> nn.Module:
    run = Code(lambda s, x: F.batch_norm(x, torch.zeros(8, dtype=x.dtype), torch.ones(8, dtype=x.dtype)))
    return nn.Sequential(conv(3, 8), run, nn.ReLU(), conv(8, 5), *head(5))


AWKWARD: dict[str, Callable[[], nn.Module]] = {
    function.__name__: function
    for function in (
        *(concatenation, gate, gate_linear, depthwise, depthwise_multiplier, grouped, flattened, shuffled, prelu, transposed),
        *(one_channel, twice, functional, borrowed, product, tokens, convolution_as_classifier, layer_scale, pad_module),
        *(pad_code, cumulated, rolled, group_norm, instance_norm, part_of_channels, expanded, power_of_two),
        *(clamp_per_channel, power_per_channel, weight_norm, transposed_grouped, tied_parameter),
        *(several_outputs, reads_its_input),
        *(chunked, split_by_width, split_by_half, split_unevenly, split_by_number, first_channels, reversed_channels),
        *(layer_norm, layer_norm_of_positions, group_norm_of_all, wide_groups, transposed_depthwise, standardised, neighbours),
        *(selected, softmax_of_channels, largest_channel, attention, pixels, shuffle_module, unpooled, edges, linear_unit),
        *(unfolded, taken_apart, picked, sampled, groups_of_the_input, folded, uneven_groups),
        *(padded_tokens, computed_linear, largest_positions, largest_channels, pooled_channels, squeezed),
        *(one_channel_repeated, normalised_with_constants, scalar_gain, product_from_the_left, sorted_channels, scripted),
        *(tied_layers, filters_as_rows),
        *(
            encoded_positions,
            log_sigmoid,
            condition,
            in_place,
            input_in_place,
            copied,
            written_through_views,
            written_in_pieces,
            written_into_zeros,
            written_to_out,
        ),
    )
}


def _plain(width: int, number: int) -> tuple[nn.Module, int]:
    outputs = 2 + number % 7
    activation = (nn.ReLU, nn.Sigmoid, nn.Identity, nn.Hardswish)[number % 4]()
    return nn.Sequential(conv(width, outputs, (1, 3)[number % 2], bias=number % 3 > 0), activation), outputs


def _normed(width: int, number: int) -> tuple[nn.Module, int]:
    outputs = 2 + number % 6
    return nn.Sequential(conv(width, outputs, bias=False), nn.BatchNorm2d(outputs, affine=number % 5 > 0), nn.SiLU()), outputs


def _residual(width: int, number: int) -> tuple[nn.Module, int]:
    inner = 2 + number % 5
    body = nn.Sequential(conv(width, inner), nn.BatchNorm2d(inner), nn.Tanh(), conv(inner, width))
    return Code(lambda s, x: x + s.body(x), body=body), width


def _branches(width: int, number: int) -> tuple[nn.Module, int]:
    outputs = 1 + number % 4
    return Code(lambda s, x: torch.cat([s.a(x), x], 1), a=conv(width, outputs)), width + outputs


def _gated(width: int, number: int) -> tuple[nn.Module, int]:
    path = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(width, 3, 1), nn.ReLU(), conv(3, width, 1), nn.Sigmoid())
    return Code(lambda s, x: x * s.path(x), path=path), width


def _separable(width: int, number: int) -> tuple[nn.Module, int]:
    outputs = 2 + number % 6
    return nn.Sequential(conv(width, width, groups=width), nn.ReLU(), conv(width, outputs, 1)), outputs


def _in_groups(width: int, number: int) -> tuple[nn.Module, int]:
    groups = max(n for n in (1, 2, 3) if width % n == 0)
    outputs = groups * (1 + number % 3)
    return nn.Sequential(conv(width, outputs, groups=groups), nn.Sigmoid()), outputs


def _mixed(width: int, number: int) -> tuple[nn.Module, int]:
    if width % 2 or width < 6:  # else the number in the code is as large as what is left of the channels
        return nn.Sequential(), width
    return Code(lambda s, x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)), width


def _upsampled(width: int, number: int) -> tuple[nn.Module, int]:
    outputs = 2 + number % 4
    return nn.Sequential(nn.ConvTranspose2d(width, outputs, 2, 2), nn.AvgPool2d(2), nn.Sigmoid()), outputs


def _padded(width: int, number: int) -> tuple[nn.Module, int]:
    before, after = number % 3, number % 2
    short = ZeroPad(before, after)
    long = conv(width, width + before + after, stride=2)
    return Code(lambda s, x: s.long(x) + s.short(x), long=long, short=short), width + before + after


def _twice(width: int, number: int) -> tuple[nn.Module, int]:
    return Code(lambda s, x: s.layer(torch.relu(s.layer(x))), layer=conv(width, width)), width


BLOCKS = (_plain, _normed, _residual, _branches, _gated, _separable, _in_groups, _mixed, _upsampled, _padded, _twice)


def random_network(numbers: Sequence[tuple[int, int]], flat: bool) -> nn.Module:
    """A network with one block for each (kind, number), for images of SHAPE."""
    width = 4
    layers: list[nn.Module] = [conv(3, width), nn.ReLU()]
    for kind, number in numbers:
        layer, width = BLOCKS[kind % len(BLOCKS)](width, number)
        layers.append(layer)
    if flat:
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, CLASSES))
    return nn.Sequential(*layers, *head(width))


def named(name: str, **kwargs: object) -> nn.Module:
    """A network that compactcli knows, with random weights; VGG's classifier is made narrow, to save memory."""
    network = randomise_(architectures.get(name, kwargs).build())
    if name.startswith("vgg"):
        network.classifier = randomise_(nn.Sequential(nn.Linear(512 * 49, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10)))
    return network


def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and every running statistic drawn anew: none zero, none one, so that no error hides."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for tensor in model.parameters():
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / math.sqrt(fan_in))
        for module in model.modules():
            if isinstance(module, _NormBase) and module.running_mean is not None:
                uniform(module.running_mean, -0.5, 0.5)
                uniform(module.running_var, 0.5, 1.5)
            if isinstance(module, _NormBase) and module.weight is not None:
                uniform(module.weight, 0.4, 1.4)
    return model


def removable(channels: Channels, share: float, seed: int = 0) -> list[int]:
    """About that share of the free sets, at random, such that something is left along every axis."""
    lies_on: dict[int, Counter[tuple[str, int]]] = defaultdict(Counter)
    left: Counter[tuple[str, int]] = Counter()
    for axis, sets in channels.axes.items():
        left[axis] = len(sets)
        for number in sets.tolist():
            lies_on[number][axis] += 1
    free = np.random.default_rng(seed).permutation(channels.free()).tolist()
    removed = []
    for number in free[: max(1, round(share * len(free)))]:
        if all(left[axis] > count for axis, count in lies_on[number].items()):
            left.subtract(lies_on[number])
            removed.append(number)
    return removed


# Which axis of a bare parameter of the networks above is contracted with activations.
READ_AXIS = {"kernel": 1, "matrix": 0}


def masked(model: nn.Module, edits: Sequence[Edit]) -> nn.Module:
    """A copy in float64 in which every weight that reads a removed channel has zeros there."""
    copied = copy.deepcopy(model).double()
    tensors = dict(copied.named_parameters(remove_duplicate=False))
    for edit in edits:
        if not isinstance(edit, Keep):
            continue
        name = edit.module.rpartition(".")[2]
        if name in READ_AXIS:
            weight, axis = tensors[edit.module], READ_AXIS[name]
            reads = edit.axis == axis
        else:
            owner = copied.get_submodule(edit.module) if edit.module not in tensors else None
            reads = isinstance(owner, nn.Module) and edit.axis == 1
            weight, axis = tensors.get(f"{edit.module}.weight"), 0 if isinstance(owner, _ConvTransposeNd) else 1
        if reads:
            gone = sorted(set(range(weight.shape[axis])) - set(edit.index))
            weight.data.index_fill_(axis, torch.tensor(gone, dtype=torch.long), 0)
    return copied


def outputs(model: nn.Module, image: Tensor) -> list[Tensor]:
    """Every tensor of the output in eval mode, in order."""
    model.eval()
    with torch.no_grad():
        return tree_leaves(model(image.clone()))  # which the network may overwrite
