"""What was done to a network, as plain data: `Edit`, `Step`, `Recipe` and their JSON. No torch."""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from .errors import CompactError

OPEN = "open"  # the command of the step that a file of a method's authors begins with
FORMAT = 1  # major version of the recipe; a newer one is refused
NAME_LENGTH = 200  # of the names in an edit
INDICES = 1 << 22  # of the channels that all edits of a recipe keep together
DEPTH = 4  # of tables and lists in an option
IMAGES = 1024  # that a network is calibrated on, where no other number is asked for
DTYPES = ("float16", "bfloat16")  # what a file may hold its floating-point numbers in, beside what they are computed in

# Numbers that a module's own code may split or slice its channels by: of a piece, of the first ones, or of all.
COUNTS = ("width", "expand_chs", "num_1x1_c", "in_channels", "dim_conv3", "dim_untouched", "c")

# The numbers a module's own code holds that an edit may change.
SETTABLE = frozenset({"groups", "num_groups", "before", "after", *COUNTS})


@dataclass(frozen=True)
class Keep:
    """Keep only the channels `index` of `module` along `axis` (0 = output, 1 = input)."""

    kind: ClassVar[str] = "keep"
    module: str
    axis: int
    index: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {"module": self.module, "axis": self.axis, "index": _ranges(self.index)}


@dataclass(frozen=True)
class Replace:
    """Put the layer kind `layer` ("method.kind") in the place of `module`, built with `options`.

    `tensors` are the values of the new layer's state_dict. They live in the file's tensors, not in
    its JSON, and are absent when an architecture is rebuilt.
    """

    kind: ClassVar[str] = "replace"
    module: str
    layer: str
    options: Mapping[str, int]
    tensors: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        return {"module": self.module, "layer": self.layer, "options": dict(self.options)}


@dataclass(frozen=True)
class Set:
    """Set the integer `attribute` of `module` (one of SETTABLE)."""

    kind: ClassVar[str] = "set"
    module: str
    attribute: str
    value: int

    def to_json(self) -> dict[str, Any]:
        return {"module": self.module, "attribute": self.attribute, "value": self.value}


@dataclass(frozen=True)
class Share:
    """Put a layer that many others refer to at the model's root, as `compactcli_shared.<name>`."""

    kind: ClassVar[str] = "share"
    name: str
    layer: str
    options: Mapping[str, int]
    tensors: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "layer": self.layer, "options": dict(self.options)}


Edit = Keep | Replace | Set | Share
_EDITS: dict[str, Any] = {"keep": Keep, "replace": Replace, "set": Set, "share": Share}


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input. Mean and std are of pixels scaled to 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None  # shorter side before the centre crop; None: straight to the input size
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class Measures:
    """What was measured of a network. None: not measured. Names and units as in `report --json`."""

    params: int | None = None
    macs: int | None = None
    size_bytes: int | None = None
    accuracy: float | None = None  # top-1, percent
    evaluated: Mapping[str, Any] | None = None  # {"dataset", "split", "images"}


@dataclass(frozen=True)
class Source:
    """The first network of the history: the file's bare name, its sha256, and what it measured."""

    name: str
    sha256: str
    measures: Measures = Measures()


@dataclass(frozen=True)
class Step:
    """One command that changed the network."""

    command: str
    method: str | None
    options: Mapping[str, Any]
    edits: tuple[Edit, ...]
    measures: Measures
    error: float | None  # relative output error against the network before the step
    version: str


