"""What is known of every network's keys and shapes, in two files, and what writes them.

`signatures.json` holds the CIFAR networks and torchvision's, which a test holds against their definitions.
`signatures-timm.json` holds timm's: building them all takes minutes, so a test holds a sample, and detection
builds what it finds there before it believes it.
"""

import functools
import hashlib
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import cifar
from .architectures import Kwargs, get, parameters, timm, torchvision_names
from .errors import CompactError

Shape = tuple[int, ...]

_TORCHVISION_VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "googlenet": ({"aux_logits": True},),
    "inception_v3": ({"aux_logits": False},),
    "vit_b_16": ({"image_size": 384},),
    "vit_l_16": ({"image_size": 512},),
    "vit_h_14": ({"image_size": 518},),
}
_COMPARED = 130_000_000  # numbers in a network whose outputs are compared with those of its twins


@dataclass(frozen=True)
class Entry:
    """What an index says of one network. The last five fields are those of timm's networks only."""

    name: str
    kwargs: Kwargs
    signature: str  # hash of the keys
    tensors: int
    patterns: frozenset[str]
    fingerprint: str = ""  # hash of keys and shapes but for the numbers of classes and input channels
    numbers: int = 0  # in all tensors but those of the next two
    classes: tuple[str, ...] = ()  # tensors whose first axis is the number of classes
    channels: tuple[str, ...] = ()  # tensors whose second axis is the number of input channels
    forward: int = 0  # differs among networks with the same fingerprint if their outputs do; 0 for the one preferred


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Key -> shape, without the counters that older files do not have."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items() if not key.endswith("num_batches_tracked")}


def signature(shapes: Iterable[str]) -> str:
    """A hash of the keys."""
    return _hash(sorted(shapes))


def fingerprint(shapes: Mapping[str, Shape], classes: Iterable[str], channels: Iterable[str]) -> str:
    """A hash of keys and shapes, without the first axis of `classes` and the second of `channels`."""
    told: dict[str, list[int]] = {key: list(shape) for key, shape in shapes.items()}
    for axis, keys in enumerate((classes, channels)):
        for key in keys:
            told[key][axis : axis + 1] = [0]
    return _hash(f"{key} {told[key]}" for key in sorted(told))


def patterns_of(shapes: Iterable[str]) -> frozenset[str]:
    """The keys with numbers taken out: nearly the same for all networks of a family."""
    return frozenset(re.sub(r"\d+", "#", key) for key in shapes)


def count(shapes: Mapping[str, Shape], besides: Iterable[str] = ()) -> int:
    """How many numbers the tensors hold."""
    return sum(math.prod(shape) for key, shape in shapes.items() if key not in besides)


@functools.cache
def ours() -> tuple[Entry, ...]:
    """The CIFAR networks and torchvision's, in the order in which they are preferred."""
    tree = _read("signatures.json")
    families = [frozenset(family) for family in tree["patterns"]]
    return tuple(Entry(**{**network, "patterns": families[network["patterns"]]}) for network in tree["networks"])


@functools.cache
def timms() -> tuple[Entry, ...]:
    """timm's networks, among those with the same tensors the preferred first."""
    tree = _read("signatures-timm.json")
    strings = tree["strings"]
    families = [frozenset(strings[number] for number in family) for family in tree["patterns"]]
    classes, channels = ([tuple(end[axis]) for end in tree["ends"]] for axis in (0, 1))
    return tuple(
        Entry(f"timm:{name}", kwargs, keys, tensors, families[family], shapes, numbers, classes[end], channels[end], forward)
        for name, kwargs, keys, tensors, family, shapes, numbers, end, forward in tree["networks"]
    )


def index() -> dict[str, Any]:
    """What `signatures.json` holds: a hash of the keys of every known network, and their patterns."""
    patterns: list[list[str]] = []
    networks = []
    for name, kwargs in _indexed():
        shapes = _definition(name, kwargs)
        pattern = sorted(patterns_of(shapes))
        if pattern not in patterns:
            patterns.append(pattern)
        entry = {"name": name, "kwargs": kwargs, "signature": signature(shapes), "tensors": len(shapes)}
        networks.append(entry | {"patterns": patterns.index(pattern)})
    return {"patterns": patterns, "networks": networks}


def timm_index() -> dict[str, Any]:
    """What `signatures-timm.json` holds, in minutes: every network of timm's that can be built without memory."""
    entries = _with_forwards([entry for name in timm().list_models() for entry in describe(name)])
    strings = sorted({text for entry in entries for text in entry.patterns})
    families = sorted({tuple(sorted(entry.patterns)) for entry in entries})
    ends = sorted({(entry.classes, entry.channels) for entry in entries})
    place = {text: number for number, text in enumerate(strings)}
    return {
        "version": [timm().__version__],
        "strings": strings,
        "patterns": [[place[text] for text in family] for family in families],
        "ends": ends,
        "networks": [
            [
                *(entry.name.removeprefix("timm:"), entry.kwargs, entry.signature, entry.tensors),
                *(families.index(tuple(sorted(entry.patterns))), entry.fingerprint, entry.numbers),
                *(ends.index((entry.classes, entry.channels)), entry.forward),
            ]
            for entry in entries
        ],
    }


