"""The open-loop bench on disk and on the terminal: CSV for programs, JSON for the record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cgfedllm.analysis.open_loop_rows import ModelRow, ModuleRow, OpenLoop, OpenLoopRow
from cgfedllm.analysis.structure import Structure
from cgfedllm.errors import CheckpointError
from cgfedllm.report.rows import plain, read_rows, rows_to_csv, table_to_csv
from cgfedllm.report.tables import plain_table
from cgfedllm.report.units import count_of, human_ratio
from cgfedllm.storage import read_json, write_atomic, write_json


def write_results(
    folder: Path,
    results: Sequence[OpenLoop],
    structures: Mapping[str, Structure],
    about: dict[str, Any],
) -> list[Path]:
    """Write everything measured so far; called after each recording, it replaces what was there.

    Parameters
    ----------
    folder : Path
        Made if missing.
    results : sequence of OpenLoop
        One a recording.
    structures : mapping of str to Structure
        Facts by recording, where they were asked for.
    about : dict
        Command, configuration and versions, for the JSON file.

    Returns
    -------
    list of Path
        ``codecs.csv``, ``modules.csv``, ``models.csv``, ``open_loop.json`` and, with facts,
        ``structure.csv``.

    Raises
    ------
    StorageError
        If a file cannot be written.
    """
    tables: dict[str, str] = {
        "codecs.csv": rows_to_csv(OpenLoopRow, (row for r in results for row in r.rows)),
        "modules.csv": rows_to_csv(ModuleRow, (row for r in results for row in r.modules)),
        "models.csv": rows_to_csv(ModelRow, (row for r in results for row in r.models)),
    }
    if structures:
        facts = ([name, *row] for name, s in structures.items() for row in s.rows())
        tables["structure.csv"] = table_to_csv(["recording", "fact", "kind", "value"], facts)
    for name, text in tables.items():
        write_atomic(folder / name, text)
    summary = folder / "open_loop.json"
    write_json(summary, {**plain(about), **results_to_dict(results, structures)})
    return [*(folder / name for name in tables), summary]


def read_results(folder: Path) -> list[OpenLoop]:
    """Read back the tables that `write_results` wrote, one entry a recording.

    What was refused is not in them.

    Raises
    ------
    CheckpointError
        If a table is missing or damaged; the message names it.
    """
    rounds = read_json(folder / "open_loop.json").get("rounds", {})
    results = {name: OpenLoop(name, tuple(own)) for name, own in rounds.items()}
    tables: dict[str, Any] = {
        "codecs.csv": (OpenLoopRow, lambda result: result.rows),
        "modules.csv": (ModuleRow, lambda result: result.modules),
        "models.csv": (ModelRow, lambda result: result.models),
    }
    for name, (row_type, rows_of) in tables.items():
        for row in read_rows(folder / name, row_type):
            if row.recording not in results:
                raise CheckpointError(f"{folder / name} is damaged: it is of another bench")
            rows_of(results[row.recording]).append(row)
    return list(results.values())


def results_to_dict(
    results: Sequence[OpenLoop], structures: Mapping[str, Structure]
) -> dict[str, Any]:
    """Plain types, ready for JSON; infinity is "inf", what is not known is null."""
    told: dict[str, Any] = plain(
        {
            "rounds": {result.recording: result.rounds for result in results},
            "refused": [asdict(r) for result in results for r in result.refusals],
            "structure": {name: s.to_dict() for name, s in structures.items()},
            "codecs": [asdict(row) for result in results for row in result.rows],
        }
    )
    return told


def open_loop_table(result: OpenLoop) -> RenderableType:
    """One row a codec and rate, by codec, on one recording; what was refused stands below."""
    table = plain_table()
    table.title = f"{result.recording}, open loop"
    table.title_justify = "left"
    table.title_style = "bold"
    table.add_column("codec", overflow="fold", min_width=10, max_width=34)
    for title in ("bits", "fewer", "SNR", "cosine", "mean", "swap", "encode", "decode"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in result.rows:
        reference = row.bpp == 0
        table.add_row(
            Text(row.codec if reference else row.label),
            _bits(row.bpp),
            "-" if reference else human_ratio(row.times_fewer_than_fp32),
            decibels(row.snr_db),
            f"{row.cosine:.3f}",
            decibels(row.aggregate_snr_db),
            decibels(row.swap_snr_db),
            "-" if reference else _milliseconds(row.encode_ms),
            "-" if reference else _milliseconds(row.decode_ms),
            style="dim" if reference else "",
        )
    measured = max((row.updates for row in result.rows), default=0)
    rounds = ", ".join(map(str, result.rounds))
    parts: list[RenderableType] = [
        table,
        Text(
            f"{count_of(measured, 'update')} of round{'s' * (len(result.rounds) > 1)} {rounds}; "
            "bits per parameter of whole packets; SNR in dB of client updates, of the round's "
            "mean, and of one client's packet taken for another's; times in ms (median); "
            "(previous): guessing the aggregate of the round before, and its best multiple",
            style="italic dim",
        ),
    ]
    parts += [
        Text(f"refused: {_asked(r.codec, r.asked_bpp)}: {r.reason}", style="yellow")
        for r in result.refusals
    ]
    return Group(*parts)


def structure_table(structures: Mapping[str, Structure]) -> Table:
    """Facts as rows, recordings as columns."""
    table = plain_table()
    table.title = "what the updates look like"
    table.title_justify = "left"
    table.title_style = "bold"
    table.add_column("fact", overflow="fold", max_width=46)
    table.add_column("of", no_wrap=True)
    for name in structures:
        table.add_column(name, justify="right")
    values = {name: {(f, k): v for f, k, v in s.rows()} for name, s in structures.items()}
    keys = dict.fromkeys(key for known in values.values() for key in known)
    for fact, kind in keys:
        cells = (values[name].get((fact, kind), math.nan) for name in structures)
        table.add_row(fact, kind, *("-" if math.isnan(v) else f"{v:.3f}" for v in cells))
    return table


def decibels(value: float) -> str:
    """Two digits; ``exact`` for infinity, ``-`` where there is no number."""
    if math.isnan(value):
        return "-"
    return "exact" if value == math.inf else f"{value:.2f}"


def _bits(bpp: float) -> str:
    return "0" if bpp == 0 else f"{bpp:.3g}" if bpp < 1 else f"{bpp:.2f}"


def _milliseconds(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def _asked(codec: str, bpp: float | None) -> str:
    return codec if bpp is None else f"{codec} at {bpp:g} bits"
