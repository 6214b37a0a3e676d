"""The swap test: whether a packet says something of its own client, or of updates as such.

::

    own       decode(packet of i)  against  update of i
    swapped   decode(packet of i)  against  update of the next client of the same round

A decoder that has learned what updates look like on average can score without listening. Then the
swap costs nothing. The predictor that sends nothing (codec `zero`: the aggregate of the round
before) is the level to beat, and its swap costs nothing by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cgfedllm.analysis.coding import Coded, swapped
from cgfedllm.analysis.fidelity import Fidelity


@dataclass(frozen=True)
class SwapRow:
    """The test of one codec on one recording.

    Parameters
    ----------
    recording, codec, options : str
        As in `OpenLoopRow`.
    updates : int
        Packets that were swapped.
    snr_db, cosine : float
        Each against its own update.
    swapped_snr_db, swapped_cosine : float
        Each against another client's.
    """

    recording: str
    codec: str
    options: str
    updates: int
    snr_db: float
    cosine: float
    swapped_snr_db: float
    swapped_cosine: float

    @property
    def lost_db(self) -> float:
        """What the swap costs."""
        return self.snr_db - self.swapped_snr_db


class SwapTest:
    """Collects the test over rounds; rounds with one client say nothing."""

    def __init__(self) -> None:
        self._own, self._swapped, self._updates = Fidelity(), Fidelity(), 0

    def add(self, group: Sequence[Coded]) -> None:
        """Take in one round's updates."""
        true = [one.sample.update for one in group]
        decoded = [one.decoded for one in group]
        if len(group) < 2:
            return
        for x, y in zip(true, decoded, strict=True):
            self._own.add(x.vector, y.vector)
        for x, y in swapped(true, decoded):
            self._swapped.add(x.vector, y.vector)
        self._updates += len(group)

    def row(self, recording: str, codec: str, options: str) -> SwapRow:
        """What was collected; NaN where no round has two clients."""
        return SwapRow(
            recording=recording,
            codec=codec,
            options=options,
            updates=self._updates,
            snr_db=self._own.snr_db,
            cosine=self._own.cosine,
            swapped_snr_db=self._swapped.snr_db,
            swapped_cosine=self._swapped.cosine,
        )
