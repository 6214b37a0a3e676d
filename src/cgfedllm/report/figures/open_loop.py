"""Figures of the open-loop bench: rate against SNR and cosine, and SNR by kind of factor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from cgfedllm.analysis.candidates import slug_of
from cgfedllm.analysis.open_loop_rows import ModuleRow, OpenLoop, OpenLoopRow
from cgfedllm.report.figures.heat import draw_decibels
from cgfedllm.report.figures.style import new_figure, save, styles_of

LOWEST_DB = 0.03
"""Bottom of the SNR axis: what lies below is drawn there."""
MODULE_RATES = (0.05, 0.1)
"""Rates, bits per parameter, that fidelity by kind of factor is shown at."""

_LOWEST_BITS = 0.01
"""Left end of the rate axis: a packet of a header alone would lie far off."""
_PANEL_WIDTH = 4.6
_MODEL_DASHES = ((0, (6, 2)), (0, (3, 2)), (0, (1, 1.5)))
_MODEL_COLOUR = "#555555"
_GREY = "#C4C4C4"
_CODEC_PANELS = 2


def draw_open_loop(results: Sequence[OpenLoop], folder: Path) -> list[Path]:
    """Draw everything that the results give something to draw for.

    Parameters
    ----------
    results : sequence of OpenLoop
        One a recording, one panel each.
    folder : Path
        For ``rate_snr``, ``rate_cosine``, ``modules_RECORDING`` and ``codecs/CODEC``, as PNG and
        SVG.

    Returns
    -------
    list of Path
        The files written.
    """
    written = save(rate_snr_figure(results), folder / "rate_snr")
    written += save(rate_cosine_figure(results), folder / "rate_cosine")
    for result in results:
        figure = modules_figure(result)
        if figure is not None:
            written += save(figure, folder / f"modules_{result.recording}")
    for codec in dict.fromkeys(r.codec for result in results for r in result.rows if r.bpp > 0):
        written += save(codec_figure(results, codec), folder / "codecs" / slug_of(codec))
    return written


def rate_snr_figure(results: Sequence[OpenLoop]) -> Figure:
    """Rate against SNR, both logarithmic: there the low-rate Gaussian model is a straight line.

    The models are dashed. A codec without an error (infinite SNR) is not shown.
    """
    figure, panels = _panels(results)
    handles = _draw_rows(
        panels, results, lambda row: max(row.snr_db, LOWEST_DB), lambda row: row.snr_db < math.inf
    )
    models: dict[str, Line2D] = {}
    for axes, result in zip(panels, results, strict=True):
        models |= _draw_models(axes, result)
    _scale_decibels(panels, results)
    _legends(figure, panels[0], handles, models)
    _label_left(panels, "SNR of client updates, dB")
    return figure


def codec_figure(results: Sequence[OpenLoop], codec: str) -> Figure:
    """One codec's rate against SNR among the others', on the first recordings."""
    results = results[:_CODEC_PANELS]
    figure, panels = _panels(results)
    labels = [row.label for result in results for row in result.rows if row.codec == codec]
    handles = _draw_rows(
        panels,
        results,
        lambda row: max(row.snr_db, LOWEST_DB),
        lambda row: row.snr_db < math.inf,
        highlighted=set(labels),
    )
    models: dict[str, Line2D] = {}
    for axes, result in zip(panels, results, strict=True):
        models |= _draw_models(axes, result)
    _scale_decibels(panels, results)
    own = {label: line for label, line in handles.items() if label in labels}
    others = [line for label, line in handles.items() if label not in labels]
    _legends(figure, panels[0], own | ({"other codecs": others[0]} if others else {}), models)
    _label_left(panels, "SNR of client updates, dB")
    return figure


def rate_cosine_figure(results: Sequence[OpenLoop]) -> Figure:
    """Rate against cosine; the previous aggregate, which costs nothing, is a level line."""
    figure, panels = _panels(results)
    handles = _draw_rows(panels, results, lambda row: row.cosine, lambda row: True)
    lowest = min((r.cosine for result in results for r in result.rows), default=0.0)
    levels: dict[str, Line2D] = {}
    for axes, result in zip(panels, results, strict=True):
        axes.set_ylim(min(0.0, lowest) - 0.02, 1.04)
        for row in result.rows:
            if row.bpp == 0:
                levels["previous aggregate, nothing sent"] = axes.axhline(
                    row.cosine, color=_MODEL_COLOUR, linewidth=1.1, linestyle=(0, (1, 1.5))
                )
                break  # scaling it leaves the cosine as it is
    _legends(figure, panels[0], handles, levels, corner="upper left")
    _label_left(panels, "cosine of client updates")
    return figure


def modules_figure(result: OpenLoop) -> Figure | None:
    """SNR by kind of factor, one panel a rate; None without anything at those rates."""
    groups = _module_groups(result)
    if not groups:
        return None
    kinds = list(dict.fromkeys(row.module for row in result.modules))
    shares = {row.module: row.energy_share for row in result.modules}
    labels = [list(dict.fromkeys(row.label for row in rows)) for _, rows in groups]
    lines = sum(map(len, labels))
    widest = max(len(label) for group in labels for label in group)
    figure, panels = new_figure(
        len(groups),
        width=1.6 + 0.07 * widest + 0.68 * len(kinds),
        height=1.1 + 0.75 * len(groups) + 0.26 * lines,
    )
    finite = [r.snr_db for _, rows in groups for r in rows if math.isfinite(r.snr_db)]
    # one scale for all panels
    top = max([*finite, 1e-3])
    for axes, (title, rows), names in zip(panels, groups, labels, strict=True):
        values = np.full((len(names), len(kinds)), np.nan)
        for row in rows:
            values[names.index(row.label), kinds.index(row.module)] = row.snr_db
        draw_decibels(axes, values, names, top=top)
        axes.set_title(f"{result.recording}, {title}: SNR in dB", loc="left")
    panels[-1].set_xticks(
        range(len(kinds)),
        [f"{kind.replace('_proj', '')}\n{100 * shares[kind]:.0f} %" for kind in kinds],
    )
    panels[-1].set_xlabel("kind of factor, and its share of the updates' energy")
    return figure


def _panels(results: Sequence[OpenLoop]) -> tuple[Figure, list[Axes]]:
    columns = min(3, len(results))
    rows = math.ceil(len(results) / columns)
    figure, panels = new_figure(
        rows,
        columns,
        width=max(6.4, _PANEL_WIDTH * columns),
        height=1.0 + 3.7 * rows,
        share_y=True,
    )
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    panels = panels[: len(results)]
    for axes, result in zip(panels, results, strict=True):
        axes.set_xscale("log")
        axes.set_title(result.recording, loc="left")
        axes.set_xlabel("bits per parameter, whole packet")
        axes.set_xlim(_LOWEST_BITS, 45)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    return figure, panels


def _scale_decibels(panels: Sequence[Axes], results: Sequence[OpenLoop]) -> None:
    finite = [r.snr_db for result in results for r in result.rows if r.snr_db < math.inf]
    for axes in panels:
        axes.set_yscale("log")
        axes.set_ylim(LOWEST_DB * 0.85, max(10.0, *finite) * 1.5)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(_decibel_tick))


def _draw_rows(
    panels: Sequence[Axes],
    results: Sequence[OpenLoop],
    height: Callable[[OpenLoopRow], float],
    shown: Callable[[OpenLoopRow], bool],
    highlighted: set[str] | None = None,
) -> dict[str, Line2D]:
    """One line a codec with its options; those of a single rate are points.

    Where some are `highlighted`, the others are grey.
    """

    def drawn(row: OpenLoopRow) -> bool:
        return row.bpp >= _LOWEST_BITS and shown(row) and not math.isnan(height(row))

    # all of them, so that a codec has the same marker in every figure
    labels = list(dict.fromkeys(row.label for r in results for row in r.rows if row.bpp > 0))
    styles = styles_of(labels)
    handles: dict[str, Line2D] = {}
    for axes, result in zip(panels, results, strict=True):
        for label in labels:
            rows = [row for row in result.rows if row.label == label and drawn(row)]
            points = sorted((row.bpp, height(row)) for row in rows)
            if points:
                x, y = zip(*points, strict=True)
                look = styles[label].keywords()
                if highlighted is not None and label not in highlighted:
                    look |= {"color": _GREY, "linewidth": 0.9, "markersize": 2.5, "zorder": 1.2}
                (handles[label],) = axes.plot(x, y, **look)
    return {label: handles[label] for label in labels if label in handles}


def _draw_models(axes: Axes, result: OpenLoop) -> dict[str, Line2D]:
    handles: dict[str, Line2D] = {}
    models = dict.fromkeys(row.model for row in result.models)
    for model, dashes in zip(models, _MODEL_DASHES, strict=False):
        points = [(r.bpp, r.snr_db) for r in result.models if r.model == model and r.snr_db > 0]
        x, y = zip(*points, strict=True)
        (handles[model],) = axes.plot(
            x, y, color=_MODEL_COLOUR, linewidth=1.1, linestyle=dashes, zorder=1.5
        )
    return handles


def _legends(
    figure: Figure,
    first: Axes,
    codecs: dict[str, Line2D],
    references: dict[str, Line2D],
    *,
    corner: Literal["lower right", "upper left"] = "lower right",
) -> None:
    """Codecs below the panels; references in a corner that rising curves leave empty."""
    if references:
        first.legend(
            list(references.values()),
            list(references),
            loc=corner,
            # off the grid line at the top
            bbox_to_anchor=(0.0, 0.95) if corner == "upper left" else None,
            # nothing is to be read through it
            frameon=True,
            framealpha=1.0,
            edgecolor="none",
            fontsize=7.5,
            handlelength=2.6,
        )
    if codecs:
        width = figure.get_size_inches()[0]
        fit = max(1, int(width / (0.7 + 0.075 * max(map(len, codecs)))))
        rows = math.ceil(len(codecs) / fit)
        figure.legend(
            list(codecs.values()),
            list(codecs),
            loc="outside lower center",
            ncols=math.ceil(len(codecs) / rows),
            frameon=False,
            fontsize=8.0,
        )


def _label_left(panels: Sequence[Axes], text: str) -> None:
    """On the first panel of each row."""
    for axes in panels:
        place = axes.get_subplotspec()
        if place is not None and place.is_first_col():
            axes.set_ylabel(text)


def _decibel_tick(value: float, _: int) -> str:
    return f"≤ {value:g}" if value <= LOWEST_DB * 1.001 else f"{value:g}"


def _module_groups(result: OpenLoop) -> list[tuple[str, list[ModuleRow]]]:
    """Rows by rate; codecs of a single rate only where there is no other."""
    asked = sorted({row.asked_bpp for row in result.modules if row.asked_bpp is not None})
    rates = [rate for rate in MODULE_RATES if rate in asked] or asked[:2]
    groups = [
        (f"{rate:g} bits per parameter", [r for r in result.modules if r.asked_bpp == rate])
        for rate in rates
    ]
    if not groups and result.modules:
        return [("codecs of one rate", list(result.modules))]
    return groups
