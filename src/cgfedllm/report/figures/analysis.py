"""Figures of an analysis, one set a recording."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from cgfedllm.analysis.distributions import DistributionRow
from cgfedllm.analysis.noise import UNCODED, NoiseRow
from cgfedllm.analysis.rounds import ALL, FidelityRow
from cgfedllm.analysis.study import Study
from cgfedllm.analysis.trials import candidate_label
from cgfedllm.report.analysis import times
from cgfedllm.report.figures.heat import draw_decibels
from cgfedllm.report.figures.style import fit_legend, new_figure, save, styles_of

_PLACES = (
    ("client", "update", "client update"),
    ("aggregate", "update", "aggregate"),
    ("client", "innovation", "innovation of client updates"),
    ("client", "product", "change of the product B A"),
)
_DECIBEL_TICKS = (-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50)
_TOP_DB = 10.0
"""End of the colour scale of modules."""
_GREY = "#767676"
_MODULES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288", "#767676")


class _Named(Protocol):
    @property
    def codec(self) -> str: ...
    @property
    def options(self) -> str: ...


def draw_study(study: Study, folder: Path) -> list[Path]:
    """Draw what one recording's results give something to draw for.

    Parameters
    ----------
    folder : Path
        For ``fidelity``, ``modules``, ``rate``, ``swap``, ``noise``, ``distributions`` and
        ``scales``, each with the recording's name behind it, as PNG and SVG.

    Returns
    -------
    list of Path
        The files written.
    """
    drawn: dict[str, Callable[[Study], Figure] | None] = {
        "fidelity": fidelity_figure if study.fidelity else None,
        "modules": modules_figure if study.fidelity else None,
        "rate": rate_figure if study.rate else None,
        "swap": swap_figure if study.swap else None,
        "noise": noise_figure if study.noise else None,
        "distributions": distributions_figure if study.histograms else None,
        "scales": scales_figure if study.distributions else None,
    }
    written: list[Path] = []
    for name, draw in drawn.items():
        if draw is not None:
            written += save(draw(study), folder / f"{name}_{study.recording}")
    return written


def label_of(row: _Named) -> str:
    """A row's codec with all its options."""
    return candidate_label(row.codec, json.loads(row.options))


