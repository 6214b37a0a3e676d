"""Entropy coding: integers into a range coder, with integer probability tables only.

::

    SymbolWriter  uniform(values, size)   numbers below a known size, log2(size) bits each
                  symbols(values, size)   the table of frequencies first, then the values
                  levels(values)          signed integers, most of them small
                  finish() -> bytes
    SymbolReader  the same calls in the same order give the values back

Range coding (Martin 1979) is done by `constriction` (Bamler, arXiv 2201.01741). Frequencies are
integers that sum to 2^16 on both ends, so every probability is exact in float64 and the coder's
fixed-point table is the same on every machine. A table of frequencies is two-pass adaptive: it is
made for the values at hand and sent ahead of them, 6 bits an entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import Any, cast

import numpy as np
from constriction import stream
from numpy.typing import NDArray

from cgfedllm.errors import PacketError

Int32Array = NDArray[np.int32]
Float64Array = NDArray[np.float64]
IntLike = NDArray[Any] | int

_TOTAL = 1 << 16
_CODE_BITS = 6
# largest size `uniform` takes in one go: the coder's probabilities have 24 bits
_MAX_UNIFORM_BITS = 16
_BLOCK = 1 << 16
# up to so many kinds of numbers, comparing with each is faster than bincount
_FEW = 8
# magnitudes from here on are escaped; more entries would cost more table than they save
_ESCAPE = 64
MAX_LEVEL = (1 << 24) - 1
"""Largest magnitude that `levels` takes."""

# weight of frequency code c is 2^((c - 1) / 4), kept as integers: a grid within 9 % of any ratio
_WEIGHTS = np.array(
    [0, *(isqrt(isqrt(1 << (code + 40))) for code in range((1 << _CODE_BITS) - 1))], np.int64
)
_LAST_CODE = len(_WEIGHTS) - 1


class SymbolWriter:
    """Collects integers into one range-coded byte string."""

    def __init__(self) -> None:
        self._encoder = stream.queue.RangeEncoder()

    def uniform(self, values: IntLike, size: int) -> None:
        """Write numbers in ``[0, size)``, all equally likely; ``size`` at most 2^16."""
        if size > 1:
            self._encode(np.asarray(values), stream.model.Uniform(size))

    def bits(self, values: IntLike, width: int) -> None:
        """Write numbers in ``[0, 2^width)``, width at most 63."""
        array = np.asarray(values).reshape(-1)
        for shift, part in _parts(width):
            for block in blocks(array.size):
                own = array[block].astype(np.int64)
                self.uniform((own >> shift) & ((1 << part) - 1), 1 << part)

    def float32(self, values: NDArray[np.float32] | float) -> None:
        """Write float32 values, 32 bits each."""
        array = np.atleast_1d(np.asarray(values, np.float32))
        self.bits(array.view(np.uint32), 32)

    def symbols(self, values: NDArray[Any], size: int) -> None:
        """Write numbers in ``[0, size)`` after a table of how often each occurs."""
        if not values.size:
            return
        table = self._write_table(occurrences(values, size))
        if table is not None:
            self._encode(values, table)

    def levels(self, values: NDArray[Any]) -> None:
        """Write signed integers of magnitude up to `MAX_LEVEL`: magnitudes, escapes, signs."""
        values = values.reshape(-1)
        if not values.size:
            return
        counts = np.trim_zeros(_magnitude_counts(values), "b")
        size = counts.size
        self.uniform(size - 1, _ESCAPE + 1)
        if size == 1:
            return
        table = self._write_table(counts)
        if table is not None:
            for own in _magnitudes(values):
                self._encode(np.minimum(own, _ESCAPE, out=own), table)
        if size > _ESCAPE:
            large = np.empty(counts[_ESCAPE], np.int32)
            start = 0
            for own in _magnitudes(values):
                own = own[own >= _ESCAPE]
                large[start : start + own.size] = own - (_ESCAPE - 1)
                start += own.size
            self._gamma(large)
        for block in blocks(values.size):
            own = values[block]
            self.uniform(own[own != 0] < 0, 2)

    @property
    def spent(self) -> int:
        """Bits that all written so far takes, to within a word."""
        return int(self._encoder.num_bits())

    def finish(self) -> bytes:
        """All that was written, as bytes; the last one is never zero."""
        words = self._encoder.get_compressed().astype("<u4", copy=False)
        return cast(bytes, words.tobytes()).rstrip(b"\0")

    def _gamma(self, values: NDArray[Any]) -> None:
        """Numbers from 1 to 2^24: the number of bits, then the bits below the first."""
        widths = _widths(values)
        self.symbols(widths, _GAMMA_WIDTHS)
        for width in _widths_above_0(widths):
            for shift, part in _parts(width):
                for block in blocks(values.size):
                    own = values[block][widths[block] == width]
                    # the mask of the last part takes the first bit away
                    self.uniform((own >> shift) & ((1 << part) - 1), 1 << part)

    def _write_table(self, counts: NDArray[np.int64]) -> Any:
        """Write the table of some counts and give its model; None if only one symbol occurs."""
        codes = frequency_codes(counts)
        self.uniform(codes, _LAST_CODE + 1)
        return _table(codes) if np.count_nonzero(codes) > 1 else None

    def _encode(self, values: NDArray[Any], model: Any) -> None:
        # the coder keeps its state from call to call: in blocks, its int32 copies stay small
        values = values.reshape(-1)
        for block in blocks(values.size):
            self._encoder.encode(np.ascontiguousarray(values[block], np.int32), model)


class SymbolReader:
    """Gives back what a `SymbolWriter` wrote; wants the same calls in the same order.

    Every count is the caller's, who knows it from the adapter's spec: nothing is ever allocated
    for a length found in the bytes.

    Raises
    ------
    PacketError
        By any of the methods, if the bytes cannot have come from a writer.
    """

    def __init__(self, payload: bytes) -> None:
        if payload.endswith(b"\0"):
            raise PacketError("range-coded payload ends in a zero byte: extended on the way")
        # the writer drops zeros at the end, even whole words; the decoder needs the last ones
        padded = payload + bytes(-len(payload) % 4)
        self._decoder = stream.queue.RangeDecoder(np.frombuffer(padded, "<u4").astype(np.uint32))

    def uniform(self, size: int, count: int) -> Int32Array:
        """Read `count` numbers in ``[0, size)``."""
        if size <= 1 or not count:
            return np.zeros(count, np.int32)
        return self._decode(stream.model.Uniform(size), count)

    def bits(self, width: int, count: int) -> NDArray[np.int64]:
        """Read `count` numbers in ``[0, 2^width)``."""
        values = np.zeros(count, np.int64)
        for shift, part in _parts(width):
            for block in blocks(count):
                own = values[block]
                own |= self.uniform(1 << part, own.size).astype(np.int64) << shift
        return values

    def float32(self, count: int) -> NDArray[np.float32]:
        """Read `count` float32 values; they may be NaN or infinite."""
        return self.bits(32, count).astype(np.uint32).view(np.float32)

    def symbols(self, size: int, count: int) -> Int32Array:
        """Read `count` numbers in ``[0, size)`` and the table ahead of them."""
        if not count:
            return np.zeros(0, np.int32)
        codes = self.uniform(_LAST_CODE + 1, size)
        present = np.flatnonzero(codes)
        if not present.size:
            raise PacketError("range-coded payload has an empty table of frequencies")
        if present.size == 1:
            return np.full(count, present[0], np.int32)
        return self._decode(_table(codes), count)

    def levels(self, count: int) -> Int32Array:
        """Read `count` signed integers."""
        size = int(self.uniform(_ESCAPE + 1, 1)[0]) + 1 if count else 1
        if size == 1:
            return np.zeros(count, np.int32)
        values = self.symbols(size, count)
        if size > _ESCAPE:
            self._escaped(values)
        for block in blocks(count):
            own = values[block]
            at = np.flatnonzero(own)
            own[at] *= 1 - 2 * self.uniform(2, at.size)
        return values

    def finish(self) -> None:
        """Make sure that nothing is left over.

        The coder looks a word ahead, so up to four bytes too many can pass; the packet's length
        and checksum are what tells them.
        """
        if not self._decoder.maybe_exhausted():
            raise PacketError("range-coded payload holds more than this adapter needs")

    def _decode(self, table: Any, count: int) -> Int32Array:
        values = np.empty(count, np.int32)
        try:
            for block in blocks(count):
                values[block] = self._decoder.decode(table, block.stop - block.start)
        except (AssertionError, ValueError) as error:
            raise PacketError(f"range-coded payload is not valid: {error}") from None
        return values

    def _escaped(self, values: Int32Array) -> None:
        """Put the numbers that were escaped in their places."""
        count = sum(int(np.count_nonzero(values[b] >= _ESCAPE)) for b in blocks(values.size))
        large = self._gamma(count)
        start = 0
        for block in blocks(values.size):
            own = values[block]
            at = np.flatnonzero(own >= _ESCAPE)
            own[at] = large[start : start + at.size]
            own[at] += _ESCAPE - 1
            start += at.size

    def _gamma(self, count: int) -> Int32Array:
        widths = self.symbols(_GAMMA_WIDTHS, count).astype(np.int8)
        values = np.left_shift(np.int32(1), widths, dtype=np.int32)
        for width in _widths_above_0(widths):
            for shift, part in _parts(width):
                for block in blocks(count):
                    at = np.flatnonzero(widths[block] == width)
                    values[block][at] += self.uniform(1 << part, at.size) << shift
        return values


_GAMMA_WIDTHS = 25


def blocks(size: int) -> Iterator[slice]:
    """Blocks that fit the cache: several passes over each are faster than over the whole.

    What is made on the way to a result is then a block's, too, whatever the update's size.
    """
    for start in range(0, size, _BLOCK):
        yield slice(start, min(start + _BLOCK, size))


def occurrences(values: NDArray[Any], size: int = 0) -> NDArray[np.int64]:
    """How often 0, 1, 2, ... occur, at least `size` of them."""
    values = values.reshape(-1)
    counts = [_count(values[block], size) for block in blocks(values.size)]
    total = np.zeros(max(map(len, counts), default=size), np.int64)
    for own in counts:
        total[: len(own)] += own
    return total


def _count(values: NDArray[Any], size: int) -> NDArray[np.int64]:
    top = int(values.max())
    if top >= _FEW:
        return np.bincount(values, minlength=size)
    counts = np.zeros(max(size, top + 1), np.int64)
    counts[: top + 1] = [np.count_nonzero(values == own) for own in range(top + 1)]
    return counts


def frequency_codes(counts: NDArray[Any]) -> Int32Array:
    """Code of each count's frequency on the grid that tables are sent in.

    Parameters
    ----------
    counts : ndarray, shape (..., size)
        How often each symbol occurs; at least one of every table does.

    Returns
    -------
    ndarray, shape (..., size)
        0 for symbols that do not occur, 1 to 63 for the others; the commonest is about 63.
    """
    counts = np.asarray(counts, np.float64)
    with np.errstate(divide="ignore"):
        below = np.rint(4 * np.log2(counts / counts.max(axis=-1, keepdims=True)))
    codes = np.maximum(_LAST_CODE + below, 1)
    return np.where(counts > 0, codes, 0).astype(np.int32)


def frequencies(codes: NDArray[Any], sizes: NDArray[Any] | None = None) -> NDArray[np.int64]:
    """Integer frequencies of tables: each sums to 2^16, none is below 1.

    Parameters
    ----------
    codes : ndarray, shape (..., size)
        Of symbols, as `frequency_codes` gives them.
    sizes : ndarray, shape (...), or None
        Symbols of each table, where some are shorter; what is beyond them is no part of it.
    """
    weights = _WEIGHTS[codes]
    size = weights.shape[-1] if sizes is None else sizes[..., None]
    # one is set aside for each symbol first, so that the rest can only be left over, never missing
    table: NDArray[np.int64] = weights * (_TOTAL - size) // weights.sum(axis=-1, keepdims=True)
    left = _TOTAL - size - table.sum(axis=-1, keepdims=True)
    commonest = table.argmax(axis=-1, keepdims=True)
    np.put_along_axis(table, commonest, np.take_along_axis(table, commonest, -1) + left, -1)
    table += 1
    return table


def symbol_bits(counts: NDArray[Any]) -> Float64Array:
    """Bits that `SymbolWriter.symbols` spends on each symbol of these counts, shape (size,).

    The table's own 6 bits an entry come on top. A symbol that does not occur is given what it
    would cost as the rarest one.
    """
    table = frequencies(frequency_codes(np.maximum(counts, 1e-3 * max(counts.max(), 1))))
    return np.log2(_TOTAL / table)


def levels_bits(counts: NDArray[Any]) -> Float64Array:
    """Bits that `SymbolWriter.levels` spends on magnitudes that occur ``counts[m]`` times.

    Parameters
    ----------
    counts : ndarray, shape (..., largest magnitude + 1) or longer
        Occurrences of magnitude 0, 1, 2, ...; the last entry may lump all larger ones.

    Returns
    -------
    ndarray, shape (...)
    """
    counts = np.asarray(counts, np.float64)
    small, large = counts[..., :_ESCAPE], counts[..., _ESCAPE:]
    widths = np.zeros((*counts.shape[:-1], _GAMMA_WIDTHS))
    if large.shape[-1]:
        sent = _bit_lengths(np.arange(1, large.shape[-1] + 1)) - 1
        starts = np.flatnonzero(np.diff(sent, prepend=-1))
        widths[..., : starts.size] = np.add.reduceat(large, starts, axis=-1)
    return _levels_bits(small, widths)


def bits_of_levels(levels: NDArray[Any]) -> float:
    """Bits that `SymbolWriter.levels` spends on these levels; takes little memory."""
    small = _magnitude_counts(levels)
    widths = np.zeros(_GAMMA_WIDTHS, np.int64)
    if small[_ESCAPE]:
        for magnitudes in _magnitudes(levels):
            escaped = magnitudes[magnitudes >= _ESCAPE] - (_ESCAPE - 1)
            widths += np.bincount(_bit_lengths(escaped) - 1, minlength=_GAMMA_WIDTHS)
    return float(_levels_bits(small[:_ESCAPE].astype(np.float64), widths))


def _levels_bits(small: Float64Array, widths: NDArray[Any]) -> Float64Array:
    """From the counts of magnitudes below the escape, and of escaped ones by width."""
    escaped = widths.sum(axis=-1)
    extra = np.zeros(escaped.shape)
    if escaped.any():
        below = [(0, 0)] * (small.ndim - 1) + [(0, _ESCAPE - small.shape[-1])]
        small = np.concatenate([np.pad(small, below), escaped[..., None]], axis=-1)
        gamma = _symbols_bits(widths, np.full(escaped.shape, _GAMMA_WIDTHS))
        extra = np.where(escaped > 0, gamma + widths @ np.arange(_GAMMA_WIDTHS), 0.0)
    there = small > 0
    # symbols of each table: up to the largest magnitude that occurs
    sizes = np.where(there.any(axis=-1), small.shape[-1] - there[..., ::-1].argmax(axis=-1), 0)
    bits = _symbols_bits(small, sizes) + extra + small[..., 1:].sum(axis=-1)
    return np.asarray(np.log2(_ESCAPE + 1) + np.where(sizes > 1, bits, 0.0))


def _symbols_bits(counts: NDArray[Any], sizes: NDArray[Any]) -> Float64Array:
    """Bits that `SymbolWriter.symbols` spends, its table included; tables are of these sizes."""
    # what does not occur at all is given a table that nothing is coded with
    empty = counts.sum(axis=-1, keepdims=True) == 0
    codes = frequency_codes(np.where(empty, 1, counts))
    several = np.count_nonzero(counts, axis=-1) > 1
    coded = (counts * np.log2(_TOTAL / frequencies(codes, sizes))).sum(axis=-1)
    return np.asarray(_CODE_BITS * sizes + np.where(several, coded, 0.0))


def _table(codes: NDArray[Any]) -> Any:
    # exact: each frequency is an integer below 2^16, divided by a power of two
    return stream.model.Categorical(frequencies(codes) / _TOTAL, perfect=False)


def _magnitudes(levels: NDArray[Any]) -> Iterator[Int32Array]:
    levels = levels.reshape(-1)
    for block in blocks(levels.size):
        own = levels[block].astype(np.int32)
        yield np.abs(own, out=own)


def _magnitude_counts(levels: NDArray[Any]) -> NDArray[np.int64]:
    """How often magnitudes 0 to the escape occur; the last one stands for all from there on."""
    counts = np.zeros(_ESCAPE + 1, np.int64)
    for own in _magnitudes(levels):
        counts += _count(np.minimum(own, _ESCAPE, out=own), _ESCAPE + 1)
    return counts


def _parts(width: int) -> Iterator[tuple[int, int]]:
    """Numbers of `width` bits in parts that `uniform` takes: first bit and bits of each."""
    for shift in range(0, width, _MAX_UNIFORM_BITS):
        yield shift, min(_MAX_UNIFORM_BITS, width - shift)


def _widths(values: Int32Array) -> NDArray[np.int8]:
    """Bits below the first one of each positive number."""
    widths = np.empty(values.size, np.int8)
    for block in blocks(values.size):
        widths[block] = _bit_lengths(values[block]) - 1
    return widths


def _widths_above_0(widths: NDArray[np.int8]) -> list[int]:
    return [width for width, count in enumerate(occurrences(widths)) if width and count]


def _bit_lengths(values: NDArray[Any]) -> Int32Array:
    # frexp's exponent is the bit length for every positive integer that float64 holds exactly
    return np.frexp(values.astype(np.float64))[1].astype(np.int32)
