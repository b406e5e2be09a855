"""The self-describing file: one safetensors whose metadata rebuilds the changed network.

`open_model` reads it and every other checkpoint; `save` writes it. No pickle, no side files, nothing
from the clock or the machine: the same network gives the same bytes.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from . import __version__, architectures, checkpoint, detection, kernels, measure, methods, resume, streams, surgery, weights
from .architectures import Architecture
from .checkpoint import Checkpoint
from .errors import CompactError, brief, short
from .graph import copied, run_fake, scores
from .methods import Foreign
from .peel import NUMBERS, without_path
from .recipe import OPEN, Measures, Recipe, Replace, Share, Source, Step

KEY = "compactcli"  # the metadata entry that holds the recipe
FAR_LARGER = 16  # times what a file holds: a network that edits have made smaller, or a hostile recipe


@dataclass
class Network:
    """A network and its history, as a command holds it."""

    module: nn.Module  # on the CPU, in eval mode
    recipe: Recipe
    name: str  # bare file name, or "stdin"
    folder: Path | None = None  # where the file lies
    sha256: str | None = None  # of the file; None for a network that was not read
    size_bytes: int | None = None
    notes: tuple[str, ...] = ()  # for people: what was recognised, guessed or dropped

    @property
    def input_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.recipe.input_shape
        return channels, height, width

    def copied(self) -> "Network":
        """The same, with a module of its own."""
        return replace(self, module=copied(self.module))

    @cached_property
    def num_classes(self) -> int:
        """How many numbers it gives for an image, or for each of its pixels; of several outputs, those that are trained."""
        given = scores(run_fake(self.module, self.input_shape))
        return given.shape[1] if given.ndim > 1 else 1


@dataclass(frozen=True)
class Wishes:
    """What the user says about a network that its file does not, or says otherwise."""

    arch: str | None = None
    arch_kwargs: Mapping[str, Any] | None = None
    input_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    trust_pickle: bool = False


def load(path: str | Path, *, arch: str | None = None, channels_last: bool = True, fold: bool = True) -> nn.Module:
    """The network in a file, in eval mode on the CPU. `arch` is wanted where a function of your own built it: `file.py:factory`.

    Convolutions whose kernels are stored as fewer numbers are plain ones; with `fold=False` they train as they are stored.
    Its convolutions are laid out for the memory format in which nearly all networks are faster (PyTorch's channels_last);
    without it the outputs are, bit for bit, those of the network that was saved.
    Raises CompactError if the file cannot be read, or its architecture is not recognised.
    """
    module = open_model(path, Wishes(arch)).module
    if fold:
        kernels.fold_(module)
    return module.to(memory_format=torch.channels_last) if channels_last else module  # type: ignore[call-overload]


def open_model(source: str | Path | bytes, wishes: Wishes | None = None) -> Network:
    """The network in a file, on stdin ("-") or in bytes, with its history.

    Raises CompactError if it cannot be read or recognised, or does not fit its recipe.
    """
    wishes = wishes or Wishes()
    file = checkpoint.read(source, trust_pickle=wishes.trust_pickle)
    try:
        network = _from_recipe(file, wishes) if KEY in file.metadata else _from_weights(file, wishes)
    except CompactError as problem:
        raise CompactError(f"{file.name}: {problem}") from None
    network.module.eval()
    network.recipe = _with_preprocessing(network.recipe, wishes)
    return network


def open_interrupted(path: Path, wishes: Wishes | None = None) -> Network:
    """The network that an interrupted run was training, from what the run left, with the weights that it had then.

    Raises CompactError if the file is none of that.
    """
    tensors, metadata = resume.read(path)
    if KEY not in metadata:
        raise CompactError(f"{path.name} does not say which network the run was training; give the network as well")
    file = Checkpoint(resume.under("model", tensors), metadata, None, path.name, path.parent, "", 0, ())
    return _from_recipe(file, wishes or Wishes())


def open_beside(
    path: str | Path, network: Network, arch: str | None = None, *, trust_pickle: bool = False, pre: Wishes | None = None
) -> Network:
    """The network in a file or folder that is to be compared with `network`: its teacher or its baseline.

    If it is the very file that the history began with, or is not recognised by itself, it is described as that was: the same
    arguments, input shape and normalisation. `pre` is what the user says of the latter for both.
    Raises CompactError if it cannot be read.
    """
    recipe, pre = network.recipe, pre or Wishes()
    if recipe.source is None or file_sha256(path) != recipe.source.sha256:
        wished = Wishes(mean=pre.mean, std=pre.std, trust_pickle=trust_pickle)
        try:
            return open_model(path, wished)
        except CompactError:
            if arch is None:
                raise
            with contextlib.suppress(CompactError):
                described = replace(wished, arch=arch, arch_kwargs=dict(recipe.kwargs), input_shape=network.input_shape)
                return open_model(path, described)
            raise
    name = recipe.architecture if is_known(recipe.architecture) else arch
    if recipe.opened:
        name = None  # it is recognised as it was then
    own = recipe.preprocessing
    return open_model(path, Wishes(name, dict(recipe.kwargs), network.input_shape, own.mean, own.std, trust_pickle))


def file_sha256(path: str | Path) -> str | None:
    """The sha256 of a file, of a folder that of its weights; None if there is none, or what is there can be read but once."""
    try:
        weights = checkpoint.weights_file(Path(path))
        if weights is None or not os.path.isfile(weights):
            return None
        with open(weights, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def fresh(wishes: Wishes, seed: int) -> Network:
    """An untrained network of the wished architecture."""
    if wishes.arch is None:
        raise CompactError("--fresh makes an untrained network; say which with --arch NAME")
    architecture = _named(wishes.arch, wishes)
    torch.manual_seed(seed)
    module = architecture.build(initialise=True).eval()
    return Network(module, _with_preprocessing(_first_recipe(architecture, module, None), wishes), wishes.arch)


def dumps(network: Network) -> bytes:
    """The file's bytes: the state_dict, in the recipe's dtype, and, under one metadata key, the recipe."""
    dtype = network.recipe.dtype
    data = safetensors.torch.save({name: stored(tensor, dtype) for name, tensor in weights.state(network.module).items()})
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = {KEY: network.recipe.dumps(), "format": "pt"}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def stored(tensor: Tensor, dtype: str | None) -> Tensor:
    """The tensor as a file holds it whose recipe has that dtype: as it is where a value is finite that would not be in it."""
    if dtype is None or not tensor.is_floating_point():
        return tensor
    half = tensor.to(getattr(torch, dtype))
    return half if torch.equal(half.isfinite(), tensor.isfinite()) else tensor


def save(network: Network, target: str) -> int:
    """Write the network to a path or to stdout ("-"), whole or not at all; the number of bytes.

    Raises CompactError where it cannot be written.
    """
    data = dumps(network)
    streams.write(data, target)
    return len(data)


def nonfinite(module: nn.Module) -> tuple[list[str], list[str]]:
    """(weights, running variances) that hold NaN or Inf."""
    bad = [name for name, tensor in weights.state(module).items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    infinite = [n for n in bad if n.endswith("running_var") and not module.state_dict()[n].isnan().any()]
    return [name for name in bad if name not in infinite], infinite


def check_finite(network: Network, log: Callable[[str], None] = lambda line: None) -> None:
    """Raise CompactError naming a weight that is not; `log` is told of a variance that is infinite."""
    bad, variances = nonfinite(network.module)
    for name in variances:
        log(f"warning: {network.name}: {name} holds Inf: the channel behind it is constant")
    if bad:
        raise CompactError(f"{network.name}: {bad[0]} holds NaN or Inf: nothing can be derived from it; repair or retrain it")


def _from_recipe(file: Checkpoint, wishes: Wishes) -> Network:
    recipe = Recipe.loads(file.metadata[KEY])
    if wishes.input_shape and wishes.input_shape != recipe.input_shape:
        prepared = recipe.preprocessing
        if wishes.input_shape[1:] != recipe.input_shape[1:]:
            prepared = replace(prepared, resize=None)  # images are then scaled straight to it
        recipe = replace(recipe, input_shape=wishes.input_shape, preprocessing=prepared)
    channels, height, width = recipe.input_shape
    shape = (channels, height, width)
    if len(recipe.preprocessing.mean) != channels or len(recipe.preprocessing.std) != channels:
        raise CompactError(f"the recipe normalises {len(recipe.preprocessing.mean)} channels of an input with {channels}")
    architecture = first_architecture(recipe, wishes.arch)
    methods.register_layers([edit.layer for edit in recipe.edits if isinstance(edit, Replace | Share)])
    module = architecture.build()
    if measure.params(module) > FAR_LARGER * sum(tensor.numel() for tensor in file.tensors.values()):
        hollow = architecture.build(device="meta")  # what is given up of it takes memory while it is
        surgery.apply_(hollow, recipe.edits)
        weights.check_fit(weights.state(hollow), file.tensors, hollow)
    surgery.apply_(module, recipe.edits)
    weights.load_(module, file.tensors)
    run_fake(module, shape)
    own = {"--arch": wishes.arch if is_known(recipe.architecture) else None, "--arch-kwargs": wishes.arch_kwargs}
    idle = [flag for flag, wish in own.items() if wish and wish != recipe.architecture]
    notes = (f"the file says itself that it began as {recipe.architecture}; {' and '.join(idle)} left out",) if idle else ()
    return Network(module, recipe, file.name, file.folder, file.sha256, file.size_bytes, (*file.notes, *notes))


def _from_weights(file: Checkpoint, wishes: Wishes) -> Network:
    tensors: Mapping[str, Tensor] = file.tensors
    notes, foreign = list(file.notes), None
    if wishes.arch is not None:
        architecture = _named(wishes.arch, wishes)
    elif file.config is not None and isinstance(file.config.get("architecture"), str):
        architecture = architectures.configured(file.config, wishes.arch_kwargs, wishes.input_shape)
    else:
        plain = {name: tensor for name, tensor in tensors.items() if name not in NUMBERS}
        foreign = methods.recognise(plain)
        found, tensors = (foreign.found, tensors) if foreign else _detected(plain, notes)
        architecture = found.architecture
        if wishes.arch_kwargs or wishes.input_shape:
            architecture = architectures.get(
                architecture.name,
                {**architecture.kwargs, **(wishes.arch_kwargs or {})},
                wishes.input_shape or architecture.input_shape,
            )
        more = f" with {foreign.what}" if foreign else ""
        notes += [f"recognised as {architecture.name}{more}", *(() if wishes.arch_kwargs else found.notes)]
    module = architecture.build()
    if foreign:
        surgery.apply_(module, foreign.edits)
    weights.load_(module, foreign.tensors if foreign else weights.as_named(module, tensors))
    recipe = _first_recipe(architecture, module, file)
    if foreign:
        recipe = recipe.then(_opening(foreign, recipe))
    return Network(module, recipe, file.name, file.folder, file.sha256, file.size_bytes, tuple(notes))


def _detected(tensors: Mapping[str, Tensor], notes: list[str]) -> tuple[detection.Detection, Mapping[str, Tensor]]:
    """What the tensors are of, and these without what all names begin with, if it is so that they are known."""
    try:
        return detection.detect(tensors), tensors
    except CompactError:
        bare = without_path(tensors)
        if bare is tensors:
            raise
        with contextlib.suppress(CompactError):
            found = detection.detect(bare)
            notes.append(f"left out what all names begin with, {short(next(iter(tensors)).removesuffix(next(iter(bare))))}")
            return found, bare
        raise


def _opening(foreign: Foreign, recipe: Recipe) -> Step:
    """The step that makes the network of a method's authors from its architecture."""
    assert recipe.source is not None
    measures = replace(recipe.source.measures, size_bytes=None)
    return Step(OPEN, foreign.method, foreign.options, foreign.edits, measures, None, __version__)


def first_architecture(recipe: Recipe, arch: str | None = None) -> Architecture:
    """What the history of a network began with; `arch` is the user's own factory, where that built it.

    Raises CompactError if it was a user's own, and is not given again.
    """
    channels, height, width = recipe.input_shape
    shape = (channels, height, width)
    if is_known(recipe.architecture):
        return architectures.get(recipe.architecture, recipe.kwargs, shape)
    if arch is None:
        raise CompactError(
            f"was built by your own {brief(recipe.architecture)}, which is never run unasked; give it again with --arch"
        )
    return architectures.user(arch, recipe.kwargs, shape)


def is_known(architecture: str) -> bool:
    """Whether the name is one of a library's, not of a user's own factory."""
    return ":" not in architecture or architecture.startswith(("cifar:", "timm:", "torchvision:"))


def _named(arch: str, wishes: Wishes) -> Architecture:
    if not is_known(arch):
        return architectures.user(arch, wishes.arch_kwargs, wishes.input_shape)
    return architectures.get(arch, wishes.arch_kwargs, wishes.input_shape)


def _first_recipe(architecture: Architecture, module: nn.Module, file: Checkpoint | None) -> Recipe:
    measures = Measures(
        params=measure.params(module),
        macs=measure.macs(module, architecture.input_shape),
        size_bytes=None if file is None else file.size_bytes,
    )
    return Recipe(
        architecture=architecture.name,
        kwargs=dict(architecture.kwargs),
        input_shape=architecture.input_shape,
        preprocessing=architecture.preprocessing,
        source=None if file is None else Source(file.name, file.sha256, measures),
    )


def _with_preprocessing(recipe: Recipe, wishes: Wishes) -> Recipe:
    changes = {name: value for name in ("mean", "std") if (value := getattr(wishes, name)) is not None}
    wrong = [name for name, value in changes.items() if len(value) != recipe.input_shape[0]]
    if wrong:
        raise CompactError(
            f"--{wrong[0]} has {len(changes[wrong[0]])} numbers, the network's input {recipe.input_shape[0]} channels"
        )
    if min(changes.get("std", (1,))) <= 0:
        raise CompactError(f"--std {','.join(f'{value:g}' for value in changes['std'])}: each must be more than 0")
    return replace(recipe, preprocessing=replace(recipe.preprocessing, **changes))
