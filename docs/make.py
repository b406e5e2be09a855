"""Make docs/cli.md from --help, the tables of results, and the README's pictures from real runs: `make docs`."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).parent
MODEL = "examples/digits-resnet20.pt"
WIDTH = 130
PICTURES = {
    "analyze": f"compactcli analyze {MODEL}",
    "compress": f"compactcli compress {MODEL} --method hinge --ratio 0.5 --data digits -o small.safetensors",
    "report": f"compactcli report small.safetensors --baseline {MODEL} --data digits",
}


def command_line() -> str:
    """Every command's --help as Markdown, as Typer writes it."""
    documented = [sys.executable, "-m", "typer", "compactcli.cli", "utils", "docs", "--name", "compactcli"]
    return subprocess.run(documented, capture_output=True, text=True, check=True).stdout


def picture(name: str, command: str, folder: Path) -> str:
    """What a terminal shows after the command, as SVG."""
    colours = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", *command.split()]
    ended = subprocess.run(run, cwd=folder, env=colours, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Text.from_ansi(f"$ {command}\n{ended.stdout.rstrip()}"))
    return console.export_svg(title="compactcli", unique_id=name)


def main() -> None:
    """Write them all."""
    (DOCS / "cli.md").write_text(command_line())
    subprocess.run([sys.executable, "-m", "benchmarks", "tables"], cwd=DOCS.parent, check=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "examples").symlink_to(DOCS.parent / "examples")
        for name, command in PICTURES.items():
            (DOCS / f"{name}.svg").write_text(picture(name, command, Path(folder)))


if __name__ == "__main__":
    main()
