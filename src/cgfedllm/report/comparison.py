"""Several runs of one experiment side by side, paired by seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from cgfedllm.metrics import RoundRecord
from cgfedllm.report.summary import Traffic, summarise
from cgfedllm.report.tables import plain_table
from cgfedllm.report.units import human_bytes, human_ratio, human_seconds


@dataclass(frozen=True)
class ComparisonEntry:
    """One run of a comparison.

    Parameters
    ----------
    codec : str
        Name (with options, if any) of the uplink codec.
    seed : int
        Seed shared by the runs of one pair.
    records : list of RoundRecord
        All its rounds.
    """

    codec: str
    seed: int
    records: list[RoundRecord] = field(repr=False)


def comparison_table(entries: Sequence[ComparisonEntry]) -> Table:
    """Show one row a codec; differences are paired by seed against the first codec.

    Parameters
    ----------
    entries : sequence of ComparisonEntry
        Runs in any order; the first one's codec is the reference.
    """
    table = plain_table()
    table.min_width = 78  # for the caption: it is folded to the table's width
    table.add_column("codec", overflow="fold", min_width=10, max_width=30)
    for title in ("uplink", "fewer", "bits", "NLL", "difference", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    codecs = list(dict.fromkeys(entry.codec for entry in entries))
    outcomes = {(e.codec, e.seed): summarise(e.records) for e in entries}
    for codec in codecs:
        own = {seed: s for (name, seed), s in outcomes.items() if name == codec}
        nlls = {seed: s.heldout.after for seed, s in own.items() if s.heldout}
        against = [
            nll - reference.heldout.after
            for seed, nll in nlls.items()
            if (reference := outcomes.get((codecs[0], seed))) and reference.heldout
        ]
        total = Traffic(
            sum(s.uplink.sent for s in own.values()), sum(s.uplink.fp32 for s in own.values())
        )
        bits = total.bits_per_parameter
        table.add_row(
            codec,
            human_bytes(total.sent / len(own)),
            human_ratio(total.times_fewer),
            f"{bits:.2f}" if bits is not None else "-",
            _mean(list(nlls.values()), "{:.4f}"),
            "reference" if codec == codecs[0] else _mean(against, "{:+.4f}"),
            human_seconds(sum(s.seconds["total"] for s in own.values()) / len(own)),
        )
    seeds = sorted({entry.seed for entry in entries})
    table.caption = (
        f"held-out NLL in nats per label token, mean over seeds {', '.join(map(str, seeds))}"
        + (" with its standard error" if len(seeds) > 1 else "")
        + f"; differences against {codecs[0]!r} with the same seed; bits per parameter"
        if codecs
        else ""
    )
    table.caption_justify = "left"
    return table


def entries_to_dicts(entries: Sequence[ComparisonEntry]) -> list[dict[str, Any]]:
    """One plain object a run, ready for JSON: codec, seed and the summary's numbers."""
    return [{"codec": e.codec, "seed": e.seed, **summarise(e.records).to_dict()} for e in entries]


def _mean(values: list[float], layout: str) -> str:
    if not values:
        return "-"
    mean = layout.format(statistics.fmean(values))
    if len(values) < 2:
        return mean
    return f"{mean} ±{statistics.stdev(values) / len(values) ** 0.5:.4f}"
