"""The report's charts: which numbers of a run go on which axes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from cgfedllm.analysis.curves import curve_of
from cgfedllm.metrics import RoundRecord
from cgfedllm.report.fidelity import finite_snr, total_fidelity
from cgfedllm.report.html.axes import (
    Axis,
    bytes_axis,
    drawable,
    log_bytes_axis,
    number_axis,
    rounds_axis,
    seconds_axis,
)
from cgfedllm.report.html.charts import Chart, Series, column_chart, line_chart, points_of
from cgfedllm.report.html.reading import RunFacts
from cgfedllm.report.html.tables import train_loss

NLL = "nats per label token"


def nll_chart(run: RunFacts) -> Chart | None:
    """Held-out NLL over rounds, and the mean over clients' own rows."""
    heldout = points_of([(r.round, r.heldout_nll) for r in run.records])
    clients = points_of(
        [(r.round, statistics.fmean(r.client_nll.values())) for r in run.records if r.client_nll]
    )
    series = _present(Series("held-out rows", heldout), Series("clients’ own rows, mean", clients))
    return _over_rounds("nll", "Negative log-likelihood", NLL, ".4f", run.records, series)


def loss_chart(run: RunFacts) -> Chart | None:
    """Training loss over rounds."""
    series = _present(
        Series("training loss", points_of([(r.round, train_loss(r)) for r in run.records]))
    )
    title = "Training loss, mean over clients"
    return _over_rounds("loss", title, NLL, ".4f", run.records, series)


def norm_chart(run: RunFacts) -> Chart | None:
    """How far each round moved the global adapter."""
    points = points_of([(r.round, r.update_norm or None) for r in run.records])
    series = _present(Series("change of the adapter", points))
    title = "Change of the global adapter in each round"
    return _over_rounds("norm", title, "Euclidean norm", ".4g", run.records, series, zero=True)


def epsilon_chart(run: RunFacts) -> Chart | None:
    """Privacy spent by round."""
    series = _present(Series("spent", points_of([(r.round, r.epsilon) for r in run.records])))
    private = run.config is not None and run.config.privacy.mechanism != "none"
    budget = run.config.privacy.epsilon if private and run.config else None
    levels = [(budget, "budget")] if budget is not None and drawable(budget) else []
    return _over_rounds(
        "epsilon", "Privacy spent", "epsilon", ".3f", run.records, series, zero=True, levels=levels
    )


def traffic_charts(run: RunFacts) -> list[Chart]:
    """Bytes of each round, a chart for each kind that was sent, and how they add up."""
    records = run.records
    kinds: tuple[tuple[str, str, Callable[[RoundRecord], int]], ...] = (
        ("uplink", "Uplink in each round", lambda r: r.uplink_bytes),
        ("downlink", "Downlink in each round", lambda r: r.downlink_bytes),
        ("codec-state", "Codec state sent down in each round", lambda r: r.codec_bytes),
    )
    charts = [_columns(key, title, records, value) for key, title, value in kinds]
    return [chart for chart in (_cumulative(records), *charts) if chart is not None]


def seconds_chart(run: RunFacts) -> Chart | None:
    """Wall time of each round."""
    points = points_of([(r.round, r.seconds.get("total")) for r in run.records])
    if not points:
        return None
    y = seconds_axis("wall time", [spent for _, spent in points])
    return column_chart(
        "seconds", "Wall time of each round", _rounds(run.records), y, points,
        flush=_flush(run.records),
    )  # fmt: skip


def kept_chart(runs: Mapping[str, RunFacts]) -> Chart | None:
    """SNR of each round's packets, one line a run; none where every packet is exact."""
    records = [record for run in runs.values() for record in run.records]
    series = _present(
        *(
            Series(
                label,
                points_of([(r.round, finite_snr(total_fidelity([r]))) for r in run.records]),
            )
            for label, run in runs.items()
        )
    )
    title = "SNR of the packets in each round, all modules"
    return _over_rounds("kept-rounds", title, "dB", ".2f", records, series)


