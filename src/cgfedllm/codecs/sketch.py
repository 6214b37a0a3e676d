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

import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs.base import CodecContext, register
from cgfedllm.codecs.entropy import blocks
from cgfedllm.codecs.linear import Int32Array, LinearCodec
from cgfedllm.codecs.parts.bitpack import MOST_WIDTH, pack, packed_size, unpack
from cgfedllm.codecs.parts.draws import apply_signs, random_order, random_signs
from cgfedllm.codecs.parts.hadamard import LENGTH, padded_shape, transform
from cgfedllm.codecs.rate import RateOptions, payload_bits
from cgfedllm.errors import CodecError, PacketError
from cgfedllm.seeding import generator

# exponent of the scale, bits a number
_HEAD = struct.Struct("<hB")
_SMALLEST_EXPONENT, _LARGEST_EXPONENT = -200, 160
# a rotated value is a sum of 4096; 1/64 makes the transform orthonormal
_ROOT = 64
# scales tried below the one at which nothing is clipped
_SCALES_TRIED = 4


class SketchOptions(RateOptions):
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
    scale_exponent: int | None = Field(
        default=None,
        ge=_SMALLEST_EXPONENT,
        le=_LARGEST_EXPONENT,
        description="Fixed step of the numbers, as a power of two. Packets of one fixed step add "
        "up as plain integers, as secure aggregation needs; chosen for each update if not set.",
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
        count = self.numbers(context.spec)
        read = []
        for blob in packets:
            packet = self._open(blob, context)
            read.append((packet, *_read(packet.payload, count)))
        # an all-zero sketch has no scale of its own
        used = [(levels, exponent) for _, levels, exponent in read if levels.any()]
        if not used:
            return packets[0]
        lowest = min(exponent for _, exponent in used)
        reach = sum(_most(levels) << min(exponent - lowest, 64) for levels, exponent in used)
        if reach >= 1 << (MOST_WIDTH - 1):
            raise CodecError(
                "sketch: the packets' scales are too far apart to add them in 32 bits; "
                "set scale_exponent to the same number on all clients"
            )
        total = np.zeros(count, np.int64)
        for levels, exponent in used:
            total += levels.astype(np.int64) << (exponent - lowest)
        width = max(self.options.bits, _most(total).bit_length() + 1)
        return replace(read[0][0], payload=_payload(total, width, lowest)).to_bytes()

    @property
    def reach(self) -> int:
        """2^(bits - 1) - 1; what is larger is clipped to it."""
        if self.options.scale_exponent is None:
            raise CodecError(
                "sketch: each packet has a step of its own; set the option scale_exponent (the "
                "step is 2 to that power, e.g. -14) so that packets add up as plain integers"
            )
        return self._top

    def levels(self, blob: bytes, context: CodecContext) -> Int32Array:
        """The integers in a packet; at the fixed step, where there is one."""
        levels, exponent = _read(self._open(blob, context).payload, self.numbers(context.spec))
        if self.options.scale_exponent not in (None, exponent) and levels.any():
            raise PacketError(
                f"sketch: the packet's scale exponent is {exponent}, "
                f"not {self.options.scale_exponent} as agreed"
            )
        return levels

    def packet_of(self, levels: NDArray[Any], context: CodecContext) -> bytes:
        """A packet of integers at the fixed step, as wide as they need."""
        assert self.options.scale_exponent is not None
        payload = b""
        if levels.size:
            width = max(self.options.bits, _most(levels).bit_length() + 1)
            payload = _payload(levels, width, self.options.scale_exponent)
        return self._sealed(payload, replace(context, previous=None))

    def numbers(self, spec: AdapterSpec) -> int:
        """How many numbers a packet for this adapter holds."""
        most = LENGTH * padded_shape(spec.size)[1]
        wanted = (payload_bits(spec, self.options.bpp) - 8 * _HEAD.size) / self.options.bits
        return max(0, min(int(wanted), most))

    @property
    def _top(self) -> int:
        return int((1 << (self.options.bits - 1)) - 1)

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        spec = context.spec
        count = self.numbers(spec)
        reached = 8 * (_HEAD.size) + count * self.options.bits
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
        return _payload(levels, self.options.bits, step)

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        spec = context.spec
        count = self.numbers(spec)
        levels, exponent = _read(payload, count)
        if not count or not levels.any():
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
            return _levels(numbers, exponent - chosen, top), chosen
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
        step = max(step, _SMALLEST_EXPONENT - exponent)
        return _levels(numbers, -step, top), step + exponent


def _map(context: CodecContext) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Signs of all parameters and the order in which rows are kept: this round's map."""
    rng = generator(context.seed, "sketch", context.round)
    signs = random_signs(rng, context.spec.size)
    return signs, random_order(rng, LENGTH)


def _levels(numbers: Float32Array, exponent: int, top: int) -> Int32Array:
    """Numbers times 2^exponent, rounded, none beyond `top`."""
    levels = np.empty(numbers.size, np.int32)
    for block in blocks(numbers.size):
        scaled = np.ldexp(numbers[block].astype(np.float64), exponent)
        levels[block] = np.clip(np.rint(scaled, out=scaled), -top, top, out=scaled)
    return levels


def _error(numbers: Float32Array, exponent: int, top: int) -> float:
    """Mean squared error of `_levels`, in levels."""
    total = 0.0
    for block in blocks(numbers.size):
        scaled = np.ldexp(numbers[block], exponent)
        scaled -= np.clip(np.rint(scaled), -top, top)
        total += float(np.square(scaled).sum(dtype=np.float64))
    return total / numbers.size


def _most(levels: NDArray[Any]) -> int:
    """Largest magnitude."""
    return max(int(levels.max()), -int(levels.min()))


def _read(payload: bytes, count: int) -> tuple[Int32Array, int]:
    """Levels and exponent of a payload."""
    if not count:
        if payload:
            raise PacketError(f"sketch: payload is {len(payload)} bytes, this rate needs none")
        return np.zeros(0, np.int32), 0
    if len(payload) < _HEAD.size:
        raise PacketError(f"sketch: payload is {len(payload)} bytes, its head is {_HEAD.size}")
    exponent, width = _HEAD.unpack_from(payload)
    if not 2 <= width <= MOST_WIDTH:
        raise PacketError(f"sketch: numbers of {width} bits; 2 to {MOST_WIDTH} are known")
    if not _SMALLEST_EXPONENT <= exponent <= _LARGEST_EXPONENT:
        raise PacketError(f"sketch: scale exponent {exponent} is out of range")
    expected = _HEAD.size + packed_size(count, width)
    if len(payload) != expected:
        raise PacketError(f"sketch: payload is {len(payload)} bytes, this rate needs {expected}")
    raised = unpack(np.frombuffer(payload, np.uint8, offset=_HEAD.size), count, width)
    return (raised.astype(np.int64) - (1 << (width - 1))).astype(np.int32), exponent


def _payload(levels: NDArray[Any], width: int, exponent: int) -> bytes:
    """Inverse of `_read`: numbers plus half of their range, `width` bits each."""
    raised = levels.astype(np.int64) + (1 << (width - 1))
    return _HEAD.pack(exponent, width) + pack(raised, width)
