"""Multiply-accumulates as the papers' authors counted them, so that their figures can be compared with ours.

Each counter follows modules, as theirs do: what code does without one is not counted. "Elements" are those of a
module's output for one image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .errors import UsageError
from .graph import operation, run_fake, trace
from .kernels import KernelLayer

Counter = Callable[[nn.Module, Sequence[int]], int]  # (model, input shape) -> count for one image


@dataclass(frozen=True)
class _Call:
    """One run of a module: its first argument and its output, of one image."""

    module: Any
    image: torch.Size
    output: torch.Size


def hinge(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Convolutions without bias, linear weights, twice the elements of batch normalisations, those of nn.ReLU.

    In the authors' own ResNeXt and wide ResNet every ReLU is a function, so not counted. Li et al., CVPR 2020.
    """
    calls = _calls(model, input_shape)
    return _convolutions(calls) + _weights(calls) + 2 * _elements(calls, _BatchNorm) + _elements(calls, nn.ReLU)


def fcf(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Convolutions without bias, linear weights and biases, elements of batch normalisations and nn.ReLU, k*k per pooled one.

    A ReLU that reads a sum, at the end of a residual block, is a function in their networks: it is not counted here,
    module or not. Li et al., CVPR 2019.
    """
    calls = _calls(model, input_shape)
    rectified = _elements(calls, nn.ReLU) - _rectified_sums(model, input_shape)
    return _convolutions(calls) + _weights(calls) + _biases(calls) + _elements(calls, _BatchNorm) + rectified + _pooled(calls)


def linearconv(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Convolutions, whose bias counts once for each input of a group, linear weights, and making the kernels, once.

    That takes multiplications and additions, of filters that read all inputs even where they read those of a group.
    Batch normalisations and activations are left out. Kahatapitiya & Rodrigo, WACV 2021.
    """
    calls = _calls(model, input_shape)
    return _convolutions(calls) + _input_biases(calls) + _weights(calls) + _synthesis(calls)


def hetconv(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Convolutions as if each had a bias, less the share of a filter that its parts leave out, and linear weights.

    Their formula, rounded; pointwise kernels that a filter's own part covers are not counted, executed or not. Batch
    normalisations, activations and pooling are left out. Singh et al., CVPR 2019.
    """
    calls = _calls(model, input_shape)
    each = [(places * one.numel() + call.output.numel()) * _used(call) for call, places, one in _kernels(calls)]
    return round(sum(each, Fraction(_weights(calls))))


COUNTERS: dict[str, Counter] = {"hinge": hinge, "fcf": fcf, "linearconv": linearconv, "hetconv": hetconv}


def get(name: str) -> Counter:
    """The counter of that name. Raises UsageError with those there are."""
    if name not in COUNTERS:
        raise UsageError(f"--counter {name}: it is one of {', '.join(COUNTERS)}")
    return COUNTERS[name]


def _calls(model: nn.Module, input_shape: Sequence[int]) -> list[_Call]:
    """Every run of every module that takes and gives a tensor, on fake tensors."""
    calls: list[_Call] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            calls.append(_Call(module, args[0].shape, output.shape))

    def hook(shadow: nn.Module) -> None:
        calls.clear()  # of a first run that code which depends on values has broken off
        for module in shadow.modules():
            module.register_forward_hook(note)

    run_fake(model, input_shape, batch=1, change=hook)
    return calls


def _elements(calls: Sequence[_Call], kind: type[nn.Module]) -> int:
    return sum(call.output.numel() for call in calls if isinstance(call.module, kind))


def _kernels(calls: Sequence[_Call]) -> list[tuple[_Call, int, torch.Size]]:
    """Every run of a convolution, how often a filter is applied, and the shape of one, stored or made.

    Of a transposed one that is what an input is multiplied with, once for each input.
    """
    found = []
    for call in calls:
        if isinstance(call.module, KernelLayer):
            found.append((call, call.output.numel(), torch.Size(call.module.shape[1:])))
        elif isinstance(call.module, _ConvNd):
            places = call.image if call.module.transposed else call.output
            found.append((call, places.numel(), call.module.weight.shape[1:]))
    return found


def _convolutions(calls: Sequence[_Call]) -> int:
    return int(
        sum(
            places * (call.module.executed if isinstance(call.module, KernelLayer) else one.numel())
            for call, places, one in _kernels(calls)
        )
    )


def _used(call: _Call) -> Fraction:
    """The share of a filter that is not left out."""
    return Fraction(call.module.used, call.module.reads) if isinstance(call.module, KernelLayer) else Fraction(1)


def _input_biases(calls: Sequence[_Call]) -> int:
    runs = [(call, one) for call, _, one in _kernels(calls) if call.module.bias is not None]
    return sum(call.output.numel() * _inputs(call.module, one) for call, one in runs)


def _inputs(module: Any, one: torch.Size) -> int:
    """How many channels an output is made of."""
    transposed = isinstance(module, _ConvNd) and module.transposed
    return module.in_channels // module.groups if transposed else one[0]


def _synthesis(calls: Sequence[_Call]) -> int:
    made = {call.module for call in calls if isinstance(call.module, KernelLayer)}
    return sum(layer.groups * (2 * layer.synthesis_macs - layer.synthesis_sums) for layer in made)


def _weights(calls: Sequence[_Call]) -> int:
    return sum(call.module.weight.numel() for call in calls if isinstance(call.module, nn.Linear))


def _biases(calls: Sequence[_Call]) -> int:
    linear = [call.module for call in calls if isinstance(call.module, nn.Linear)]
    return sum(module.bias.numel() for module in linear if module.bias is not None)


def _pooled(calls: Sequence[_Call]) -> int:
    """What pooling reads: k*k for each element it makes."""
    total = 0
    for call in calls:
        if isinstance(call.module, nn.MaxPool2d | nn.AvgPool2d):
            size = call.module.kernel_size
            total += call.output.numel() * (size * size if isinstance(size, int) else size[0] * size[1])
        elif isinstance(call.module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
            total += call.image.numel()
    return total


def _rectified_sums(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Elements of nn.ReLU modules where they read a sum."""
    graph = trace(model, input_shape, batch=1)
    total = 0
    for node in graph.nodes:
        if operation(node) in ("relu", "relu_") and isinstance(model.get_submodule(graph.owners[node]), nn.ReLU):
            source: Any = node.args[0]
            total += node.meta["val"].numel() if operation(source) in ("add", "add_") else 0
    return total
