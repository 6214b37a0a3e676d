"""The heat map of weight changes: layers across, modules down, as positions on a canvas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cgfedllm.report.html.axes import drawable
from cgfedllm.report.html.charts import WIDTH
from cgfedllm.report.html.reading import WeightChange
from cgfedllm.report.html.tables import compact

_LEFT, _ROW, _GAP, _FOOT = 100, 26, 2, 42
_MOST_TICKS = 8


@dataclass(frozen=True)
class Cell:
    """One weight matrix."""

    x: float
    y: float
    strength: float
    """Share of the largest change, which is how opaque the cell is."""
    text: str


@dataclass(frozen=True)
class Heat:
    """Everything the template needs.

    Parameters
    ----------
    cells : list of Cell
        Upper left corners.
    width, height : float
        Of a cell.
    modules, layers : list of (float, str)
        Position down or across, and text.
    canvas : float
        Height of the whole.
    highest : str
        What full strength stands for.
    description : str
        What a reader who cannot see it is told.
    """

    cells: list[Cell]
    width: float
    height: float
    modules: list[tuple[float, str]]
    layers: list[tuple[float, str]]
    canvas: float
    highest: str
    description: str


def heat_map(weights: Sequence[WeightChange]) -> Heat | None:
    """Weight changes by layer and module, where there is more than one layer."""
    located = [(w.layer, w) for w in weights if w.layer is not None and drawable(w.norm)]
    layers = sorted({layer for layer, _ in located})
    strongest = max((w for _, w in located), key=lambda w: w.norm, default=None)
    if len(layers) < 2 or strongest is None or not strongest.norm:
        return None
    modules = list(dict.fromkeys(w.module for _, w in located))
    step = (WIDTH - _LEFT) / len(layers)
    every = math.ceil(len(layers) / _MOST_TICKS)
    return Heat(
        cells=[
            Cell(
                round(_LEFT + step * layers.index(layer), 2),
                _ROW * modules.index(w.module),
                round(w.norm / strongest.norm, 3),
                f"layer {layer}, {w.module}: {compact(w.norm)}",
            )
            for layer, w in located
        ],
        width=round(step - min(_GAP, step / 6), 2),
        height=_ROW - _GAP,
        modules=[
            (_ROW * (row + 0.5) + 3, module.rsplit(".", 1)[-1])
            for row, module in enumerate(modules)
        ],
        layers=[
            (round(_LEFT + step * (column + 0.5), 1), str(layer))
            for column, layer in enumerate(layers)
            if column % every == 0
        ],
        canvas=_ROW * len(modules) + _FOOT,
        highest=compact(strongest.norm),
        description=f"{len(modules)} modules in {len(layers)} layers. The largest change: layer "
        f"{strongest.layer}, {strongest.module}, norm {compact(strongest.norm)}.",
    )
