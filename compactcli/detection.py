"""The name of a network from its tensors' keys and shapes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from . import cifar
from .architectures import LARGEST, Architecture, Kwargs, get, has_timm, parameters, title
from .errors import CompactError, brief, shape_text
from .signatures import Entry, Shape, count, fingerprint, ours, patterns_of, shapes_of, signature, timms
from .vision import torchvision


@dataclass(frozen=True)
class Detection:
    """What a set of tensors was recognised as, and the choices made where they do not tell."""

    architecture: Architecture
    notes: tuple[str, ...]


def detect(tensors: Mapping[str, Tensor]) -> Detection:
    """The architecture whose definition has exactly these keys and shapes. Class count and width are read off them.

    Of several the CIFAR networks come first, then torchvision's as its own weights are, then timm's. Looks at keys and shapes
    only, so meta tensors will do. Raises CompactError naming the nearest architecture and the first tensor
    in which it differs, or timm where that is missing.
    """
    shapes = shapes_of(tensors)
    if not shapes:
        raise CompactError("there are no tensors to recognise a network by")
    keys = signature(shapes)
    for entry in ours():
        if entry.signature == keys and (found := _exactly(entry, shapes)):
            twins = [] if entry.name.startswith("cifar:") else _fingerprinted(shapes, keys)
            if entry.kwargs and twins and (own := _exactly(twins[0], shapes)):  # no weights of torchvision's are of this variant
                return Detection(own, _twins_note(twins[0], own, [*twins, entry]))
            return Detection(found, _notes(found) + _twins_note(entry, found, twins))
    fitting = _fingerprinted(shapes, keys)
    if fitting and not has_timm() and _one_class_count(fitting[0], shapes):
        raise CompactError(f"these are the tensors of {fitting[0].name}; pip install compactcli[timm]")
    for entry in fitting:
        if found := _exactly(entry, shapes):
            return Detection(found, _twins_note(entry, found, fitting))
    return Detection(_otherwise(shapes), ())


@dataclass(frozen=True)
class Partial:
    """What a set of tensors was recognised as of which some are missing, and these."""

    found: Detection
    missing: Mapping[str, Shape]  # in the order of the definition


def lacking(tensors: Mapping[str, Tensor], number: int) -> Iterator[Partial]:
    """The CIFAR networks, and torchvision's, whose definitions have exactly these keys and shapes and so many tensors more."""
    shapes = shapes_of(tensors)
    patterns = patterns_of(shapes)
    for entry in ours():
        if entry.tensors == len(shapes) + number and patterns <= entry.patterns and (fit := _fit(entry, shapes)):
            definition = shapes_of(fit.architecture.build(device="meta").state_dict())
            missing = {key: shape for key, shape in definition.items() if key not in shapes}
            if len(fit.differences) == len(missing) == number:
                yield Partial(Detection(fit.architecture, _notes(fit.architecture)), missing)


def _one_class_count(entry: Entry, shapes: Mapping[str, Shape]) -> bool:
    """Whether all tensors that depend on the number of classes tell of the same, as a build would show."""
    return len({shapes[key][:1] for key in entry.classes}) <= 1


class _Fit(NamedTuple):
    """An architecture beside given shapes."""

    architecture: Architecture
    differences: list[str]


def _fingerprinted(shapes: Mapping[str, Shape], keys: str) -> list[Entry]:
    """timm's networks with these shapes, by its index."""
    same = [entry for entry in timms() if entry.signature == keys]
    return [entry for entry in same if entry.fingerprint == fingerprint(shapes, entry.classes, entry.channels)]


def _exactly(entry: Entry, shapes: Mapping[str, Shape]) -> Architecture | None:
    fit = _fit(entry, shapes)
    return fit.architecture if fit and not fit.differences else None


def _fit(entry: Entry, shapes: Mapping[str, Shape]) -> _Fit | None:
    """The architecture with the arguments read off the shapes where that brings it nearer, and what still differs.

    None if it cannot be built: without timm, or with another version of it.
    """
    usual = _built(entry.name, entry.kwargs)
    if usual is None:
        return None
    differences = _differences(shapes, usual[1])
    read = _read(entry, shapes, usual[1])
    if differences and read and (nearer := _built(entry.name, {**entry.kwargs, **read})):
        fewer = _differences(shapes, nearer[1])
        if len(fewer) < len(differences):
            return _Fit(nearer[0], fewer)
    return _Fit(usual[0], differences)


def _built(name: str, kwargs: Kwargs) -> tuple[Architecture, dict[str, Shape]] | None:
    """The architecture and its shapes; None if it is not there or refuses the arguments."""
    try:
        architecture = get(name, kwargs)
        return architecture, shapes_of(architecture.build(device="meta").state_dict())
    except CompactError:
        return None


