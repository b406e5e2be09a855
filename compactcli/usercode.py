"""Code of the user's own, which runs because the command line names it; never what a file names."""

import contextlib
import importlib
import importlib.machinery
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import CompactError, brief
from .vision import cured


def named(spec: str) -> Any:
    """What `file.py:name` or `package.module:name` names.

    Raises CompactError, with the user's own error as its cause, where there is no such thing or importing it fails.
    """
    source, _, name = spec.rpartition(":")
    module = _module(source, spec)
    if not hasattr(module, name):
        raise CompactError(f"there is no {name!r} in {source}")
    return getattr(module, name)


def called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the user's function returns; where its first import of torchvision fails for a foreign torch, in a second call."""
    return cured(lambda: function(*args, **kwargs))


def _module(source: str, spec: str) -> ModuleType:
    if source.endswith(".py") and not Path(source).is_file():
        raise CompactError(f"there is no file {source}")
    try:
        return cured(lambda: _imported(source))
    except Exception as problem:  # the user's own code
        said = brief(f"{type(problem).__name__}: {problem}")
        raise CompactError(f"cannot load {spec}: {said}; it must be file.py:name or package.module:name") from problem


def _imported(source: str) -> ModuleType:
    """The module, with what lies beside the file, or in the working folder, to import from behind all that is installed."""
    path = Path(source).resolve()
    beside = str(path.parent if source.endswith(".py") else Path.cwd())
    if beside not in sys.path:
        sys.path.append(beside)  # for good: a function may import when it is called
    if not source.endswith(".py"):
        return importlib.import_module(source)
    loader = importlib.machinery.SourceFileLoader(f"compactcli_user.{path}", str(path))
    module = ModuleType(loader.name)
    module.__file__ = str(path)
    sys.modules[loader.name] = module  # where dataclasses look for the names in annotations
    try:
        loader.exec_module(module)
    except BaseException:
        with contextlib.suppress(KeyError):
            del sys.modules[loader.name]
        raise
    return module
