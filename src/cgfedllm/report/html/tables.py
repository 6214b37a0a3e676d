"""The report's tables: texts ready to be shown, one builder a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cgfedllm.metrics import RoundRecord
from cgfedllm.report.html.reading import CardFidelity, RunFacts, WeightChange
from cgfedllm.report.model_card import POOLS
from cgfedllm.report.summary import PHASES, Traffic, mean_train_loss
from cgfedllm.report.units import count_of, human_bytes, human_ratio, human_seconds

NOTHING = "–"
_EMPTY = (NOTHING, "0 B", "0.00 s")


@dataclass(frozen=True)
class Table:
    """Rows under headings; the first cell of a row names it.

    Parameters
    ----------
    caption : str
        What it shows.
    columns : list of str
        Headings.
    rows : list of list of str
        Cells.
    texts : frozenset of int
        Columns that hold words; the others hold numbers and are set flush right.
    """

    caption: str
    columns: list[str]
    rows: list[list[str]]
    texts: frozenset[int] = field(default_factory=lambda: frozenset({0}))


def fixed(value: float | None, form: str = ".4f") -> str:
    """Format a number; a dash where there is none."""
    return NOTHING if value is None else format(value, form).replace("-", "−")


def compact(value: float) -> str:
    """About four digits, and no power of ten as long as the number is no monster."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"


def signed(value: float | None) -> str:
    """A difference with its sign."""
    return fixed(value, "+.4f")


def ratio(traffic: Traffic) -> str:
    """How many times fewer than fp32."""
    return NOTHING if traffic.times_fewer is None else human_ratio(traffic.times_fewer)


def bits(traffic: Traffic) -> str:
    """Bits per parameter, three digits."""
    return fixed(traffic.bits_per_parameter, ".3g")


def round_name(record: RoundRecord) -> str:
    """A round's number, and what it was if no ordinary one."""
    if record.round == 0:
        return "0 (start)"
    return f"{record.round} (flush)" if record.flush else str(record.round)


def traffic_table(run: RunFacts) -> Table:
    """Bytes of the whole run, each kind apart."""
    summary = run.summary
    uplink = run.config.uplink.name if run.config else NOTHING
    downlink = run.config.downlink.name if run.config else NOTHING
    rows = [
        [name, codec, human_bytes(t.sent), human_bytes(t.fp32), ratio(t), bits(t)]
        for name, codec, t in (
            ("Uplink", uplink, summary.uplink),
            ("Downlink", downlink, summary.downlink),
        )
    ]
    for name, sent in (
        ("Codec state, down", summary.codec_bytes),
        ("Pre-training, up", summary.tgap_uplink_bytes),
        ("Pre-training, down", summary.tgap_downlink_bytes),
    ):
        if sent:
            rows.append([name, uplink, human_bytes(sent), NOTHING, NOTHING, NOTHING])
    return Table(
        "Bytes of the whole run, over all clients",
        ["kind", "codec", "sent", "as fp32", "fewer", "bits per parameter"],
        rows,
        frozenset({0, 1}),
    )


@dataclass
class _Part:
    """One client's part in a run, added up."""

    rows: int | None = None
    rounds: int = 0
    uplink: int = 0
    downlink: int = 0
    codec: int = 0
    seconds: float = 0.0
    failures: int = 0


def client_table(run: RunFacts) -> Table:
    """One row a client: who it is, what it sent, and how its own rows fare."""
    losses, parts = run.summary.clients, _parts(run)
    weights = _weights(run, parts)
    rows = []
    for name, part in parts.items():
        change = losses.get(name)
        rows.append(
            [
                name,
                NOTHING if part.rows is None else f"{part.rows:,}",
                f"{weights[name]:.1f} %" if name in weights else NOTHING,
                str(part.rounds),
                fixed(change.before if change else None),
                fixed(change.after if change else None),
                signed(change.difference if change else None),
                human_bytes(part.uplink),
                human_bytes(part.downlink),
                human_bytes(part.codec),
                human_seconds(part.seconds),
                str(part.failures),
            ]
        )
    columns = [
        "client", "rows", "weight", "rounds", "NLL before", "NLL after", "change", "uplink",
        "downlink", "codec state", "training", "failures",
    ]  # fmt: skip
    return _without_empty(Table("Clients over the whole run", columns, rows))


