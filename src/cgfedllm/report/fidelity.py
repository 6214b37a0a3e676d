"""What codecs kept in a run, from the rows of its clients: sums over sums, as `analysis` has it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from cgfedllm.analysis.fidelity import Fidelity
from cgfedllm.metrics import ModuleRecord, RoundRecord


def fidelity_by_module(records: Iterable[RoundRecord]) -> dict[str, Fidelity]:
    """Each kind of factor, pooled over clients and rounds; empty where nobody told."""
    pools: dict[str, Fidelity] = {}
    for record in records:
        for client in record.clients:
            for kind, told in client.fidelity.items():
                pools[kind] = pools.get(kind, Fidelity()) + _fidelity(told)
    return pools


def pooled(pools: Iterable[Fidelity]) -> Fidelity | None:
    """All together; None where there are none."""
    found = list(pools)
    return sum(found, Fidelity()) if found else None


def total_fidelity(records: Iterable[RoundRecord]) -> Fidelity | None:
    """All kinds, clients and rounds together; None where nobody told."""
    return pooled(fidelity_by_module(records).values())


def finite_snr(fidelity: Fidelity | None) -> float | None:
    """Decibels; None where there is no signal, or no error to compare it with."""
    snr = math.nan if fidelity is None else fidelity.snr_db
    return snr if math.isfinite(snr) else None


def _fidelity(told: ModuleRecord) -> Fidelity:
    # ||x - y||^2 = ||x||^2 + ||y||^2 - 2 <x, y>
    inner = (told.signal + told.decoded - told.error) / 2
    return Fidelity(told.signal, told.decoded, told.error, inner)
