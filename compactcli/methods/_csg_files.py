"""The files of CSG's authors, and the generators that a file holds.

In theirs the generator, square slices x d, is repeated under every block, and the codes of a block's kernels are in the block
itself, in the order of the kernels. Slices are runs of numbers.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checkpoint, detection
from ..detection import Partial
from ..errors import CompactError, shape_text, short
from ..kernels import SHARED
from ..recipe import Edit, Recipe, Replace, Share
from ..signatures import Shape
from . import Foreign
from ._slices import Slicing, name_of

GENERATOR = ("CLG.weight", "CSG.weight")  # what its keys end in: of older files, and of newer
CODE = re.compile(r"(.*\.)?code\d*")


@dataclass(frozen=True)
class Given:
    """A generator from a file."""

    weight: Tensor  # (numbers, d) float32
    shape: tuple[int, int]  # (outputs, inputs) of a slice
    by_rows: bool  # whether it was made for slices that are runs of numbers


def recognise(tensors: Mapping[str, Tensor]) -> Foreign | None:
    """The network in one of the authors' files; None for any other file.

    Raises CompactError if copies of the generator differ, or there is no known network whose kernels the codes could make.
    """
    copies = {name: tensor for name, tensor in tensors.items() if name.endswith(GENERATOR)}
    codes = {name: tensor for name, tensor in tensors.items() if CODE.fullmatch(name)}
    if not copies or not codes:
        return None
    generator = _one(copies)
    rest = {name: tensor for name, tensor in tensors.items() if name not in copies and name not in codes}
    partial, pairs = _paired(rest, codes)
    slicings = {module: _slicing(partial.missing[f"{module}.weight"], generator) for module in pairs}
    for module, name in pairs.items():
        _check(name, codes[name], slicings[module], generator)
    if len({slicing.shape[2:] for slicing in slicings.values()}) > 1:
        raise CompactError("has one generator of csg for kernels of several sizes")
    return _foreign(partial, generator, slicings, {module: codes[name] for module, name in pairs.items()}, rest)


def _foreign(
    partial: Partial,
    generator: Tensor,
    slicings: Mapping[str, Slicing],
    codes: Mapping[str, Tensor],
    rest: Mapping[str, Tensor],
) -> Foreign:
    """The network with the codes of the modules, which are in the definition's order."""
    first = next(iter(slicings.values()))
    kernel, code = first.shape[2:], generator.shape[1]
    cut = {"outputs": first.outputs, "inputs": first.inputs, "code": code}
    edits: list[Edit] = [Share(name_of(kernel), "csg.generator", cut | {"height": kernel[0], "width": kernel[1]})]
    edits += [Replace(module, "csg.coded", cut | {"rows": int(first.by_rows)}) for module in slicings]
    coded = {f"{module}.code": tensor for module, tensor in codes.items()}
    side = f"{first.outputs}x{first.inputs}"
    return Foreign(
        found=partial.found,
        method="csg",
        what=f"csg slices {side}x{shape_text(kernel)}, code {code}",
        options={"slice": side, "code": code, "order": "rows"},
        edits=tuple(edits),
        tensors={**rest, **coded, f"{SHARED}.{name_of(kernel)}.weight": generator},
    )


def _one(copies: Mapping[str, Tensor]) -> Tensor:
    """The tensor that all are copies of. Raises CompactError if one differs."""
    (first, one), *others = copies.items()
    for name, other in others:
        same = other.shape == one.shape and torch.allclose(other, one, rtol=0, atol=0, equal_nan=True)
        if not same:
            raise CompactError(f"{name} is not the generator of csg that {first} is; the authors' networks have one")
    if one.ndim != 2:
        raise CompactError(f"{first} is {shape_text(one.shape)}, and no generator of csg")
    return one


def _paired(rest: Mapping[str, Tensor], codes: Iterable[str]) -> tuple[Partial, dict[str, str]]:
    """The network that lacks the kernels of these codes, and by the modules of the kernels, in order, their codes.

    Raises CompactError if there is none.
    """
    codes = sorted(codes)
    own = _by_parent(codes)
    for partial in detection.lacking(rest, len(codes)):
        kernels = [name.removesuffix(".weight") for name, shape in partial.missing.items() if _is_kernel(name, shape)]
        inside = _by_parent(kernels)
        if {parent: len(names) for parent, names in inside.items()} == {parent: len(names) for parent, names in own.items()}:
            pairs = {module: name for parent in inside for module, name in zip(inside[parent], own[parent], strict=True)}
            return partial, {module: pairs[module] for module in kernels}
    raise CompactError(
        f"holds codes of csg for {len(codes)} kernels, but no known network has the other tensors and just those kernels besides"
    )


