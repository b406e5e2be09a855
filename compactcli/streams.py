"""Bytes in and out: whole files or none, models on stdout only into a pipe, text for people on stderr."""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

from .errors import CompactError, UsageError


def model_source(given: str | None) -> str:
    """Where a command reads its model: what was given, else "-" for stdin.

    Raises UsageError if nothing was given and stdin is a terminal.
    """
    if given is None and sys.stdin.isatty():
        raise UsageError("no model: give a file, or pipe one in")
    return given or "-"


def model_target(output: str | None, source: str, suffix: str, ending: str = ".safetensors") -> str:
    """Where a command writes its model: a path, or "-" for stdout.

    `suffix` and `ending` name the file made beside the working folder's others where stdout is a terminal.
    Raises UsageError if there is nothing to name it after, and CompactError if the folder is missing.
    """
    if output is None and not sys.stdout.isatty():
        return "-"
    if output is None and source == "-":
        raise UsageError("give -o FILE: a model does not go to a terminal")
    if output == "-" and sys.stdout.isatty():
        raise UsageError("a model does not go to a terminal; give -o FILE or a pipe")
    target = output or f"{Path(source).name.split('.')[0]}.{suffix}{ending}"
    if output is None and Path(target).resolve() == Path(source).resolve():
        target = f"{Path(source).stem}.{suffix}{ending}"  # a command never overwrites what it reads unasked
    if target != "-":
        check_folder(target)
    return target


def check_folder(target: str) -> None:
    """Raise CompactError unless a file can be made at the path: better before the work than after."""
    folder = Path(target).resolve().parent
    if not folder.is_dir():
        raise CompactError(f"{target}: the folder {folder.name!r} does not exist; make it, or write elsewhere")
    if Path(target).is_dir():
        raise CompactError(f"{target}: is a folder; give a file")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        reason = (problem.strerror or str(problem)).lower()
        raise CompactError(f"{target}: the folder {folder.name!r} cannot be written to ({reason}); write elsewhere") from None


def write(data: bytes, target: str) -> None:
    """Write the bytes to stdout ("-") or to a file, which appears whole or not at all.

    Raises CompactError where the disk is full, a limit is met or writing is not allowed.
    """
    if target == "-":
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except OSError as problem:
            raise CompactError(f"stdout: {(problem.strerror or str(problem)).lower()}") from None
        return
    path = Path(target)
    temporary = None
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mode = 0o666 & ~_umask()
        with contextlib.suppress(FileNotFoundError):
            mode = path.stat().st_mode
        temporary.chmod(mode & 0o777)
        temporary.replace(path)
    except OSError as problem:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise CompactError(f"{target}: {(problem.strerror or str(problem)).lower()}; nothing was written") from None
    except BaseException:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
