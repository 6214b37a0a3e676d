"""Top-k: the largest values of every chunk, in a sign and a bit of magnitude each.

::

    update -> chunks of 4096 -> the k largest of each -> positions | signs | 1 bit of magnitude

SparseLoCo (Sarfi et al., arXiv 2508.15706) sends 1 to 3 % of an update like this: 12 bits of
position in the chunk and 2 bits of value. Coding the positions as a sequence of hits and misses
with a range coder takes about 3 bits less at these densities; that is the default here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs.base import Codec, CodecContext, register
from cgfedllm.codecs.entropy import SymbolReader, SymbolWriter, blocks
from cgfedllm.codecs.parts.logscale import SCALE_CODES, scale_codes, scale_values
from cgfedllm.codecs.rate import RateOptions, payload_bits
from cgfedllm.errors import PacketError

# values that are worked on together; the largest chunk
_AT_ONCE = 1 << 16
# the two magnitudes, relative to their chunk's mean, are sent in 64ths
_MAGNITUDE_STEP = 64
_MAGNITUDE_SIZE = 1 << 9
_LARGEST = np.finfo(np.float32).max


class TopKOptions(RateOptions):
    """How much is kept, and how positions are told."""

    bpp: float = Field(
        default=0.1,
        gt=0,
        le=2.5,
        allow_inf_nan=False,
        description="Bits per parameter of the whole packet, header included; decides k.",
    )
    chunk: int = Field(
        default=4096, ge=2, le=1 << 16, description="Values among which the largest are chosen."
    )
    positions: Literal["coded", "fixed"] = Field(
        default="coded",
        description="coded: hits and misses through the range coder. fixed: log2(chunk) bits each, "
        "as in SparseLoCo.",
    )
    value_bits: Literal[1, 2] = Field(
        default=2, description="2: sign and one bit of magnitude. 1: sign alone."
    )


@dataclass(frozen=True)
class _Layout:
    """How many values each chunk keeps, from how many are kept in all.

    Parameters
    ----------
    size, chunk : int
        Parameters, and the length of all chunks but the last.
    kept : ndarray, shape (number of chunks,)
        Values kept in each.
    """

    size: int
    chunk: int
    kept: NDArray[np.int64]

    @property
    def total(self) -> int:
        return int(self.kept.sum())

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """Some chunks at a time, and where their values are."""
        count = max(_AT_ONCE // self.chunk, 1)
        for first in range(0, len(self.kept), count):
            last = min(first + count, len(self.kept))
            yield slice(first, last), slice(first * self.chunk, min(last * self.chunk, self.size))


@register
class TopK(Codec):
    """Chunked top-k with 2-bit values."""

    name = "topk"
    kind = "element-wise"
    rates = "0.005 to 2.5 bits"
    summary = "largest values of every chunk in 2 bits each, positions entropy coded"
    paper = "SparseLoCo, Sarfi et al., arXiv 2508.15706"
    Options = TopKOptions

    options: TopKOptions

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        layout = self._layout(context.spec, self._affordable(context.spec))
        if not layout.total or not update.vector.any():
            return b""
        hit = _largest(update.vector, layout)
        means = np.zeros(len(layout.kept))
        for chunks, part in layout.parts():
            places = np.flatnonzero(hit[part])
            own = np.abs(update.vector[part][places])
            means[chunks] = np.bincount(places // layout.chunk, own, chunks.stop - chunks.start)
        means /= np.maximum(layout.kept, 1)
        largest = np.float32(means.max())
        writer = SymbolWriter()
        writer.bits(layout.total, 32)
        writer.float32(float(largest))
        codes = scale_codes(means, float(largest))
        writer.uniform(codes, SCALE_CODES)
        self._write_positions(writer, hit, layout)
        scales = scale_values(codes, largest)
        relative = np.zeros(layout.total)
        start = 0
        for chunks, part in layout.parts():
            places = np.flatnonzero(hit[part])
            values = update.vector[part][places]
            writer.uniform(values < 0, 2)
            scale = scales[chunks].astype(np.float64)[places // layout.chunk]
            own = relative[start : start + places.size]
            np.divide(np.abs(values), scale, out=own, where=scale > 0)
            start += places.size
        self._write_magnitudes(writer, relative)
        return writer.finish()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        vector = np.zeros(context.spec.size, np.float32)
        if not payload:
            return vector
        reader = SymbolReader(payload)
        total = int(reader.bits(32, 1)[0])
        if not 0 < total <= context.spec.size:
            raise PacketError(f"{self.name}: {total} of {context.spec.size} values cannot be kept")
        layout = self._layout(context.spec, total)
        largest = reader.float32(1)[0]
        if not np.isfinite(largest) or largest <= 0:
            raise PacketError(f"{self.name}: the largest scale is {largest}, not positive")
        scales = scale_values(reader.uniform(SCALE_CODES, len(layout.kept)), largest)
        hit = self._read_positions(reader, layout)
        negative = reader.uniform(2, layout.total)
        magnitudes, which = self._read_magnitudes(reader, layout.total)
        reader.finish()
        start = 0
        for chunks, part in layout.parts():
            places = np.flatnonzero(hit[part])
            own = slice(start, start + places.size)
            scale = scales[chunks][places // layout.chunk]
            with np.errstate(over="ignore"):  # cut off at the end
                values = scale * magnitudes[which[own]] * (1 - 2 * negative[own])
            vector[part][places] = np.clip(values, -_LARGEST, _LARGEST)
            start = own.stop
        return vector

    def _layout(self, spec: AdapterSpec, total: int) -> _Layout:
        chunk = self.options.chunk
        chunks = -(-spec.size // chunk)
        lengths = np.full(chunks, chunk)
        lengths[-1] = spec.size - (chunks - 1) * chunk
        # everyone the same share; what is left over goes to the first ones
        ends = np.cumsum(lengths) * total // spec.size
        return _Layout(spec.size, chunk, np.diff(ends, prepend=0))

    def _affordable(self, spec: AdapterSpec) -> int:
        """How many values fit into the budget, by bisection on the coded size."""
        # count, largest scale, the others, two magnitudes, the table of hits and misses
        fixed = 32 + 32 + 8 * -(-spec.size // self.options.chunk) + 2 * 9
        if self.options.positions == "coded":
            fixed += 18
        available = payload_bits(spec, self.options.bpp) - fixed
        low, high = 0, spec.size
        while low < high:
            kept = (low + high + 1) // 2
            if self._bits(kept, spec.size) <= available:
                low = kept
            else:
                high = kept - 1
        return low

    def _bits(self, kept: int, size: int) -> float:
        values = kept * self.options.value_bits
        if self.options.positions == "fixed":
            return values + kept * float(np.log2(self.options.chunk))
        if kept in (0, size):
            return values
        share = kept / size
        return values - size * float(share * np.log2(share) + (1 - share) * np.log2(1 - share))

    def _write_positions(
        self, writer: SymbolWriter, hit: NDArray[np.bool_], layout: _Layout
    ) -> None:
        if self.options.positions == "coded":
            writer.symbols(hit, 2)
            return
        for _, part in layout.parts():
            writer.uniform(np.flatnonzero(hit[part]) % layout.chunk, layout.chunk)

    def _read_positions(self, reader: SymbolReader, layout: _Layout) -> NDArray[np.bool_]:
        if self.options.positions == "coded":
            hit = reader.symbols(2, layout.size).astype(bool)
            count = np.count_nonzero(hit)
            if count != layout.total:
                raise PacketError(f"{self.name}: {count} positions, {layout.total} are due")
            return hit
        first = np.repeat(np.arange(len(layout.kept)) * layout.chunk, layout.kept)
        hits = first + reader.uniform(layout.chunk, layout.total)
        if (np.diff(hits) <= 0).any() or (hits.size and hits[-1] >= layout.size):
            raise PacketError(f"{self.name}: positions are not in order")
        hit = np.zeros(layout.size, bool)
        hit[hits] = True
        return hit

    def _write_magnitudes(self, writer: SymbolWriter, relative: NDArray[np.float64]) -> None:
        everything = _mean(relative, -np.inf, np.inf)
        if self.options.value_bits == 1:
            writer.uniform(_in_64ths(everything), _MAGNITUDE_SIZE)
            return
        # two-means on the line: the boundary lies halfway between the means (Lloyd 1982)
        boundary = everything
        for _ in range(4):
            low, high = _mean(relative, -np.inf, boundary), _mean(relative, boundary, np.inf)
            # magnitudes above the mean are above 0: a mean of 0 is that of none
            boundary = (low + (high or low)) / 2
        for own in (_mean(relative, -np.inf, boundary), _mean(relative, boundary, np.inf)):
            writer.uniform(_in_64ths(own), _MAGNITUDE_SIZE)
        writer.uniform(relative > boundary, 2)

    def _read_magnitudes(
        self, reader: SymbolReader, count: int
    ) -> tuple[Float32Array, NDArray[np.int32]]:
        """The magnitudes there are, and which of them each value has."""
        magnitudes = reader.uniform(_MAGNITUDE_SIZE, self.options.value_bits)
        # of one there is nothing to tell
        which = reader.uniform(self.options.value_bits, count)
        return magnitudes.astype(np.float32) / np.float32(_MAGNITUDE_STEP), which


def _largest(vector: Float32Array, layout: _Layout) -> NDArray[np.bool_]:
    """Where the largest magnitudes of each chunk are; of equals, the first."""
    hit = np.zeros(vector.size, bool)
    for chunks, part in layout.parts():
        magnitudes = np.abs(vector[part])
        missing = -magnitudes.size % layout.chunk
        if missing:
            magnitudes = np.pad(magnitudes, (0, missing), constant_values=-1)
        rows = magnitudes.reshape(-1, layout.chunk)
        hit[part] = _largest_of_rows(rows, layout.kept[chunks]).reshape(-1)[: hit[part].size]
    return hit


def _largest_of_rows(magnitudes: Float32Array, kept: NDArray[np.int64]) -> NDArray[np.bool_]:
    chunk = magnitudes.shape[1]
    hit = np.zeros(magnitudes.shape, bool)
    for count in np.unique(kept[kept > 0]):
        rows = kept == count
        own = magnitudes[rows]
        bound = np.partition(own, chunk - count, axis=1)[:, chunk - count, None]
        above = own >= bound
        surplus = above.sum(axis=1) - count
        for row in np.flatnonzero(surplus):  # equal magnitudes at the boundary
            equal = np.flatnonzero(own[row] == bound[row])
            above[row, equal[equal.size - surplus[row] :]] = False
        hit[rows] = above
    return hit


def _mean(values: NDArray[np.float64], above: float, up_to: float) -> float:
    """Mean of the values in an interval, 0 if there are none."""
    count, total = 0, 0.0
    for block in blocks(values.size):
        at = (values[block] > above) & (values[block] <= up_to)
        count += int(np.count_nonzero(at))
        total += float(np.multiply(values[block], at).sum())
    return total / count if count else 0.0


def _in_64ths(mean: float) -> int:
    return int(np.clip(np.rint(_MAGNITUDE_STEP * mean), 0, _MAGNITUDE_SIZE - 1))
