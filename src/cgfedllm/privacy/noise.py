"""Gaussian numbers from a secret key: a cryptographic stream, the same again for the same labels.

Simulation generators (Philox, Mersenne twister) can be told from random and must not hide anything;
SHAKE-256 (FIPS 202), keyed, is what a stream of noise may come from.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 32

Float64Array = NDArray[np.float64]


def uniforms(key: bytes, count: int, *labels: bytes | str | int) -> Float64Array:
    """Numbers between 0 and 1, both excluded.

    Parameters
    ----------
    key : bytes
        Secret, `KEY_BYTES` long.
    count : int
        How many.
    *labels : bytes, str or int
        What they are for; other labels give unrelated numbers.

    Returns
    -------
    ndarray, shape (count,), float64
    """
    return np.asarray((_words(key, count, labels) >> np.uint64(12)) + 0.5) / 2.0**52


def gaussians(key: bytes, count: int, *labels: bytes | str | int) -> Float64Array:
    """Independent standard normal numbers; parameters as for `uniforms`."""
    from scipy.special import ndtri

    words = _words(key, count, labels)
    # sign and magnitude from different bits: a uniform number near 1 would lose its tail
    tails = ((words >> np.uint64(11)) + 0.5) / 2.0**54
    signs = 1.0 - 2.0 * (words & np.uint64(1)).astype(np.float64)
    return np.asarray(ndtri(tails) * signs, np.float64)


def _words(key: bytes, count: int, labels: tuple[bytes | str | int, ...]) -> NDArray[np.uint64]:
    stream = hashlib.shake_256(key)
    for label in labels:
        part = label if isinstance(label, bytes) else str(label).encode()
        stream.update(len(part).to_bytes(8, "little") + part)  # no two lists of labels run together
    return np.frombuffer(stream.digest(8 * count), "<u8").astype(np.uint64, copy=False)