@dataclass(frozen=True)
class Recipe:
    """How to rebuild a network, and where it came from."""

    architecture: str
    kwargs: Mapping[str, Any]
    input_shape: tuple[int, ...]  # (channels, height, width)
    preprocessing: Preprocessing
    source: Source | None = None
    classes: tuple[str, ...] | None = None
    dataset: str | None = None
    steps: tuple[Step, ...] = ()
    dtype: str | None = None  # one of DTYPES, in which the file holds floating-point numbers; None: as they are

    @property
    def edits(self) -> tuple[Edit, ...]:
        """Every edit of every step, in order: what rebuilds the network from its architecture."""
        return tuple(edit for step in self.steps for edit in step.edits)

    @property
    def opened(self) -> tuple[Edit, ...]:
        """The edits that make the first network of the history, where it was in a file of a method's authors."""
        return self.steps[0].edits if self.steps and self.steps[0].command == OPEN else ()

    def then(self, step: Step) -> "Recipe":
        """This recipe with one more step."""
        return replace(self, steps=(*self.steps, step))

    def dumps(self) -> str:
        """The recipe as one line of JSON, keys sorted: equal recipes give equal bytes.

        Raises CompactError for a figure that is not finite.
        """
        tree = {"format": FORMAT, **_plain(self)}
        try:
            return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)
        except ValueError:
            raise CompactError(
                "a figure of the history is not finite: the network's numbers are too large to compute with"
            ) from None

    @staticmethod
    def loads(text: str) -> "Recipe":
        """The recipe that `dumps` wrote.

        Raises CompactError for a newer format, for an unknown kind of edit or key inside one, and
        for values of the wrong type.
        """
        try:
            tree = json.loads(text, parse_constant=_no_number)
            version = tree.get("format")
            if not isinstance(version, int) or isinstance(version, bool):
                raise CompactError("the recipe in this file has no format version")
            if version > FORMAT:
                raise CompactError(
                    f"the recipe has format {_brief(version)}, this compactcli reads up to {FORMAT}; upgrade compactcli"
                )
            return _recipe(tree)
        except CompactError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
            raise CompactError(f"the recipe in this file is damaged: {_brief(problem)}") from None


