"""Files appear whole or not at all; models go to pipes and files, never to terminals."""

import errno
import io
import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from compactcli import streams
from compactcli.errors import CompactError, UsageError

DATA = bytes(range(256)) * 100


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def refused(target: Path | str, message: str, kind: type[CompactError] = CompactError) -> None:
    with pytest.raises(kind, match=message) as caught:
        streams.write(DATA, str(target))
    assert "\n" not in str(caught.value)


@pytest.fixture(params=["unnamed", "named"])
def way(request, monkeypatch):
    """Files are written without a name where the system can, else under one of their own."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return request.param


@pytest.mark.usefixtures("way")
def test_a_file_appears_whole(tmp_path):
    target = tmp_path / "model.safetensors"
    streams.write(DATA, str(target))
    assert target.read_bytes() == DATA
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_new_file_has_the_usual_permissions(tmp_path, mask):
    before = os.umask(mask)
    try:
        streams.write(DATA, str(tmp_path / "model"))
        assert os.umask(mask) == mask  # looked at, not changed
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o666 & ~mask


@pytest.mark.usefixtures("way")
def test_an_existing_file_is_replaced_and_keeps_its_permissions(tmp_path):
    target = tmp_path / "model"
    target.write_bytes(b"old")
    target.chmod(0o640)
    reader = target.open("rb")  # of the file as it was
    streams.write(DATA, str(target))
    assert target.read_bytes() == DATA
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert reader.read() == b"old"
    reader.close()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("call", ["fsync", "replace", "fdopen"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, call, existing):
    target = tmp_path / "model.safetensors"
    if existing:
        target.write_bytes(b"old")

    def full(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((Path, "replace") if call == "replace" else (os, call)), full)
    refused(target, "model.safetensors: no space left on device; nothing was written")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == (["model.safetensors"] if existing else [])
    assert not existing or target.read_bytes() == b"old"


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="this system has no files without a name")
def test_a_kill_would_leave_nothing_behind(tmp_path, monkeypatch):
    """What there is in the folder when all is written, but for the name."""
    seen: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda _descriptor: seen.extend(os.listdir(tmp_path)))
    streams.write(DATA, str(tmp_path / "model"))
    assert seen == []
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.usefixtures("way")
def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        streams.write(DATA, str(tmp_path / "model"))
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_written_is_said_in_one_line(tmp_path):
    refused(tmp_path / "nowhere" / "model", "model: no such file or directory; nothing was written")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "folder: is a directory; nothing was written")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_broken_stdout_is_said_in_one_line(monkeypatch):
    class Full(io.BytesIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Full()))
    refused("-", "stdout: [Nn]o space left on device")


def test_stdout_gets_the_bytes(monkeypatch):
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream))
    streams.write(DATA, "-")
    assert stream.getvalue() == DATA


# Where a command reads and writes


def test_the_source_is_what_was_given_or_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert streams.model_source("net.pt") == "net.pt"
    assert streams.model_source("-") == "-"
    assert streams.model_source(None) == "-"
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert streams.model_source("net.pt") == "net.pt"
    with pytest.raises(UsageError, match="no model: give a file, or pipe one in"):
        streams.model_source(None)


def test_into_a_pipe_without_a_name(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert streams.model_target(None, "net.pt", "hinge-0.5") == "-"
    assert streams.model_target(None, "-", "hinge-0.5") == "-"
    assert streams.model_target("-", "-", "hinge-0.5") == "-"


def test_a_terminal_gets_no_model(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert streams.model_target(None, "folder/net.pt", "hinge-0.5") == "net.hinge-0.5.safetensors"
    assert streams.model_target("out.pt", "-", "tuned") == "out.pt"
    with pytest.raises(UsageError, match="give -o FILE"):
        streams.model_target(None, "-", "tuned")
    with pytest.raises(UsageError, match="give -o FILE or a pipe"):
        streams.model_target("-", "net.pt", "tuned")


def test_names_made_up_are_of_the_whole_input(monkeypatch, tmp_path):
    """Not that of another: of what the first of two commands made for the second, or of what is alike up to a point."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", Terminal())
    first = streams.model_target(None, "net.pt", "hinge-0.5")
    assert first == "net.hinge-0.5.safetensors"
    assert streams.model_target(None, first, "hinge-0.5") == "net.hinge-0.5.hinge-0.5.safetensors"
    assert streams.model_target(None, "folder/run.v1.safetensors", "tuned") == "run.v1.tuned.safetensors"
    assert streams.model_target(None, "folder/run.v1", "tuned") == "run.v1.tuned.safetensors"
    assert streams.model_target(None, "net.PTH", "onnx", "") == "net.onnx"


def test_an_empty_name_is_refused():
    with pytest.raises(UsageError, match="the model's name is empty"):
        streams.model_source("")


@pytest.mark.parametrize(("target", "message"), [("no/model", "the folder 'no' does not exist"), ("made", "made: is a folder")])
def test_a_target_that_cannot_be_is_refused_before_the_work(monkeypatch, tmp_path, target, message):
    monkeypatch.chdir(tmp_path)
    Path("made").mkdir()
    with pytest.raises(CompactError, match=message):
        streams.model_target(target, "net.pt", "tuned")
    assert os.listdir(tmp_path) == ["made"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(CompactError, match="cannot be written to \\(permission denied\\); write elsewhere"):
        streams.check_folder(str(tmp_path / "model"))
    tmp_path.chmod(0o755)


@pytest.mark.usefixtures("way")
def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "model").write_bytes(b"old")
    for name in ("model", "new"):
        (tmp_path / name).symlink_to(tmp_path / "store" / name)
        streams.write(DATA, str(tmp_path / name))
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "store" / name).read_bytes() == DATA


def test_a_named_pipe_passes_the_bytes_on(tmp_path):
    """As a device does (/dev/null), and what the shell's >(command) gives; its folder need not be one to write in."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    streams.check_folder(str(pipe))
    with ThreadPoolExecutor() as pool:
        reader = pool.submit(pipe.read_bytes)
        streams.write(DATA, str(pipe))
        assert reader.result() == DATA
        reader = pool.submit(pipe.read_bytes)
        descriptor = streams.opened(str(pipe))
        streams.give(DATA, descriptor, str(pipe))
        streams.give(DATA, descriptor, str(pipe))
        os.close(descriptor)
        assert reader.result() == DATA * 2
    assert pipe.is_fifo()
    streams.check_folder(os.devnull)
    streams.write(DATA, os.devnull)
    assert Path(os.devnull).is_char_device()