def _read(entry: Entry, shapes: Mapping[str, Shape], definition: Mapping[str, Shape]) -> dict[str, int]:
    """The class count, the input channels where they may be chosen, and the width of our own, that the shapes tell of."""
    read = {}
    for argument, (key, axis) in _places(entry, definition).items():
        shape, usual = shapes.get(key, ()), definition.get(key, ())
        if len(shape) == len(usual) > axis and shape[axis] != usual[axis] and 1 <= shape[axis] <= LARGEST:
            read[argument] = shape[axis]
    return read


def _places(entry: Entry, definition: Mapping[str, Shape]) -> dict[str, tuple[str, int]]:
    """Argument -> a tensor and the axis of it that has that size."""
    library, _, own = entry.name.partition(":")
    if library == "timm":
        ends = {"num_classes": (entry.classes, 0), "in_chans": (entry.channels, 1)}
        return {argument: (keys[0], axis) for argument, (keys, axis) in ends.items() if keys}
    weights = [key for key, shape in definition.items() if len(shape) > 1]
    places = {"num_classes": (weights[-1], 0), "in_channels": (weights[0], 1), "width": (weights[0], 0)}
    takes = parameters(cifar.NETWORKS[own]) if library == "cifar" else {"num_classes"}
    return {argument: place for argument, place in places.items() if argument in takes}


def _differences(shapes: Mapping[str, Shape], definition: Mapping[str, Shape]) -> list[str]:
    """What keeps the shapes from being those of the definition, one clause per tensor."""
    differences = []
    for key, shape in definition.items():
        if key not in shapes:
            differences.append(f"{key} is missing")
        elif shapes[key] != shape:
            differences.append(f"{key} is {shape_text(shapes[key])}, not {shape_text(shape)}")
    return differences + [f"{brief(key)} is unexpected" for key in shapes if key not in definition]


def _otherwise(shapes: Mapping[str, Shape]) -> Architecture:
    """The nearest network if nothing differs in it: timm is then of another version than its index.

    Else raises CompactError with what differs.
    """
    near = _near(shapes)
    fits = [fit for entry in near if (fit := _fit(entry, shapes))]
    if fits:
        architecture, differences = min(fits, key=lambda fit: len(fit.differences))
        if not differences:
            return architecture
        usual = get(architecture.name).kwargs
        told = {key: value for key, value in architecture.kwargs.items() if usual.get(key) != value}
        nearest = f"nearest is {title(architecture.name, told)}, but {differences[0]}"
    elif near:
        why = "this version of timm cannot build" if has_timm() else "only timm can compare (pip install compactcli[timm])"
        nearest = f"nearest is {near[0].name}, which {why}"
    else:
        nearest = f"no known network has keys like {brief(repr(next(iter(shapes))))}"
    raise CompactError(f"cannot name the architecture; {nearest}; try --arch NAME")


def _near(shapes: Mapping[str, Shape]) -> list[Entry]:
    """The networks to compare with: those with the same keys, else some of those with the most key patterns in common."""
    keys, patterns = signature(shapes), patterns_of(shapes)

    def distance(entry: Entry) -> tuple[int, int]:
        return abs(entry.tensors - len(shapes)), abs(entry.numbers - count(shapes, {*entry.classes, *entry.channels}))

    same = [[entry for entry in entries if entry.signature == keys] for entries in (ours(), timms())]
    if any(same):
        return same[0] + sorted(same[1], key=distance)[:4]
    best = max(dict.fromkeys(entry.patterns for entry in (*ours(), *timms())), key=lambda family: _likeness(family, patterns))
    if best.isdisjoint(patterns):
        return []
    family = [[entry for entry in entries if entry.patterns == best] for entries in (ours(), timms())]
    return [entry for entries in family for entry in sorted(entries, key=distance)[:4]]


def _likeness(family: frozenset[str], patterns: frozenset[str]) -> float:
    """The share of all patterns that are common, without a union: there may be a million patterns."""
    common = len(family & patterns)
    return common / (len(family) + len(patterns) - common)


def _twins_note(chosen: Entry, found: Architecture, twins: list[Entry]) -> tuple[str, ...]:
    """A note on timm's networks that make something else of the same tensors."""
    others = {entry.forward: entry.name for entry in reversed(twins) if entry.forward != chosen.forward}
    if not others:
        return ()
    named = ", ".join(others[forward] for forward in sorted(others)[:3])
    read = [f"{argument}={found.kwargs[argument]}" for argument in ("num_classes", "in_chans") if argument in found.kwargs]
    how = " ".join(["--arch", *(f"--arch-kwargs {argument}" for argument in read)])
    return (f"taken as {chosen.name}; the same tensors fit {named}: choose with {how}",)


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
