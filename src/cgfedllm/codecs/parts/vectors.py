r"""Long vectors at any rate, each in a mode of its own.

::

    mode 1 ... 6   1/8 to 1 bit an entry: codewords of `trellis`, times a scale
    mode 7         a dead-zone quantiser, one step for all such vectors

What is chosen is the caller's business; `GAUSSIAN` and `UNIFORM` say what a code keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import Float32Array
from cgfedllm.codecs.entropy import Float64Array, SymbolReader, SymbolWriter
from cgfedllm.codecs.parts import trellis
from cgfedllm.codecs.parts.deadzone import Histogram, read_levels, write_levels
from cgfedllm.codecs.parts.fitting import DEAD_ZONES, finest_within
from cgfedllm.errors import PacketError

IntArray = NDArray[np.int64]

CODES = (8, 6, 4, 3, 2, 1)
"""Entries a bit of modes 1, 2, ...; mode 0 is no vector."""
SCALAR = len(CODES) + 1
"""Mode of vectors that are dead-zone quantised."""
MODES = SCALAR + 1
"""Number of modes."""
GAUSSIAN = np.array([0.140, 0.183, 0.265, 0.340, 0.464, 0.637])
"""Share of the energy that modes 1 to 6 keep of entries with a mean magnitude of 0.798 of their
root mean square; measured, and only used to choose."""
UNIFORM = np.array([0.143, 0.189, 0.278, 0.362, 0.515, 0.750])
"""The same, of entries with a mean magnitude of 0.866 of it."""

_SCALE_BITS = 7
_SCALES_AN_OCTAVE = 4
# a vector's root mean square is at most 8 times the update's largest value
_SCALE_ZERO = 12
# 2^(-i/4), to the last bit the same everywhere
_QUARTERS = np.array([1.0, 0.8408964152537145, 0.7071067811865476, 0.5946035575013605])
# classes of scalar-quantised vectors by their scale, three quarters of an octave each
_CLASSES = 6
_CLASS_WIDTH = 3
_STEP_BITS = 32


def lean_of(rows: Float32Array, energies: Float64Array) -> Float64Array:
    """What the entries of vectors are like: 0 Gaussian, 1 uniform, more for two-valued ones.

    Parameters
    ----------
    rows : ndarray, shape (count, n)
    energies : ndarray, shape (count,)
        Sums of their squares.
    """
    mean = np.abs(rows).mean(axis=1, dtype=np.float64)
    squared = mean**2 * rows.shape[1] / np.maximum(energies, 1e-300)
    lean = (squared - GAUSSIAN[-1]) / (UNIFORM[-1] - GAUSSIAN[-1])
    return np.asarray(np.clip(lean, -1.0, 2.0))


def write_vectors(
    writer: SymbolWriter,
    rows: list[Float32Array],
    modes: list[IntArray],
    budget: float,
    loose: Sequence[Float32Array] = (),
    dead_zones: Sequence[float] = DEAD_ZONES,
) -> bool:
    """Write vectors: scales, codewords, and the scalar-quantised ones with what is left.

    Parameters
    ----------
    rows : list of ndarray, shape (count, n)
        Those that are sent, by length.
    modes : list of ndarray, shape (count,)
        Of each, 1 to 7.
    budget : float
        Bits the writer may hold in the end.
    loose : sequence of ndarray
        Values that are no vectors, class by class: quantised along.
    dead_zones : sequence of float
        To try, as `finest_within` does.

    Returns
    -------
    bool
        Whether anything was written that is not zero.
    """
    magnitudes = [np.sqrt(np.square(own).mean(axis=1, dtype=np.float64)) for own in rows]
    words: list[NDArray[np.uint8]] = []
    for own, mode, magnitude in zip(rows, modes, magnitudes, strict=True):
        for which, k in enumerate(CODES, 1):
            at = np.flatnonzero(mode == which)
            if at.size:
                bits = trellis.encode(own[at], k)
                word = trellis.decode(bits, k, own.shape[1])
                magnitude[at] = (own[at] * word).mean(axis=1, dtype=np.float64)
                words.append(bits)
    codes = _scale_codes(np.concatenate(magnitudes))
    _write_scales(writer, codes)
    for bits in words:
        trellis.write_bits(writer, bits)
    scalar = _write_scalar(writer, rows, modes, codes, budget, loose, dead_zones)
    return scalar or bool(words)


def read_vectors(
    reader: SymbolReader, modes: list[IntArray], lengths: list[int], loose: Sequence[int] = ()
) -> tuple[list[Float32Array], list[Float32Array]]:
    """Inverse of `write_vectors`.

    Raises
    ------
    PacketError
        If scales or the step are out of range.
    """
    codes = _read_scales(reader, sum(len(own) for own in modes))
    magnitudes = np.split(_scales(codes), np.cumsum([len(own) for own in modes])[:-1])
    rows = [np.zeros((len(m), n), np.float32) for m, n in zip(modes, lengths, strict=True)]
    for own, mode, magnitude in zip(rows, modes, magnitudes, strict=True):
        for which, k in enumerate(CODES, 1):
            at = np.flatnonzero(mode == which)
            if at.size:
                bits = trellis.read_bits(reader, at.size, -(-own.shape[1] // k))
                own[at] = trellis.decode(bits, k, own.shape[1]) * magnitude[at, None]
    return rows, _read_scalar(reader, rows, modes, codes, loose)


def _scale_codes(magnitudes: Float64Array) -> IntArray:
    """Code of the scale nearest to each magnitude."""
    octaves = -np.log2(np.maximum(magnitudes, 1e-30))
    codes = np.rint(_SCALES_AN_OCTAVE * octaves).astype(np.int64) + _SCALE_ZERO
    return np.asarray(np.clip(codes, 0, (1 << _SCALE_BITS) - 1))


def _scales(codes: IntArray) -> Float32Array:
    """Scales of some codes."""
    octaves, quarters = np.divmod(codes - _SCALE_ZERO, _SCALES_AN_OCTAVE)
    values = np.ldexp(_QUARTERS[quarters], -octaves.astype(np.int32))
    return np.asarray(values, np.float32)


def _write_scales(writer: SymbolWriter, codes: IntArray) -> None:
    """Write codes of scales: their range, then each."""
    if not codes.size:
        return
    low, span = int(codes.min()), int(np.ptp(codes))
    writer.bits(low, _SCALE_BITS)
    writer.bits(span, _SCALE_BITS)
    # a table is worth its bits only for many of them
    if codes.size > 16 * (span + 1):
        writer.symbols(codes - low, span + 1)
    else:
        writer.uniform(codes - low, span + 1)


def _read_scales(reader: SymbolReader, count: int) -> IntArray:
    """Inverse of `write_scales`."""
    if not count:
        return np.zeros(0, np.int64)
    low, span = (int(v) for v in reader.bits(_SCALE_BITS, 2))
    if low + span >= 1 << _SCALE_BITS:
        raise PacketError(f"scales from {low} to {low + span} are out of range")
    if count > 16 * (span + 1):
        return low + reader.symbols(span + 1, count).astype(np.int64)
    return low + reader.uniform(span + 1, count).astype(np.int64)


def _write_scalar(
    writer: SymbolWriter,
    rows: list[Float32Array],
    modes: list[IntArray],
    codes: IntArray,
    budget: float,
    loose: Sequence[Float32Array],
    dead_zones: Sequence[float],
) -> bool:
    """All scalar-quantised pieces with what is left of the budget; a step of 0 if that is none.

    Whether it was any.
    """
    members = [
        np.concatenate([own[at].reshape(-1) for own, at in zip(rows, which, strict=True)])
        for which in _classes(modes, codes)
    ] + list(loose)
    if not members:
        return False
    histogram = Histogram(members)
    quantiser = finest_within(histogram, budget - writer.spent - _STEP_BITS, dead_zones)
    writer.float32(quantiser.step if quantiser else 0.0)
    if quantiser:
        for values in members:
            write_levels(writer, values, quantiser.levels(values), quantiser.step)
    return quantiser is not None


def _read_scalar(
    reader: SymbolReader,
    rows: list[Float32Array],
    modes: list[IntArray],
    codes: IntArray,
    loose: Sequence[int],
) -> list[Float32Array]:
    classes = _classes(modes, codes)
    zeros = [np.zeros(count, np.float32) for count in loose]
    if not classes and not loose:
        return zeros
    step = reader.float32(1)[0]
    if not 0 <= step <= 2.0**32:  # NaN, too, is not
        raise PacketError(f"the step is {step}, not a number from 0 to 2^32")
    if not step:
        return zeros
    for which in classes:
        sizes = [np.count_nonzero(at) * own.shape[1] for own, at in zip(rows, which, strict=True)]
        values = read_levels(reader, int(sum(sizes)), step)
        parts = np.split(values, np.cumsum(sizes)[:-1])
        for own, at, part in zip(rows, which, parts, strict=True):
            own[at] = part.reshape(-1, own.shape[1])
    return [read_levels(reader, count, step) for count in loose]


def _classes(modes: list[IntArray], codes: IntArray) -> list[list[NDArray[np.bool_]]]:
    """Scalar-quantised vectors by class of scale: for each class that occurs, masks a length."""
    scalar = np.concatenate(modes) == SCALAR
    if not scalar.any():
        return []
    classes = (codes - codes[scalar].min()) // _CLASS_WIDTH
    classes = np.where(scalar, np.minimum(classes, _CLASSES - 1), -1)
    ends = np.cumsum([len(own) for own in modes])[:-1]
    return [np.split(classes == which, ends) for which in np.unique(classes[scalar])]
