"""The power of two that a packet's values are multiplied with, so that inside all are below 1."""

from __future__ import annotations

import numpy as np

from cgfedllm.adapter import Float32Array
from cgfedllm.codecs.entropy import SymbolReader, SymbolWriter

EXPONENT_BITS = 9
"""Bits of an exponent."""
LOWEST_EXPONENT = -160
"""Lowest exponent that can be written; float32 magnitudes are 2^-149 to 2^128."""


def exponent_of(*arrays: Float32Array) -> int:
    """The least power of two above all magnitudes; 0 for zeros."""
    largest = max(float(np.abs(own).max(initial=0)) for own in arrays)
    return int(np.frexp(largest)[1])


def write_exponent(writer: SymbolWriter, exponent: int) -> None:
    """Write an exponent from `LOWEST_EXPONENT` up."""
    writer.bits(exponent - LOWEST_EXPONENT, EXPONENT_BITS)


def read_exponent(reader: SymbolReader) -> int:
    """Inverse of `write_exponent`."""
    return int(reader.bits(EXPONENT_BITS, 1)[0]) + LOWEST_EXPONENT


def scaled_back(values: Float32Array, exponent: int) -> Float32Array:
    """Values times 2^exponent, in place; the caller refuses what is not finite then."""
    if exponent > 64:  # the largest values may round to more than a float32 holds
        most = np.ldexp(np.finfo(np.float32).max, -exponent)
        np.clip(values, -most, most, out=values)
    with np.errstate(over="ignore"):
        return np.ldexp(values, exponent, out=values)
