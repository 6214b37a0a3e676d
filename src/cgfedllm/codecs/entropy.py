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
_PIECE = 1 << 18
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
        array = np.atleast_1d(np.asarray(values)).astype(np.int32, copy=False)
        if size > 1 and array.size:
            self._encoder.encode(
                np.ascontiguousarray(array.reshape(-1)), stream.model.Uniform(size)
            )

    def bits(self, values: IntLike, width: int) -> None:
        """Write numbers in ``[0, 2^width)``, width at most 63."""
        array = np.atleast_1d(np.asarray(values)).astype(np.int64)
        for shift in range(0, width, _MAX_UNIFORM_BITS):
            part = min(_MAX_UNIFORM_BITS, width - shift)
            self.uniform((array >> shift) & ((1 << part) - 1), 1 << part)

    def float32(self, values: NDArray[np.float32] | float) -> None:
        """Write float32 values, 32 bits each."""
        array = np.atleast_1d(np.asarray(values, np.float32))
        self.bits(array.view(np.uint32), 32)

    def symbols(self, values: NDArray[Any], size: int) -> None:
        """Write numbers in ``[0, size)`` after a table of how often each occurs."""
        if not values.size:
            return
        values = np.ascontiguousarray(values.reshape(-1), dtype=np.int32)
        codes = frequency_codes(occurrences(values, size))
        self.uniform(codes, _LAST_CODE + 1)
        if np.count_nonzero(codes) > 1:
            self._encoder.encode(values, _table(codes))

    def levels(self, values: NDArray[Any]) -> None:
        """Write signed integers of magnitude up to `MAX_LEVEL`: magnitudes, escapes, signs."""
        magnitudes = np.abs(values.reshape(-1))
        if not magnitudes.size:
            return
        size = min(int(magnitudes.max()), _ESCAPE) + 1
        self.uniform(size - 1, _ESCAPE + 1)
        if size == 1:
            return
        self.symbols(magnitudes if size <= _ESCAPE else np.minimum(magnitudes, _ESCAPE), size)
        if size > _ESCAPE:
            self._gamma(magnitudes[magnitudes >= _ESCAPE] - (_ESCAPE - 1))
        nonzero = values.reshape(-1)
        nonzero = nonzero[nonzero != 0]
        self.uniform(nonzero < 0, 2)

    @property
    def spent(self) -> int:
        """Bits that all written so far takes, to within a word."""
        return int(self._encoder.num_bits())

    def finish(self) -> bytes:
        """All that was written, as bytes; the last one is never zero."""
        words = self._encoder.get_compressed().astype("<u4")
        return cast(bytes, words.tobytes()).rstrip(b"\0")

    def _gamma(self, values: NDArray[Any]) -> None:
        """Numbers from 1 to 2^24: the number of bits, then the bits below the first."""
        widths = _bit_lengths(values) - 1
        self.symbols(widths, _GAMMA_WIDTHS)
        for width in np.unique(widths[widths > 0]):
            self.bits(values[widths == width] - (1 << int(width)), int(width))


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
        for shift in range(0, width, _MAX_UNIFORM_BITS):
            part = min(_MAX_UNIFORM_BITS, width - shift)
            values |= self.uniform(1 << part, count).astype(np.int64) << shift
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
            escaped = np.flatnonzero(values >= _ESCAPE)
            values[escaped] = self._gamma(escaped.size) + (_ESCAPE - 1)
        negative = values != 0
        negative[negative] = self.uniform(2, int(np.count_nonzero(negative))) == 1
        np.negative(values, out=values, where=negative)
        return values

    def finish(self) -> None:
        """Make sure that nothing is left over.

        The coder looks a word ahead, so up to four bytes too many can pass; the packet's length
        and checksum are what tells them.
        """
        if not self._decoder.maybe_exhausted():
            raise PacketError("range-coded payload holds more than this adapter needs")

    def _decode(self, table: Any, count: int) -> Int32Array:
        try:
            return cast(Int32Array, self._decoder.decode(table, count))
        except (AssertionError, ValueError) as error:
            raise PacketError(f"range-coded payload is not valid: {error}") from None

    def _gamma(self, count: int) -> Int32Array:
        widths = self.symbols(_GAMMA_WIDTHS, count)
        values = np.left_shift(np.int32(1), widths)
        for width in np.unique(widths[widths > 0]):
            at = np.flatnonzero(widths == width)
            values[at] += self.bits(int(width), at.size).astype(np.int32)
        return values


_GAMMA_WIDTHS = 25


def occurrences(values: NDArray[Any], size: int = 0) -> NDArray[np.int64]:
    """How often 0, 1, 2, ... occur, at least `size` of them; in pieces, for the memory's sake."""
    values = values.reshape(-1)
    pieces = range(0, max(values.size, 1), _PIECE)
    # bincount makes int64 of what it is given
    counts = [np.bincount(values[at : at + _PIECE], minlength=size) for at in pieces]
    total = np.zeros(max(map(len, counts)), np.int64)
    for own in counts:
        total[: len(own)] += own
    return total