def nll_by_rounds(runs: Mapping[str, RunFacts]) -> Chart | None:
    """Held-out NLL over rounds, one line a run."""
    records = [record for run in runs.values() for record in run.records]
    series = _present(
        *(
            Series(label, points_of([(r.round, r.heldout_nll) for r in run.records]))
            for label, run in runs.items()
        )
    )
    return _over_rounds("nll-rounds", "Held-out NLL over rounds", NLL, ".4f", records, series)


def nll_by_uplink(runs: Mapping[str, RunFacts]) -> Chart | None:
    """Held-out NLL against what the clients had sent by then, bytes on a log scale."""
    curves = {
        label: [(float(p.uplink), p.nll) for p in curve_of(run.records) if p.uplink > 0]
        for label, run in runs.items()
    }
    series = _present(
        *(Series(label, points_of(points), steps=True) for label, points in curves.items())
    )
    if not series:
        return None
    starts = [curve[0].nll for run in runs.values() if (curve := curve_of(run.records))]
    starts = [nll for nll in starts[:1] if drawable(nll)]
    points = [point for each in series for point in each.points]
    return line_chart(
        "nll-uplink",
        "Held-out NLL against uplink bytes",
        log_bytes_axis("uplink of all clients so far (log scale)", [sent for sent, _ in points]),
        number_axis(NLL, [*(nll for _, nll in points), *starts], ".4f"),
        series,
        levels=[(nll, "before training") for nll in starts],
        note="A loss holds until the next evaluated round. Runs that sent nothing have no line.",
    )


def _over_rounds(
    key: str,
    title: str,
    label: str,
    form: str,
    records: Sequence[RoundRecord],
    series: Sequence[Series],
    *,
    zero: bool = False,
    levels: Sequence[tuple[float, str]] = (),
) -> Chart | None:
    if not series:
        return None
    values = [value for each in series for _, value in each.points]
    y = number_axis(label, [*values, *(value for value, _ in levels)], form, zero=zero)
    return line_chart(key, title, _rounds(records), y, series, levels=levels)


def _cumulative(records: Sequence[RoundRecord]) -> Chart | None:
    kinds: tuple[tuple[str, Callable[[RoundRecord], int]], ...] = (
        ("uplink", lambda r: r.uplink_bytes_total),
        ("downlink", lambda r: r.downlink_bytes_total),
        ("codec state, down", lambda r: r.codec_bytes_total),
    )
    series = _present(
        *(Series(label, _totals(records, value)) for label, value in kinds),
        Series("uplink as fp32", _totals(records, lambda r: r.uplink_bytes_fp32_total), under=True),
    )
    if not series:
        return None
    sent = [value for each in series for _, value in each.points]
    y = log_bytes_axis("bytes so far (log scale)", sent)
    return line_chart("bytes", "Bytes sent so far", _rounds(records), y, series)


def _totals(
    records: Sequence[RoundRecord], value: Callable[[RoundRecord], int]
) -> list[tuple[float, float]]:
    return points_of([(r.round, value(r)) for r in records if value(r) > 0])


def _columns(
    key: str, title: str, records: Sequence[RoundRecord], value: Callable[[RoundRecord], int]
) -> Chart | None:
    points = points_of([(r.round, value(r)) for r in records])
    if not any(sent for _, sent in points):
        return None
    y = bytes_axis("sent", [sent for _, sent in points])
    return column_chart(key, title, _rounds(records), y, points, flush=_flush(records))


def _present(*series: Series) -> list[Series]:
    return [each for each in series if each.points]


def _rounds(records: Sequence[RoundRecord]) -> Axis:
    return rounds_axis(max(record.round for record in records))


def _flush(records: Sequence[RoundRecord]) -> list[float]:
    return [float(record.round) for record in records if record.flush]
