"""The name of a network from its tensors' keys and shapes."""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from . import cifar
from .architectures import LARGEST, Architecture, Kwargs, brief, get, parameters, title, torchvision_names
from .errors import CompactError
from .vision import torchvision

Shape = tuple[int, ...]

_TORCHVISION_VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "googlenet": ({"aux_logits": True},),
    "inception_v3": ({"aux_logits": False},),
    "vit_b_16": ({"image_size": 384},),
    "vit_l_16": ({"image_size": 512},),
    "vit_h_14": ({"image_size": 518},),
}


@dataclass(frozen=True)
class Detection:
    """What a set of tensors was recognised as, and the choices made where they do not tell."""

    architecture: Architecture
    notes: tuple[str, ...]


def detect(tensors: Mapping[str, Tensor]) -> Detection:
    """The architecture whose definition has exactly these keys and shapes. Class count and width are read off them.

    Looks at keys and shapes only, so meta tensors will do. Raises CompactError naming the nearest
    architecture and the first tensor in which it differs.
    """
    shapes = _shapes(tensors)
    if not shapes:
        raise CompactError("there are no tensors to recognise a network by")
    signature = _signature(shapes)
    known = [network for network in _index()["networks"] if network["signature"] == signature]
    for network in known:
        architecture, differences = _fit(network["name"], network["kwargs"], shapes)
        if not differences:
            return Detection(architecture, _notes(architecture))
    raise CompactError(f"cannot name the architecture; {_nearest(shapes, known)}; try --arch NAME")


def index() -> dict[str, Any]:
    """What `signatures.json` holds: a hash of the keys of every known network, and their patterns."""
    patterns: list[list[str]] = []
    networks = []
    for name, kwargs in _indexed():
        shapes = _shapes(get(name, kwargs).build(device="meta").state_dict())
        pattern = sorted(_patterns(shapes))
        if pattern not in patterns:
            patterns.append(pattern)
        entry = {"name": name, "kwargs": kwargs, "signature": _signature(shapes), "tensors": len(shapes)}
        networks.append(entry | {"patterns": patterns.index(pattern)})
    return {"patterns": patterns, "networks": networks}


