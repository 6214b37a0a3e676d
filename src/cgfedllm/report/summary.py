"""A whole run in a few numbers: what the final table shows and what JSON mode ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cgfedllm.metrics import RoundRecord

PHASES = ("train", "encode", "transfer", "decode", "aggregate", "evaluate", "checkpoint")
"""Parts of a round's wall time, in the order they happen; the rest is "other"."""


@dataclass(frozen=True)
class Traffic:
    """Bytes in one direction.

    Parameters
    ----------
    sent : int
        Length of the packets that went over the wire.
    fp32 : int
        What the same messages weigh as bare float32.
    """

    sent: int
    fp32: int

    @property
    def times_fewer(self) -> float | None:
        """``fp32 / sent``; None where nothing was sent."""
        return self.fp32 / self.sent if self.sent and self.fp32 else None

    @property
    def bits_per_parameter(self) -> float | None:
        """Bits on the wire for one float32 value; None where nothing was sent."""
        return 32 * self.sent / self.fp32 if self.sent and self.fp32 else None


@dataclass(frozen=True)
class Change:
    """A held-out NLL before training and at the latest evaluation, nats per label token."""

    before: float
    after: float

    @property
    def difference(self) -> float:
        """``after - before``; negative is better."""
        return self.after - self.before


@dataclass(frozen=True)
class Summary:
    """What came out of the rounds done so far."""

    rounds: int
    uplink: Traffic
    downlink: Traffic
    heldout: Change | None
    clients: dict[str, Change]
    seconds: dict[str, float]
    """Wall time by phase, "other" and "total" included."""
    failures: int
    product_gap: float | None = None
    """Of the last round: what averaging the factors apart ignores, as a share of mean(B A)."""
    notes: list[str] = field(default_factory=list)
    codec_bytes: int = 0
    """State of a learned uplink codec, sent down; in neither direction's traffic above."""
    secagg_uplink_bytes: int = 0
    """Keys and shares of secure aggregation, sent up; not in the uplink's traffic."""
    secagg_downlink_bytes: int = 0
    """The same, sent down."""
    tgap_uplink_bytes: int = 0
    """What pre-training that codec cost clients' uplinks; in no other number."""
    tgap_downlink_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON; derived numbers included."""
        plain = asdict(self)
        for name, traffic in (("uplink", self.uplink), ("downlink", self.downlink)):
            plain[name]["times_fewer"] = traffic.times_fewer
            plain[name]["bits_per_parameter"] = traffic.bits_per_parameter
        return plain


def summarise(records: Sequence[RoundRecord]) -> Summary:
    """Sum a run up.

    Parameters
    ----------
    records : sequence of RoundRecord
        Rounds in order, round 0 (before any training) first where it was evaluated.
    """
    last = records[-1] if records else RoundRecord(0)
    held = [r.heldout_nll for r in records if r.heldout_nll is not None]
    first_nll: dict[str, float] = {}
    last_nll: dict[str, float] = {}
    for record in records:
        for client, nll in record.client_nll.items():
            first_nll.setdefault(client, nll)
            last_nll[client] = nll
    notes = []
    if held and last.heldout_nll is None:
        evaluated = max(r.round for r in records if r.heldout_nll is not None)
        notes.append(f"last evaluated after round {evaluated}")
    return Summary(
        rounds=last.round,
        uplink=Traffic(last.uplink_bytes_total, last.uplink_bytes_fp32_total),
        downlink=Traffic(last.downlink_bytes_total, last.downlink_bytes_fp32_total),
        heldout=Change(held[0], held[-1]) if held else None,
        clients={name: Change(nll, last_nll[name]) for name, nll in first_nll.items()},
        seconds=_seconds(records),
        failures=sum(len(r.failures) for r in records),
        product_gap=last.product_gap,
        notes=notes,
        codec_bytes=last.codec_bytes_total,
        secagg_uplink_bytes=last.secagg_uplink_bytes_total,
        secagg_downlink_bytes=last.secagg_downlink_bytes_total,
        tgap_uplink_bytes=sum(r.tgap_uplink_bytes for r in records),
        tgap_downlink_bytes=sum(r.tgap_downlink_bytes for r in records),
    )


def mean_train_loss(record: RoundRecord) -> float | None:
    """Loss over the round's clients, weighted by examples; None if nobody trained."""
    if record.flush:
        return None
    weight = sum(c.examples for c in record.clients)
    if not weight:
        return None
    return sum(c.train_loss * c.examples for c in record.clients) / weight


def _seconds(records: Sequence[RoundRecord]) -> dict[str, float]:
    totals = {p: sum(r.seconds.get(p, 0.0) for r in records) for p in PHASES}
    known = sum(totals.values())
    # clients may run side by side; then the phases add up to more than the wall time
    total = sum(r.seconds.get("total", 0.0) for r in records) or known
    return {**totals, "other": max(0.0, total - known), "total": total}
