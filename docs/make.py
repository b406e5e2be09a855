"""Make docs/cli.md from --help, the tables of results, and the README's pictures from real runs: `make docs`."""

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).parent
MODEL = "examples/digits-resnet20.pt"
FORMAT = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)  # the reader's own fonts: nothing is fetched
COMPRESS = f"compactcli compress {MODEL} --method hinge --ratio 0.5 --data digits -o small.safetensors"
PICTURES = {
    "analyze": f"compactcli analyze {MODEL} --quiet",
    "report": f"compactcli report small.safetensors --baseline {MODEL} --data digits",
}


def command_line() -> str:
    """Every command's --help as Markdown, as Typer writes it."""
    documented = [sys.executable, "-m", "typer", "compactcli.cli", "utils", "docs", "--name", "compactcli"]
    return subprocess.run(documented, capture_output=True, text=True, check=True).stdout


def shown(command: str, folder: Path) -> str:
    """What a terminal shows after the command."""
    colours = {**os.environ, "FORCE_COLOR": "1", "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", *command.split()]
    both: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(run, cwd=folder, env=colours, text=True, check=True, **both).stdout


def picture(name: str, command: str, folder: Path) -> str:
    """The command and what it shows, as SVG."""
    text = Text.from_ansi(f"$ {command}\n{shown(command, folder).rstrip()}")
    console = Console(record=True, width=max(len(line.rstrip()) for line in text.plain.splitlines()), file=io.StringIO())
    console.print(Text("\n").join([line[: console.width] for line in text.split()]))
    svg = console.export_svg(title="compactcli", unique_id=name, code_format=FORMAT)
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)


def main() -> None:
    """Write them all."""
    (DOCS / "cli.md").write_text(command_line())
    subprocess.run([sys.executable, "-m", "benchmarks", "tables"], cwd=DOCS.parent, check=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "examples").symlink_to(DOCS.parent / "examples")
        shown(COMPRESS, Path(folder))
        for name, command in PICTURES.items():
            (DOCS / f"{name}.svg").write_text(picture(name, command, Path(folder)))


if __name__ == "__main__":
    main()
