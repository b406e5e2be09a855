"""The compression methods. A method is one file in this folder, registered by being there.

A file holds a class that derives from `Method`, a frozen dataclass with its options, and the layers
it puts into networks. The first line of its docstring is its help on the command line.
"""

import ast
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from ..errors import CompactError, UsageError, brief
from ..recipe import Edit, Recipe, Replace

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..budget import Budget
    from ..channels import Channels
    from ..detection import Detection
    from ..moments import Moments

LARGEST = 10**9  # of a number that a user gives: beyond it are mistakes, and NaN


@dataclass(frozen=True)
class Progress:
    """Where a training run stands."""

    step: int  # optimizer steps taken
    epoch: int  # counted from 0
    share: float  # of the run, 0 to 1
    learning_rates: tuple[float, ...]  # of the parameter groups


@dataclass(frozen=True)
class NoOptions:
    """Of a method that has none."""


@dataclass(frozen=True)
class Foreign:
    """The network in a file of a method's authors, as this package makes it."""

    found: "Detection"  # the architecture before the method changed it
    method: str
    what: str  # how the network differs from that, for people
    options: Mapping[str, Any]  # the method's, as a step holds them
    edits: tuple[Edit, ...]  # what makes the network from the architecture
    tensors: Mapping[str, "Tensor"]  # under the names that they have then


class Method:
    """What a method may do, and when. The hooks that a method does not need do nothing.

    Where it chooses by error, `losses` then tells what its edits to each layer, by name, do to the network's outputs: as a share
    of their mean square deviation, before any refit. Sets that several layers make count for the first of them.
    """

    Options: ClassVar[type] = NoOptions
    # What --ratio may be of; the first is the default.
    of: ClassVar[tuple[Literal["macs", "params", "latency"], ...]] = ("macs", "params", "latency")
    rounds: ClassVar[bool] = True  # whether it makes fewer channels, filters or ranks, which --round makes multiples of a number
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # by the option "preset": values for what is not set otherwise

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options
        self.losses: dict[str, float] = {}

    @property
    def soft(self) -> bool:
        """Whether channels may go that a normalisation takes its statistics over."""
        return bool(getattr(self.options, "soft", False))

    @classmethod
    def recognise(cls, tensors: "Mapping[str, Tensor]") -> Foreign | None:
        """The network in a file of the method's authors; None for any other file.

        Raises CompactError where a file is one of theirs and does not hold together.
        """
        return None

    @property
    def files(self) -> tuple[str, ...]:
        """Those that the options name: what is in them makes a result, as the options do."""
        return ()

    def recorded(self) -> dict[str, Any]:
        """The options as the file holds them: no path of this machine."""
        return asdict(self.options)

    def start(
        self,
        model: "nn.Module",
        channels: "Channels",
        budget: "Budget",
        moments: "Mapping[str, Moments] | None" = None,
        *,
        trains: bool = False,
    ) -> list[Edit]:
        """Edits to make at once, before training if the method `trains`.

        It may instead get ready for a search: layers may be parametrized in place; `end` makes them plain again.
        """
        return []

    def end(self, model: "nn.Module") -> str | None:
        """Called after training: leave no parametrization behind. What to tell the user about how it went."""
        return None

    def finish(
        self, model: "nn.Module", channels: "Channels", budget: "Budget", moments: "Mapping[str, Moments] | None"
    ) -> list[Edit]:
        """Edits to make after training, or right after those of `start` where there is none."""
        return []

    def mended(self) -> "Mapping[str, Tensor]":
        """Better values of parameters and buffers after the edits of `finish`, without images; taken if the outputs gain."""
        return {}

    def attach(self, model: "nn.Module", edits: Sequence[Edit]) -> None:
        """Get ready to train a network that the method made by these edits, some of which others may have undone."""

    def parameter_groups(self, model: "nn.Module") -> list[dict[str, Any]] | None:
        """Groups for the optimizer; None for one group of all that trains.

        Learning rates are multiples of that of all else: "rate", and with plain gradient steps (sgd) times "pace".
        """
        return None

    def regularise(self, model: "nn.Module", progress: Progress) -> None:
        """Add to the gradients, after backward."""

    def project(self, model: "nn.Module", progress: Progress) -> None:
        """Change the weights, after the optimizer's step."""

    def done(self, model: "nn.Module") -> bool:
        """Whether the search may end before its last epoch; asked after each."""
        return False

    def state_dict(self) -> dict[str, "Tensor"]:
        """What the method must remember while training."""
        return {}

    def load_state_dict(self, state: Mapping[str, "Tensor"]) -> None:
        """Take back what `state_dict` gave."""


