"""Slow figures: each module is one claim of the README, run as `python -m benchmarks NAME`."""

import ast
import pkgutil
from pathlib import Path


def names() -> list[str]:
    """The benchmarks there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def claim(name: str) -> str:
    """What a benchmark shows: the first line of its docstring, up to the command."""
    docstring = ast.get_docstring(ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")))
    assert docstring is not None
    return docstring.partition("\n")[0].partition(": `")[0]
