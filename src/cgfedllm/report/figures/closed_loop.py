"""Held-out loss against the bytes it took, one line a candidate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cgfedllm.report.figures.style import (
    LineStyle,
    fit_legend,
    label_lines,
    new_figure,
    save,
    styles_of,
)

_PANELS = (
    ("uplink_bytes", "cumulative uplink, all clients (bytes)"),
    ("total_bytes", "cumulative uplink + downlink, all clients (bytes)"),
)


def draw_closed_loop(results: Mapping[str, Any]) -> Figure:
    """Draw two panels: against uplink bytes, and against bytes of both directions.

    Lines are means over seeds, round by round; bands reach from the least to the greatest seed.
    References, which send nothing, are level lines at their final loss.

    Parameters
    ----------
    results : mapping
        Content of a results file of `cgfedllm compare`; cells may be missing.
    """
    labels = [candidate["label"] for candidate in results["candidates"]]
    styles = styles_of(labels)
    curves = {label: _curves(results, label) for label in labels}
    curves = {label: found for label, found in curves.items() if found}
    figure, axes = new_figure(1, 2, width=11.0, height=4.8, share_y=True)
    figure.suptitle(_title(results["what"], results["seeds"]), fontsize=10.0)
    drawn: dict[str, Line2D] = {}
    direct = True
    start = _start(curves)
    levels = {label: nll for label, found in curves.items() if (nll := _level(found)) is not None}
    for panel, (key, name) in zip(axes, _PANELS, strict=True):
        lines = {
            _shown(label, found, results): line
            for label, found in curves.items()
            if (line := _draw(panel, found, key, styles[label])) is not None
        }
        if start is not None:
            _draw_level(panel, start, "before training", below=True, right=True)
        for number, (label, nll) in enumerate(levels.items()):
            # at either end in turn: two references may lie close together
            _draw_level(panel, nll, label, right=bool(number % 2))
        _finish(panel, name)
        drawn |= lines
        direct = label_lines(panel, lines, legend=False) and direct
    axes[0].set_ylabel("held-out NLL (nats per label token)")
    if not direct:
        fit_legend(figure, axes, drawn)
    return figure


def plot_closed_loop(results: Mapping[str, Any], path: Path | str) -> list[Path]:
    """Write `draw_closed_loop` to ``PATH.png`` and ``PATH.svg``.

    Raises
    ------
    StorageError
        If they cannot be written.
    """
    return save(draw_closed_loop(results), path)


def _curves(results: Mapping[str, Any], label: str) -> list[dict[int, dict[str, Any]]]:
    """Points of each finished cell by round."""
    return [
        {point["round"]: point for point in cell["curve"]}
        for cell in results["cells"]
        if cell["candidate"] == label and cell["curve"]
    ]


def _draw(
    panel: Axes, curves: Sequence[dict[int, dict[str, Any]]], key: str, style: LineStyle
) -> Line2D | None:
    rounds = sorted(set.intersection(*(set(points) for points in curves)))
    if not rounds:
        return None
    spans = [
        (
            statistics.fmean(points[r][key] for points in curves),
            [float(points[r]["heldout_nll"]) for points in curves],
        )
        for r in rounds
        if r > 0 and all(points[r][key] > 0 for points in curves)
    ]
    if not spans:
        return None
    x = [sent for sent, _ in spans]
    (line,) = panel.plot(x, [statistics.fmean(nlls) for _, nlls in spans], **style.keywords())
    if len(curves) > 1:
        low, high = [min(nlls) for _, nlls in spans], [max(nlls) for _, nlls in spans]
        panel.fill_between(x, low, high, color=style.colour, alpha=0.15, linewidth=0)
    return line


def _start(curves: Mapping[str, Sequence[dict[int, dict[str, Any]]]]) -> float | None:
    """Mean loss before training."""
    found = [
        float(points[0]["heldout_nll"]) for own in curves.values() for points in own if 0 in points
    ]
    return statistics.fmean(found) if found else None


def _level(curves: Sequence[dict[int, dict[str, Any]]]) -> float | None:
    """Final loss of a reference: it sends nothing, so it has an outcome but no curve."""
    last = [points[max(points)] for points in curves]
    if any(point["total_bytes"] for point in last):
        return None
    return statistics.fmean(float(point["heldout_nll"]) for point in last)


def _draw_level(
    panel: Axes, nll: float, text: str, *, below: bool = False, right: bool = False
) -> None:
    panel.axhline(nll, color="#888888", linewidth=1.0, linestyle=":", zorder=1)
    panel.annotate(
        text,
        (1.0 if right else 0.0, nll),
        xycoords=("axes fraction", "data"),
        xytext=(-3 if right else 3, -3 if below else 2),
        textcoords="offset points",
        ha="right" if right else "left",
        va="top" if below else "bottom",
        fontsize=7.5,
        color="#666666",
    )


def _finish(panel: Axes, name: str) -> None:
    panel.set_xlabel(name)
    panel.set_xscale("log")
    panel.margins(x=0.08)
    low, high = panel.get_xlim()
    decades = math.log10(high / low)
    # a short axis needs ticks between the powers of ten, a long one has no room for them
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value)))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _bytes(count: float) -> str:
    """Decimal units: the ticks of a log axis are powers of ten."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= 0.999 * size:
            return f"{count / size:g} {unit}"
    return f"{count:g} B"


def _shown(label: str, found: Sequence[object], results: Mapping[str, Any]) -> str:
    wanted = len(results["seeds"])
    return label if len(found) == wanted else f"{label} ({len(found)} of {wanted} seeds)"


def _title(what: Mapping[str, Any], seeds: Sequence[int]) -> str:
    steps = (
        f"{what['local_steps']} local steps"
        if what["local_steps"]
        else f"{what['local_epochs']:g} local epochs"
    )
    clients = what["clients"] if what["clients"] is not None else "?"
    if what["fraction_train"] < 1:
        clients = f"{clients} ({100 * what['fraction_train']:g} % a round)"
    counted = ", ".join(map(str, seeds))
    over = f"mean and range over seeds {counted}" if len(seeds) > 1 else f"seed {counted}"
    return (
        f"{what['model']} on {what['data']}: {clients} clients, {what['rounds']} rounds of "
        f"{steps}; {over}"
    )