def names() -> list[str]:
    """The methods there are, by their files; nothing is imported."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def summary(name: str) -> str:
    """The first line of the method's docstring; nothing is imported."""
    source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def get(name: str) -> type[Method]:
    """The method's class. Raises UsageError with the near matches for a name that does not exist."""
    if name not in names():
        near = get_close_matches(name, names(), 1)
        raise UsageError(f"no method {name!r}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(names())}"))
    module = import_module(f"{__name__}.{name}")
    for value in vars(module).values():
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__:
            return value
    raise CompactError(f"the method file {name}.py holds no Method")


def recognise(tensors: "Mapping[str, Tensor]") -> Foreign | None:
    """The network in a file of some method's authors; None for any other file.

    Raises CompactError where a file is one of theirs and does not hold together.
    """
    return next((foreign for name in names() if (foreign := get(name).recognise(tensors))), None)


def attached(recipe: Recipe, model: "nn.Module") -> list[Method]:
    """The hooks of the methods that made a network, to train it further."""
    hooks: list[Method] = []
    later: set[str] = set()  # modules that later steps put something else in the place of
    for step in reversed(recipe.steps):
        own = [edit for edit in step.edits if not (isinstance(edit, Replace) and edit.module in later)]
        if step.method is not None and step.method not in names():
            raise CompactError(
                f"the recipe has a step of the unknown method {brief(repr(step.method))}; it needs a newer compactcli"
            )
        if step.method is not None and (own or not step.edits):  # else nothing of what it made is left
            hooks.insert(0, _recorded(get(step.method), step.options))
            hooks[0].attach(model, own)
        later |= {edit.module for edit in step.edits if isinstance(edit, Replace)}
    return hooks


def _recorded(method: type[Method], options: Mapping[str, Any]) -> Method:
    """The method with the options that a file tells of, as far as it knows them."""
    known = {option.name: option for option in option_list(method)}
    for name, value in options.items():
        if name in known and not _fits(known[name], value):
            raise CompactError(f"the recipe has an option that {method.__name__} does not take: {name}={brief(repr(value))}")
    try:
        return method(method.Options(**{name: value for name, value in options.items() if name in known}))
    except (TypeError, ValueError) as problem:
        raise CompactError(f"the recipe has an option that {method.__name__} does not take: {brief(str(problem))}") from None


def register_layers(layers: Sequence[str]) -> None:
    """Import what the layer kinds of a recipe come from: the methods ("method.kind"), `plain` and `folding`."""
    for source in {layer.partition(".")[0] for layer in layers}:
        if source in names():
            get(source)
        elif source in ("plain", "folding"):
            import_module(f"..{source}", __name__)


@dataclass(frozen=True)
class Option:
    """One field of a method's options, as the command line shows it."""

    name: str
    kind: type | tuple[str, ...]  # a tuple lists the allowed words
    default: Any
    help: str


def _fits(option: Option, value: Any) -> bool:
    """Whether a value is of the option's kind."""
    if isinstance(option.kind, tuple):
        return value in option.kind
    kinds = (int, float) if option.kind is float else option.kind
    return isinstance(value, kinds) and (option.kind is bool or not isinstance(value, bool))


def option_list(method: type[Method]) -> list[Option]:
    """The options of a method, read off its dataclass."""
    hints = get_type_hints(method.Options, include_extras=True)
    result = []
    for item in fields(method.Options):
        hint, text = hints[item.name], ""
        if get_origin(hint) is Annotated:
            hint, text = get_args(hint)[0], hint.__metadata__[0]
        kind = get_args(hint) if get_origin(hint) is Literal else hint
        result.append(Option(item.name, kind, None if item.default is MISSING else item.default, text))
    return result


def parse_options(method: type[Method], pairs: Sequence[str]) -> Any:
    """The options dataclass from `name=value` strings.

    Raises UsageError for a string without "=", a name that is not an option, a value of the wrong kind.
    """
    known = {option.name: option for option in option_list(method)}
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"--set {pair}: give it as name=value")
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise UsageError(
                f"--set {name}: no such option; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")
            )
        values[name] = _value(known[name], text)
    try:
        return method.Options(**{**method.presets.get(values.get("preset", ""), {}), **values})
    except ValueError as problem:
        raise UsageError(f"--set {problem}") from None


def _value(option: Option, text: str) -> Any:
    if isinstance(option.kind, tuple):
        if text not in option.kind:
            raise UsageError(f"--set {option.name}={text}: it is one of {', '.join(option.kind)}")
        return text
    if option.kind is bool:
        if text not in ("true", "false"):
            raise UsageError(f"--set {option.name}={text}: it is true or false")
        return text == "true"
    try:
        number = option.kind(text)
    except ValueError:
        raise UsageError(f"--set {option.name}={text}: it is a number") from None
    if isinstance(number, int | float) and not -LARGEST <= number <= LARGEST:
        raise UsageError(f"--set {option.name}={text}: it is a number of at most {LARGEST:,}")
    return number
