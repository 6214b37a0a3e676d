"""What codecs kept of the updates, module by module: tables and a heat map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cgfedllm.analysis.fidelity import Fidelity
from cgfedllm.metrics import RoundRecord
from cgfedllm.report.fidelity import fidelity_by_module, finite_snr, pooled
from cgfedllm.report.html.axes import drawable
from cgfedllm.report.html.heat import Entry, Heat, heat_of
from cgfedllm.report.html.reading import RunFacts
from cgfedllm.report.html.tables import NOTHING, Table, fixed

ALL = "all modules"
EXACT = "exact"
_MOST_COLUMNS = 60


def snr_text(fidelity: Fidelity | None) -> str:
    """Decibels in words."""
    if fidelity is None or math.isnan(fidelity.snr_db):
        return NOTHING
    return fixed(fidelity.snr_db, ".2f") if fidelity.error else EXACT


def kept_table(run: RunFacts) -> Table | None:
    """Fidelity by kind of factor over the whole run."""
    pools = fidelity_by_module(run.records)
    whole = pooled(pools.values())
    if whole is None:
        return None
    rows = [
        [
            _shown(kind),
            fixed(100 * one.signal / whole.signal, ".1f") + " %" if whole.signal else NOTHING,
            snr_text(one),
            _cosine_text(one),
        ]
        for kind, one in {**pools, ALL: whole}.items()
    ]
    return Table(
        "SNR and cosine by module, over the whole run",
        ["module and factor", "share of the energy", "SNR (dB)", "cosine"],
        rows,
    )


def kept_by_run(runs: Mapping[str, RunFacts]) -> Table | None:
    """SNR by kind of factor, a column a run."""
    pools = {name: fidelity_by_module(run.records) for name, run in runs.items()}
    kinds = dict.fromkeys(kind for own in pools.values() for kind in own)
    if not kinds:
        return None
    rows = [[_shown(kind), *(snr_text(own.get(kind)) for own in pools.values())] for kind in kinds]
    rows.append([ALL, *(snr_text(pooled(own.values())) for own in pools.values())])
    return Table("SNR of the packets by module (dB)", ["module and factor", *runs], rows)


def kept_heat(run: RunFacts) -> Heat | None:
    """SNR by kind of factor (down) and round (across); many rounds share columns."""
    told = [record for record in run.records if any(c.fidelity for c in record.clients)]
    each = math.ceil(len(told) / _MOST_COLUMNS) or 1
    entries = []
    for start in range(0, len(told), each):
        rounds = told[start : start + each]
        for kind, fidelity in fidelity_by_module(rounds).items():
            snr = finite_snr(fidelity)
            if drawable(snr):
                row = _shown(kind)
                text = f"{_rounds_text(rounds)}, {row}: {snr_text(fidelity)} dB"
                entries.append(Entry(rounds[0].round, row, max(0.0, snr or 0.0), text))
    strongest = max((entry.value for entry in entries), default=0.0)
    return heat_of(
        entries,
        key="kept",
        title="SNR of the packets by round and module",
        across="round",
        note=f"Full colour: {strongest:.1f} dB. No colour: 0 dB or less.",
        description=_told(entries),
    )


def _shown(kind: str) -> str:
    return kind.replace(".", " ")


def _cosine_text(fidelity: Fidelity) -> str:
    cosine = fidelity.cosine
    # a client may say what no pair of vectors has
    return NOTHING if math.isnan(cosine) else fixed(min(1.0, max(-1.0, cosine)), ".3f")


def _rounds_text(rounds: Sequence[RoundRecord]) -> str:
    first, last = rounds[0].round, rounds[-1].round
    return f"round {first}" if first == last else f"rounds {first} to {last}"


def _told(entries: Sequence[Entry]) -> str:
    if not entries:
        return ""
    best, worst = max(entries, key=lambda e: e.value), min(entries, key=lambda e: e.value)
    return f"Highest: {best.text}. Lowest: {worst.text}."
