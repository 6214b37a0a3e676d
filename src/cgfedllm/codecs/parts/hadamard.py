"""Randomised Hadamard rotation by butterflies: additions in a fixed order, no matrix product.

::

    x (n) --pad, deal out--> (4096, blocks) --signs, H--> rotated       block b holds elements
                                                                        b, b + blocks, ...

The result is the same to the bit on every machine and for every number of threads.
"""

from __future__ import annotations

import numpy as np

from cgfedllm.adapter import Float32Array

LENGTH = 4096
"""Elements of one block."""
# blocks transformed together: half a megabyte, so that all twelve passes stay in the cache
_TILE = 32


def padded_shape(size: int) -> tuple[int, int]:
    """Shape ``(LENGTH, blocks)`` that holds `size` elements."""
    return LENGTH, -(-size // LENGTH)


def transform(values: Float32Array) -> None:
    """Unnormalised Walsh-Hadamard transform of every column, in place.

    Twice gives `LENGTH` times the input.

    Parameters
    ----------
    values : ndarray, shape (LENGTH, blocks), float32
        Overwritten by its transform.
    """
    blocks = values.shape[1]
    for start in range(0, blocks, _TILE):
        tile = np.ascontiguousarray(values[:, start : start + _TILE])
        other = np.empty_like(tile)
        half = 1
        while half < LENGTH:
            pairs = tile.reshape(-1, 2, half * tile.shape[1])
            sums = other.reshape(pairs.shape)
            np.add(pairs[:, 0], pairs[:, 1], out=sums[:, 0])
            np.subtract(pairs[:, 0], pairs[:, 1], out=sums[:, 1])
            tile, other = other, tile
            half *= 2
        values[:, start : start + _TILE] = tile
