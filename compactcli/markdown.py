"""Reports and comparisons as Markdown, to paste into a model card."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from . import __version__, compare, tables
from .errors import printable

LEFT = {"", "network", "Pareto for", "command"}  # headings of words; under the others are figures


def report_markdown(tree: Mapping[str, Any]) -> str:
    """A report: the measures, and the history."""
    parts = [f"### {_text(tables.title(tree['model']))}", _table(tables.HEADINGS, tables.summary_rows(tree))]
    judged = tables.judged_by(tree["model"], tree["baseline"])
    if judged:
        parts.append(_text(judged) + ".")
    if tree["steps"]:
        parts += ["#### History", _table(tables.STEP_HEADINGS, list(map(tables.step_row, tree["steps"])))]
    return "\n\n".join([*parts, f"Measured by compactcli {__version__}."]) + "\n"


def comparison_markdown(tree: Mapping[str, Any]) -> str:
    """A comparison: a row for each network."""
    return "\n\n".join([_table(compare.HEADINGS, compare.rows(tree)), _text(compare.caption(tree)) + "."]) + "\n"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, [":--" if name in LEFT else "--:" for name in headings]]
    cells = [[_text(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *cells])


def _text(value: str) -> str:
    """Words of a file as words of Markdown: one line, with nothing in it that has a meaning there."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$@])", r"\\\1", printable(" ".join(value.split())))
