"""The paper's table as a figure: a line a row, a panel a measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cgfedllm.errors import CheckpointError
from cgfedllm.report.figures.style import colour_of, new_figure, save
from cgfedllm.storage import read_json

_FORMAT = 1


def plot_paper(results: Path | str, path: Path | str) -> list[Path]:
    """Draw a results file of `reproduce paper` as ``PATH.png`` and ``PATH.svg``.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged or something else.
    StorageError
        If the figure cannot be written.
    """
    tree = read_json(results)
    if not isinstance(tree, dict) or tree.get("format") != _FORMAT or "rows" not in tree:
        raise CheckpointError(f"{results} is no results file of `cgfedllm reproduce paper`")
    return save(draw_paper(tree), path)


def draw_paper(tree: Mapping[str, Any]) -> Figure:
    """Held-out loss, bytes sent, and the average of each benchmark, row by row from the top."""
    rows: Sequence[Mapping[str, Any]] = tree["rows"]
    benchmarks = list(dict.fromkeys(name for row in rows for name in row["benchmarks"]))
    figure, panels = new_figure(
        columns=2 + len(benchmarks),
        width=4.0 + 2.0 * (2 + len(benchmarks)),
        height=1.2 + 0.28 * len(rows),
        share_y=True,
    )
    colours = [colour_of(row["codec"] or row["key"]) for row in rows]
    places = [-number for number in range(len(rows))]
    panels[0].set_yticks(places, [row["label"] for row in rows])
    panels[0].scatter([row["heldout_nll"] for row in rows], places, color=colours, zorder=3)
    panels[0].set_xlabel("held-out NLL\n(nats per label token)")
    sent = [(row["uplink_bytes"], y, c) for row, y, c in zip(rows, places, colours, strict=True)]
    shown = [item for item in sent if item[0]]
    panels[1].set_xscale("log")
    if shown:
        x, y, colour = zip(*shown, strict=True)
        panels[1].scatter(x, y, color=colour, zorder=3)
    panels[1].set_xlabel("uplink bytes of the run")
    for panel, name in zip(panels[2:], benchmarks, strict=True):
        _accuracies(panel, rows, places, colours, name)
    return figure


def _accuracies(
    panel: Axes,
    rows: Sequence[Mapping[str, Any]],
    places: Sequence[int],
    colours: Sequence[str],
    name: str,
) -> None:
    """Mean of all subjects with one standard error, and what guessing gets."""
    title = ""
    for row, y, colour in zip(rows, places, colours, strict=True):
        result = row["benchmarks"].get(name)
        if result is None:
            continue
        # the last group is that of all subjects
        score = next((g for g in result["groups"] if "verage" in g["name"]), result["groups"][-1])
        panel.errorbar(
            100 * score["value"],
            y,
            xerr=100 * (score["standard_error"] or 0.0),
            fmt="o",
            color=colour,
            markersize=5.0,
            zorder=3,
        )
        panel.axvline(100 * result["chance"], color="#888888", linestyle=":", linewidth=1.0)
        title = score["name"]
    panel.set_xlabel(f"{name}, {title.lower()}\n(% right; dotted: guessing)")
