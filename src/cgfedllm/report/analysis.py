"""An analysis on disk and on the terminal: CSV for programs, JSON for the record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cgfedllm.analysis.distributions import DistributionRow, HistogramRow
from cgfedllm.analysis.noise import NoiseRow
from cgfedllm.analysis.rate import RateRow
from cgfedllm.analysis.rounds import ALL, FidelityRow
from cgfedllm.analysis.study import Study
from cgfedllm.analysis.swap import SwapRow
from cgfedllm.analysis.trials import candidate_label
from cgfedllm.report.open_loop import decibels
from cgfedllm.report.rows import plain, rows_to_csv
from cgfedllm.report.tables import plain_table
from cgfedllm.report.units import human_ratio
from cgfedllm.storage import write_atomic, write_json

_TABLES: dict[str, type[Any]] = {
    "fidelity": FidelityRow,
    "rate": RateRow,
    "swap": SwapRow,
    "noise": NoiseRow,
    "distributions": DistributionRow,
    "histograms": HistogramRow,
}


def write_studies(folder: Path, studies: Sequence[Study], about: dict[str, Any]) -> list[Path]:
    """Write everything found so far; called after each recording, it replaces what was there.

    Parameters
    ----------
    folder : Path
        Made if missing.
    studies : sequence of Study
        One a recording.
    about : dict
        Command, configuration and versions.

    Returns
    -------
    list of Path
        A CSV a table that has rows (``fidelity``, ``rate``, ``swap``, ``noise``,
        ``distributions``, ``histograms``), and ``analysis.json``.

    Raises
    ------
    StorageError
        If a file cannot be written.
    """
    written = []
    for name, row_type in _TABLES.items():
        rows = [row for study in studies for row in getattr(study, name)]
        if rows:
            written.append(folder / f"{name}.csv")
            write_atomic(written[-1], rows_to_csv(row_type, rows))
    written.append(folder / "analysis.json")
    write_json(written[-1], {**plain(about), **studies_to_dict(studies)})
    return written


def studies_to_dict(studies: Sequence[Study]) -> dict[str, Any]:
    """Plain types, ready for JSON: everything but what is told round by round."""
    told: dict[str, Any] = plain(
        {
            "rounds": {study.recording: study.rounds for study in studies},
            "notes": {study.recording: study.notes for study in studies if study.notes},
            "refused": [asdict(r) for study in studies for r in study.refusals],
            "fidelity": [
                asdict(row) for study in studies for row in study.fidelity if row.round is None
            ],
            **{
                name: [asdict(row) for study in studies for row in getattr(study, name)]
                for name in ("rate", "swap", "noise")
            },
        }
    )
    return told


def study_tables(study: Study) -> RenderableType:
    """One row a codec: fidelity over all rounds, rate, swap test; then noise."""
    parts: list[RenderableType] = []
    if study.fidelity or study.rate or study.swap:
        parts += [_codecs(study), Text(_CODECS_NOTE, style="italic dim"), Text()]
    if study.noise:
        parts += [_noise(study), Text(_NOISE_NOTE, style="italic dim"), Text()]
    if study.distributions:
        rounds = ", ".join(map(str, study.rounds))
        parts.append(Text(f"distributions of rounds {rounds}: see the figures"))
    parts += [Text(f"note: {note}", style="yellow") for note in study.notes]
    parts += [
        Text(f"refused: {candidate_label(r.codec, json.loads(r.options))}: {r.reason}", "yellow")
        for r in study.refusals
    ]
    return Group(*parts)


def times(ratio: float) -> str:
    """Two digits, and never an exponent for what is large."""
    return f"{ratio:.2g}" if ratio < 100 else f"{ratio:,.0f}"


_CODECS_NOTE = (
    "SNR in dB over all rounds: of client updates, of the round's mean, of what is new against the "
    "last mean, of the change of B A; swap: one client's packet taken for another's, which must be "
    "worse; elements: latent over input"
)
_NOISE_NOTE = (
    "SNR in dB against the clean update; none: without noise; (uncoded): what the noise alone costs"
)


def _codecs(study: Study) -> Table:
    table = _titled(study, "what codecs keep")
    table.add_column("codec", overflow="fold", min_width=10, max_width=34)
    columns = ("bits", "fewer", "elements", "update", "mean", "new", "B A", "cosine", "swap")
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    rates = {(r.codec, r.options): r for r in study.rate}
    swaps = {(r.codec, r.options): r for r in study.swap}
    pooled: dict[tuple[str, ...], FidelityRow] = {
        (r.codec, r.options, r.level, r.quantity): r
        for r in study.fidelity
        if r.round is None and r.module == ALL
    }
    rows: list[Any] = [*study.fidelity, *study.rate, *study.swap]
    for key in dict.fromkeys((row.codec, row.options) for row in rows):
        rate, swap, own = rates.get(key), swaps.get(key), pooled.get((*key, "client", "update"))
        share = rate.element_share if rate else None
        found = [
            pooled.get((*key, level, quantity))
            for level, quantity in (
                ("client", "update"),
                ("aggregate", "update"),
                ("client", "innovation"),
                ("client", "product"),
            )
        ]
        table.add_row(
            Text(candidate_label(key[0], json.loads(key[1]))),
            f"{rate.bpp:.3g}" if rate else "-",
            human_ratio(rate.times_fewer_than_fp32) if rate else "-",
            "-" if share is None else f"{100 * share:.3g} %",
            *(decibels(row.snr_db) if row else "-" for row in found),
            f"{own.cosine:.3f}" if own else "-",
            decibels(swap.swapped_snr_db) if swap else "-",
        )
    return table


def _noise(study: Study) -> Table:
    table = _titled(study, "noise")
    table.add_column("codec", overflow="fold", min_width=10, max_width=34)
    table.add_column("on", no_wrap=True)
    sigmas = sorted({row.sigma for row in study.noise})
    for sigma in sigmas:
        table.add_column(f"{sigma:g}" if sigma else "none", justify="right", no_wrap=True)
    cells: dict[tuple[str, str, str], dict[float, NoiseRow]] = {}
    for row in study.noise:
        cells.setdefault((row.codec, row.options, row.place), {})[row.sigma] = row
    for (codec, options, place), own in cells.items():
        values = (decibels(own[sigma].snr_db) if sigma in own else "-" for sigma in sigmas)
        table.add_row(Text(candidate_label(codec, json.loads(options))), place, *values)
    first = next(iter(cells.values()))
    ratios = (times(first[s].norm_ratio) if s in first else "-" for s in sigmas)
    table.add_row("noise / update, norms", "update", *ratios, style="dim")
    return table


def _titled(study: Study, what: str) -> Table:
    table = plain_table()
    table.title = f"{study.recording}, {what}"
    table.title_justify = "left"
    table.title_style = "bold"
    return table
