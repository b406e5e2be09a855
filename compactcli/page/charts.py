"""Charts as inline SVG that stretches with the page: a column for each layer or epoch, and points with their front.

What lies along the horizontal axis is one unit wide in the drawing. A column that covers its whole height tells its values by its
label, on hover and, with the arrow keys, on focus.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from .markup import Markup, join, tag

HEIGHT = 100.0  # of every drawing
LEAST, MOST = 1e-290, 1e290  # of what a scale tells apart, and reaches
SHORT = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"))


@dataclass(frozen=True)
class Series:
    """A line of a chart: its name, a value for each column, and whether it is dashed."""

    name: str
    values: Sequence[float | None]
    dashed: bool = False


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot: what stands in it, what it tells, and whether no other beats it."""

    name: str
    label: str
    x: float
    y: float
    optimal: bool


def short(value: float) -> str:
    """A number in three or four digits, e.g. 853 k."""
    size, unit = next(((size, unit) for size, unit in SHORT if abs(value) >= size), (1.0, ""))
    scaled = value / size
    text = f"{scaled:.{0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + unit


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover low to high, about as many as wanted; nothing beyond MOST."""
    low, high = min(max(low, -MOST), MOST), min(max(high, -MOST), MOST)
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, LEAST):
        room = (size if size > LEAST else 1) / 20
        low, high = low - room, high + room
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 2.5, 5, 10) if power * each >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * number for number in range(first, last + 1)]


def bars(name: str, labels: Sequence[str], before: Sequence[float], after: Sequence[float]) -> Markup:
    """For each label a wide, hollow bar with what was, and a narrow, full one in it with what is."""
    marks = ticks(0, max([*before, *after, 1]))
    height = [[HEIGHT * value / marks[-1] for value in values] for values in (before, after)]
    wide = (_bar("before", number + 0.08, 0.84, tall) for number, tall in enumerate(height[0]))
    narrow = (_bar("after", number + 0.24, 0.52, tall) for number, tall in enumerate(height[1]))
    return _frame(name, labels, marks, [*wide, *narrow])


def heat(name: str, labels: Sequence[str], columns: Sequence[Sequence[float] | None], ends: tuple[str, str]) -> Markup:
    """For each label a column of fields, the stronger the nearer to 1 a level is; None leaves it empty.

    `ends` says what is at the top and at the bottom.
    """
    fields: list[Markup] = []
    for number, levels in enumerate(columns):
        for row, level in enumerate(levels or ()):
            tall = HEIGHT / len(levels or ())
            place = {"x": number + 0.04, "y": row * tall, "width": 0.92, "height": tall}
            fields.append(tag("rect", class_="heat", fill_opacity=round(min(max(level, 0), 1), 2), **place))
    return _frame(name, labels, [], fields, zip((0, HEIGHT), ends, strict=True))


def lines(name: str, labels: Sequence[str], series: Sequence[Series], starts: Sequence[int] = ()) -> Markup:
    """The series over the labels, a gap where a value is None; a line where a stage starts that is not the first."""
    known = [value for each in series for value in each.values if value is not None] or [0.0]
    marks = ticks(min(known), max(known))
    drawn = [tag("line", class_="stage", x1=start, x2=start, y1=0, y2=HEIGHT) for start in starts]
    for each in series:
        points = [(None if value is None else _height(value, marks)) for value in each.values]
        path = "".join(
            f"{'L' if number and points[number - 1] is not None else 'M'}{number + 0.5:g} {point:.2f}"
            for number, point in enumerate(points)
            if point is not None
        )
        dots = "".join(f"M{number + 0.5:g} {point:.2f}h0" for number, point in enumerate(points) if point is not None)
        kind = " dashed" if each.dashed else ""
        drawn += [tag("path", class_=f"curve{kind}", d=path), tag("path", class_=f"dots{kind}", d=dots)]
    return _frame(name, labels, marks, drawn)


def scatter(name: str, points: Sequence[Point]) -> Markup:
    """Points, full where no other beats them and joined by their front, hollow and dashed elsewhere; equal ones are one."""
    across, up = ticks(*_span(point.x for point in points), 3), ticks(*_span(point.y for point in points))
    front = sorted({(point.x, point.y) for point in points if point.optimal})
    path = "".join(
        f"{'L' if number else 'M'}{100 * _share(x, across):.2f} {_height(y, up):.2f}" for number, (x, y) in enumerate(front)
    )
    places: dict[tuple[float, float], list[Point]] = {}
    for point in points:
        places.setdefault((point.x, point.y), []).append(point)
    dots = [
        tag(
            "span",
            " ".join(point.name for point in there),
            class_="point best" if there[0].optimal else "point",
            tabindex=-1 if number else 0,
            role="img",
            aria_label="\n".join(point.label for point in there),
            style=f"left:{100 * _share(x, across):.2f}%;top:{_height(y, up):.2f}%",
        )
        for number, ((x, y), there) in enumerate(places.items())
    ]
    below = (tag("span", short(mark), style=f"left:{100 * _share(mark, across):.2f}%") for mark in across)
    drawing = tag(
        "svg", *_grid(up, 100), tag("path", class_="curve", d=path), viewBox="0 0 100 100", preserveAspectRatio="none",
        aria_hidden="true",
    )  # fmt: skip
    plane = tag("div", drawing, *dots, class_="plane marks", role="group", aria_label=f"{name}; arrow keys move")
    return join([tag("div", _scale(up), plane, class_="frame"), tag("div", *below, class_="across", aria_hidden="true")])


def groups(names: Iterable[str]) -> Markup:
    """The parts of a network under the columns of its layers: a field for each run of names that begin alike."""
    runs = [(part, len(list(run))) for part, run in groupby(name.partition(".")[0] for name in names)]
    room = sum(count for _, count in runs) / 25  # narrower ones would show a letter or two
    return _under((part if count > room else "", count) for part, count in runs)


def numbers(labels: Sequence[str]) -> Markup:
    """The labels under their columns, as many as there is room for."""
    every = math.ceil(len(labels) / 12)
    return _under((label if number % every == 0 else "", 1) for number, label in enumerate(labels))


def legend(*entries: tuple[str, str]) -> Markup:
    """What is drawn how: (class of the sample, its meaning)."""
    return tag("p", *(tag("span", tag("i", class_=kind), text) for kind, text in entries), class_="legend")


def kept(share: float) -> Markup:
    """A share as a bar."""
    width = min(max(share, 0), 1)
    return tag(
        "svg", tag("rect", class_="whole", width=1, height=1), tag("rect", class_="part", width=width, height=1),
        viewBox="0 0 1 1", preserveAspectRatio="none", class_="kept", aria_hidden="true",
    )  # fmt: skip


def _under(parts: Iterable[tuple[str, int]]) -> Markup:
    cells = (tag("span", tag("b", text), style=f"flex:{width}") for text, width in parts)
    return tag("div", *cells, class_="under", aria_hidden="true")


def _frame(
    name: str,
    labels: Sequence[str],
    marks: Sequence[float],
    drawn: Sequence[Markup],
    ends: Iterable[tuple[float, str]] = (),
) -> Markup:
    """A drawing with a scale at its left, and over it the columns that tell the values."""
    columns = [
        tag(
            "rect",
            class_="hit",
            x=number,
            y=0,
            width=1,
            height=HEIGHT,
            role="img",
            tabindex=-1 if number else 0,
            aria_label=label,
        )
        for number, label in enumerate(labels)
    ]
    drawing = tag(
        "svg", *_grid(marks, len(labels)), *drawn, *columns, viewBox=f"0 0 {len(labels)} 100", preserveAspectRatio="none",
        class_="marks", role="group", aria_label=f"{name}; arrow keys move",
    )  # fmt: skip
    return tag("div", _scale(marks, ends), tag("div", drawing, class_="plane"), class_="frame")


def _grid(marks: Sequence[float], width: float) -> list[Markup]:
    return [tag("line", class_="grid", x1=0, x2=width, y1=_height(mark, marks), y2=_height(mark, marks)) for mark in marks]


def _scale(marks: Sequence[float], ends: Iterable[tuple[float, str]] = ()) -> Markup:
    places = [*((_height(mark, marks), short(mark)) for mark in marks), *ends]
    texts = (tag("span", text, style=f"top:{place:.2f}%") for place, text in places)
    return tag("div", *texts, class_="scale", aria_hidden="true")


def _bar(kind: str, left: float, width: float, height: float) -> Markup:
    return tag("rect", class_=kind, x=left, y=HEIGHT - height, width=width, height=height)


def _height(value: float, marks: Sequence[float]) -> float:
    """Where a value lies between the first mark, at the bottom, and the last."""
    return HEIGHT * (1 - _share(value, marks))


def _share(value: float, marks: Sequence[float]) -> float:
    value = min(max(value, marks[0]), marks[-1])
    return (value - marks[0]) / (marks[-1] - marks[0])


def _span(values: Iterable[float]) -> tuple[float, float]:
    """From the least to the largest value, with some room."""
    known = list(values)
    room = (max(known) - min(known)) / 12
    return min(known) - room, max(known) + room
