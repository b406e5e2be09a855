"""The file that an interrupted run goes on from: everything a run holds, as safetensors, whole or not at all.

Random numbers depend on seed, step and process alone, so they need no place in it.
"""

import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from . import streams
from .errors import CompactError, brief
from .methods import Method
from .optim import Average

KEY = "compactcli_run"  # the metadata entry that says where the run stands
VERSION = 2

T = TypeVar("T")


@dataclass(frozen=True)
class Store:
    """Where a run is kept, and what it must be the run of."""

    path: Path
    identity: Mapping[str, Any]  # JSON; another run's file is refused
    metadata: Mapping[str, str]  # further entries of the file, such as the recipe that makes it self-contained

    def save(self, tensors: Mapping[str, Tensor], standing: Mapping[str, Any]) -> None:
        """Replace the file. Raises CompactError where it cannot be written."""
        text = json.dumps({"version": VERSION, "identity": self.identity, "standing": standing}, sort_keys=True)
        as_stored: Any = {"copy": True, "memory_format": torch.contiguous_format}  # a copy: names may share a tensor
        plain = {name: tensor.detach().to("cpu", **as_stored) for name, tensor in tensors.items()}
        streams.write(safetensors.torch.save(plain, {**self.metadata, KEY: text}), str(self.path))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `save` was given; None if there is no file.

        Raises CompactError if it is no such file, or of another run, naming the first difference.
        """
        if not self.path.exists():
            return None
        tensors, metadata = read(self.path)
        run = json.loads(metadata[KEY])
        for name, wanted in json.loads(json.dumps(self.identity)).items():
            was = run["identity"].get(name)
            if was != wanted:
                both = f"{name.replace('_', '-')} {_brief(was)}, this one {_brief(wanted)}"
                raise CompactError(
                    f"{self.path.name}: the run there has {both}; give the same flags, or leave --resume out to begin again"
                )
        return tensors, run["standing"]


def _brief(value: Any) -> str:
    """A value for people; of a digest its beginning."""
    text = str(value)
    return text if len(text) < 40 else f"{text[:8]}..."


def check(path: Path) -> dict[str, str]:
    """The metadata of a file that a store wrote; its tensors are not read. Raises CompactError if it is none."""
    return _opened(path, lambda file: None)[1]


def steps_left(path: Path) -> int:
    """How many steps are left of a run that a store wrote there; none without a file. Raises CompactError if it is none."""
    return int(json.loads(check(path)[KEY])["standing"].get("left", 0)) if path.exists() else 0


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file that a store wrote. Raises CompactError if it is none."""
    return _opened(path, lambda file: {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (it is no mapping)


def _opened(path: Path, take: Callable[[Any], T]) -> tuple[T, dict[str, str]]:
    """(what is taken from the open file, its metadata)."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            run = json.loads(metadata.get(KEY, "null"))
            taken = take(file)
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as problem:
        raise CompactError(f"{path.name} cannot be resumed from: {brief(str(problem))}") from None
    parts = [run.get(name) for name in ("identity", "standing")] if isinstance(run, dict) else []
    if not isinstance(run, dict) or run.get("version") != VERSION or not all(isinstance(part, dict) for part in parts):
        raise CompactError(f"{path.name} is not what an interrupted training run left; leave --resume out to begin one")
    return taken, metadata


def pack(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None, hooks: Sequence[Method]
) -> dict[str, Tensor]:
    """Every tensor that training changes, under the name of what it is part of."""
    parts: dict[str, Mapping[str, Any]] = {"model": model.state_dict(), "average": {} if average is None else average.tensors}
    parts |= {f"hook.{number}": hook.state_dict() for number, hook in enumerate(hooks)}
    parts |= {f"optimizer.{number}": state for number, state in optimizer.state_dict()["state"].items()}
    return {f"{part}.{name}": t for part, state in parts.items() for name, t in state.items() if isinstance(t, Tensor)}


def unpack_(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    hooks: Sequence[Method],
) -> None:
    """Put what `pack` gave where it came from: on the same devices, in the same memory formats.

    Raises ValueError, or RuntimeError, where it is of something else.
    """
    model.load_state_dict(under("model", tensors))
    if average is not None:
        averages = under("average", tensors)
        check_shapes(averages, average.tensors)
        for name, tensor in averages.items():
            average.tensors[name].copy_(tensor)
    for number, hook in enumerate(hooks):
        hook.load_state_dict(under(f"hook.{number}", tensors))
    for number, parameter in enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]):
        for name, tensor in under(f"optimizer.{number}", tensors).items():
            alike = tensor.shape == parameter.shape
            if not alike and tensor.ndim:  # else it counts steps
                raise ValueError(f"{name} of a parameter of another shape")
            optimizer.state[parameter][name] = torch.empty_like(parameter.detach()).copy_(tensor) if alike else tensor


def check_shapes(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless both have the same names and shapes."""
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: tensor.shape for name, tensor in own.items()}:
        raise ValueError("weights of another network")


def under(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with that part, without it."""
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


class Interruption:
    """Whether Ctrl-C or SIGTERM came: a run ends at its next step then. The second one ends it at once."""

    def __init__(self) -> None:
        self.came = False

    @contextmanager
    def watched(self) -> Iterator["Interruption"]:
        """Take the signals while the block runs; only the main thread may."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True
