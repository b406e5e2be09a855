"""Tables on a terminal of whatever width: words and numbers are never broken."""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Column, Table

UNBOUNDED = 10_000  # characters: more than any line of a table has
FEW_ROWS = 12  # up to which a table may be shown row by row
LESSER = ("weight", "mean corr", "eff. rank", "free sets", "parameters kept")  # columns that may be left out, least first


def fitting(renderable: RenderableType, console: Console) -> RenderableType:
    """The same, of a width at which no word and no number is broken; a table that is too wide for that row by row, or, of many
    rows, without columns that say less.
    """
    if isinstance(renderable, Group):
        return Group(*(fitting(each, console) for each in renderable.renderables))
    if not isinstance(renderable, Table) or not renderable.show_header:
        return renderable
    wide = console.options.update(max_width=UNBOUNDED)

    def sizes(column: Column) -> Measurement:
        found = [Measurement.get(console, wide, cell) for cell in (column.header, *column.cells)]
        return Measurement(max(each.minimum for each in found), max(each.maximum for each in found))

    measured = {id(column): sizes(column) for column in renderable.columns}

    def room(columns: Sequence[Column]) -> int:
        """What is left beside lines, and a space on either side of each column, if each is as narrow as it may be."""
        return console.width - 1 - sum(3 + measured[id(column)].minimum for column in columns)

    shown, dropped = list(renderable.columns), []
    for lesser in [column for header in LESSER for column in shown if column.header == header]:
        if room(shown) < 0 and renderable.row_count > FEW_ROWS:
            dropped.append(str(lesser.header))
            shown.remove(lesser)
    if room(shown) < 0:
        return _blocks(renderable)
    if dropped:
        renderable.columns = shown
        renderable.caption = f"{renderable.caption or ''}\nleft out, for want of width: {', '.join(dropped)}".strip()
    own, spare = [measured[id(column)] for column in shown], room(shown)
    wanted = sum(each.span for each in own)
    if wanted > spare:
        for column, each in zip(shown, own, strict=True):
            column.width = each.minimum + spare * each.span // wanted
    return renderable


def _blocks(table: Table) -> Table:
    """Row after row, what a table has in each of its columns."""
    result = Table(title=table.title, caption=table.caption, title_justify="left", caption_justify="left", show_header=False)
    result.add_column(overflow="fold")
    result.add_column(overflow="fold")
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        for column, cell in zip(table.columns, cells, strict=True):
            result.add_row(column.header, cell)
        result.add_section()
    return result
