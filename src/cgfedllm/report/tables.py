"""The table at the end of a run; 80 columns are enough."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cgfedllm.metrics import RoundRecord
from cgfedllm.report.summary import PHASES, Change, Summary, summarise
from cgfedllm.report.units import count_of, human_bytes, human_ratio, human_seconds

_MOST_CLIENTS = 20
_EXTREMES = 5


def final_table(
    records: Sequence[RoundRecord], *, uplink_codec: str = "", downlink_codec: str = ""
) -> RenderableType:
    """Show what came out of a run: bytes against fp32, held-out NLL, and where the time went.

    Parameters
    ----------
    records : sequence of RoundRecord
        All rounds of the run, round 0 included where it was evaluated.
    uplink_codec, downlink_codec : str
        Named beside the bytes.
    """
    summary = summarise(records)
    parts: list[RenderableType] = [Text(), _bytes_table(summary, uplink_codec, downlink_codec)]
    if summary.heldout or summary.clients:
        parts += [Text(), _nll_table(summary)]
    if summary.seconds["total"] > 0:
        parts += [Text(), _time_line(summary)]
    if summary.product_gap is not None:
        gap = f"{100 * summary.product_gap:.2g} %"
        parts.append(Text(f"Factors averaged apart: {gap} off the mean product (last round)"))
    if summary.failures:
        lost = count_of(summary.failures, "client reply", "client replies")
        parts.append(Text(f"{lost} could not be used", style="yellow"))
    return Group(*parts)


def print_final(
    console: Console,
    records: Sequence[RoundRecord],
    *,
    run_dir: str | Path,
    adapter_dir: str | Path | None = None,
    uplink_codec: str = "",
    downlink_codec: str = "",
    report: Path | None = None,
) -> None:
    """Print `final_table` and, below it, where the adapter, the run and its report are."""
    console.print(final_table(records, uplink_codec=uplink_codec, downlink_codec=downlink_codec))
    console.print()
    # soft_wrap: paths are there to be copied, so they are neither cut nor folded
    if adapter_dir is not None:
        console.print(Text(f"Adapter  {adapter_dir}", style="bold green"), soft_wrap=True)
    console.print(Text(f"Run      {run_dir}"), soft_wrap=True)
    if report is not None:
        console.print(Text(f"Report   {report}"), soft_wrap=True)


def plain_table() -> Table:
    """Make an empty table without lines."""
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")


def _bytes_table(summary: Summary, uplink_codec: str, downlink_codec: str) -> Table:
    table = plain_table()
    table.add_column("Bytes", overflow="fold", min_width=10)
    for title in ("sent", "as fp32", "fewer", "bits per parameter"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, codec, traffic in (
        ("uplink", uplink_codec, summary.uplink),
        ("downlink", downlink_codec, summary.downlink),
    ):
        bits = traffic.bits_per_parameter
        table.add_row(
            f"{name} ({codec})" if codec else name,
            human_bytes(traffic.sent),
            human_bytes(traffic.fp32),
            human_ratio(traffic.times_fewer),
            f"{bits:.2f}" if bits is not None else "-",
        )
    for name, sent in (
        ("codec state, down", summary.codec_bytes),
        ("secure aggregation, up", summary.secagg_uplink_bytes),
        ("secure aggregation, down", summary.secagg_downlink_bytes),
        ("pre-training, up", summary.tgap_uplink_bytes),
        ("pre-training, down", summary.tgap_downlink_bytes),
    ):
        if sent:
            table.add_row(name, human_bytes(sent))
    return table


def _nll_table(summary: Summary) -> Table:
    table = plain_table()
    note = f" ({', '.join(summary.notes)})" if summary.notes else ""
    table.add_column(f"Held-out NLL{note}", overflow="fold", min_width=14, max_width=40)
    for title in ("before", "after", "difference"):
        table.add_column(title, justify="right", no_wrap=True)
    if summary.heldout:
        _nll_row(table, "global", summary.heldout, style="bold")
    rows = sorted(summary.clients.items(), key=lambda item: item[1].difference)
    if len(rows) > _MOST_CLIENTS:
        hidden = rows[_EXTREMES:-_EXTREMES]
        for name, change in rows[:_EXTREMES]:
            _nll_row(table, name, change)
        middle = Change(
            statistics.fmean(c.before for _, c in hidden),
            statistics.fmean(c.after for _, c in hidden),
        )
        _nll_row(table, f"({len(hidden)} clients between, mean)", middle, style="dim")
        rows = rows[-_EXTREMES:]
    for name, change in rows:
        _nll_row(table, name, change)
    return table


def _nll_row(table: Table, name: str, change: Change, style: str = "") -> None:
    colour = "green" if change.difference < 0 else "red" if change.difference > 0 else ""
    table.add_row(
        Text(name),
        f"{change.before:.4f}",
        f"{change.after:.4f}",
        Text(f"{change.difference:+.4f}", style=colour),
        style=style,
    )


def _time_line(summary: Summary) -> Text:
    total = summary.seconds["total"]
    line = Text()
    line.append("Time  ", style="bold")
    line.append(f"{human_seconds(total)} over {count_of(summary.rounds, 'round')}: ")
    shares = []
    for phase in (*PHASES, "other"):
        spent = summary.seconds[phase]
        if spent > 0:
            percent = 100 * spent / total
            shown = f"{percent:.0f} %" if percent >= 0.5 else "<1 %"
            shares.append(f"{phase} {human_seconds(spent)} ({shown})")

    line.append(", ".join(shares))
    return line
