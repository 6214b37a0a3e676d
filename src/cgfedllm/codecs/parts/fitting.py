"""The dead-zone quantiser that spends a given number of bits, over several dead zones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cgfedllm.codecs.parts.deadzone import Histogram, Quantiser

# dead zones to try, in steps; the first one codes signs
DEAD_ZONES = (0.001, 0.5, 0.55, 0.6, 0.7, 0.85, 1.0, 1.3)
"""What `finest_within` tries if not told."""

_HALVINGS = 20


def finest_within(
    histogram: Histogram,
    budget: float,
    dead_zones: Sequence[float] = DEAD_ZONES,
    finest: float = 2.0**-21,
) -> Quantiser | None:
    """The quantiser with the least squared error that fits a budget.

    Parameters
    ----------
    histogram : Histogram
        The values.
    budget : float
        Bits.
    dead_zones : sequence of float
        Where level 1 may begin, in steps.
    finest : float
        Smallest step, as a share of the largest value.

    Returns
    -------
    Quantiser or None
        None if nothing that fits is better than zeros.
    """
    best: tuple[float, Quantiser | None] = (histogram.energy, None)
    if not histogram.largest:
        return None
    for dead_zone in dead_zones:
        low, high = histogram.largest * finest, histogram.largest * 2.1
        for _ in range(_HALVINGS):
            step = float(np.float32(np.sqrt(low * high)))
            candidate = Quantiser(step, dead_zone, max(0.5, min(dead_zone, 0.6)))
            bits, error = histogram.try_out(candidate)
            if bits > budget:
                low = step
                continue
            high = step
            if error < best[0]:
                best = error, candidate
            if bits > 0.998 * budget:
                break
    return best[1]
