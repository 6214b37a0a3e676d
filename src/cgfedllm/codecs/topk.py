"""Top-k: the largest values of every chunk, in a sign and a bit of magnitude each.

::

    update -> chunks of 4096 -> the k largest of each -> positions | signs | 1 bit of magnitude

SparseLoCo (Sarfi et al., arXiv 2508.15706) sends 1 to 3 % of an update like this: 12 bits of
position in the chunk and 2 bits of value. Coding the positions as a sequence of hits and misses
with a range coder takes about 3 bits less at these densities; that is the default here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs.base import Codec, CodecContext, register
from cgfedllm.codecs.entropy import SymbolReader, SymbolWriter
from cgfedllm.codecs.logscale import SCALE_CODES, scale_codes, scale_values
from cgfedllm.codecs.rate import RateOptions, payload_bits
from cgfedllm.errors import PacketError

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
    """How many values each chunk keeps; both ends derive it from spec and options.

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


@register
class TopK(Codec):
    """Chunked top-k with 2-bit values."""

    name = "topk"
    kind = "element-wise"
    rates = "0.005 to 2.5 bits"
    summary = "largest values of every chunk in 2 bits each, positions entropy coded"
    paper = "SparseLoCo, arXiv 2508.15706"
    Options = TopKOptions

    options: TopKOptions

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        layout = self._layout(context.spec)
        if not layout.total or not update.vector.any():
            return b""
        hits = _largest(update.vector, layout)
        values = update.vector[hits]
        chunks = hits // layout.chunk
        magnitudes = np.abs(values).astype(np.float64)
        sums = np.bincount(chunks, weights=magnitudes, minlength=len(layout.kept))
        means = sums / np.maximum(layout.kept, 1)
        largest = np.float32(means.max())
        writer = SymbolWriter()
        writer.float32(float(largest))
        codes = scale_codes(means, float(largest))
        writer.uniform(codes, SCALE_CODES)
        self._write_positions(writer, hits, layout)
        writer.uniform(values < 0, 2)
        scales = scale_values(codes, largest).astype(np.float64)[chunks]
        relative = np.divide(magnitudes, scales, out=np.zeros_like(magnitudes), where=scales > 0)
        self._write_magnitudes(writer, relative)
        return writer.finish()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        vector = np.zeros(context.spec.size, np.float32)
        if not payload:
            return vector
        layout = self._layout(context.spec)
        reader = SymbolReader(payload)
        largest = reader.float32(1)[0]
        if not np.isfinite(largest) or largest <= 0:
            raise PacketError(f"{self.name}: the largest scale is {largest}, not positive")
        scales = scale_values(reader.uniform(SCALE_CODES, len(layout.kept)), largest)
        hits = self._read_positions(reader, layout)
        signs = 1 - 2 * reader.uniform(2, hits.size)
        magnitudes = self._read_magnitudes(reader, hits.size)
        reader.finish()
        with np.errstate(over="ignore"):  # cut off at the end
            values = scales[hits // layout.chunk] * magnitudes * signs
        vector[hits] = np.clip(values, -_LARGEST, _LARGEST)
        return vector

    def _layout(self, spec: AdapterSpec) -> _Layout:
        chunk = self.options.chunk
        chunks = -(-spec.size // chunk)
        fixed = 32 + 8 * chunks + 2 * 9
        if self.options.positions == "coded":
            fixed += 18
        available = payload_bits(spec, self.options.bpp) - fixed
        total = self._affordable(spec.size, available)
        lengths = np.full(chunks, chunk)
        lengths[-1] = spec.size - (chunks - 1) * chunk
        # everyone the same share; what is left over goes to the first ones
        ends = np.cumsum(lengths) * total // spec.size
        return _Layout(spec.size, chunk, np.diff(ends, prepend=0))

    def _affordable(self, size: int, available: float) -> int:
        """How many values fit into some bits, by bisection on the coded size."""
        low, high = 0, size
        while low < high:
            kept = (low + high + 1) // 2
            if self._bits(kept, size) <= available:
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
        self, writer: SymbolWriter, hits: NDArray[np.int64], layout: _Layout
    ) -> None:
        if self.options.positions == "fixed":
            writer.uniform(hits % layout.chunk, layout.chunk)
            return
        flags = np.zeros(layout.size, np.int32)
        flags[hits] = 1
        writer.symbols(flags, 2)

    def _read_positions(self, reader: SymbolReader, layout: _Layout) -> NDArray[np.int64]:
        if self.options.positions == "fixed":
            first = np.repeat(np.arange(len(layout.kept)) * layout.chunk, layout.kept)
            hits = first + reader.uniform(layout.chunk, layout.total)
            if (np.diff(hits) <= 0).any() or (hits.size and hits[-1] >= layout.size):
                raise PacketError(f"{self.name}: positions are not in order")
            return hits
        hits = np.flatnonzero(reader.symbols(2, layout.size))
        if hits.size != layout.total:
            raise PacketError(f"{self.name}: {hits.size} positions, {layout.total} are due")
        return hits

    def _write_magnitudes(self, writer: SymbolWriter, relative: NDArray[np.float64]) -> None:
        if self.options.value_bits == 1:
            writer.uniform(_in_64ths(relative), _MAGNITUDE_SIZE)
            return
        # two-means on the line: the boundary lies halfway between the means (Lloyd 1982)
        boundary = float(relative.mean())
        for _ in range(4):
            high = relative > boundary
            means = [relative[~high].mean() if not high.all() else 0.0]
            means.append(relative[high].mean() if high.any() else means[0])
            boundary = (means[0] + means[1]) / 2
        high = relative > boundary
        for part in (~high, high):
            writer.uniform(_in_64ths(relative[part]), _MAGNITUDE_SIZE)
        writer.uniform(high, 2)

    def _read_magnitudes(self, reader: SymbolReader, count: int) -> Float32Array:
        levels = reader.uniform(_MAGNITUDE_SIZE, self.options.value_bits) / np.float32(
            _MAGNITUDE_STEP
        )
        which = reader.uniform(2, count) if self.options.value_bits == 2 else np.zeros(count, int)
        return levels.astype(np.float32)[which]


def _largest(vector: Float32Array, layout: _Layout) -> NDArray[np.int64]:
    """Positions of the largest magnitudes of each chunk, ascending; of equals, the first."""
    chunks, chunk = len(layout.kept), layout.chunk
    magnitudes = np.abs(vector)
    if vector.size % chunk:
        magnitudes = np.pad(magnitudes, (0, chunks * chunk - vector.size), constant_values=-1)
    magnitudes = magnitudes.reshape(chunks, chunk)
    hit = np.zeros(magnitudes.shape, bool)
    for kept in np.unique(layout.kept[layout.kept > 0]):
        rows = layout.kept == kept
        own = magnitudes[rows]
        bound = np.partition(own, chunk - kept, axis=1)[:, chunk - kept, None]
        above = own >= bound
        surplus = above.sum(axis=1) - kept
        for row in np.flatnonzero(surplus):  # equal magnitudes at the boundary
            equal = np.flatnonzero(own[row] == bound[row])
            above[row, equal[equal.size - surplus[row] :]] = False
        hit[rows] = above
    return np.flatnonzero(hit)


def _in_64ths(magnitudes: NDArray[np.float64]) -> int:
    mean = float(magnitudes.mean()) if magnitudes.size else 0.0
    return int(np.clip(np.rint(_MAGNITUDE_STEP * mean), 0, _MAGNITUDE_SIZE - 1))