def describe(name: str) -> list[Entry]:
    """What the index says of timm's network `name`, but for `forward`: of one without classes also with them."""
    try:
        shapes = _definition(f"timm:{name}", {})
        more = _definition(f"timm:{name}", {"num_classes": 1001})
    except CompactError:  # a few compute with their weights while they are built
        return []
    if shapes.keys() == more.keys():
        return [_entry(name, {}, shapes)]
    return [_entry(name, {}, shapes), _entry(name, {"num_classes": 1000}, _definition(f"timm:{name}", {"num_classes": 1000}))]


def _entry(name: str, kwargs: dict[str, int], shapes: dict[str, Shape]) -> Entry:
    full = f"timm:{name}"
    classes = _ends(shapes, _definition(full, {"num_classes": 7}), 0, 7)
    channels = _ends(shapes, _definition(full, {**kwargs, "in_chans": 1}), 1, 1)
    return Entry(
        full,
        kwargs,
        signature(shapes),
        len(shapes),
        patterns_of(shapes),
        fingerprint(shapes, classes, channels),
        count(shapes, {*classes, *channels}),
        classes,
        channels,
    )


def _ends(shapes: dict[str, Shape], others: dict[str, Shape], axis: int, wanted: int) -> tuple[str, ...]:
    """The tensors of which just this axis differs, and is as wanted in the other network."""
    if shapes.keys() != others.keys():
        return ()
    return tuple(
        key
        for key, shape in shapes.items()
        if shape != others[key] and others[key] == (*shape[:axis], wanted, *shape[axis + 1 :])
    )


def _with_forwards(entries: list[Entry]) -> list[Entry]:
    """The entries with `forward`, the plainest name first: the shortest, after a network of torchvision's."""
    twins: dict[str, list[Entry]] = defaultdict(list)
    for entry in sorted(entries, key=lambda entry: (len(entry.name), entry.name)):
        twins[entry.fingerprint].append(entry)
    return [entry for group in twins.values() for entry in forwards(group)]


def forwards(group: list[Entry]) -> list[Entry]:
    """Networks with the same tensors, each with the number of the first that computes the same from them."""
    known: list[Entry] = [entry for entry in _of_torchvision() if _are_twins(entry, group[0])]
    numbered = []
    for entry in group:
        forward = next((number for number, other in enumerate(known) if same_outputs(other, entry)), len(known))
        known += [entry] if forward == len(known) else []
        numbered.append(replace(entry, forward=forward))
    return numbered


def same_outputs(first: Entry, second: Entry) -> bool:
    """Whether a network and one of timm's make the same outputs of the same weights.

    Those too large to try count as different.
    """
    if second.numbers > _COMPARED:
        return False
    classes = {"num_classes": 10} if second.classes else {}
    one, other = (get(entry.name, {**entry.kwargs, **classes}) for entry in (first, second))
    generator = torch.Generator().manual_seed(0)
    network, twin = one.build().eval(), other.build().eval()
    _draw_(network, generator)
    twin.load_state_dict(network.state_dict())
    images = torch.randn(1, *one.input_shape, generator=generator)
    with torch.no_grad():
        try:
            outputs, others = network(images), twin(images)
        except (AssertionError, RuntimeError):  # takes images of another size
            return False
    return outputs.shape == others.shape and bool((outputs - others).abs().max() <= 1e-4 * outputs.abs().max())


def _draw_(network: nn.Module, generator: torch.Generator) -> None:
    """Weights that no layer ignores: of unit gain, and scales around one."""
    for tensor in network.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim > 1:
            tensor.normal_(std=math.prod(tensor.shape[1:]) ** -0.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5, generator=generator)


def _are_twins(entry: Entry, other: Entry) -> bool:
    """Whether a network of torchvision's has the same tensors as one of timm's."""
    if entry.signature != other.signature:
        return False
    return fingerprint(_definition(entry.name, entry.kwargs), other.classes, other.channels) == other.fingerprint


def _of_torchvision() -> list[Entry]:
    return [entry for entry in ours() if not entry.name.startswith("cifar:")]


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


def _definition(name: str, kwargs: Kwargs) -> dict[str, Shape]:
    return shapes_of(get(name, kwargs).build(device="meta").state_dict())


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _read(file: str) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(Path(__file__).with_name(file).read_text())
    return tree
