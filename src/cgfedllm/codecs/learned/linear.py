"""Linear mode of `learned`: what a client sends adds up with what others send.

::

    update --axes--> coefficients of the state's directions --the first m--> integers, one step

A sum means something only if number i is the same coefficient at the same step in every packet. So
nothing here depends on the update: not which coefficients are sent, nor how finely. Which come
first is foretold by state and adapter, which both ends hold.

Directions in which the adapter has grown are left out: beside the state's directions it hardly
grows, as nothing else is sent.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, Float32Array
from cgfedllm.codecs.entropy import Int32Array
from cgfedllm.codecs.learned.directions import described
from cgfedllm.codecs.learned.kinds import Axes
from cgfedllm.codecs.parts.integers import largest_of
from cgfedllm.codecs.parts.rows import row_count
from cgfedllm.errors import PacketError

# how the axes are found is the highest three bits of a range coded payload's first word, and no
# axes have this number
_MARK = 7
_WORD = struct.Struct("<I")
MARK_BYTES = _WORD.size
"""Bytes that a payload begins with."""


def coefficient_count(spec: AdapterSpec, directions: int) -> int:
    """How many coefficients an update has along the directions of a state."""
    return directions * sum(row_count(factor) for factor in described(spec))


def gathered(axes: Axes, coefficients: Float32Array, count: int) -> Float32Array:
    """So many of the coefficients, the strongest foretold first; zeros where there are fewer."""
    sent = np.zeros(count, np.float32)
    places = _strongest(axes, count)
    sent[: places.size] = coefficients[places]
    return sent


def scattered(axes: Axes, levels: Int32Array) -> tuple[Float32Array, int]:
    """All coefficients, of the numbers that were sent; they are still to be scaled.

    Returns
    -------
    coefficients : ndarray
        Below 1, so that products of them stay finite.
    exponent : int
        They are times 2 to this power.
    """
    exponent = largest_of(levels).bit_length()
    coefficients = np.zeros(axes.foretold.size, np.float32)
    places = _strongest(axes, levels.size)
    coefficients[places] = np.ldexp(levels[: places.size].astype(np.float32), -exponent)
    return coefficients, exponent


def is_linear(payload: bytes) -> bool:
    """Whether a payload says that it is of linear mode."""
    return len(payload) >= MARK_BYTES and payload[MARK_BYTES - 1] >> 5 == _MARK


def marked(how: int, integers: bytes) -> bytes:
    """A payload of linear mode: how the axes are found, and integers."""
    return _WORD.pack((_MARK << 29) + how) + integers


def unmarked(payload: bytes) -> tuple[int, bytes]:
    """Inverse of `marked`.

    Raises
    ------
    PacketError
        If the payload is not of linear mode.
    """
    if not is_linear(payload):
        raise PacketError(
            "learned: the packet is not of linear mode, as the option scale_exponent asks here; "
            "set it on both ends or on none"
        )
    return _WORD.unpack_from(payload)[0] & ~(_MARK << 29), payload[MARK_BYTES:]


def _strongest(axes: Axes, count: int) -> NDArray[np.int64]:
    return np.argsort(-axes.foretold, kind="stable")[:count]
