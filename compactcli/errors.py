"""Errors a user can cause: one line with what, where, was, wanted, and what to try."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class CompactError(Exception):
    """The input cannot be served. The command line prints the message and exits with `exit_code`."""

    exit_code = 1


class UsageError(CompactError):
    """The command was given wrongly: a flag, an option or a value that does not exist."""

    exit_code = 2


def shape_text(shape: Sequence[int]) -> str:
    """A shape as messages and tables show it, e.g. 3x32x32."""
    text = "x".join(map(str, shape)) or "a single number"
    return text if len(text) <= 100 else f"{text[:99]}…"


def printable(text: str) -> str:
    """Words of a file or of the user with a mark in the place of all that would steer a terminal, or cannot be written."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def short(name: str) -> str:
    """A name from a file, fit for a line of text."""
    return name if name.isprintable() and len(name) <= 80 else f"{name[:60]!r}..."


def brief(text: str) -> str:
    """One line of at most 100 printable characters."""
    line = " ".join(text.split())
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(line) <= 100 else f"{line[:99]}…"


@contextmanager
def damage(part: str, *errors: type[Exception]) -> Iterator[None]:
    """What a parser raises in the block over broken input, as one line. Raises CompactError."""
    caught: tuple[type[Exception], ...] = (ValueError, KeyError, IndexError, EOFError, *errors)
    try:
        yield
    except caught as problem:
        raise CompactError(f"the {part} is damaged or cut short ({brief(str(problem)) or type(problem).__name__})") from None
