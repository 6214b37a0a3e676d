"""Scale of each factor, and gain of each kind of factor: what networks need not learn.

A factor is divided by the power of two nearest to its mean magnitude, which one large value moves
little, and cut off at a multiple of it. Powers of two cost two bits or so a factor, and dividing by
them is exact. The networks' output is multiplied by them again, and by the gain that brings it
nearest to the update, never below zero: what cannot be rebuilt becomes zero.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs.cg.layout import kind_of
from cgfedllm.codecs.entropy import Float64Array, SymbolReader, SymbolWriter
from cgfedllm.errors import PacketError

IntArray = NDArray[np.int64]

NOTHING = -(1 << 15)
"""In place of the exponent of a factor that is zero throughout."""

_LOWEST, _HIGHEST = -149, 128
_EXPONENT_BITS = 9
# normalised values beyond are cut off, so that one of them cannot outshine an image
_LARGEST = 32.0
_GAIN_STEPS = 256
_GAIN_UNIT = 128
_FLOAT32 = float(np.finfo(np.float32).max)


def exponents_of(update: AdapterUpdate) -> IntArray:
    """Exponent of each factor's scale, shape (factors,)."""
    sums = np.add.reduceat(np.abs(update.vector), _starts(update.spec), dtype=np.float64)
    exponents = np.full(len(update.spec), NOTHING)
    some = sums > 0
    exponents[some] = np.rint(np.log2(sums[some] / _sizes(update.spec)[some]))
    return np.where(some, np.clip(exponents, _LOWEST, _HIGHEST), NOTHING)


def normalised(update: AdapterUpdate, exponents: IntArray) -> Float32Array:
    """Values divided by their factor's scale, shape (spec.size,)."""
    down = np.where(exponents == NOTHING, 0, -exponents).astype(np.int32)
    values: Float32Array = np.ldexp(update.vector, np.repeat(down, _sizes(update.spec)))
    return np.clip(values, -_LARGEST, _LARGEST, out=values)


def denormalised(
    values: Float32Array, spec: AdapterSpec, exponents: IntArray, gains: NDArray[np.integer]
) -> Float32Array:
    """Values times the gain of their kind and the scale of their factor, kept finite.

    Parameters
    ----------
    values : ndarray, shape (spec.size,), float32
        As the decoder made them.
    gains : ndarray, shape (kinds,)
        As `best_gains` gives them.
    """
    factors = gains[kinds(spec)] / _GAIN_UNIT * scales_of(exponents)
    scaled = values * np.repeat(factors, _sizes(spec))
    return np.clip(scaled, -_FLOAT32, _FLOAT32, out=scaled).astype(np.float32)


def scales_of(exponents: IntArray) -> Float64Array:
    """Scales themselves, 0 for factors that are zero throughout; shape (factors,)."""
    scales: Float64Array = np.ldexp(1.0, exponents.astype(np.int32))
    return scales


def best_gains(
    values: Float32Array, decoded: Float32Array, spec: AdapterSpec, exponents: IntArray
) -> IntArray:
    """Gain of each kind that leaves the least squared error, in steps; shape (kinds,).

    Parameters
    ----------
    values, decoded : ndarray, shape (spec.size,), float32
        Normalised values, before and after.
    """
    some = exponents != NOTHING
    if not some.any():
        return np.zeros(int(kinds(spec).max()) + 1, np.int64)
    # squared scales, relative to the largest: these cannot overflow
    weights = np.square(scales_of(np.where(some, exponents - exponents[some].max(), NOTHING)))
    starts = _starts(spec)
    along = np.add.reduceat(np.multiply(values, decoded, dtype=np.float64), starts)
    energy = np.add.reduceat(np.square(decoded, dtype=np.float64), starts)
    wanted = np.bincount(kinds(spec), weights * along)
    found = np.bincount(kinds(spec), weights * energy)
    gains = np.divide(wanted, found, out=np.zeros_like(wanted), where=found > 0)
    steps: IntArray = np.rint(_GAIN_UNIT * gains).clip(0, _GAIN_STEPS - 1).astype(np.int64)
    return steps


def kinds(spec: AdapterSpec) -> IntArray:
    """Number of each factor's kind, in the order in which kinds first occur; shape (factors,)."""
    names = list(dict.fromkeys(map(kind_of, spec)))
    return np.array([names.index(kind_of(factor)) for factor in spec])


def write_scales(writer: SymbolWriter, exponents: IntArray, gains: IntArray) -> None:
    """Write gains, then exponents; one of these at least is not `NOTHING`."""
    writer.uniform(gains, _GAIN_STEPS)
    some = exponents != NOTHING
    lowest, highest = int(exponents[some].min()), int(exponents[some].max())
    writer.bits(np.array([lowest - _LOWEST, highest - lowest]), _EXPONENT_BITS)
    # 0 stands for nothing
    writer.symbols(np.where(some, exponents - lowest + 1, 0), highest - lowest + 2)


def read_scales(reader: SymbolReader, spec: AdapterSpec) -> tuple[IntArray, IntArray]:
    """Exponents and gains.

    Raises
    ------
    PacketError
        If an exponent is none of a float32.
    """
    gains = reader.uniform(_GAIN_STEPS, int(kinds(spec).max()) + 1).astype(np.int64)
    above, span = (int(number) for number in reader.bits(_EXPONENT_BITS, 2))
    if above + span > _HIGHEST - _LOWEST:
        raise PacketError(f"a scale of 2^{above + span + _LOWEST} is none of a float32")
    codes = reader.symbols(span + 2, len(spec)).astype(np.int64)
    return np.where(codes > 0, codes - 1 + above + _LOWEST, NOTHING), gains


def _starts(spec: AdapterSpec) -> IntArray:
    return np.cumsum(_sizes(spec)) - _sizes(spec)


def _sizes(spec: AdapterSpec) -> IntArray:
    return np.array([factor.size for factor in spec])