def fidelity_figure(study: Study) -> Figure:
    """SNR above, cosine below, over rounds; hollow where the codec was fitted on the round."""
    places = [
        place
        for place in _PLACES
        if any((row.level, row.quantity) == place[:2] for row in study.fidelity)
    ]
    figure, panels = new_figure(
        2, len(places), width=1.0 + 3.0 * len(places), height=6.2, share_y=True
    )
    rows = [row for row in study.fidelity if row.module == ALL and row.round is not None]
    labels = list(dict.fromkeys(map(label_of, rows)))
    styles = styles_of(labels)
    handles: dict[str, Line2D] = {}
    for column, (level, quantity, title) in enumerate(places):
        for label in labels:
            own = [
                row
                for row in rows
                if label_of(row) == label and (row.level, row.quantity) == (level, quantity)
            ]
            for line, value in ((0, _snr), (1, _cosine)):
                points = [
                    (row.round or 0, value(row), row.seen)
                    for row in own
                    if math.isfinite(value(row))
                ]
                if points:
                    handles[label] = _draw_seen(
                        panels[line * len(places) + column], points, styles[label].keywords()
                    )
        panels[column].set_title(title, loc="left")
        panels[len(places) + column].set_xlabel("round")
    for axes in panels[: len(places)]:
        _scale_decibels(axes, [row.snr_db for row in rows])
    for axes in panels:
        axes.set_xlim(study.rounds[0] - 0.4, study.rounds[-1] + 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("SNR, dB")
    panels[len(places)].set_ylabel("cosine")
    figure.suptitle(_title(study, "fidelity over rounds"), fontsize=10.0)
    fit_legend(figure, panels, {label: handles[label] for label in labels if label in handles})
    return figure


def modules_figure(study: Study) -> Figure:
    """SNR by kind of factor, and of the product by kind of module, over all rounds."""
    rows = [
        row
        for row in study.fidelity
        if row.round is None and row.level == "client" and row.module != ALL
    ]
    groups = {
        title: [row for row in rows if row.quantity == quantity]
        for quantity, title in (("update", "client updates"), ("product", "change of B A"))
    }
    groups = {title: own for title, own in groups.items() if own}
    labels = list(dict.fromkeys(map(label_of, rows)))
    kinds = {title: list(dict.fromkeys(r.module for r in own)) for title, own in groups.items()}
    figure, panels = new_figure(
        len(groups),
        width=2.0 + 0.07 * max(map(len, labels)) + 0.68 * max(map(len, kinds.values())),
        height=1.0 + len(groups) * (0.8 + 0.26 * len(labels)),
    )
    # codecs that lose next to nothing would leave no colours to the others
    top = min(_TOP_DB, max([1e-3, *(r.snr_db for r in rows if math.isfinite(r.snr_db))]))
    for axes, (title, own) in zip(panels, groups.items(), strict=True):
        values = np.full((len(labels), len(kinds[title])), np.nan)
        for row in own:
            values[labels.index(label_of(row)), kinds[title].index(row.module)] = row.snr_db
        draw_decibels(axes, values, labels, top=top)
        names = [kind.replace("_proj", "") for kind in kinds[title]]
        axes.set_xticks(range(len(names)), names)
        axes.set_title(f"{study.recording}, {title}: SNR in dB", loc="left")
    return figure


def rate_figure(study: Study) -> Figure:
    """How many times fewer: in elements, and in bytes against fp32 and bf16."""
    rows = study.rate
    figure, (axes,) = new_figure(width=7.4, height=1.4 + 0.3 * len(rows))
    marks: tuple[tuple[str, str, str, Callable[[Any], float | None]], ...] = (
        ("latent elements", "D", "#D55E00", lambda r: r.element_share and 1 / r.element_share),
        ("bytes, against fp32", "o", "#000000", lambda r: r.times_fewer_than_fp32),
        ("bytes, against bf16", "s", "#56B4E9", lambda r: r.times_fewer_than_bf16),
    )
    for label, marker, colour, value in marks:
        points = [(v, y) for y, row in enumerate(rows) if (v := value(row)) is not None]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, marker, color=colour, label=label, markersize=5.0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("times fewer")
    _name_rows(axes, [label_of(row) for row in rows])
    axes.set_title(_title(study, "rate"), loc="left")
    with mpl.rc_context({"legend.frameon": False}):
        figure.legend(loc="outside lower center", ncols=3, fontsize=8.0)
    return figure


def swap_figure(study: Study) -> Figure:
    """Each codec's own score, and what is left when packets go to a neighbour."""
    rows = study.swap
    figure, panels = new_figure(1, 2, width=9.6, height=1.5 + 0.3 * len(rows))
    values: tuple[tuple[str, Callable[[Any], float], Callable[[Any], float]], ...] = (
        ("SNR, dB", _snr, lambda r: r.swapped_snr_db),
        ("cosine", _cosine, lambda r: r.swapped_cosine),
    )
    for axes, (name, own, other) in zip(panels, values, strict=True):
        for y, row in enumerate(rows):
            pair = [own(row), other(row)]
            if all(map(math.isfinite, pair)):
                axes.plot(pair, [y, y], color=_GREY, linewidth=1.0, zorder=1.5)
            if math.isfinite(pair[0]):
                axes.plot(pair[0], y, "o", color="#0072B2", markersize=5.5)
            elif pair[0] == math.inf:
                axes.text(0.99, y, "exact", transform=axes.get_yaxis_transform(), ha="right",
                          va="center", fontsize=7.5, color="#0072B2")  # fmt: skip
            if math.isfinite(pair[1]):
                axes.plot(pair[1], y, "o", color="#D55E00", markerfacecolor="white", markersize=5.5)
        axes.set_xlabel(name)
    finite = [v for r in rows for v in (r.snr_db, r.swapped_snr_db)]
    _scale_decibels(panels[0], finite, across=True)
    _name_rows(panels[0], [label_of(row) for row in rows])
    _name_rows(panels[1], [""] * len(rows))
    figure.suptitle(_title(study, "swap test"), fontsize=10.0)
    handles = [
        Line2D([], [], marker="o", linestyle="", color="#0072B2"),
        Line2D([], [], marker="o", linestyle="", color="#D55E00", markerfacecolor="white"),
    ]
    names = ["against its own client's update", "against another client's"]
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=8.0, frameon=False)
    return figure


