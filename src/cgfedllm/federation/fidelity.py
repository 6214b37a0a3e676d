"""What a codec keeps of a client's update, module by module, told with each reply.

::

    client   wanted  = what went into the codec: update + decay * residual
             decoded = what its packet decodes to
             wanted, decoded --> ||wanted||^2, ||wanted - decoded||^2 a kind of factor --> metrics
    server   checks them, adds ||decoded||^2 of what it decoded itself --> the client's row

Only the client knows what it wanted to send. Kinds are those of the adapter that both ends have
(``q_proj.A``, ``q_proj.B``, ..., summed over layers), so that none is named on the wire.
"""

from __future__ import annotations

import numpy as np
from flwr.app import MetricRecord, RecordDict

from cgfedllm.adapter import AdapterUpdate, factor_kind
from cgfedllm.codecs.feedback import Encoded
from cgfedllm.errors import PacketError
from cgfedllm.federation.messages import METRICS
from cgfedllm.metrics import ModuleRecord

SIGNAL, ERROR = "fidelity-signal", "fidelity-error"
MOST_KINDS = 64
"""Numbers in a list; beyond them the last kind is all the rest, so that replies stay small."""
OTHER = "other"

_LARGEST_ENERGY = 1e120
_DIGITS = 6


def module_energies(update: AdapterUpdate) -> dict[str, float]:
    """Sum of squares (float64) of each kind of factor, over all layers, in the adapter's order."""
    energies: dict[str, float] = {}
    for factor in update.spec:
        kind = factor_kind(factor)
        if kind not in energies and len(energies) >= MOST_KINDS - 1:
            kind = OTHER
        part = update.vector[update.spec.slices[factor.name]]
        # no BLAS, whose sums depend on the number of threads
        energy = float(np.square(part, dtype=np.float64).sum())
        energies[kind] = energies.get(kind, 0.0) + energy
    return energies


def tell_fidelity(metrics: MetricRecord, encoded: Encoded) -> None:
    """Add to a client's metrics what its packet keeps."""
    lost = encoded.residual
    error = encoded.wanted - encoded.decoded if lost is None else lost
    metrics[SIGNAL] = list(module_energies(encoded.wanted).values())
    metrics[ERROR] = list(module_energies(error).values())


def told_fidelity(content: RecordDict, decoded: AdapterUpdate) -> dict[str, ModuleRecord]:
    """What a client says its packet keeps, by kind; empty where it says nothing.

    Parameters
    ----------
    content : RecordDict
        The client's reply, with metrics in it.
    decoded : AdapterUpdate
        What its packet has decoded to.

    Raises
    ------
    PacketError
        If what it says are not as many numbers from 0 to 1e120 as the adapter has kinds.
    """
    record = content.metric_records[METRICS]
    if SIGNAL not in record and ERROR not in record:
        return {}
    own = module_energies(decoded)
    signal, error = (_energies(record, name, len(own)) for name in (SIGNAL, ERROR))
    return {
        kind: ModuleRecord(*(float(f"{value:.{_DIGITS}g}") for value in values))
        for kind, *values in zip(own, signal, own.values(), error, strict=True)
    }


def _energies(record: MetricRecord, name: str, count: int) -> list[float]:
    values = record.get(name)
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(0 <= value <= _LARGEST_ENERGY for value in values)
    ):
        raise PacketError(f"the reply's {name} is not {count} numbers from 0 to 1e120")
    return [float(value) for value in values]