def _is_kernel(name: str, shape: Shape) -> bool:
    return name.endswith(".weight") and len(shape) == 4


def _by_parent(names: Sequence[str]) -> dict[str, list[str]]:
    """The names by the module that they are in."""
    result = defaultdict(list)
    for name in names:
        result[name.rpartition(".")[0]].append(name)
    return dict(result)


def _slicing(shape: Shape, generator: Tensor) -> Slicing:
    """How a kernel is cut. Raises CompactError if the generator makes no square slices of its size."""
    side = _side(len(generator), shape[2:])
    if not side:
        raise CompactError(f"a generator of {len(generator)} numbers makes no square slices for a kernel {shape_text(shape)}")
    return Slicing(shape, side, side, by_rows=True)


def _check(name: str, code: Tensor, slicing: Slicing, generator: Tensor) -> None:
    wanted = (slicing.count, generator.shape[1])
    if code.shape != wanted:
        kernel = f"a kernel {shape_text(slicing.shape)} in slices {slicing.outputs}x{slicing.inputs}"
        raise CompactError(f"{name} is {shape_text(code.shape)}, and {kernel} has codes {shape_text(wanted)}")


def generators(path: str) -> dict[tuple[int, ...], Given]:
    """Kernel size -> generator, in another artefact or in a file of the authors'.

    Raises CompactError if the file cannot be read or holds none.
    """
    file = checkpoint.read(path)
    try:
        if "compactcli" in file.metadata:
            return _ours(Recipe.loads(file.metadata["compactcli"]), file.tensors)
        return _theirs(file.tensors)
    except CompactError as problem:
        raise CompactError(f"{file.name}: {problem}") from None


def _ours(recipe: Recipe, tensors: Mapping[str, Tensor]) -> dict[tuple[int, ...], Given]:
    result: dict[tuple[int, ...], Given] = {}
    by_rows = any(isinstance(edit, Replace) and edit.options.get("rows") == 1 for edit in recipe.edits)
    for edit in recipe.edits:
        weight = tensors.get(f"{SHARED}.{edit.name}.weight") if isinstance(edit, Share) else None
        if isinstance(edit, Share) and edit.layer == "csg.generator" and weight is not None:
            height, width, outputs, inputs, code = (
                edit.options.get(key, 0) for key in ("height", "width", "outputs", "inputs", "code")
            )
            numbers = outputs * inputs * height * width
            if not numbers or weight.shape != (numbers, code):
                raise CompactError(
                    f"the generator {short(edit.name)} is {shape_text(weight.shape)}, which is not what its recipe says"
                )
            result[height, width] = Given(_usable(weight), (outputs, inputs), by_rows)
    if not result:
        raise CompactError("there is no generator of csg in it")
    return result


def _theirs(tensors: Mapping[str, Tensor]) -> dict[tuple[int, ...], Given]:
    copies = {name: tensor for name, tensor in tensors.items() if name.endswith(GENERATOR) and tensor.ndim == 2}
    if not copies:
        raise CompactError("there is no generator of csg in it")
    weight = _one(copies)
    kernel, side = _square(len(weight))
    return {kernel: Given(_usable(weight), (side, side), True)}


def _usable(weight: Tensor) -> Tensor:
    """A generator in float32. Raises CompactError if it makes nothing, or a number is not finite."""
    if not weight.shape[1] or not weight.is_floating_point() or not weight.isfinite().all():
        raise CompactError("the generator of csg in it is not of finite numbers")
    return weight.float()


def _square(numbers: int) -> tuple[tuple[int, int], int]:
    """(kernel size, side) of the authors' slices, which are square. Raises CompactError if there are none of so many numbers."""
    for each in (3, 5, 7, 1):
        if side := _side(numbers, (each, each)):
            return (each, each), side
    raise CompactError(f"a generator of {numbers} numbers makes no square slices")


def _side(numbers: int, kernel: Sequence[int]) -> int:
    """The side of square slices of so many numbers; 0 if there are none."""
    area = math.prod(kernel)
    side = math.isqrt(numbers // area)
    return side if side * side * area == numbers else 0
