"""Tables at any width: every word and every number is whole, and of few rows all are there."""

import io
import re

import pytest
from rich.console import Console, Group
from rich.table import Table

from compactcli.cli.screen import FEW_ROWS, fitting

WIDTHS = (32, 40, 60, 80, 100, 160)


def table(rows: int) -> Table:
    made = Table("layer", "weight", "MACs", "free sets", "mean corr", "locked", title="networks", caption="of random images")
    for number in range(rows):
        made.add_row(f"layer{number}.conv", "16x16x3x3", f"{1234567 * (number + 1):,}", "16", "0.25", "the network's output")
    return made


def words(width: int, rows: int) -> list[str]:
    stream = io.StringIO()
    console = Console(file=stream, width=width, markup=False, emoji=False)
    console.print(fitting(Group(table(rows), "try: it"), console))
    lines = stream.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    return re.findall(r"[^\s│┃┏┓┗┛└┘┌┐├┤┬┴┼━─╇╈┡┩┳┻╋]+", "\n".join(lines))


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_of_few_rows_is_broken_or_left_out(width):
    whole = [cell for column in table(3).columns for cell in column.cells]
    shown = words(width, 3)
    assert {word for cell in whole for word in str(cell).split()} <= {*shown}
    assert sum(word == "16x16x3x3" for word in shown) == 3
    assert {"networks", "random", "try:"} <= {*shown}


@pytest.mark.parametrize("width", [60, 80, 100])
def test_many_rows_do_without_columns_that_say_less_and_name_them(width):
    rows = FEW_ROWS + 8
    shown = words(width, rows)
    assert {f"{1234567 * (number + 1):,}" for number in range(rows)} <= {*shown}
    assert {f"layer{number}.conv" for number in range(rows)} <= {*shown}
    headers = {column.header for column in table(1).columns}
    assert all({*header.split()} <= {word.rstrip(",") for word in shown} for header in headers)  # as a column or in the caption
    assert ("left" in shown) == (width < 80)


def test_where_that_is_not_enough_nothing_is_left_out():
    shown = words(32, 20)
    assert sum(word == "16x16x3x3" for word in shown) == 20


def test_a_wide_terminal_changes_nothing():
    console = Console(file=io.StringIO(), width=200)
    made = table(20)
    assert fitting(made, console) is made
    assert [column.width for column in made.columns] == [None] * 6
