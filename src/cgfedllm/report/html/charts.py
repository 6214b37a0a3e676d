"""Charts as positions on a small canvas; the template draws them as SVG.

The canvas is as wide as a phone, and CSS chooses every colour and size of text, so that one drawing
serves phone and desktop, light and dark, screen and paper. No series is told by colour alone: each
has dashes of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cgfedllm.report.html.axes import Axis, drawable

WIDTH, HEIGHT = 420, 264
LEFT, RIGHT, TOP, BOTTOM = 60, 22, 30, 44
_MOST_MARKS = 60
_COLOURS, _DASHES = 6, 5

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Parameters
    ----------
    label : str
        In the legend.
    points : sequence of (float, float)
        x and y in the data's units, x ascending.
    steps : bool
        What was reached holds until the next point.
    under : bool
        A broad pale line below the others, for what they are measured against.
    """

    label: str
    points: Points
    steps: bool = False
    under: bool = False


@dataclass(frozen=True)
class Mark:
    """A point with its tooltip."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class DrawnSeries:
    """A series on the canvas; `style` is its CSS classes."""

    label: str
    style: str
    path: str
    marks: list[Mark]


@dataclass(frozen=True)
class Chart:
    """Everything the template needs.

    Parameters
    ----------
    key : str
        Unique in the page; ids are made of it.
    title, note : str
        Above and below the drawing.
    description : str
        What a reader who cannot see it is told.
    x_label, y_label : str
        Of the axes.
    x_ticks, y_ticks : list of (float, str)
        Position on the canvas, and text.
    series : list of DrawnSeries
        Lines.
    bars, flush_bars : str
        Outlines of columns; those of the flush look different.
    levels : list of (float, str)
        Horizontal lines across, and their texts.
    """

    key: str
    title: str
    description: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    series: list[DrawnSeries]
    bars: str = ""
    flush_bars: str = ""
    levels: tuple[tuple[float, str], ...] = ()
    note: str = ""


def style_of(number: int) -> str:
    """CSS classes of the n-th series: thirty look different."""
    return f"c{number % _COLOURS} d{number % _DASHES}"


def line_chart(
    key: str,
    title: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    *,
    levels: Sequence[tuple[float, str]] = (),
    note: str = "",
) -> Chart:
    """Lines through points; where they are few, each has a dot and a tooltip.

    Parameters
    ----------
    key, title, note : str
        As in `Chart`.
    x, y : Axis
        Scales.
    series : sequence of Series
        At least one point each.
    levels : sequence of (float, str)
        Values of y that stand for themselves, such as a budget.
    """
    drawn = [
        DrawnSeries(
            each.label,
            "under" if each.under else style_of(number),
            _path(each, x, y),
            _marks(each, x, y, len(series) > 1),
        )
        for number, each in enumerate(series)
    ]
    told = [_told(each, x, y) for each in series]
    told += [f"{text}: {y.say(value)}." for value, text in levels]
    return _chart(
        key, title, " ".join(told), x, y, drawn, note=note,
        levels=tuple((_y(y, value), text) for value, text in levels),
    )  # fmt: skip


def column_chart(
    key: str, title: str, x: Axis, y: Axis, points: Points, *, flush: Sequence[float] = ()
) -> Chart:
    """One column a round.

    Parameters
    ----------
    key, title : str
        As in `Chart`.
    x, y : Axis
        Scales; y begins at 0.
    points : sequence of (float, float)
        Round and height.
    flush : sequence of float
        Rounds in which nobody trained.
    """
    # half a column of room at either end
    wide = Axis(x.label, x.low - 0.6, x.high + 0.6, x.ticks, x.say)
    plain = [point for point in points if point[0] not in flush]
    last = [point for point in points if point[0] in flush]
    return _chart(
        key,
        title,
        _told(Series(title, points), x, y),
        wide,
        y,
        [],
        bars=_columns(plain, wide, y),
        flush_bars=_columns(last, wide, y),
        note="The paler column is the flush: nobody trains in it."
        if any(height for _, height in last)
        else "",
    )


def points_of(values: Sequence[tuple[float, float | None]]) -> list[tuple[float, float]]:
    """The pairs that can be drawn."""
    return [(x, y) for x, y in values if y is not None and drawable(x) and drawable(y)]


def _chart(
    key: str,
    title: str,
    description: str,
    x: Axis,
    y: Axis,
    series: list[DrawnSeries],
    *,
    bars: str = "",
    flush_bars: str = "",
    levels: tuple[tuple[float, str], ...] = (),
    note: str = "",
) -> Chart:
    return Chart(
        key, title, description, x.label, y.label,
        [(_x(x, value), text) for value, text in x.ticks],
        [(_y(y, value), text) for value, text in y.ticks],
        series, bars, flush_bars, levels, note,
    )  # fmt: skip


def _x(axis: Axis, value: float) -> float:
    return round(LEFT + axis.at(value) * (WIDTH - LEFT - RIGHT), 1)


def _y(axis: Axis, value: float) -> float:
    return round(HEIGHT - BOTTOM - axis.at(value) * (HEIGHT - TOP - BOTTOM), 1)


def _path(series: Series, x: Axis, y: Axis) -> str:
    placed = [(_x(x, a), _y(y, b)) for a, b in series.points]
    path = f"M{placed[0][0]:g} {placed[0][1]:g}"
    for (_, before), (right, here) in pairwise(placed):
        if series.steps:
            path += f"L{right:g} {before:g}"
        path += f"L{right:g} {here:g}"
    return path


def _marks(series: Series, x: Axis, y: Axis, named: bool) -> list[Mark]:
    if series.under or len(series.points) > _MOST_MARKS:
        return []
    whose = f"{series.label}, " if named else ""
    return [Mark(_x(x, a), _y(y, b), f"{whose}{x.say(a)}: {y.say(b)}") for a, b in series.points]


def _columns(points: Points, x: Axis, y: Axis) -> str:
    half = max(0.2, 0.35 * (_x(x, 1.0) - _x(x, 0.0)))
    floor = _y(y, 0.0)
    return "".join(
        f"M{_x(x, a) - half:.2f} {floor:g}V{_y(y, b):g}h{2 * half:.2f}V{floor:g}Z"
        for a, b in points
    )


def _told(series: Series, x: Axis, y: Axis) -> str:
    """A series in words."""
    (x0, y0), (x1, y1) = series.points[0], series.points[-1]
    if len(series.points) == 1:
        return f"{series.label}: {y.say(y0)} at {x.say(x0)}."
    heights = [b for _, b in series.points]
    return (
        f"{series.label}: {y.say(y0)} at {x.say(x0)}, {y.say(y1)} at {x.say(x1)}; "
        f"lowest {y.say(min(heights))}, highest {y.say(max(heights))}."
    )


def stacked(
    parts: Sequence[tuple[str, float]], whole: float, say: Callable[[float], str]
) -> list[tuple[float, float, str]]:
    """Pieces of a horizontal bar.

    Parameters
    ----------
    parts : sequence of (str, float)
        Label and amount.
    whole : float
        What the full width stands for.
    say : callable
        An amount as people are told of it.

    Returns
    -------
    list of (float, float, str)
        Start and width in percent, and tooltip.
    """
    pieces, start = [], 0.0
    for label, amount in parts:
        width = 100 * amount / whole if whole else 0.0
        pieces.append((round(start, 3), round(width, 3), f"{label}: {say(amount)}"))
        start += width
    return pieces
