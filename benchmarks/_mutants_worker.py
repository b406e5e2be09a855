"""Runs tests on copies of the repository, each in a fork of a process that has the libraries: `mutants` starts it.

A line of JSON on stdin names a folder, test files and a limit in seconds; one on stdout tells how it ended and which test failed.
The package itself must not be imported here: every fork imports its own.
"""

import json
import os
import re
import resource
import signal
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

LIBRARIES = ("torch", "torch.fx.experimental.proxy_tensor", "numpy", "pytest", "safetensors.torch", "rich.console")
MEMORY = 12 << 30  # bytes of addresses


def main() -> None:
    """Serve until stdin ends."""
    for name in LIBRARIES:
        import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        job = json.loads(line)
        folder, start = Path(job["folder"]), time.perf_counter()
        for tests in job["tests"]:  # a fork for each, for none of them is collected in vain
            answer = _ended(folder, tests, job["seconds"] - (time.perf_counter() - start))
            if answer["ended"] != "passed":
                break
        print(json.dumps({**answer, "seconds": round(time.perf_counter() - start, 1)}), file=answers, flush=True)


def _ended(folder: Path, tests: str, seconds: float) -> dict[str, str | None]:
    """How the tests of a file end, and the first that fails."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _run(folder, tests, log)
    ended = _wait(child, seconds)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", log.read_text(errors="replace"), re.M) if log.exists() else None
    return {"ended": ended, "test": failed and failed[1]}


def _run(folder: Path, tests: str, log: Path) -> None:
    """The tests, up to the first that fails; ends the process with pytest's exit code."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target, 2)
    code = 3
    try:
        code = int(import_module("pytest").main(["-x", "-q", "-p", "no:cacheprovider", tests]))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(child: int, seconds: float) -> str:
    """How the child ended: passed, failed, or too late."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return "passed" if status == 0 else "failed"
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "late"


if __name__ == "__main__":
    main()
