r"""Dead-zone quantiser: its design on a histogram, and the two directions.

::

          -2      -1           0            1       2
    ---|-------|-------|---------------|-------|-------|---> |x| / step
                      -t       0       t     1+theta

Magnitudes below ``t * step`` become 0, others are rounded with offset theta; the decoder puts
level m at ``(m - shift_m) * step``, the centroid of what fell there. Sullivan (IEEE Trans. IT
42(5), 1996) shows that for Laplacian sources this is the optimal entropy-coded quantiser; step,
t and theta are searched here on the histogram at hand instead of being derived from a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import Float32Array
from cgfedllm.codecs.entropy import SymbolReader, SymbolWriter, blocks, levels_bits

Float64Array = NDArray[np.float64]
IntArray = NDArray[np.signedinteger[Any]]

# histogram bins are runs of float32 bit patterns: 1024 an octave, 0.1 % wide, for 24 octaves
_DROPPED_BITS = 13
_BINS = 24 << (23 - _DROPPED_BITS)
# a step below this times the largest magnitude would overflow the levels
_SMALLEST_RATIO = 2.0**-22
_SMALLEST_STEP = 2.0**-126
_LARGEST = float(np.finfo(np.float32).max)
# squared step over slope of a uniform quantiser at high rate
_STEP_OF_SLOPE = 6 * float(np.log(2))
# more levels than this are lumped together while searching
_SEARCHED_LEVELS = 1024
# magnitudes 1, 2 and 3 or more each have a shift, in 32nds of a step
_SHIFTS = 3
_SHIFT_BITS = 5


@dataclass(frozen=True)
class Quantiser:
    """A dead-zone quantiser.

    Parameters
    ----------
    step : float
        Distance of levels; exactly a float32.
    threshold : float
        Where level 1 begins, in steps.
    offset : float
        Level m > 1 begins at ``m - 1 + offset`` steps; 0.5 is plain rounding.
    """

    step: float
    threshold: float
    offset: float

    def levels(self, values: Float32Array) -> IntArray:
        """Signed levels of a vector, in the smallest integers that hold them."""
        largest = max(float(values.max(initial=0)), -float(values.min(initial=0)))
        # the largest level is at most one above this; one more is for rounding, one for the sign
        bound = int(largest / self.step) + 3
        levels: IntArray = np.empty(values.size, np.min_scalar_type(-bound))
        for block in blocks(values.size):
            self._level(values[block], levels[block])
        return levels

    def _level(self, values: Float32Array, out: IntArray) -> None:
        scaled = np.abs(values)
        scaled *= np.float32(1 / self.step)
        alive = scaled >= np.float32(self.threshold)
        scaled += np.float32(1 - self.offset)
        np.maximum(scaled, 1, out=scaled)
        scaled *= alive
        np.copysign(scaled, values, out=scaled)
        np.copyto(out, scaled, casting="unsafe")  # cuts off what is below the point


class Histogram:
    """Magnitudes of several classes of values, ready for trying quantisers.

    Parameters
    ----------
    classes : list of ndarray
        Finite float32 values, a class each.
    """

    def __init__(self, classes: list[Float32Array]) -> None:
        self.largest = max((float(np.abs(v).max(initial=0)) for v in classes), default=0.0)
        top = int(np.float32(self.largest).view(np.uint32)) >> _DROPPED_BITS
        self._first = max(top + 1 - _BINS, 0)
        edges = (np.arange(self._first, self._first + _BINS, dtype=np.uint32)) << _DROPPED_BITS
        middle = (edges | (1 << (_DROPPED_BITS - 1))).view(np.float32).astype(np.float64)
        # the last edges may lie beyond the largest float32; nothing falls there
        middle[~np.isfinite(middle)] = 0.0
        counts = np.stack([self._count(values) for values in classes]).astype(np.float64)
        self._n = _from_above(counts)
        self._sum = _from_above(counts * middle)
        self._squares = _from_above(counts * middle**2)
        self.energy = float(self._squares[:, 0].sum())

    def try_out(self, quantiser: Quantiser) -> tuple[float, float]:
        """Bits and squared error that a quantiser would give, tables and signs included."""
        step = quantiser.step
        top = min(int(self.largest / step + 1 - quantiser.offset) + 1, _SEARCHED_LEVELS)
        begins = np.arange(top, dtype=np.float64) + quantiser.offset
        begins[0] = quantiser.threshold
        np.maximum(begins, quantiser.threshold, out=begins)
        at = self._bin(begins * step)
        n, total = self._n[:, at], self._sum[:, at]
        n[:, :-1] -= n[:, 1:]
        total[:, :-1] -= total[:, 1:]
        zeros = self._n[:, :1] - n.sum(axis=1, keepdims=True)
        bits = float(levels_bits(np.concatenate([zeros, n], axis=1)).sum())
        return bits, self.energy - self._gained(n, total, step)

    def _gained(self, n: Float64Array, total: Float64Array, step: float) -> float:
        """Energy that reconstruction at the shifted levels saves against zeros."""
        levels = np.arange(1, n.shape[1] + 1)
        gained = 0.0
        for group in _groups(n.shape[1]):
            at = levels[group]
            count = n[:, group].sum(axis=1)
            mean = np.divide(
                total[:, group].sum(axis=1) / step - (n[:, group] * at).sum(axis=1),
                count,
                out=np.zeros_like(count),
                where=count > 0,
            )
            points = step * (at[None, :] + np.clip(mean, -0.5, 0.5)[:, None])
            gained += float((2 * points * total[:, group] - points**2 * n[:, group]).sum())
        return gained

    def _count(self, values: Float32Array) -> NDArray[np.int64]:
        counts = np.zeros(_BINS, np.int64)
        for block in blocks(values.size):
            bins = np.abs(values[block]).view(np.int32)
            bins >>= _DROPPED_BITS
            bins -= self._first
            np.maximum(bins, 0, out=bins)
            counts += np.bincount(bins, minlength=_BINS)
        return counts

    def _bin(self, magnitudes: Float64Array) -> NDArray[np.int64]:
        """Bins in which these magnitudes lie; one past the last for what is larger than all."""
        largest = np.finfo(np.float32).max
        patterns = np.minimum(magnitudes, largest).astype(np.float32).view(np.uint32)
        bins: NDArray[np.int64] = (patterns.astype(np.int64) >> _DROPPED_BITS) - self._first
        np.clip(bins, 1, _BINS, out=bins)  # bin 0 also holds all that is too small to tell apart
        return bins


@dataclass(frozen=True)
class Design:
    """A quantiser and the share of all values that it is used on; the others are not sent."""

    quantiser: Quantiser
    share: float = 1.0


def design_for_bits(histogram: Histogram, budget: float) -> Design | None:
    """The design with the least squared error among those that spend `budget` bits.

    Where values saturate, as those of an optimiser with normalised steps do, there are no large
    ones to pick out at low rate. Coding a share of the values well, and the others not at all, is
    then better than coding all of them badly: the straight line from zero to the point of the
    rate-distortion curve with the most gain a bit (time sharing).

    Returns
    -------
    Design or None
        None if nothing worth sending fits: all values are to be decoded as zeros.
    """
    if not histogram.largest or budget <= 0:
        return None
    everywhere = _spend(histogram, budget)
    shared = _most_gain_a_bit(histogram, budget)
    candidates = []
    if everywhere is not None:
        bits, error = histogram.try_out(everywhere)
        # values of equal size cannot be told apart by a threshold; what is left is not spent
        candidates.append((histogram.energy - error, Design(everywhere)))
    if shared is not None:
        bits, error = histogram.try_out(shared)
        share = min(budget / bits, 1.0)
        candidates.append((share * (histogram.energy - error), Design(shared, share)))
    gain, best = max(candidates, key=lambda c: c[0], default=(0.0, None))
    return best if gain > 0 else None


def _most_gain_a_bit(histogram: Histogram, budget: float) -> Quantiser | None:
    """Among quantisers that spend the budget or more, the one with the most gain a bit."""
    low, high = _step_range(histogram)
    best: tuple[float, Quantiser] | None = None
    for step in high / 2 * np.geomspace(1, 1 / 16, 13):
        for threshold in (0.001, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9):
            candidate = _quantiser(max(float(step), low), threshold, max(0.5, threshold))
            bits, error = histogram.try_out(candidate)
            rate = (histogram.energy - error) / bits
            if bits >= budget and (best is None or rate > best[0]):
                best = (rate, candidate)
    return best[1] if best else None


def _spend(histogram: Histogram, budget: float) -> Quantiser | None:
    """The best quantiser of all values that spends the budget."""

    def spent(step: float, threshold: float, offset: float) -> float:
        return histogram.try_out(_quantiser(step, threshold, offset))[0]

    # the coarsest step at which plain rounding spends the budget; finer ones need wider dead zones
    low, high = _step_range(histogram)
    plain = _bisect(lambda step: spent(step, 0.55, 0.55), low, high, budget)
    best: tuple[float, Quantiser] | None = None
    for ratio in (1.0, 0.88, 0.78, 0.68, 0.6, 0.5):
        step = max(plain * ratio, low)
        for offset in (0.55, 0.65):
            widest = max(4.0, 1.01 * histogram.largest / step)
            threshold = _bisect(
                lambda t, step=step, offset=offset: spent(step, t, offset),  # type: ignore[misc]
                offset,
                widest,
                budget,
            )
            candidate = _quantiser(step, threshold, offset)
            bits, error = histogram.try_out(candidate)
            if bits <= budget * 1.005 and (best is None or error < best[0]):
                best = (error, candidate)
    return best[1] if best else None


def bits_at(histogram: Histogram, slope: float) -> float:
    """Bits that values take where one bit must gain `slope` of energy; a guess at low rate."""
    step = max(float(np.sqrt(_STEP_OF_SLOPE * slope)), histogram.largest * 2.0**-21)
    if step >= 2 * histogram.largest:
        return 0.0
    return histogram.try_out(Quantiser(step, 0.6, 0.6))[0]


def design_for_slope(histogram: Histogram, slope: float) -> Design | None:
    """The design with the least ``squared error + slope * bits``; None if that is zeros."""
    if not histogram.largest:
        return None
    low, high = _step_range(histogram)
    # at high rate the best step is sqrt(6 ln 2 * slope); at low rate it stays nearby
    centre = float(np.clip(np.sqrt(_STEP_OF_SLOPE * slope), low, high))
    best: tuple[float, Quantiser] = (histogram.energy, _quantiser(high, 1.0, 0.5))
    for step in np.clip(centre * np.geomspace(0.35, 2.5, 13), low, high):
        for threshold in (0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0):
            candidate = _quantiser(float(step), threshold, min(threshold, 0.6))
            bits, error = histogram.try_out(candidate)
            if error + slope * bits < best[0]:
                best = (error + slope * bits, candidate)
    return Design(best[1]) if best[0] < histogram.energy else None


def write_levels(writer: SymbolWriter, values: Float32Array, levels: IntArray, step: float) -> None:
    """Write the levels of one class and the shifts of their reconstruction points."""
    writer.levels(levels)
    counts, sums, along = np.zeros((3, _SHIFTS + 1))
    for block in blocks(levels.size):
        own, sizes = np.abs(levels[block]), np.abs(values[block])
        for group in range(1, min(int(own.max()), _SHIFTS) + 1):
            at = _in_group(own, group)
            counts[group] += np.count_nonzero(at)
            # faster than picking them out, which the processor cannot foresee
            sums[group] += np.multiply(own, at).sum(dtype=np.int64)
            along[group] += np.multiply(sizes, at).sum(dtype=np.float64)
    for group in range(1, _SHIFTS + 1):
        if not counts[group]:
            continue
        shift = (sums[group] - along[group] / step) / counts[group]
        writer.bits(int(np.clip(np.rint(32 * shift) + 16, 0, 31)), _SHIFT_BITS)


def read_levels(reader: SymbolReader, count: int, step: np.float32) -> Float32Array:
    """Read one class back, as values."""
    levels = reader.levels(count)
    present: set[int] = set()
    for block in blocks(count):
        own = np.abs(levels[block])
        missing = {*range(1, min(int(own.max()), _SHIFTS) + 1)} - present
        present |= {group for group in missing if _in_group(own, group).any()}
    shifts = np.zeros(2 * _SHIFTS + 1)  # of levels -3, ..., 3
    for group in sorted(present):
        shift = (int(reader.bits(_SHIFT_BITS, 1)[0]) - 16) / 32
        shifts[_SHIFTS + group], shifts[_SHIFTS - group] = shift, -shift
    # levels become values in their own memory
    values = levels.view(np.float32)
    for block in blocks(count):
        own = levels[block]
        points: Float64Array = np.take(shifts, own + _SHIFTS, mode="clip")
        np.subtract(own, points, out=points)
        points *= float(step)
        values[block] = np.clip(points, -_LARGEST, _LARGEST, out=points)
    return values


def _in_group(magnitudes: IntArray, group: int) -> NDArray[np.bool_]:
    """Which ones share a shift: 1, 2, or 3 and more."""
    return np.asarray(magnitudes == group if group < _SHIFTS else magnitudes >= group)


def _groups(top: int) -> list[slice]:
    return [slice(0, 1), slice(1, 2), slice(2, top)][: min(top, _SHIFTS)]


def _quantiser(step: float, threshold: float, offset: float) -> Quantiser:
    return Quantiser(float(np.float32(step)), threshold, offset)


def _step_range(histogram: Histogram) -> tuple[float, float]:
    low = max(histogram.largest * _SMALLEST_RATIO, _SMALLEST_STEP)
    return low, min(max(2 * histogram.largest, 2 * low), float(np.finfo(np.float32).max) / 2)


def _bisect(
    spent: Callable[[float], float], low: float, high: float, budget: float, steps: int = 18
) -> float:
    """Where a falling function meets the budget, on a logarithmic scale, from below."""
    if spent(low) <= budget:
        return low
    for _ in range(steps):
        middle = float(np.sqrt(low * high))
        bits = spent(middle)
        if bits > budget:
            low = middle
        else:
            high = middle
            if bits > 0.998 * budget:
                break
    return high


def _from_above(counts: Float64Array) -> Float64Array:
    """Sum from each bin to the last, and a zero for the bin after it."""
    sums = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]
    return np.pad(sums, ((0, 0), (0, 1)))
