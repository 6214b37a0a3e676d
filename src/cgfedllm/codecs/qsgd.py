"""`qsgd`: stochastic rounding to a uniform grid, unbiased at any rate.

::

    x --> level = floor(x / step + u),  u uniform in [0, 1)  --range coder-->  level * step

E[level * step] = x whatever the step. With a step above the magnitudes this is stochastic
sparsification: +-step with probability |x| / step, else 0. The step is searched so that the
packet spends `bpp`; the levels, which QSGD sends by Elias coding, go through the range coder.

Two defaults differ from the paper's:

- One step for the whole update instead of one for each bucket. On Gaussian values (8.4 M of them)
  the error at 0.05, 0.2 and 1 bpp is 4.9, 1.0 and 0.3 dB below that with buckets of 512, whose
  norms cost 16 bits each; the range coder has no need of a bounded number of levels.
- Decoded values shrink to the least squared error. Unbiased ones err by more than the update
  itself below about 1.2 bpp, which errors of many clients average out, but which error feedback
  multiplies from round to round: set `unbiased` together with ``uplink.error_feedback = false``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cgfedllm.adapter import AdapterUpdate, Float32Array
from cgfedllm.codecs.base import Codec, CodecContext, register
from cgfedllm.codecs.bf16 import bfloat16_above, from_bfloat16
from cgfedllm.codecs.entropy import (
    Int32Array,
    SymbolReader,
    SymbolWriter,
    bits_of_levels,
    blocks,
    levels_bits,
)
from cgfedllm.codecs.rate import RateOptions, payload_bits
from cgfedllm.errors import PacketError
from cgfedllm.seeding import generator

_STEP_BITS = 32
_NORM_BITS = 16
_LARGEST = np.finfo(np.float32).max
# a step below this times the largest magnitude would overflow the levels
_SMALLEST_RATIO = 2.0**-22
_SMALLEST_STEP = np.float32(2.0**-126)
# levels beyond this many times 2^bpp are lumped together while searching
_SEARCHED_LEVELS = 64
# values whose buckets are scaled together
_AT_ONCE = 1 << 16
# the packet spends this share of its budget at least, where stochastic rounding lets it
_ENOUGH = 0.99


class QsgdOptions(RateOptions):
    """Rate and buckets."""

    bpp: float = Field(
        default=0.1,
        gt=0,
        le=16,
        allow_inf_nan=False,
        description="Bits per parameter of the whole packet, header included.",
    )
    bucket: int = Field(
        default=0,
        ge=0,
        le=2**24,
        description="Values whose step is proportional to their Euclidean norm, as published "
        "(512 there); costs 16 bits a bucket. 0: one step for the whole update.",
    )
    unbiased: bool = Field(
        default=False,
        description="Decode to the update in expectation, as published; not to be used with error "
        "feedback. Otherwise to what has the least squared error.",
    )


@register
class Qsgd(Codec):
    """Stochastic quantisation, unbiased or shrunk, range coded."""

    name = "qsgd"
    kind = "element-wise"
    rates = "0.001 to 16 bits"
    summary = "stochastic rounding to a uniform grid, range coded"
    paper = "Alistarh et al., arXiv 1610.02132"
    Options = QsgdOptions

    options: QsgdOptions

    def __init__(self, options: QsgdOptions) -> None:
        super().__init__(options)
        self.unbiased = options.unbiased

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        values = update.vector
        budget = payload_bits(context.spec, self.options.bpp) - _STEP_BITS
        norms = None
        if self.options.bucket:
            norms = _norms(values, self.options.bucket)
            values = np.empty_like(values)
            bucket = self.options.bucket
            _by_bucket(np.divide, update.vector, from_bfloat16(norms), bucket, out=values)
            budget -= _NORM_BITS * norms.size
        most_levels = int(_SEARCHED_LEVELS * 2**self.options.bpp)
        found = _search(values, budget, self._noise(update, context), most_levels)
        if found is None:
            return b""
        step, levels = found
        if not self.unbiased:
            step = _best_step(values, levels)
        writer = SymbolWriter()
        writer.float32(float(step))
        if norms is not None:
            writer.bits(norms, _NORM_BITS)
        writer.levels(levels)
        return writer.finish()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        size = context.spec.size
        if not payload:
            return np.zeros(size, np.float32)
        reader = SymbolReader(payload)
        step = reader.float32(1)[0]
        if not np.isfinite(step) or step <= 0:
            raise PacketError(f"{self.name}: the step is {step}, not a positive number")
        norms = None
        if self.options.bucket:
            count = -(-size // self.options.bucket)
            norms = from_bfloat16(reader.bits(_NORM_BITS, count).astype(np.uint16))
            if not (norms >= 0).all() or not np.isfinite(norms).all():
                raise PacketError(f"{self.name}: a norm is negative or not finite")
        levels = reader.levels(size)
        reader.finish()
        # levels become values in their own memory
        vector = levels.view(np.float32)
        # rounding up may lead beyond the largest float32
        with np.errstate(over="ignore"):
            for block in blocks(size):
                values = levels[block] * step
                vector[block] = np.clip(values, -_LARGEST, _LARGEST, out=values)
            if norms is not None:
                _by_bucket(np.multiply, vector, norms, self.options.bucket, out=vector)
                np.clip(vector, -_LARGEST, _LARGEST, out=vector)
        return vector

    def _noise(self, update: AdapterUpdate, context: CodecContext) -> Float32Array:
        # the checksum sets clients apart: with common noise their errors would not average out
        checksum = zlib.crc32(update.vector.astype("<f4", copy=False).data)
        rng = generator(context.seed, self.name, context.round, checksum)
        return rng.random(context.spec.size, dtype=np.float32)


def _search(
    values: Float32Array, budget: float, noise: Float32Array, most_levels: int
) -> tuple[np.float32, Int32Array] | None:
    """Step and levels that spend a budget; None if nothing fits, or all is zero.

    A histogram tells how many bits to expect of a step; what the levels really take, once drawn,
    corrects the aim.
    """
    expect, low, high = _expectation(values, most_levels)
    if high == 0:
        return None
    levels = np.empty(values.size, np.int32)
    best: tuple[float, np.float32] | None = None
    aim = 0.995 * budget
    for _ in range(8):
        step = np.float32(_bisect(expect, aim, low, high))
        _draw(values, step, noise, out=levels)
        bits = bits_of_levels(levels)
        if bits <= budget and (best is None or bits > best[0]):
            best = bits, step
        if _ENOUGH * budget <= bits <= budget or (bits < budget and step <= 1.001 * low):
            break
        aim *= 0.995 * budget / bits
        if aim <= 0:
            break
    if best is None:
        return None
    if best[1] != step:  # levels of one step are kept, to save memory
        _draw(values, best[1], noise, out=levels)
    return best[1], levels


def _expectation(
    values: Float32Array, most_levels: int
) -> tuple[Callable[[float], float], float, float]:
    """Expected bits as a function of the step, and the range of steps that make sense.

    Level m is drawn with probability max(0, 1 - | |x|/step - m |): second differences of
    T(t) = sum of max(0, |x|/step - t), which takes only counts and sums of what is above.
    """
    # bins are the upper halves of the magnitudes, bfloat16: 128 an octave
    counts = np.zeros(1 << 15, np.int64)
    for block in blocks(values.size):
        upper = values[block].view(np.uint32) >> np.uint32(16)
        upper &= np.uint32(0x7FFF)
        counts += np.bincount(upper.view(np.int32), minlength=1 << 15)
    counts = counts[:0x7F80]
    edges = np.arange(len(counts) + 1, dtype=np.uint32) << np.uint32(16)
    starts = edges.view(np.float32).astype(np.float64)
    starts[-1] = float(_LARGEST)
    middles = (starts[:-1] + starts[1:]) / 2
    middles[0] = 0.0
    above = _from_above(counts.astype(np.float64))
    sums = _from_above(counts * middles)
    largest = max(float(values.max()), -float(values.min()))
    if not largest:
        return lambda step: 0.0, 0.0, 0.0

    def excess(step: float, levels: NDArray[np.int64]) -> NDArray[np.float64]:
        at = np.searchsorted(middles, levels * step)
        return sums[at] / step - levels * above[at]

    def expect(step: float) -> float:
        top = min(int(largest / step) + 2, most_levels)
        t = excess(step, np.arange(top + 1))
        drawn = np.empty(top)
        drawn[0] = values.size - t[0] + t[1]
        drawn[1:] = t[:-2] - 2 * t[1:-1] + t[2:]
        drawn[-1] += t[-2] - t[-1] if top == most_levels else 0
        return float(levels_bits(np.maximum(drawn, 0)))

    low = max(largest * _SMALLEST_RATIO, float(_SMALLEST_STEP))
    # at the highest step, one value in four packets is expected to be sent
    return expect, low, max(low, min(4 * float(sums[0]), float(_LARGEST)))


def _bisect(expect: Callable[[float], float], aim: float, low: float, high: float) -> float:
    """Step at which the expected bits are `aim`, on a logarithmic scale."""
    if expect(high) >= aim:
        return high
    for _ in range(40):
        middle = float(np.sqrt(low) * np.sqrt(high))
        if expect(middle) > aim:
            low = middle
        else:
            high = middle
        if high < 1.001 * low:
            break
    return high


def _draw(values: Float32Array, step: np.float32, noise: Float32Array, out: Int32Array) -> None:
    """Levels drawn with given noise."""
    for block in blocks(values.size):
        scaled = values[block] / step
        scaled += noise[block]
        out[block] = np.floor(scaled, out=scaled)


def _best_step(values: Float32Array, levels: Int32Array) -> np.float32:
    """The step with which drawn levels come nearest to the values."""
    along = square = 0.0
    for block in blocks(values.size):
        own = levels[block].astype(np.float64)
        square += float(np.square(own).sum())
        own *= values[block]
        along += float(own.sum())
    return np.float32(np.clip(along / max(square, 1.0), _SMALLEST_STEP, _LARGEST))


def _norms(values: Float32Array, bucket: int) -> NDArray[np.uint16]:
    """bfloat16 bits of each bucket's Euclidean norm, rounded up."""
    norms = np.empty(-(-values.size // bucket), np.float64)
    for own, buckets in _pieces(values, bucket):
        # in float64, since squares of float32 values overflow
        norms[buckets] = np.sqrt(
            np.square(_rows(values[own], bucket), dtype=np.float64).sum(axis=1)
        )
    return bfloat16_above(norms.clip(_SMALLEST_STEP, _LARGEST).astype(np.float32))


def _by_bucket(
    operation: np.ufunc, values: Float32Array, norms: Float32Array, bucket: int, out: Float32Array
) -> None:
    """Divide or multiply each bucket by its norm."""
    for own, buckets in _pieces(values, bucket):
        rows = operation(_rows(values[own], bucket), norms[buckets, None])
        out[own] = rows.reshape(-1)[: values[own].size]


def _pieces(values: Float32Array, bucket: int) -> Iterator[tuple[slice, slice]]:
    """Runs of whole buckets: where their values are, and where the buckets."""
    count = max(_AT_ONCE // bucket, 1)
    for first in range(0, -(-values.size // bucket), count):
        yield (
            slice(first * bucket, (first + count) * bucket),
            slice(first, first + count),
        )


def _rows(values: Float32Array, bucket: int) -> Float32Array:
    """Values as one bucket a row, zeros after the last."""
    missing = -values.size % bucket
    return (np.pad(values, (0, missing)) if missing else values).reshape(-1, bucket)


def _from_above(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum from each bin to the last, and a zero for the bin after it."""
    return np.append(np.cumsum(counts[::-1])[::-1], 0.0)
