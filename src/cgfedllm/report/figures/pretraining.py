"""The course of a codec's fit: training loss, and fidelity on updates it does not learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cgfedllm.report.figures.style import colour_of, new_figure, save

_PANELS = (
    ("train_loss", "training loss"),
    ("validation_snr_db", "validation SNR (dB, sum over sum)"),
)


def draw_fit(curve: Sequence[Mapping[str, float]], best: int, codec: str) -> Figure:
    """Draw two panels over the epochs; a dotted line marks the epoch whose state was kept.

    Parameters
    ----------
    curve : sequence of mapping
        Rows of `FitProgress.curve`, one or more.
    best : int
        The epoch that was kept.
    codec : str
        Its label.
    """
    figure, axes = new_figure(1, 2, width=8.0, height=3.4)
    figure.suptitle(f"TGAP: {codec}, best after epoch {best} of {len(curve)}", fontsize=10.0)
    epochs = [row["epoch"] for row in curve]
    for panel, (key, name) in zip(axes, _PANELS, strict=True):
        panel.plot(
            epochs,
            [row[key] for row in curve],
            color=colour_of(codec),
            linewidth=1.6,
            marker="o" if len(epochs) < 20 else None,
            markersize=3.0,
        )
        panel.axvline(best, color="#888888", linewidth=1.0, linestyle=":", zorder=1)
        panel.set_xlabel("epoch")
        panel.set_ylabel(name)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    _show_zero(axes[1])
    return figure


def plot_fit(
    curve: Sequence[Mapping[str, float]], best: int, codec: str, path: Path | str
) -> list[Path]:
    """Write `draw_fit` to ``PATH.png`` and ``PATH.svg``.

    Raises
    ------
    StorageError
        If they cannot be written.
    """
    return save(draw_fit(curve, best, codec), path)


def _show_zero(panel: Axes) -> None:
    """0 dB is what predicting nothing gets: where it is near, it is told."""
    low, high = panel.get_ylim()
    if low < 0.5 and high > -0.5:
        panel.set_ylim(min(low, -0.1), max(high, 0.1))
        panel.axhline(0.0, color="#888888", linewidth=1.0, zorder=1)
        panel.annotate(
            "predicting zero",
            (0.0, 0.0),
            xycoords=("axes fraction", "data"),
            xytext=(3, -3),  # below: the curve is above, or ought to be
            textcoords="offset points",
            va="top",
            fontsize=7.5,
            color="#666666",
        )
