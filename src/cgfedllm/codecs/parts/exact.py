"""Products of matrices that end at the same bits on every machine.

Libraries sum in an order that depends on the build and the processor. Sums of integers do not
depend on it as long as they are exact, and small matrices are multiplied element by element in one
order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import Float32Array
from cgfedllm.codecs.entropy import Float64Array

# entries are rounded to this many bits of the largest
_ENTRY_BITS = 14


def gram(rows: Float32Array | Float64Array) -> Float64Array:
    """Rows times rows, shape (..., r, n) to (..., r, r): sums of integers, times a power of two.

    Exact for up to 2^25 columns, so the order of summing does not matter.
    """
    whole, exponent = _rounded(rows)
    return np.asarray(np.ldexp(whole @ np.swapaxes(whole, -1, -2), 2 * exponent))


def whole_products(rows: Float32Array | Float64Array, whole: NDArray[np.int8]) -> Float64Array:
    """Rows times small integers, shape (i, k) and (k, j) to (i, j): exact sums of rounded rows.

    Rows are rounded as by `gram`. Exact for up to 2^32 terms a sum.
    """
    rounded, exponent = _rounded(rows)
    return np.asarray(np.ldexp(rounded @ whole.astype(np.float64), exponent))


def _rounded(rows: Float32Array | Float64Array) -> tuple[Float64Array, int]:
    """Entries as integers, and the power of two that they count."""
    exponent = int(np.frexp(np.abs(rows).max(initial=0))[1]) - _ENTRY_BITS
    return np.rint(np.ldexp(rows.astype(np.float64), -exponent)), exponent


def times(x: Float64Array, y: Float64Array) -> Float64Array:
    """Products of small matrices, shape (count, i, k) and (count, k, j), summed in order."""
    out = x[:, :, 0, None] * y[:, None, 0]
    for k in range(1, x.shape[2]):
        out += x[:, :, k, None] * y[:, None, k]
    return out


def transposed(matrices: Float64Array) -> Float64Array:
    """Of a stack, shape (count, i, k) to (count, k, i)."""
    return np.ascontiguousarray(matrices.swapaxes(1, 2))
