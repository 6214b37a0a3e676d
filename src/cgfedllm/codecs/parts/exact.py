"""Products of matrices that end at the same bits on every machine.

Libraries sum in an order that depends on the build and the processor. Sums of integers do not
depend on it as long as they are exact, and small matrices are multiplied element by element in one
order.
"""

from __future__ import annotations

import numpy as np

from cgfedllm.adapter import Float32Array
from cgfedllm.codecs.entropy import Float64Array

# entries are rounded to this many bits of the largest
_ENTRY_BITS = 14


def gram(rows: Float32Array | Float64Array) -> Float64Array:
    """Rows times rows, shape (..., r, n) to (..., r, r): sums of integers, times a power of two.

    Exact for up to 2^25 columns, so the order of summing does not matter.
    """
    largest = float(np.abs(rows).max(initial=0))
    if not largest:
        return np.zeros((*rows.shape[:-1], rows.shape[-2]))
    exponent = int(np.frexp(largest)[1]) - _ENTRY_BITS
    whole = np.rint(np.ldexp(rows.astype(np.float64), -exponent))
    return np.asarray(np.ldexp(whole @ np.swapaxes(whole, -1, -2), 2 * exponent))


def times(x: Float64Array, y: Float64Array) -> Float64Array:
    """Products of small matrices, shape (count, i, k) and (count, k, j), summed in order."""
    out = x[:, :, 0, None] * y[:, None, 0]
    for k in range(1, x.shape[2]):
        out += x[:, :, k, None] * y[:, None, k]
    return out


def transposed(matrices: Float64Array) -> Float64Array:
    """Of a stack, shape (count, i, k) to (count, k, i)."""
    return np.ascontiguousarray(matrices.swapaxes(1, 2))
