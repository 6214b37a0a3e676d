"""Numbers of a few bits each, laid end to end, lowest bit first."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_WIDTH = 32
"""Bits of the widest number."""

# numbers handled at a time; a multiple of 8, so that each part is whole bytes
_TILE = 1 << 16


def packed_size(count: int, width: int) -> int:
    """Bytes that `count` numbers of `width` bits take."""
    return -(-count * width // 8)


def pack(values: NDArray[Any], width: int) -> bytes:
    """Pack numbers from 0 to 2^width - 1, `width` from 1 to 32."""
    parts = []
    for start in range(0, values.size, _TILE):
        words = values[start : start + _TILE].astype("<u4")
        bits = np.unpackbits(words.view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
        parts.append(np.packbits(bits[:, :width].reshape(-1), bitorder="little").tobytes())
    return b"".join(parts)


def unpack(packed: NDArray[np.uint8], count: int, width: int) -> NDArray[np.uint32]:
    """Inverse of `pack`, for `packed_size` bytes."""
    values = np.empty(count, np.uint32)
    for start in range(0, count, _TILE):
        size = min(_TILE, count - start)
        first = start * width // 8
        part = packed[first : first + packed_size(size, width)]
        bits = np.zeros((size, MOST_WIDTH), np.uint8)
        bits[:, :width] = np.unpackbits(part, count=size * width, bitorder="little").reshape(
            size, width
        )
        values[start : start + size] = (
            np.packbits(bits, axis=1, bitorder="little").view("<u4").reshape(-1)
        )
    return values
