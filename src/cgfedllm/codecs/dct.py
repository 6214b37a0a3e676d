r"""`dct`: the largest coefficients of a chunked cosine transform.

::

    factor (r x n) --DCT over chunks of 64, both ways--> coefficients
       --largest of all (or of every chunk)--> levels --range coder--> packet

DeMo (Peng et al., arXiv 2411.19870) sends the k largest DCT coefficients of every chunk. Here they
are chosen over the whole update by one dead zone unless told otherwise, which is never worse at
the same rate: an energetic chunk gets more of them. Positions and values are entropy coded in one,
as levels that are mostly zero, with a table for each class of matrices of like scale.

All transforms are in integers (`parts/cosine.py`).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cgfedllm.adapter import AdapterUpdate, Float32Array
from cgfedllm.codecs.base import Codec, CodecContext, register
from cgfedllm.codecs.entropy import SymbolReader, SymbolWriter
from cgfedllm.codecs.parts import cosine
from cgfedllm.codecs.parts.deadzone import Histogram, Quantiser, read_levels, write_levels
from cgfedllm.codecs.parts.exponent import EXPONENT_BITS, exponent_of, read_exponent, write_exponent
from cgfedllm.codecs.parts.fitting import DEAD_ZONES, finest_within
from cgfedllm.codecs.parts.matrices import Batch, batches
from cgfedllm.codecs.rate import RateOptions, payload_bits
from cgfedllm.errors import PacketError

# the largest value becomes an integer of this many bits
_VALUE_BITS = 20
# reconstruction points are integers in 32nds of a step; more levels than these are not made
_POINTS = 32
_FINEST = 2.0**-16
# bits that rounding between the two axes of the inverse keeps below such a unit
_SPARE = 2
_STEP_BITS = 32
# classes of matrices, two to an octave of their root mean square
_CLASSES = 8
_TABLE_BITS = 6 * _CLASSES
# matrices transformed at a time: a few megabytes, whatever the size of the update
_TILE = 1 << 18
# "chunk": values of the coefficients kept, in steps of this share of their mean magnitude
_KEPT_STEP = 0.8
_SEARCHES = 20
_FEWEST = 1e-6


class DctOptions(RateOptions):
    """Rate, chunks, and how coefficients are chosen."""

    bpp: float = Field(
        default=0.1,
        gt=0,
        le=12,
        allow_inf_nan=False,
        description="Bits per parameter of the whole packet, header included.",
    )
    chunk: int = Field(default=64, ge=2, le=256, description="Length of a chunk along either axis.")
    axes: Literal["both", "long"] = Field(
        default="both", description="Transform along both axes of a factor, or the long one alone."
    )
    selection: Literal["global", "chunk"] = Field(
        default="global",
        description="global: the largest coefficients of the update. chunk: as many of each chunk, "
        "as in DeMo.",
    )


@register
class Dct(Codec):
    """Chunked DCT, the largest coefficients, entropy coded."""

    name = "dct"
    kind = "structured"
    rates = "0.005 to 12 bits"
    summary = "the largest coefficients of a chunked cosine transform, entropy coded"
    paper = "DeMo, Peng et al., arXiv 2411.19870"
    Options = DctOptions

    options: DctOptions

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        budget = payload_bits(context.spec, self.options.bpp) - EXPONENT_BITS - _STEP_BITS
        if budget < 8 or not update.vector.any():
            return b""
        exponent = exponent_of(update.vector)
        groups = batches(context.spec)
        stacks = [self._coefficients(group, update.vector, exponent) for group in groups]
        classes = _classes(stacks)
        if classes.any():
            budget -= _class_bits(classes)
        members = _members(stacks, classes)
        if self.options.selection == "chunk":
            ranks = _members([self._to_ranks(stack) for stack in stacks], classes)
            stacks.clear()
            quantiser = _keep_of_each_chunk(members, ranks, budget)
        else:
            stacks.clear()
            quantiser = finest_within(Histogram(members), budget, DEAD_ZONES[1:], _FINEST)
        if quantiser is None:
            return b""
        writer = SymbolWriter()
        write_exponent(writer, exponent)
        writer.float32(quantiser.step)
        writer.symbols(classes, _CLASSES)
        for values in members:
            write_levels(writer, values, quantiser.levels(values), quantiser.step)
        return writer.finish()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        if not payload:
            return np.zeros(context.spec.size, np.float32)
        reader = SymbolReader(payload)
        exponent = read_exponent(reader)
        step = reader.float32(1)[0]
        if not 0 < step <= 2.0**32:  # NaN, too, is not
            raise PacketError(f"{self.name}: the step is {step}, not a number from 0 to 2^32")
        groups = batches(context.spec)
        counts = [len(group.bands) for group in groups]
        classes = reader.symbols(_CLASSES, sum(counts))
        stacks = [np.empty((len(g.bands), g.rows, g.columns), np.float32) for g in groups]
        split = np.split(classes, np.cumsum(counts)[:-1])
        for which in np.unique(classes):
            at = [own == which for own in split]
            sizes = [int(np.count_nonzero(a)) * s[0].size for a, s in zip(at, stacks, strict=True)]
            # a step of 32 gives the points as integers
            points = read_levels(reader, sum(sizes), np.float32(_POINTS))
            np.clip(points, -cosine.LARGEST_IN, cosine.LARGEST_IN, out=points)
            parts = np.split(points, np.cumsum(sizes)[:-1])
            for stack, a, part in zip(stacks, at, parts, strict=True):
                stack[a] = part.reshape(-1, *stack.shape[1:])
            del points, parts, part
        reader.finish()
        unit = float(step) / _POINTS * 2.0**-_VALUE_BITS
        vector = np.empty(context.spec.size, np.float32)
        for group, stack in zip(groups, stacks, strict=True):
            self._values(stack, unit, exponent)
            group.scatter(stack, vector)
        return vector

    def _coefficients(self, group: Batch, vector: Float32Array, exponent: int) -> Float32Array:
        """Integer coefficients of all matrices of a shape, (matrices, rows, columns)."""
        stack = group.gather(vector)
        for part in _tiles(stack):
            values = np.ldexp(part.astype(np.float64), _VALUE_BITS - exponent)
            values = cosine.forward(np.rint(values), self.options.chunk, 2)
            if self._both(stack):
                values = cosine.forward(values, self.options.chunk, 1)
            part[...] = values
        return stack

    def _values(self, stack: Float32Array, unit: float, exponent: int) -> None:
        """Turn the coefficients of a stack into values, in place."""
        most = float(np.finfo(np.float32).max)
        for part in _tiles(stack):
            values = part.astype(np.float64)
            if self._both(stack):
                values = cosine.inverse(values, self.options.chunk, 1, _SPARE)
            else:
                values *= 1 << _SPARE
            values = cosine.inverse(values, self.options.chunk, 2)
            values = np.ldexp(values * (unit / (1 << _SPARE)), exponent)
            part[...] = np.clip(values, -most, most)

    def _both(self, stack: Float32Array) -> bool:
        return self.options.axes == "both" and stack.shape[1] > 1

    def _to_ranks(self, stack: Float32Array) -> Float32Array:
        """Replace each coefficient by the rank of its magnitude in its chunk, 0 to below 1.

        A share s of the coefficients of every chunk has ranks below s; where that is no whole
        number, so many chunks in turn keep one more.
        """
        _, rows, columns = stack.shape
        chunk = self.options.chunk
        for top in range(0, rows, chunk):
            for left in range(0, columns, chunk):
                where = np.s_[:, top : top + chunk, left : left + chunk]
                part = stack[where]
                flat = np.abs(part).reshape(len(part), -1)
                order = np.argsort(-flat, axis=1, kind="stable")
                # a different offset for each chunk, evenly spread
                turn = (np.arange(len(part)) * 0.6180339887 + left / columns) % 1
                rank = (np.arange(flat.shape[1]) + turn[:, None]) / flat.shape[1]
                sorted_ranks = np.empty(flat.shape, np.float32)
                np.put_along_axis(sorted_ranks, order, rank.astype(np.float32), axis=1)
                part[...] = sorted_ranks.reshape(part.shape)
        return stack


def _keep_of_each_chunk(
    members: list[Float32Array], ranks: list[Float32Array], budget: float
) -> Quantiser | None:
    """Set all but the largest coefficients of every chunk to zero; the quantiser for them."""
    low, high, share = _FEWEST, 1.0, 1.0
    for _ in range(_SEARCHES):
        kept = [np.where(r < share, m, 0) for m, r in zip(members, ranks, strict=True)]
        histogram = Histogram(kept)
        quantiser = _quantiser_of(kept)
        bits = histogram.try_out(quantiser)[0] if quantiser else 0.0
        if bits <= budget and share == 1.0:
            # all of them fit: what is left goes into finer values
            return finest_within(histogram, budget, DEAD_ZONES[:2], _FINEST)
        low, high = (share, high) if bits <= budget else (low, share)
        if 0.995 * budget < bits <= budget:
            break
        share = float(np.sqrt(low * high))
        del kept
    for own, rank in zip(members, ranks, strict=True):
        own[rank >= low] = 0
    return _quantiser_of(members)


def _quantiser_of(kept: list[Float32Array]) -> Quantiser | None:
    """Two or three levels a sign for what is kept, none for zeros."""
    total = sum(float(np.abs(own).sum(dtype=np.float64)) for own in kept)
    count = sum(int(np.count_nonzero(own)) for own in kept)
    if not count:
        return None
    return Quantiser(float(np.float32(_KEPT_STEP * total / count)), 1e-6, 0.5)


def _tiles(stack: Float32Array) -> list[Float32Array]:
    many = max(1, _TILE // stack[0].size)
    return [stack[start : start + many] for start in range(0, len(stack), many)]


def _classes(stacks: list[Float32Array]) -> NDArray[np.int64]:
    """Class of each matrix, by its root mean square below the largest one's."""
    squares = [np.square(own, dtype=np.float64).mean(axis=(1, 2)) for own in stacks]
    octaves = -0.5 * np.log2(np.maximum(np.concatenate(squares), 1e-3))
    classes = np.clip(np.rint(2 * (octaves - octaves.min())), 0, _CLASSES - 1)
    return np.asarray(classes, np.int64)


def _class_bits(classes: NDArray[np.int64]) -> float:
    counts = np.bincount(classes)
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum()) + _TABLE_BITS


def _members(stacks: list[Float32Array], classes: NDArray[np.int64]) -> list[Float32Array]:
    """Coefficients of each class that occurs."""
    split = np.split(classes, np.cumsum([len(own) for own in stacks])[:-1])
    return [
        np.concatenate([s[c == which].reshape(-1) for s, c in zip(stacks, split, strict=True)])
        for which in np.unique(classes)
    ]
