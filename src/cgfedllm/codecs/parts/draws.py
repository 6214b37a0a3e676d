"""Random choices that both ends of a packet make alike.

They rest on a generator's bytes alone, whose stream numpy guarantees; its `permutation` and the
like may change from release to release.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import Float32Array
from cgfedllm.codecs.entropy import blocks


def random_order(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    """A permutation of 0 to `count` - 1: the order of as many random 64-bit keys."""
    keys = np.frombuffer(rng.bytes(8 * count), "<u8")
    return np.argsort(keys, kind="stable")


def random_signs(rng: np.random.Generator, count: int) -> NDArray[np.uint8]:
    """Independent signs, eight a byte, for `apply_signs`."""
    return np.frombuffer(rng.bytes(-(-count // 8)), np.uint8)


def apply_signs(values: Float32Array, signs: NDArray[np.uint8]) -> None:
    """Change the sign of every value whose bit is 1, in place; shape (count,)."""
    patterns = values.view(np.uint32)
    for block in blocks(values.size):  # blocks begin at whole bytes
        bits = np.unpackbits(signs[block.start // 8 :], count=block.stop - block.start)
        patterns[block] ^= bits.astype(np.uint32) << np.uint32(31)
