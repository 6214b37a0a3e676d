"""Whole numbers at one step, which is a power of two: what packets that can be added hold.

::

    int16 exponent | uint8 width | numbers: width bits each, raised by 2^(width - 1)
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import Float32Array
from cgfedllm.codecs.entropy import Int32Array, blocks
from cgfedllm.codecs.parts.bitpack import MOST_WIDTH, pack, packed_size, unpack
from cgfedllm.errors import PacketError

SMALLEST_EXPONENT, LARGEST_EXPONENT = -200, 160
"""Of the step, as a power of two."""

_HEAD = struct.Struct("<hB")
HEAD_BYTES = _HEAD.size
"""Bytes before the numbers."""


def rounded(numbers: Float32Array, exponent: int, top: int) -> Int32Array:
    """Numbers times 2^exponent, rounded, none beyond `top`."""
    levels = np.empty(numbers.size, np.int32)
    for block in blocks(numbers.size):
        scaled = np.ldexp(numbers[block].astype(np.float64), exponent)
        levels[block] = np.clip(np.rint(scaled, out=scaled), -top, top, out=scaled)
    return levels


def largest_of(levels: NDArray[Any]) -> int:
    """Largest magnitude; 0 of none."""
    return max(int(levels.max(initial=0)), -int(levels.min(initial=0)))


def width_of(levels: NDArray[Any]) -> int:
    """Bits that each of the numbers needs."""
    return largest_of(levels).bit_length() + 1


def size_of(count: int, width: int) -> int:
    """Bytes that `write_integers` makes of so many numbers."""
    return HEAD_BYTES + packed_size(count, width) if count else 0


def write_integers(levels: NDArray[Any], width: int, exponent: int) -> bytes:
    """Numbers that fit `width` bits each, 2 to 32, at the step 2^exponent; nothing of none."""
    if not levels.size:
        return b""
    raised = levels.astype(np.int64) + (1 << (width - 1))
    return _HEAD.pack(exponent, width) + pack(raised, width)


def read_integers(payload: bytes, count: int, codec: str) -> tuple[Int32Array, int]:
    """Inverse of `write_integers`: numbers, and the exponent of their step.

    Parameters
    ----------
    count : int
        How many there are.
    codec : str
        Name of the codec, for messages.

    Raises
    ------
    PacketError
        If the length is not that of so many numbers, or width or exponent are out of range.
    """
    if not count:
        if payload:
            raise PacketError(f"{codec}: payload is {len(payload)} bytes, this rate needs none")
        return np.zeros(0, np.int32), 0
    if len(payload) < HEAD_BYTES:
        raise PacketError(f"{codec}: payload is {len(payload)} bytes, its head is {HEAD_BYTES}")
    exponent, width = _HEAD.unpack_from(payload)
    if not 2 <= width <= MOST_WIDTH:
        raise PacketError(f"{codec}: numbers of {width} bits; 2 to {MOST_WIDTH} are known")
    if not SMALLEST_EXPONENT <= exponent <= LARGEST_EXPONENT:
        raise PacketError(f"{codec}: scale exponent {exponent} is out of range")
    expected = size_of(count, width)
    if len(payload) != expected:
        raise PacketError(f"{codec}: payload is {len(payload)} bytes, this rate needs {expected}")
    raised = unpack(np.frombuffer(payload, np.uint8, offset=HEAD_BYTES), count, width)
    return (raised.astype(np.int64) - (1 << (width - 1))).astype(np.int32), exponent
