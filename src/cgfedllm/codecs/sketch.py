r"""`sketch`: a random projection that all clients share, so that packets can be added up.

::

    x (N) --signs, Hadamard in blocks of 4096, m rows kept--> S x --round--> integers y
    x^ = S^T y : zeros in the missing rows, Hadamard back, signs

FetchSGD (Rothchild et al., arXiv 2007.07682) sends count sketches because the server can add them
before it decodes. Linearity is what matters here too, for secure aggregation: the sum of packets
decodes to the sum of what they decode to. The rows of S are orthonormal (a subsampled randomised
Hadamard transform; Ailon and Chazelle, STOC 2006), so S^T S is a projection on m of N dimensions;
it is the best linear decoder for an update with no preferred direction, with no factor to scale
it by. What it misses, (N - m) / N of the energy, is in other directions every round: with error
feedback all of it arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs.base import CodecContext, register
from cgfedllm.codecs.entropy import Int32Array, blocks
from cgfedllm.codecs.linear import LinearCodec, LinearOptions
from cgfedllm.codecs.parts.bitpack import MOST_WIDTH
from cgfedllm.codecs.parts.draws import apply_signs, random_order, random_signs
from cgfedllm.codecs.parts.hadamard import LENGTH, padded_shape, transform
from cgfedllm.codecs.parts.integers import HEAD_BYTES, SMALLEST_EXPONENT, largest_of, rounded
from cgfedllm.codecs.rate import payload_bits
from cgfedllm.errors import CodecError
from cgfedllm.seeding import generator

# a rotated value is a sum of 4096; 1/64 makes the transform orthonormal
_ROOT = 64
# scales tried below the one at which nothing is clipped
_SCALES_TRIED = 4


class SketchOptions(LinearOptions):
    """Size of the sketch and of its numbers."""

    bpp: float = Field(
        default=0.1,
        gt=0,
        le=16,
        allow_inf_nan=False,
        description="Bits per parameter of the whole packet, header included; with `bits` it "
        "decides how many directions are sent.",
    )
    bits: int = Field(
        default=8,
        ge=2,
        le=16,
        description="Bits of each number of the sketch. Fewer "
        "leave room for more directions: 2 lose the least at a given rate.",
    )


@register
class Sketch(LinearCodec):
    """Subsampled randomised Hadamard transform; linear."""

    name = "sketch"
    kind = "structured"
    rates = "0.001 bits up to the option `bits`"
    summary = "a shared random projection, linear: packets can be added before they are decoded"
    paper = "FetchSGD, Rothchild et al., arXiv 2007.07682"
    Options = SketchOptions

    options: SketchOptions

    def add(self, packets: Sequence[bytes], context: CodecContext) -> bytes:
        """Sum packets of one round without decoding them.

        Parameters
        ----------
        packets : sequence of bytes
            At least one, all coded in `context`; sums of packets are welcome too.
        context : CodecContext
            As for `decode`.

        Returns
        -------
        bytes
            A packet that decodes to the sum of what the packets decode to, up to the rounding of
            float32. Its numbers are wider where the sum needs it.

        Raises
        ------
        PacketError
            If one of them is not a packet of this codec, adapter and round.
        CodecError
            If there are none, or their scales are so far apart that the sum needs more than 32
            bits a number.
        """
        if not packets:
            raise CodecError("sketch: there are no packets to add")
        read = []
        for blob in packets:
            packet = self._open(blob, context)
            read.append((packet, *self._integers(packet.payload, context)))
        # an all-zero sketch has no scale of its own
        used = [(levels, exponent) for _, levels, exponent in read if levels.any()]
        if not used:
            return packets[0]
        lowest = min(exponent for _, exponent in used)
        reach = sum(largest_of(levels) << min(exponent - lowest, 64) for levels, exponent in used)
        if reach >= 1 << (MOST_WIDTH - 1):
            raise CodecError(
                "sketch: the packets' scales are too far apart to add them in 32 bits; "
                "set scale_exponent to the same number on all clients"
            )
        total = np.zeros(used[0][0].size, np.int64)
        for levels, exponent in used:
            total += levels.astype(np.int64) << (exponent - lowest)
        payload = self._of_integers(total, lowest, context)
        return replace(read[0][0], payload=payload).to_bytes()

    def numbers(self, spec: AdapterSpec) -> int:
        """See `LinearCodec.numbers`."""
        return min(self._room(spec), LENGTH * padded_shape(spec.size)[1])

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        spec = context.spec
        count = self.numbers(spec)
        reached = 8 * HEAD_BYTES + count * self.options.bits
        if reached < 0.98 * payload_bits(spec, self.options.bpp) and spec.size > 10_000:
            raise CodecError(
                f"{self.name}: {self.options.bpp:g} bits per parameter are more than "
                f"{self.options.bits}-bit numbers can use; the nearest is {reached / spec.size:.3g}"
            )
        largest = float(np.abs(update.vector).max())
        if not count:
            return b""
        exponent = int(np.frexp(largest)[1])
        signs, rows = _map(context)
        values = np.zeros(padded_shape(spec.size), np.float32)
        flat = values.reshape(-1)[: spec.size]
        np.ldexp(update.vector, -exponent, out=flat)
        apply_signs(flat, signs)
        transform(values)
        numbers = values[rows[: -(-count // values.shape[1])]].reshape(-1)[:count]
        del values, flat
        numbers /= np.float32(_ROOT)
        levels, step = self._round(numbers, exponent)
        return self._of_integers(levels, step, context)

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        spec = context.spec
        levels, exponent = self._integers(payload, context)
        count = levels.size
        if not levels.any():
            return np.zeros(spec.size, np.float32)
        signs, rows = _map(context)
        values = np.zeros(padded_shape(spec.size), np.float32)
        kept = -(-count // values.shape[1])
        sent = np.zeros((kept, values.shape[1]), np.float32)
        sent.reshape(-1)[:count] = levels
        values[rows[:kept]] = sent
        transform(values)
        vector = values.reshape(-1)[: spec.size]
        apply_signs(vector, signs)
        vector /= np.float32(_ROOT)
        if exponent > 0:  # the largest values may round to more than a float32 holds
            most = np.ldexp(np.finfo(np.float32).max, -exponent)
            np.clip(vector, -most, most, out=vector)
        return np.asarray(np.ldexp(vector, exponent, out=vector))

    def _round(self, numbers: Float32Array, exponent: int) -> tuple[Int32Array, int]:
        """Levels, and the exponent of their step, for numbers scaled by 2^-exponent."""
        top = self._top
        if self.options.scale_exponent is not None:
            chosen = self.options.scale_exponent
            return rounded(numbers, exponent - chosen, top), chosen
        largest = float(np.abs(numbers).max())
        if not largest:
            return np.zeros(numbers.size, np.int32), 0
        # the coarsest step clips nothing; a finer one may be worth a few clipped numbers
        coarsest = int(np.ceil(np.log2(largest / top)))
        best: tuple[float, int] | None = None
        for step in range(coarsest, coarsest - _SCALES_TRIED, -1):
            error = _error(numbers, -step, top) * 4.0 ** (step - coarsest)
            if best is None or error < best[0]:
                best = error, step
        assert best is not None
        step = best[1]
        step = max(step, SMALLEST_EXPONENT - exponent)
        return rounded(numbers, -step, top), step + exponent


def _map(context: CodecContext) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Signs of all parameters and the order in which rows are kept: this round's map."""
    rng = generator(context.seed, "sketch", context.round)
    signs = random_signs(rng, context.spec.size)
    return signs, random_order(rng, LENGTH)


def _error(numbers: Float32Array, exponent: int, top: int) -> float:
    """Mean squared error of `rounded`, in levels."""
    total = 0.0
    for block in blocks(numbers.size):
        scaled = np.ldexp(numbers[block], exponent)
        scaled -= np.clip(np.rint(scaled), -top, top)
        total += float(np.square(scaled).sum(dtype=np.float64))
    return total / numbers.size
