"""Bytes in and out: whole files or none, models on stdout only into a pipe, text for people on stderr."""

import contextlib
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import CompactError, UsageError

ENDINGS = frozenset({".pt", ".pth", ".th", ".t7", ".bin", ".ckpt", ".tar", ".safetensors"})  # of models, in their names


def model_source(given: str | None) -> str:
    """Where a command reads its model: what was given, else "-" for stdin.

    Raises UsageError if nothing was given and stdin is a terminal.
    """
    if given is None and sys.stdin.isatty():
        raise UsageError("no model: give a file, or pipe one in")
    if given == "":
        raise UsageError("the model's name is empty (is a variable unset?); give a file")
    return given or "-"


def piped() -> bool:
    """Whether there is something on stdin, which is waited for; not where that is a terminal."""
    return not sys.stdin.isatty() and bool(sys.stdin.buffer.peek(1))  # type: ignore[union-attr]  # a BufferedReader


def model_target(output: str | None, source: str, suffix: str, ending: str = ".safetensors") -> str:
    """Where a command writes its model: a path, or "-" for stdout.

    `suffix` and `ending` name the file made beside the working folder's others where stdout is a terminal.
    Raises UsageError if there is nothing to name it after, and CompactError if the folder is missing.
    """
    if output == "":
        raise UsageError("-o: the file's name is empty (is a variable unset?); give one")
    if output is None and not sys.stdout.isatty():
        return "-"
    if output is None and source == "-":
        raise UsageError("give -o FILE: a model does not go to a terminal")
    if output == "-" and sys.stdout.isatty():
        raise UsageError("a model does not go to a terminal; give -o FILE or a pipe")
    target = output or f"{_bare(source)}.{suffix}{ending}"
    if target != "-":
        check_folder(target)
    return target


def _bare(source: str) -> str:
    """A model's name without its folder and its ending."""
    path = Path(Path(source).name)
    return path.stem if path.suffix.lower() in ENDINGS else path.name


def check_folder(target: str) -> None:
    """Raise CompactError unless a file can be made at the path: better before the work than after."""
    folder = Path(target).resolve().parent
    if not folder.is_dir():
        raise CompactError(f"{target}: the folder {folder.name!r} does not exist; make it, or write elsewhere")
    if Path(target).is_dir():
        raise CompactError(f"{target}: is a folder; give a file")
    if passes_on(Path(target)):
        return
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        reason = (problem.strerror or str(problem)).lower()
        raise CompactError(f"{target}: the folder {folder.name!r} cannot be written to ({reason}); write elsewhere") from None


def write(data: bytes, target: str) -> None:
    """Write the bytes to stdout ("-") or to a file, which appears whole or not at all: the one that a link points to.

    What passes bytes on (a named pipe, a device) is written to as it is.
    Raises CompactError where the disk is full, a limit is met or writing is not allowed.
    """
    if target == "-":
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except OSError as problem:
            raise CompactError(f"stdout: {(problem.strerror or str(problem)).lower()}") from None
        return
    if passes_on(Path(target)):
        descriptor = opened(target)
        try:
            give(data, descriptor, target)
        finally:
            os.close(descriptor)
        return
    path = Path(os.path.realpath(target))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor, named = _created(temporary)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(descriptor, path.stat().st_mode & 0o777)
            if not named:
                os.link(f"/proc/self/fd/{descriptor}", temporary, src_dir_fd=descriptor)  # which makes it follow the link
        temporary.replace(path)
    except OSError as problem:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CompactError(f"{target}: {(problem.strerror or str(problem)).lower()}; nothing was written") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def passes_on(path: Path) -> bool:
    """Whether there is something at the path that is neither a file nor a folder."""
    return path.exists() and not (path.is_file() or path.is_dir())


def opened(path: str) -> int:
    """A descriptor of what passes bytes on. Raises CompactError where it may not be written to."""
    with _told(path):
        return os.open(path, os.O_WRONLY)


def give(data: bytes, descriptor: int, path: str) -> None:
    """Write all the bytes to what was opened. Raises CompactError where that fails."""
    with _told(path):
        while data:
            data = data[os.write(descriptor, data) :]


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
    """What the system says of writing, as a CompactError."""
    try:
        yield
    except OSError as problem:
        raise CompactError(f"{path}: {(problem.strerror or str(problem)).lower()}") from None


def _created(temporary: Path) -> tuple[int, bool]:
    """(a new file to write to, whether it has that name): none where it need not, so that a kill leaves nothing behind."""
    if hasattr(os, "O_TMPFILE") and Path("/proc/self/fd").is_dir():
        with contextlib.suppress(OSError):  # not every file system has such files
            return os.open(temporary.parent, os.O_TMPFILE | os.O_WRONLY, 0o666), False
    return os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), True
