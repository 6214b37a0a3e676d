"""What collecting updates cost, so that whoever uses the codec can be charged for it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cgfedllm.errors import CgFedLlmError
from cgfedllm.metrics import RoundRecord
from cgfedllm.runs import RunFolder
from cgfedllm.tgap.recorder import noted
from cgfedllm.tgap.recording import Recording


@dataclass(frozen=True)
class CollectingCost:
    """Bytes and time of making recordings.

    Parameters
    ----------
    uplink_bytes, downlink_bytes : int
        Over all clients and rounds.
    seconds : float or None
        Wall time; None where nobody knows.
    basis : tuple of str
        How they are known, a sentence a recording.
    """

    uplink_bytes: int
    downlink_bytes: int
    seconds: float | None
    basis: tuple[str, ...]

    def to_dict(self, fit_seconds: float) -> dict[str, Any]:
        """Table ``cost`` of a codec's card."""
        return {
            "uplink_bytes": self.uplink_bytes,
            "downlink_bytes": self.downlink_bytes,
            "collect_seconds": self.seconds,
            "fit_seconds": fit_seconds,
            "basis": " ".join(self.basis),
        }


def collecting_cost(recordings: Iterable[Recording]) -> CollectingCost:
    """What it took to make these recordings.

    Measured bytes where the run that was recorded lies around the recording; else what the
    recording lets one infer.
    """
    parts = [_cost(recording) for recording in recordings]
    times = [part.seconds for part in parts]
    known = [seconds for seconds in times if seconds is not None]
    return CollectingCost(
        uplink_bytes=sum(part.uplink_bytes for part in parts),
        downlink_bytes=sum(part.downlink_bytes for part in parts),
        seconds=math.fsum(known) if len(known) == len(times) else None,
        basis=tuple(dict.fromkeys(sentence for part in parts for sentence in part.basis)),
    )


def _cost(recording: Recording) -> CollectingCost:
    records = _records(recording)
    seconds = math.fsum(r.seconds.get("total", 0.0) for r in records) if records else None
    if recording.kind == "centralised":
        basis = (
            "Centralised: no update travels; that all clients' rows are on one machine is not "
            "counted."
        )
        return CollectingCost(0, 0, seconds, (basis,))
    if recording.kind == "local-only":
        basis = (
            "Local only: uplink is every recorded update once as float32; clients start from the "
            "common seed, so nothing comes down."
        )
        return CollectingCost(recording.nbytes, 0, seconds, (basis,))
    if records:
        basis = "Federated warm-up: packets of both directions as its metrics.jsonl counts them."
        last = records[-1]
        return CollectingCost(last.uplink_bytes_total, last.downlink_bytes_total, seconds, (basis,))
    basis = (
        "Federated warm-up whose metrics are not beside the recording: estimated as one float32 "
        "adapter in each direction for each recorded update."
    )
    return CollectingCost(recording.nbytes, recording.nbytes, None, (basis,))


def _records(recording: Recording) -> list[RoundRecord]:
    """Records of the run around a recording, if there is one and it is that run's."""
    run = RunFolder(recording.path.parent)
    try:
        where = noted(run) if run.exists() else None
        if where is None or where.resolve() != recording.path.resolve():
            return []
        return run.records()
    except CgFedLlmError:
        return []  # a damaged neighbour is no reason not to use a sound recording
