"""Several runs of one experiment side by side, paired by seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from cgfedllm.analysis.curves import ComparisonEntry, curve_of, gain_kept
from cgfedllm.report.summary import Summary, Traffic, summarise
from cgfedllm.report.tables import plain_table
from cgfedllm.report.units import human_bytes, human_ratio, human_seconds

__all__ = ["ComparisonEntry", "comparison_table", "entries_to_dicts"]


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
    for title in ("uplink", "fewer", "bits", "NLL", "difference", "kept", "time"):
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
            sum(s.uplink.sent for s in own.values()),
            round(sum(e.scale * outcomes[codec, e.seed].uplink.fp32 for e in entries
                      if e.codec == codec)),
        )  # fmt: skip
        bits = total.bits_per_parameter
        table.add_row(
            codec,
            human_bytes(total.sent / len(own)),
            human_ratio(total.times_fewer),
            f"{bits:.3g}" if bits is not None else "-",
            f"{statistics.fmean(nlls.values()):.4f}" if nlls else "-",
            "reference" if codec == codecs[0] else _mean(against, "{:+.4f}"),
            _kept(entries, codec, codecs[0]),
            human_seconds(sum(s.seconds["total"] for s in own.values()) / len(own)),
        )
    if codecs:
        table.caption = _caption(entries, codecs[0]) + _charges(outcomes, codecs)
        table.caption_justify = "left"
    return table


def entries_to_dicts(entries: Sequence[ComparisonEntry]) -> list[dict[str, Any]]:
    """One plain object a run, ready for JSON: codec, seed and the summary's numbers."""
    return [{"codec": e.codec, "seed": e.seed, **summarise(e.records).to_dict()} for e in entries]


def _caption(entries: Sequence[ComparisonEntry], reference: str) -> str:
    seeds = sorted({entry.seed for entry in entries})
    spread = " with its standard error" if len(seeds) > 1 else ""
    whose = " of the base configuration's adapter" if any(e.scale != 1.0 for e in entries) else ""
    return (
        f"held-out NLL in nats per label token, mean over seeds {', '.join(map(str, seeds))}; "
        f"difference{spread} from {reference!r} with the same seed; kept: share of its NLL gain; "
        f"bits per parameter{whose}; uplink of a whole run"
    )


def _charges(outcomes: Mapping[tuple[str, int], Summary], codecs: Sequence[str]) -> str:
    """What learned codecs and secure aggregation cost beside the uplink, each on a line."""
    lines = ""
    for what, attribute in (
        ("codec state sent down", "codec_bytes"),
        ("secure aggregation, up", "secagg_uplink_bytes"),
        ("secure aggregation, down", "secagg_downlink_bytes"),
        ("pre-training, up", "tgap_uplink_bytes"),
        ("pre-training, down", "tgap_downlink_bytes"),
    ):
        for codec in codecs:
            own = [getattr(s, attribute) for (name, _), s in outcomes.items() if name == codec]
            if any(own):
                lines += f"\n{what}, not in uplink: {codec} {human_bytes(sum(own) / len(own))}"
    return lines


def _kept(entries: Sequence[ComparisonEntry], codec: str, reference: str) -> str:
    curves = {(e.codec, e.seed): curve_of(e.records) for e in entries}
    shares = [
        gain_kept(curve, curves[reference, seed])
        for (name, seed), curve in curves.items()
        if name == codec and (reference, seed) in curves
    ]
    known = [share for share in shares if share is not None]
    return f"{100 * statistics.fmean(known):.1f} %" if known else "-"


def _mean(values: list[float], layout: str) -> str:
    if not values:
        return "-"
    mean = layout.format(statistics.fmean(values))
    if len(values) < 2:
        return mean
    return f"{mean} ±{statistics.stdev(values) / len(values) ** 0.5:.4f}"
