"""How finely each coefficient row is coded: one Lagrangian for the whole update.

::

    for each row and mode:  worth = energy kept - lambda * bits;   the best mode, if worth > 0
    lambda by bisection, so that all of it fills a budget

Modes are those of `parts/vectors.py`; what they would keep comes from a row's energy and from how
sign-like its entries are, so nothing is coded to choose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import Float32Array
from cgfedllm.codecs.parts.deadzone import Histogram, bits_at
from cgfedllm.codecs.parts.vectors import SCALAR, lean_of
from cgfedllm.codecs.parts.worth import Modes
from cgfedllm.codecs.rate import largest_within

IntArray = NDArray[np.int64]

# bits of a row beside its entries, until some are written: scale and mode
SIDE_BITS = 4.5


@dataclass(frozen=True)
class Allocation:
    """A mode for every row.

    Parameters
    ----------
    modes : list of ndarray, shape (rows,)
        Kind by kind; 0 is not sent.
    bits : float
        Expected bits, without what goes beside entries.
    absorbing : float
        Those of them that dead-zone quantised values take: they can do with a little less.
    """

    modes: list[IntArray]
    bits: float
    absorbing: float

    @property
    def count(self) -> int:
        """Rows that are sent."""
        return sum(int(np.count_nonzero(own)) for own in self.modes)


class Choice:
    """Everything an update's allocation is chosen from.

    Parameters
    ----------
    rows : list of ndarray, shape (rows, n)
        Kind by kind.
    loose : list of ndarray
        Values that are quantised one by one, class by class.
    """

    def __init__(self, rows: list[Float32Array], loose: list[Float32Array]) -> None:
        self._options = [_Options(own) for own in rows]
        self._histogram = Histogram(loose) if loose else None
        self._total = sum(float(own.energies.sum()) for own in self._options)
        self._total += self._histogram.energy if self._histogram else 0.0

    def plan(self, quality: float) -> tuple[float, Allocation]:
        """Expected bits and modes; finer ones for more quality."""
        slope = self._total * 2.0 ** (-60 * quality)
        chosen = [own.at(slope) for own in self._options]
        bits = sum(own[1] for own in chosen)
        scalar = sum(own[2] for own in chosen)
        loose = bits_at(self._histogram, slope) if self._histogram else 0.0
        bits, scalar = bits + loose, scalar + loose
        allocation = Allocation([own[0] for own in chosen], bits, scalar)
        return bits + SIDE_BITS * allocation.count, allocation

    def within(self, budget: float) -> Allocation:
        """The modes with the least ``squared error + lambda * bits`` within a budget."""
        return largest_within(budget, self.plan, 0.0, 1.0, steps=30)


class _Options:
    """What each mode of each row of a kind would keep, and cost."""

    def __init__(self, rows: Float32Array) -> None:
        self.energies = np.square(rows).sum(axis=1, dtype=np.float64)
        lean = lean_of(rows, self.energies)
        self._modes = Modes(self.energies, lean, rows.shape[1], SIDE_BITS)

    def at(self, slope: float) -> tuple[IntArray, float, float]:
        """Modes, bits of entries, and those of dead-zone quantised rows.

        One bit must gain `slope`.
        """
        gains, costs, _ = self._modes.at(slope)
        worth = gains - slope * costs
        best = worth.argmax(axis=1)
        each = np.arange(len(best))
        modes = np.where(worth[each, best] > 0, best + 1, 0)
        spent = costs[each, best] - SIDE_BITS
        return modes, float(spent[modes > 0].sum()), float(spent[modes == SCALAR].sum())