def noise_figure(study: Study) -> Figure:
    """SNR against the clean update by sigma; without noise, the reference, apart on the left."""
    places = list(dict.fromkeys(row.place for row in study.noise))
    labels = list(dict.fromkeys(map(label_of, study.noise)))
    styles = styles_of([label for label in labels if label != UNCODED])
    figure, panels = new_figure(1, len(places), width=1.6 + 4.4 * len(places), height=4.6)
    handles: dict[str, Line2D] = {}
    for axes, place in zip(panels, places, strict=True):
        own = [row for row in study.noise if row.place == place]
        sigmas = sorted({row.sigma for row in own})
        for label in labels:
            points = {row.sigma: row.snr_db for row in own if label_of(row) == label}
            look = (
                {"color": _GREY, "linestyle": "--", "linewidth": 1.2}
                if label == UNCODED
                else styles[label].keywords()
            )
            noisy = [s for s in sigmas if s > 0 and math.isfinite(points.get(s, math.nan))]
            if noisy:
                x = [sigmas.index(sigma) + 0.5 for sigma in noisy]
                (handles[label],) = axes.plot(x, [points[sigma] for sigma in noisy], **look)
            if math.isfinite(points.get(0.0, math.nan)):
                axes.plot([0], [points[0.0]], **look | {"linestyle": "", "marker": "o"})
        axes.axvline(0.75, color="#DDDDDD", linewidth=1.0)
        axes.set_xticks(
            [0, *(index + 0.5 for index in range(1, len(sigmas)))],
            ["none", *(_sigma_tick(own, sigma) for sigma in sigmas[1:])],
        )
        axes.xaxis.grid(False)
        axes.set_xlabel("sigma of the noise\n(norm of the noise over that of what it is added to)")
        where = "the update, before coding" if place == "update" else "the latent"
        axes.set_title(f"noise on {where}", loc="left")
    for axes in panels:
        _scale_decibels(axes, [row.snr_db for row in study.noise])
    panels[0].set_ylabel("SNR against the clean update, dB")
    figure.suptitle(_title(study, "robustness to noise"), fontsize=10.0)
    fit_legend(figure, panels, handles)
    return figure


def distributions_figure(study: Study) -> Figure:
    """Density of values over their standard deviation, a panel a kind of factor, a line a round."""
    kinds = list(dict.fromkeys(row.module for row in study.histograms))
    rounds = sorted({row.round for row in study.histograms})
    columns = min(4, len(kinds))
    lines = math.ceil(len(kinds) / columns)
    figure, panels = new_figure(
        lines, columns, width=1.0 + 2.6 * columns, height=1.3 + 2.3 * lines, share_y=True
    )
    colours = mpl.colormaps["viridis"](np.linspace(0.0, 0.9, len(rounds)))
    handles: dict[str, Line2D] = {}
    grid = np.linspace(-4, 4, 161)
    for axes, kind in zip(panels, kinds, strict=False):
        for number, colour in zip(rounds, colours, strict=True):
            own = [r for r in study.histograms if (r.module, r.round) == (kind, number)]
            if own:
                middle = [(row.left + row.right) / 2 for row in own]
                (handles[f"round {number}"],) = axes.plot(
                    middle, [row.density for row in own], color=colour, linewidth=1.1
                )
        (handles["Gaussian"],) = axes.plot(
            grid, np.exp(-np.square(grid) / 2) / math.sqrt(2 * math.pi),
            color=_GREY, linestyle=":", linewidth=1.1,
        )  # fmt: skip
        axes.set_xlim(-4, 4)
        axes.set_title(kind, loc="left")
    for axes in panels[len(kinds) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(kinds) - columns) : len(kinds)]:
        axes.set_xlabel("value over standard deviation")
    for axes in panels[::columns]:
        axes.set_ylabel("density")
    figure.suptitle(_title(study, "distribution of updates"), fontsize=10.0)
    fit_legend(figure, panels, handles)
    return figure