def without_tensors(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """The edits as the file holds them: what a new layer's tensors are, its state_dict says."""
    return tuple(replace(edit, tensors={}) if isinstance(edit, Replace | Share) else edit for edit in edits)


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries, edits through their own `to_json`."""
    if isinstance(value, Edit):
        return {"kind": value.kind, **value.to_json()}
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _recipe(tree: dict[str, Any]) -> Recipe:
    source = tree.get("source")
    classes = tree.get("classes")
    return Recipe(
        architecture=_string(tree["architecture"]),
        kwargs={_string(key): _simple(value) for key, value in tree["kwargs"].items()},
        input_shape=_input_shape(tree["input_shape"]),
        preprocessing=preprocessing_of(tree["preprocessing"]),
        source=None if source is None else _source(source),
        classes=None if classes is None else tuple(_string(name) for name in classes),
        dataset=None if tree.get("dataset") is None else _string(tree["dataset"]),
        steps=_steps(tree["steps"]),
        dtype=_optional(_dtype, tree.get("dtype")),
    )


def preprocessing_of(tree: Mapping[str, Any]) -> Preprocessing:
    """What a file says of it. Raises KeyError, TypeError or ValueError where that is none."""
    return Preprocessing(
        mean=tuple(_number(n) for n in tree["mean"]),
        std=tuple(_positive(n) for n in tree["std"]),
        resize=_optional(lambda value: _integer(value, 1, 1 << 16), tree.get("resize")),
        interpolation=_string(tree["interpolation"]),
    )


def _source(tree: dict[str, Any]) -> Source:
    return Source(_bare(tree["name"]), _string(tree["sha256"]), _measures(tree["measures"]))


def _steps(trees: Iterable[dict[str, Any]]) -> tuple[Step, ...]:
    """The steps; a short string can name many channels, so these are counted as they are read."""
    room = INDICES

    def edits(each: Iterable[dict[str, Any]]) -> Iterator[Edit]:
        nonlocal room
        for tree in each:
            edit = _edit(tree)
            room -= len(edit.index) if isinstance(edit, Keep) else 0
            if room < 0:
                raise ValueError(f"its edits keep more than {INDICES} channels")
            yield edit

    return tuple(_step(tree, tuple(edits(tree["edits"]))) for tree in trees)


def _step(tree: dict[str, Any], edits: tuple[Edit, ...]) -> Step:
    return Step(
        command=_string(tree["command"]),
        method=None if tree.get("method") is None else _string(tree["method"]),
        options={_string(key): _simple(value) for key, value in tree["options"].items()},
        edits=edits,
        measures=_measures(tree["measures"]),
        error=_optional(_number, tree.get("error")),
        version=_string(tree["version"]),
    )


def _edit(tree: dict[str, Any]) -> Edit:
    kind = _EDITS.get(tree["kind"])
    if kind is None:
        raise CompactError(f"the recipe has an edit of unknown kind {_brief(tree['kind'])!r}; it needs a newer compactcli")
    readers = _READERS[tree["kind"]]
    unknown = set(tree) - {"kind"} - set(readers)
    if unknown:
        raise CompactError(
            f"the recipe's {tree['kind']} edit has the unknown key {_brief(min(unknown))!r}; it needs a newer compactcli"
        )
    edit: Edit = kind(**{key: read(tree[key]) for key, read in readers.items()})
    return edit


def _measures(tree: dict[str, Any]) -> Measures:
    evaluated = tree.get("evaluated")
    return Measures(
        params=_optional(_count, tree.get("params")),
        macs=_optional(_count, tree.get("macs")),
        size_bytes=_optional(_count, tree.get("size_bytes")),
        accuracy=_optional(_number, tree.get("accuracy")),
        evaluated=None
        if evaluated is None
        else {
            "dataset": _string(evaluated["dataset"]),
            "split": _string(evaluated["split"]),
            "images": _optional(_count, evaluated["images"]),
        },
    )


def _input_shape(value: Any) -> tuple[int, ...]:
    channels, height, width = (_integer(n, 1, 1 << 16) for n in value)
    return channels, height, width


def _simple(value: Any, depth: int = DEPTH) -> Any:
    """A value that a program may be told: a word, a finite number, or a few of them."""
    if isinstance(value, list | dict) and depth:
        own = value.items() if isinstance(value, dict) else enumerate(value)
        for _, each in own:
            _simple(each, depth - 1)
        return value
    if value is not None and not isinstance(value, str | bool):
        _number(value)
    return value


def _optional(read: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else read(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise TypeError(f"{repr(value)[:40]} is not a finite number")
    return float(value)


def _positive(value: Any) -> float:
    if _number(value) <= 0:
        raise ValueError(f"a standard deviation of {value} is none")
    return float(value)


def _count(value: Any) -> int:
    return _integer(value, 0, 1 << 62)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a number of JSON")


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _name(value: Any) -> str:
    """The path of a module or the name of a layer, as an edit has it."""
    if len(_string(value)) > NAME_LENGTH:
        raise ValueError(f"{value[:40]!r}... is too long for a name")
    return _string(value)


def _bare(value: Any) -> str:
    """The name of a file in no folder."""
    if any(sign in _string(value) for sign in "/\0"):
        raise ValueError(f"{value[:40]!r} is not the bare name of a file")
    return _string(value)


def _integer(value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise TypeError(f"{value!r} is not an integer from {low} to {high}")
    return value


def _dtype(value: Any) -> str:
    if value not in DTYPES:
        raise CompactError(f"the recipe stores numbers as {_brief(value)!r}; it needs a newer compactcli")
    return _string(value)


def _attribute(value: Any) -> str:
    if value not in SETTABLE:
        raise CompactError(f"the recipe sets the attribute {_brief(value)!r}; only {', '.join(sorted(SETTABLE))} may be set")
    return _string(value)


def _options(tree: Any) -> dict[str, int]:
    return {_string(key): _integer(value, 0, 1 << 31) for key, value in tree.items()}


_READERS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "keep": {"module": _name, "axis": lambda v: _integer(v, 0, 1), "index": lambda v: _indices(v)},
    "replace": {"module": _name, "layer": _name, "options": _options},
    "set": {"module": _name, "attribute": _attribute, "value": lambda v: _integer(v, 0, 1 << 31)},
    "share": {"name": _name, "layer": _name, "options": _options},
}


def _ranges(index: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2,5": short, exact and readable."""
    parts: list[list[int]] = []
    for i in index:
        if parts and i == parts[-1][1] + 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _indices(text: Any) -> tuple[int, ...]:
    """The inverse of `_ranges`. Indices ascend, so a hostile string cannot ask for more than 2^20."""
    result: list[int] = []
    for part in _string(text).split(","):
        match = re.fullmatch(r"([0-9]{1,7})(?:-([0-9]{1,7}))?", part)
        if match is None:
            raise ValueError(f"{part!r} is not a range of channels")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= 1 << 20 or (result and first <= result[-1]):
            raise ValueError(f"{part!r} is not an ascending range of channels")
        result.extend(range(first, last + 1))
    return tuple(result)


def _brief(problem: object) -> str:
    text = f"missing {problem}" if isinstance(problem, KeyError) else str(problem)
    return " ".join(text.split())[:160]