def frequency_codes(counts: NDArray[Any]) -> Int32Array:
    """Code of each count's frequency on the grid that tables are sent in.

    Parameters
    ----------
    counts : ndarray, shape (size,)
        How often each symbol occurs; at least one does.

    Returns
    -------
    ndarray, shape (size,)
        0 for symbols that do not occur, 1 to 63 for the others; the commonest is about 63.
    """
    counts = np.asarray(counts, np.float64)
    with np.errstate(divide="ignore"):
        below = np.rint(4 * np.log2(counts / counts.max()))
    codes = np.maximum(_LAST_CODE + below, 1)
    return np.where(counts > 0, codes, 0).astype(np.int32)


def frequencies(codes: NDArray[Any]) -> NDArray[np.int64]:
    """Integer frequencies of a table, shape (size,): they sum to 2^16, none is below 1."""
    weights = _WEIGHTS[codes]
    # one is set aside for each symbol first, so that the rest can only be left over, never missing
    table: NDArray[np.int64] = 1 + weights * (_TOTAL - weights.size) // weights.sum()
    table[np.argmax(table)] += _TOTAL - table.sum()
    return table


def symbol_bits(counts: NDArray[Any]) -> Float64Array:
    """Bits that `SymbolWriter.symbols` spends on each symbol of these counts, shape (size,).

    The table's own 6 bits an entry come on top. A symbol that does not occur is given what it
    would cost as the rarest one.
    """
    table = frequencies(frequency_codes(np.maximum(counts, 1e-3 * max(counts.max(), 1))))
    return np.log2(_TOTAL / table)


def levels_bits(counts: NDArray[Any]) -> float:
    """Bits that `SymbolWriter.levels` spends on magnitudes that occur ``counts[m]`` times.

    Parameters
    ----------
    counts : ndarray, shape (largest magnitude + 1,) or longer
        Occurrences of magnitude 0, 1, 2, ...; the last entry may lump all larger ones.
    """
    counts = np.trim_zeros(np.asarray(counts, np.float64), "b")
    large = counts[_ESCAPE:]
    widths = np.zeros(_GAMMA_WIDTHS)
    if large.size:
        sent = _bit_lengths(np.arange(1, large.size + 1)) - 1
        widths[: sent[-1] + 1] = np.bincount(sent, weights=large)
    return _levels_bits(counts[:_ESCAPE], widths)


def bits_of_levels(levels: NDArray[Any]) -> float:
    """Bits that `SymbolWriter.levels` spends on these levels; takes little memory."""
    small = np.zeros(_ESCAPE + 1, np.int64)
    widths = np.zeros(_GAMMA_WIDTHS, np.int64)
    levels = levels.reshape(-1)
    for at in range(0, levels.size, _PIECE):
        magnitudes = np.abs(levels[at : at + _PIECE])
        small += np.bincount(np.minimum(magnitudes, _ESCAPE), minlength=_ESCAPE + 1)
        escaped = magnitudes[magnitudes >= _ESCAPE] - (_ESCAPE - 1)
        if escaped.size:
            widths += np.bincount(_bit_lengths(escaped) - 1, minlength=_GAMMA_WIDTHS)
    return _levels_bits(np.trim_zeros(small[:_ESCAPE].astype(np.float64), "b"), widths)


def _levels_bits(small: Float64Array, widths: NDArray[Any]) -> float:
    """From the counts of magnitudes below the escape, and of escaped ones by width."""
    header = float(np.log2(_ESCAPE + 1))
    escaped = widths.sum()
    extra = 0.0
    if escaped:
        small = np.append(np.pad(small, (0, _ESCAPE - small.size)), escaped)
        extra = _symbols_bits(widths) + float((widths * np.arange(widths.size)).sum())
    if small.size <= 1:
        return header
    return header + _symbols_bits(small) + extra + float(small[1:].sum())


def _symbols_bits(counts: NDArray[Any]) -> float:
    """Bits that `SymbolWriter.symbols` spends, its table included."""
    codes = frequency_codes(counts)
    present = codes > 0
    coded = 0.0
    if np.count_nonzero(present) > 1:
        coded = float((counts[present] * np.log2(_TOTAL / frequencies(codes)[present])).sum())
    return _CODE_BITS * counts.size + coded


def _table(codes: NDArray[Any]) -> Any:
    # exact: each frequency is an integer below 2^16, divided by a power of two
    return stream.model.Categorical(frequencies(codes) / _TOTAL, perfect=False)


def _bit_lengths(values: NDArray[Any]) -> Int32Array:
    # frexp's exponent is the bit length for every positive integer that float64 holds exactly
    return np.frexp(values.astype(np.float64))[1].astype(np.int32)
