r"""Chunked discrete cosine transform in integers: the same to the bit on every machine.

::

    integers --x round(2^18 basis), summed in float64--> exact sums --one rounding--> integers

Every partial sum is an integer below 2^53, so a product of matrices is exact whatever order a BLAS
sums it in. Each axis is cut into chunks of a given length and a shorter last one.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]

_BASIS_BITS = 18
LARGEST_IN = 1 << 22
"""Magnitudes up to this may be transformed along two axes of chunks up to 256."""


@lru_cache(maxsize=64)
def _basis(n: int) -> Float64Array:
    """Orthonormal DCT-II times 2^18, rounded; row k is frequency k."""
    angle = np.pi / n * np.outer(np.arange(n), np.arange(n) + 0.5)
    basis = np.cos(angle) * np.sqrt(2 / n)
    basis[0] = np.sqrt(1 / n)
    return np.asarray(np.rint(basis * (1 << _BASIS_BITS)))


def forward(values: Float64Array, chunk: int, axis: int, spare: int = 0) -> Float64Array:
    """Coefficients of integers along an axis, rounded to integers.

    Parameters
    ----------
    values : ndarray
        Integers up to `LARGEST_IN` (16 times that where a first axis is transformed already).
    chunk : int
        Length of chunks.
    axis : int
        Axis to transform.
    spare : int
        Bits below the unit to keep: the result is 2^spare times the coefficients.
    """
    return _along(values, chunk, axis, spare, inverse=False)


def inverse(values: Float64Array, chunk: int, axis: int, spare: int = 0) -> Float64Array:
    """Inverse of `forward`, to within rounding."""
    return _along(values, chunk, axis, spare, inverse=True)


def _along(
    values: Float64Array, chunk: int, axis: int, spare: int, *, inverse: bool
) -> Float64Array:
    moved = np.moveaxis(values, axis, -1)
    n = moved.shape[-1]
    whole = n - n % chunk if n > chunk else 0
    parts = []
    for start, stop, length in ((0, whole, chunk), (whole, n, n - whole)):
        if stop > start:
            basis = _basis(length)
            part = moved[..., start:stop].reshape(*moved.shape[:-1], -1, length)
            product = part @ (basis if inverse else basis.T)
            product *= 2.0 ** (spare - _BASIS_BITS)
            np.rint(product, out=product)
            parts.append(product.reshape(*moved.shape[:-1], -1))
    return np.moveaxis(parts[0] if len(parts) == 1 else np.concatenate(parts, -1), -1, axis)
