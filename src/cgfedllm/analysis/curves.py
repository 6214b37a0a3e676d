"""What a run's bytes bought: held-out loss against bytes sent, and numbers drawn from that.

A curve is read as a step function, NLL(b): the loss after the last evaluated round whose
cumulative bytes are at most b, and the loss before training where not even one such round fits.
Nothing is interpolated: half a round's bytes buy nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from cgfedllm.metrics import RoundRecord


@dataclass(frozen=True)
class ComparisonEntry:
    """One run of a comparison.

    Parameters
    ----------
    codec : str
        Name (with options, if any) of the uplink codec, or a variant's label.
    seed : int
        Seed shared by the runs of one pair.
    records : list of RoundRecord
        All its rounds.
    scale : float
        Parameters of the base configuration's adapter for each of this run's own; bits per
        parameter refer to the former, so that a smaller adapter counts as what it saves.
    """

    codec: str
    seed: int
    records: list[RoundRecord] = field(repr=False)
    scale: float = 1.0


@dataclass(frozen=True)
class Point:
    """State after an evaluated round: bytes are cumulative over all clients.

    `codec` is what was sent down of a learned codec's state, `secagg` what secure aggregation sent
    of keys and shares both ways; `uplink` and `downlink` hold neither.
    """

    round: int
    nll: float
    uplink: int
    downlink: int
    codec: int = 0
    secagg: int = 0

    @property
    def total(self) -> int:
        """Both directions, codec state and secure aggregation included; pre-training is not."""
        return self.uplink + self.downlink + self.codec + self.secagg


Bytes = Callable[[Point], int]


def uplink(point: Point) -> int:
    """Cumulative uplink bytes."""
    return point.uplink


def total(point: Point) -> int:
    """Cumulative bytes of both directions, codec state included."""
    return point.total


def curve_of(records: Sequence[RoundRecord]) -> list[Point]:
    """Evaluated rounds of a run, in order; the first is round 0, before training."""
    return [
        Point(
            r.round,
            r.heldout_nll,
            r.uplink_bytes_total,
            r.downlink_bytes_total,
            r.codec_bytes_total,
            r.secagg_uplink_bytes_total + r.secagg_downlink_bytes_total,
        )
        for r in records
        if r.heldout_nll is not None
    ]


def gain(curve: Sequence[Point]) -> float | None:
    """Loss before training less loss at the end, nats per label token."""
    return curve[0].nll - curve[-1].nll if len(curve) > 1 else None


def gain_kept(curve: Sequence[Point], reference: Sequence[Point]) -> float | None:
    """Gain at the end as a share of the reference's; None where that gained nothing."""
    own, whole = gain(curve), gain(reference)
    if own is None or whole is None or whole <= 0:
        return None
    return own / whole


def gain_kept_by_round(curve: Sequence[Point], reference: Sequence[Point]) -> dict[int, float]:
    """The same after every round that both evaluated, where the reference has gained by then."""
    theirs = {point.round: point.nll for point in reference}
    return {
        point.round: (curve[0].nll - point.nll) / (reference[0].nll - theirs[point.round])
        for point in curve[1:]
        if point.round in theirs and reference[0].nll > theirs[point.round]
    }


def bytes_to_share(
    curve: Sequence[Point], reference: Sequence[Point], share: float, bytes_of: Bytes = uplink
) -> int | None:
    """Bytes to reach a share of the gain that the reference has at its end.

    Parameters
    ----------
    curve, reference : sequence of Point
        Runs with the same seed.
    share : float
        For example 0.95. The loss to reach is the reference's loss before training less this
        share of its gain.
    bytes_of : callable
        `uplink` or `total`.

    Returns
    -------
    int or None
        Cumulative bytes after the first evaluated round at or below that loss; None if there is
        none, or the reference gained nothing.
    """
    whole = gain(reference)
    if whole is None or whole <= 0:
        return None
    target = reference[0].nll - share * whole
    return next((bytes_of(point) for point in curve if point.nll <= target), None)


def area_between(
    curve: Sequence[Point], reference: Sequence[Point], bytes_of: Bytes = uplink
) -> float | None:
    """Area between two curves over the logarithm of bytes; positive: the first is better.

    ::

        area = integral over x from lo to hi of  NLL_reference(10^x) - NLL_curve(10^x)

    with x = log10(bytes) and NLL(b) the step function of this module. lo is where the first of
    the two has its first evaluated trained round, hi where the last of the two ends; beyond its
    end a curve keeps its last loss. The unit is nats per label token times decades of bytes: 0.3
    may be 0.1 nats better over a thousandfold range of budgets.

    Returns
    -------
    float or None
        None where one of them sent nothing or was not evaluated after training.
    """
    own, theirs = ([p for p in c if bytes_of(p) > 0] for c in (curve, reference))
    # what evaluating costs on the downlink before training buys nothing
    own, theirs = ([p for p in c if p.round > 0] for c in (own, theirs))
    if not own or not theirs:
        return None
    edges = sorted({math.log10(bytes_of(p)) for p in (*own, *theirs)})
    return sum(
        (high - low)
        * (_at(theirs, reference[0], low, bytes_of) - _at(own, curve[0], low, bytes_of))
        for low, high in pairwise(edges)
    )


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[tuple[int, list[Point]]]:
    """Points of several seeds, round by round, for the rounds that all of them evaluated."""
    by_round = [{point.round: point for point in curve} for curve in curves]
    common = set.intersection(*(set(points) for points in by_round)) if by_round else set()
    return [(round_, [points[round_] for points in by_round]) for round_ in sorted(common)]


def _at(points: Sequence[Point], start: Point, log_bytes: float, bytes_of: Bytes) -> float:
    """Loss bought by ``10 ** log_bytes`` bytes."""
    reached = [p.nll for p in points if math.log10(bytes_of(p)) <= log_bytes]
    return reached[-1] if reached else start.nll
