"""Heat maps: one quantity across, modules down, as positions on a canvas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cgfedllm.report.html.axes import drawable
from cgfedllm.report.html.charts import WIDTH
from cgfedllm.report.html.reading import WeightChange
from cgfedllm.report.html.tables import compact

_ROW, _GAP, _FOOT = 26, 2, 42
_MOST_TICKS = 8
# room for the names of rows: width of a letter, on a phone, and how many of them
_LETTER, _FEWEST_LETTERS, _MOST_LETTERS = 8.8, 10, 16


@dataclass(frozen=True)
class Entry:
    """One value of a heat map, at a number across and a module down, with its tooltip."""

    column: int
    row: str
    value: float
    text: str


@dataclass(frozen=True)
class Cell:
    """One rectangle."""

    x: float
    y: float
    strength: float
    """Share of the largest value, which is how opaque the cell is."""
    text: str


@dataclass(frozen=True)
class Heat:
    """Everything the template needs.

    Parameters
    ----------
    key : str
        Unique in the page; ids are made of it.
    title, note : str
        Above and below the drawing.
    across : str
        What the columns are.
    cells : list of Cell
        Upper left corners.
    left : float
        Where the names of rows end.
    width, height : float
        Of a cell.
    rows, columns : list of (float, str)
        Position down or across, and text.
    canvas : float
        Height of the whole.
    description : str
        What a reader who cannot see it is told.
    """

    key: str
    title: str
    note: str
    across: str
    cells: list[Cell]
    left: float
    width: float
    height: float
    rows: list[tuple[float, str]]
    columns: list[tuple[float, str]]
    canvas: float
    description: str


def heat_map(weights: Sequence[WeightChange]) -> Heat | None:
    """Weight changes by layer and module, where there is more than one layer."""
    located = [
        Entry(w.layer, w.module, w.norm, f"layer {w.layer}, {w.module}: {compact(w.norm)}")
        for w in weights
        if w.layer is not None and drawable(w.norm)
    ]
    strongest = max(located, key=lambda entry: entry.value, default=None)
    if strongest is None:
        return None
    highest = compact(strongest.value)
    modules = len({entry.row for entry in located})
    layers = len({entry.column for entry in located})
    return heat_of(
        located,
        key="heat",
        title="Change of the weights by layer and module",
        across="layer",
        note=f"Full colour: {highest}. No colour: 0.",
        description=f"{modules} modules in {layers} layers. The largest change: layer "
        f"{strongest.column}, {strongest.row}, norm {highest}.",
    )


def heat_of(
    entries: Sequence[Entry], *, key: str, title: str, across: str, note: str, description: str
) -> Heat | None:
    """Draw values of 0 or more; None for a single column, or where all are 0.

    Parameters
    ----------
    entries : sequence of Entry
        Rows are drawn in the order in which they come first.
    key, title, across, note, description : str
        As in `Heat`.
    """
    numbers = sorted({entry.column for entry in entries})
    largest = max((entry.value for entry in entries), default=0.0)
    if len(numbers) < 2 or not largest:
        return None
    names = list(dict.fromkeys(entry.row for entry in entries))
    at = {number: place for place, number in enumerate(numbers)}
    down = {name: place for place, name in enumerate(names)}
    labels = [_short(name) for name in names]
    left = 8 + _LETTER * max(_FEWEST_LETTERS, *map(len, labels))
    step = (WIDTH - left) / len(numbers)
    every = math.ceil(len(numbers) / _MOST_TICKS)
    return Heat(
        key=key,
        title=title,
        note=note,
        across=across,
        cells=[
            Cell(
                round(left + step * at[entry.column], 2),
                _ROW * down[entry.row],
                round(entry.value / largest, 3),
                entry.text,
            )
            for entry in entries
        ],
        left=round(left - 8, 1),
        width=round(step - min(_GAP, step / 6), 2),
        height=_ROW - _GAP,
        rows=[(_ROW * (place + 0.5) + 3, label) for place, label in enumerate(labels)],
        columns=[
            (round(left + step * (place + 0.5), 1), str(number))
            for number, place in at.items()
            if place % every == 0
        ],
        canvas=_ROW * len(names) + _FOOT,
        description=description,
    )


def _short(name: str) -> str:
    """The last part of a module's path, cut where there is no room for it."""
    label = name.rsplit(".", 1)[-1]
    return label if len(label) <= _MOST_LETTERS else label[: _MOST_LETTERS - 1] + "…"
