"""Rate control: the option `bpp`, the budget it gives, and the search that meets it.

Rates count everything that is sent: 52 bytes of packet header, scales and tables included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pydantic import Field

from cgfedllm.adapter import AdapterSpec
from cgfedllm.codecs.base import CodecOptions
from cgfedllm.codecs.packet import HEADER_SIZE

T = TypeVar("T")


class RateOptions(CodecOptions):
    """Options of a codec whose rate can be set."""

    bpp: float = Field(
        default=0.1,
        gt=0,
        le=32,
        allow_inf_nan=False,
        description="Bits per parameter of the whole packet, header included.",
    )


def payload_bits(spec: AdapterSpec, bpp: float) -> float:
    """Bits that `bpp` leaves for the payload; none where the header takes them all."""
    return max(0.0, bpp * spec.size - 8 * HEADER_SIZE)


def largest_within(
    budget: float,
    plan: Callable[[float], tuple[float, T]],
    low: float,
    high: float,
    *,
    steps: int = 24,
) -> T:
    """Find the plan that spends the most bits within a budget, by bisection.

    Parameters
    ----------
    budget : float
        Bits.
    plan : callable
        From a quality in [0, 1] to (bits, plan); bits grow with quality, nearly always.
    low, high : float
        Range of quality to search. The plan at `low` is taken if nothing fits.
    steps : int
        Halvings of the range.

    Returns
    -------
    T
        The second value of the best call.
    """
    bits, best = plan(high)
    if bits <= budget:
        return best
    _, best = plan(low)
    best_bits = -1.0
    for _ in range(steps):
        middle = (low + high) / 2
        bits, candidate = plan(middle)
        if bits > budget:
            high = middle
            continue
        low = middle
        if bits >= best_bits:
            best_bits, best = bits, candidate
        if bits >= 0.997 * budget:
            break
    return best
