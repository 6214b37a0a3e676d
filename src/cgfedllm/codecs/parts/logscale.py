"""Magnitudes on a logarithmic grid of eight steps an octave, the same on every machine.

Powers of two with fractional exponents come from integer square roots, not from the platform's
`exp2`, whose last bit differs between libraries.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import Float32Array

SCALE_CODES = 256
_PER_OCTAVE = 8
# 2^(-j / 8) as integers over 2^20: the eighth root of 2^(160 - j)
_FRACTIONS = [isqrt(isqrt(isqrt(1 << (8 * 20 - j)))) for j in range(_PER_OCTAVE)]
# code 0 is zero, code c is 2^(-(c - 1) / 8)
_VALUES = np.array(
    [0.0]
    + [
        _FRACTIONS[step % _PER_OCTAVE] / 2.0 ** (20 + step // _PER_OCTAVE)
        for step in range(SCALE_CODES - 1)
    ]
)


def scale_codes(magnitudes: NDArray[Any], largest: float) -> NDArray[np.uint8]:
    """Nearest codes of some magnitudes, none above `largest`; too small ones become zero."""
    with np.errstate(divide="ignore"):
        octaves = np.log2(np.asarray(magnitudes, np.float64)) - np.log2(largest)
    codes = np.rint(-_PER_OCTAVE * octaves) + 1
    return np.where(codes < SCALE_CODES, codes, 0).astype(np.uint8)


def scale_values(codes: NDArray[Any], largest: np.float32) -> Float32Array:
    """The magnitudes that codes stand for."""
    values: Float32Array = (_VALUES[codes] * float(largest)).astype(np.float32)
    return values