def rounds_table(run: RunFacts) -> Table:
    """Every number of every round."""
    rows = [
        [
            round_name(r),
            str(len(r.clients)),
            str(len(r.failures)),
            str(r.attempts),
            fixed(r.heldout_nll),
            fixed(train_loss(r)),
            human_bytes(r.uplink_bytes),
            human_bytes(r.downlink_bytes),
            human_bytes(r.codec_bytes),
            compact(r.update_norm),
            fixed(100 * r.product_gap, ".2g") + " %" if r.product_gap is not None else NOTHING,
            fixed(r.epsilon, ".3f"),
            human_seconds(r.seconds.get("total", 0.0)),
        ]
        for r in run.records
    ]
    columns = [
        "round", "clients", "failures", "attempts", "held-out NLL", "training loss", "uplink",
        "downlink", "codec state", "change of adapter", "factor averaging gap", "epsilon", "time",
    ]  # fmt: skip
    return _without_empty(Table("All rounds", columns, rows))


def fault_table(records: Sequence[RoundRecord]) -> Table:
    """Who was left out, when and why."""
    rows = [[str(r.round), f.client, f.reason] for r in records for f in r.failures]
    caption = count_of(len(rows), "reply", "replies") + " that could not be used"
    return Table(caption, ["round", "client", "reason"], rows, frozenset({0, 1, 2}))


def time_table(seconds: Mapping[str, float]) -> Table:
    """Where the time went."""
    parts = time_parts(seconds)
    whole = sum(spent for _, spent in parts)
    rows = [[name, human_seconds(spent), f"{100 * spent / whole:.1f} %"] for name, spent in parts]
    return Table("Time by phase, summed over rounds and clients", ["phase", "time", "share"], rows)


def time_parts(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """Phases that took any time, in their order."""
    return [(phase, seconds[phase]) for phase in (*PHASES, "other") if seconds[phase] > 0]


def module_table(weights: Sequence[WeightChange]) -> Table:
    """Weight change by kind of module, over all layers."""
    squares: dict[str, list[float]] = {}
    for each in weights:
        squares.setdefault(each.module, []).append(each.norm**2)
    whole = sum(map(sum, squares.values()))
    rows = [
        [
            module,
            str(len(own)),
            compact(sum(own) ** 0.5),
            fixed(100 * sum(own) / whole, ".1f") + " %" if whole else NOTHING,
        ]
        for module, own in sorted(squares.items(), key=lambda item: -sum(item[1]))
    ]
    return Table(
        "Change of the weights by module, over all layers",
        ["module", "matrices", "norm of the change", "share of its square"],
        rows,
    )


def card_table(card: Mapping[str, CardFidelity]) -> Table:
    """What the codec's own card says."""
    rows = [
        [
            POOLS.get(pool, pool),
            fixed(found.snr_db, ".2f"),
            fixed(found.cosine, ".3f"),
            fixed(found.bpp, ".4g"),
            str(found.updates),
        ]
        for pool, found in card.items()
    ]
    return Table(
        "The codec on recorded updates, when it was pre-trained (not in this run)",
        ["updates", "SNR (dB)", "cosine", "bits per parameter", "coded"],
        rows,
    )


def facts_table(caption: str, facts: Iterable[tuple[str, str]]) -> Table:
    """Labels and texts."""
    rows = [[label, text] for label, text in facts]
    return Table(caption, ["item", "value"], rows, frozenset({0, 1}))


def value_text(value: Any) -> str:
    """A configuration value in words."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value)) or "none"
    return str(value) if value not in ("", {}) else "none"


def train_loss(record: RoundRecord) -> float | None:
    """Clients' mean loss; under local privacy they tell none, and write 0."""
    return mean_train_loss(record) or None


def _without_empty(table: Table) -> Table:
    """Leave out columns in which there is nothing to read; the first stays."""
    keep = [
        index
        for index in range(len(table.columns))
        if index == 0 or any(row[index] not in _EMPTY for row in table.rows)
    ]
    return Table(
        table.caption,
        [table.columns[index] for index in keep],
        [[row[index] for index in keep] for row in table.rows],
    )


def _parts(run: RunFacts) -> dict[str, _Part]:
    parts = {name: _Part() for name in run.clients}
    for record in run.records:
        for failure in record.failures:
            parts[failure.client].failures += 1
        for client in record.clients:
            part = parts[client.client]
            part.uplink += client.uplink_bytes
            part.downlink += client.downlink_bytes
            part.codec += client.codec_bytes
            part.seconds += client.train_seconds
            if not record.flush:
                part.rows = client.examples
                part.rounds += 1
    return parts


def _weights(run: RunFacts, parts: Mapping[str, _Part]) -> dict[str, float]:
    """Percent of the average if everybody took part; empty where the run does not say."""
    federation = run.config.federation if run.config else None
    if federation is None or federation.aggregation == "sum":
        return {}
    equal = federation.weighting == "uniform"
    rows = {name: 1 if equal else p.rows for name, p in parts.items() if p.rows is not None}
    whole = sum(rows.values())
    return {name: 100 * count / whole for name, count in rows.items()} if whole else {}