def _indexed() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every network by name, and the arguments that change its keys."""
    for name, factory in cifar.NETWORKS.items():
        choices: list[list[dict[str, Any]]] = []
        if "keys" in parameters(factory):
            choices = [[{}, {"keys": "csg"}], [{}, {"shortcut": "conv"}], [{}, {"stem_bias": True}]]
        for chosen in itertools.product(*choices):
            yield f"cifar:{name}", {key: value for choice in chosen for key, value in choice.items()}
    for name in torchvision_names():
        for kwargs in ({}, *_TORCHVISION_VARIANTS.get(name, ())):
            yield name, kwargs


@functools.cache
def _index() -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(Path(__file__).with_name("signatures.json").read_text())
    return tree


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Key -> shape, without the counters that older files do not have."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items() if not key.endswith("num_batches_tracked")}


def _signature(shapes: Mapping[str, Shape]) -> str:
    return hashlib.sha256("\n".join(sorted(shapes)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _patterns(shapes: Mapping[str, Shape]) -> set[str]:
    """The keys with numbers taken out: nearly the same for all networks of a family."""
    return {re.sub(r"\d+", "#", key) for key in shapes}


def _fit(name: str, kwargs: Kwargs, shapes: Mapping[str, Shape]) -> tuple[Architecture, list[str]]:
    """The architecture with the arguments read off the shapes where that brings it nearer, and what still differs."""
    architecture = get(name, kwargs)
    definition = _shapes(architecture.build(device="meta").state_dict())
    differences = _differences(shapes, definition)
    read = _read(name, shapes, definition)
    if differences and read:
        nearer = get(name, {**kwargs, **read})
        fewer = _differences(shapes, _shapes(nearer.build(device="meta").state_dict()))
        if len(fewer) < len(differences):
            return nearer, fewer
    return architecture, differences


def _read(name: str, shapes: Mapping[str, Shape], definition: Mapping[str, Shape]) -> dict[str, int]:
    """The class count, and for our own networks the input channels and the width, that the shapes tell of."""
    weights = [key for key, shape in definition.items() if len(shape) > 1]
    places = {"num_classes": (weights[-1], 0), "in_channels": (weights[0], 1), "width": (weights[0], 0)}
    library, _, own = name.partition(":")
    takes = parameters(cifar.NETWORKS[own]) if library == "cifar" else {"num_classes"}
    read = {}
    for argument, (key, axis) in places.items():
        shape, usual = shapes.get(key, ()), definition[key]
        if argument in takes and len(shape) == len(usual) and shape[axis] != usual[axis] and 1 <= shape[axis] <= LARGEST:
            read[argument] = shape[axis]
    return read


def _differences(shapes: Mapping[str, Shape], definition: Mapping[str, Shape]) -> list[str]:
    """What keeps the shapes from being those of the definition, one clause per tensor."""
    differences = []
    for key, shape in definition.items():
        if key not in shapes:
            differences.append(f"{key} is missing")
        elif shapes[key] != shape:
            differences.append(f"{key} is {_size(shapes[key])}, not {_size(shape)}")
    return differences + [f"{brief(key)} is unexpected" for key in shapes if key not in definition]


def _nearest(shapes: Mapping[str, Shape], known: list[dict[str, Any]]) -> str:
    """The clause that names the network with the most key patterns in common and what differs in it."""
    patterns = _patterns(shapes)
    families = [set(family) for family in _index()["patterns"]]
    likeness = [len(family & patterns) / len(family | patterns) for family in families]
    if not known and max(likeness) == 0:
        return f"no known network has keys like {brief(repr(next(iter(shapes))))}"
    best = likeness.index(max(likeness))
    family = [network for network in _index()["networks"] if network["patterns"] == best]
    near = known or sorted(family, key=lambda network: abs(network["tensors"] - len(shapes)))[:4]
    architecture, differences = min((_fit(n["name"], n["kwargs"], shapes) for n in near), key=lambda fit: len(fit[1]))
    usual = get(architecture.name).kwargs
    told = {key: value for key, value in architecture.kwargs.items() if usual.get(key) != value}
    return f"nearest is {title(architecture.name, told)}, but {differences[0]}"


def _notes(architecture: Architecture) -> tuple[str, ...]:
    """The choices that keys and shapes leave open, and how to choose otherwise."""
    how = {
        "pad": "every second position, zero channels on both sides",
        "append": "every second position, zero channels behind",
        "pool": "2x2 average pooling, zero channels on both sides",
    }
    chosen = architecture.kwargs.get("shortcut")
    if chosen in how:
        others = " or ".join(f"shortcut={kind}" for kind in how if kind != chosen)
        return (f'shortcut taken as "{chosen}" ({how[chosen]}); if accuracy is off try --arch-kwargs {others}',)
    if architecture.kwargs.get("transform_input"):
        return (
            "transform_input taken as true, as torchvision's own weights need it; else try --arch-kwargs transform_input=false",
        )
    return _weights_note(architecture)


def _weights_note(architecture: Architecture) -> tuple[str, ...]:
    """A note where torchvision's weights for one network were made with different preprocessing."""
    if architecture.name.startswith("cifar:") or architecture.kwargs.get("num_classes", 1000) != 1000:
        return ()
    weights = torchvision().models.get_model_weights(architecture.name)
    if len({str(entry.transforms()) for entry in weights}) == 1:
        return ()
    chosen = f"{weights.__name__}.{weights.DEFAULT.name}"
    return (f"preprocessing taken from {chosen} (resize to {architecture.preprocessing.resize}); its other weights differ",)


def _size(shape: Shape) -> str:
    return brief("x".join(map(str, shape))) or "a single number"