def scales_figure(study: Study) -> Figure:
    """Standard deviation, robust scale and excess kurtosis over rounds, a line a kind of factor."""
    facts: tuple[tuple[str, Callable[[DistributionRow], float]], ...] = (
        ("standard deviation", lambda row: row.std),
        ("robust scale", lambda row: row.robust_scale),
        ("excess kurtosis", lambda row: row.excess_kurtosis),
    )
    kinds = list(dict.fromkeys(row.module for row in study.distributions))
    # a colour a module; B is dashed
    modules = list(dict.fromkeys(kind.removesuffix(".A").removesuffix(".B") for kind in kinds))
    figure, panels = new_figure(1, 3, width=11.0, height=3.9)
    handles: dict[str, Line2D] = {}
    for axes, (name, value) in zip(panels, facts, strict=True):
        for kind in kinds:
            own = [row for row in study.distributions if row.module == kind]
            module = modules.index(kind.removesuffix(".A").removesuffix(".B"))
            (handles[kind],) = axes.plot(
                [row.round for row in own],
                [value(row) for row in own],
                color=_MODULES[module % len(_MODULES)],
                linestyle="--" if kind.endswith(".B") else "-",
                marker="os^DvPX<"[module % 8],
                markersize=4.0,
                linewidth=1.6,
            )
        axes.set_title(name, loc="left")
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(_title(study, "scale and shape of updates"), fontsize=10.0)
    fit_legend(figure, panels, handles)
    return figure


def _draw_seen(
    axes: Axes, points: Sequence[tuple[int, float, int]], look: dict[str, Any]
) -> Line2D:
    x, y, seen = zip(*points, strict=True)
    (line,) = axes.plot(x, y, **look)
    known = [(a, b) for a, b, count in zip(x, y, seen, strict=True) if count]
    if known:
        hollow = {"markerfacecolor": "white", "linestyle": "", "zorder": 3}
        axes.plot(*zip(*known, strict=True), **look | hollow)
    return line


def _scale_decibels(axes: Axes, values: Iterable[float], *, across: bool = False) -> None:
    """Linear about 0 dB, where codecs of few bits live; logarithmic where they lose little."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min([0.0, *finite]), max([1.0, *finite])
    if across:
        axes.set_xscale("symlog", linthresh=1.0)
        axes.set_xlim(low * 1.15 - 0.15, high * 1.15)
    else:
        axes.set_yscale("symlog", linthresh=1.0)
        axes.set_ylim(low * 1.15 - 0.15, high * 1.15)
    axis = axes.xaxis if across else axes.yaxis
    ticks = [tick for tick in _DECIBEL_TICKS if low * 1.15 - 0.15 <= tick <= high * 1.15]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_minor_locator(NullLocator())


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.yaxis.grid(False)


def _sigma_tick(rows: Sequence[NoiseRow], sigma: float) -> str:
    ratio = next((row.norm_ratio for row in rows if row.sigma == sigma), math.nan)
    return f"{sigma:g}\n({times(ratio)})"


def _snr(row: FidelityRow | Any) -> float:
    return float(row.snr_db)


def _cosine(row: FidelityRow | Any) -> float:
    return float(row.cosine)


def _title(study: Study, what: str) -> str:
    rounds = study.rounds
    span = str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    return f"{study.recording}: {what}, rounds {span}"
