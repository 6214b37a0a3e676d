"""EDEN: a random rotation makes every coordinate Gaussian; then the Gaussian's own quantiser.

::

    update -> random signs, Hadamard -> first K coordinates -> Lloyd-Max at b or b + 1 bits
    scale  = <rotated, quantised> / <quantised, quantised>         (least squares)

Vargaftik et al., ICML 2022 (arXiv 2108.08842). Above 1 bit a share of the coordinates gets one
bit more than the others; below 1 bit only a share is sent, 1 bit each: after the rotation any
fixed subset is a random one. Each packet has a rotation of its own, so that the errors of many
clients average out.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs.base import Codec, CodecContext, register
from cgfedllm.codecs.entropy import blocks
from cgfedllm.codecs.parts.draws import apply_signs, random_signs
from cgfedllm.codecs.parts.hadamard import LENGTH, padded_shape, transform
from cgfedllm.codecs.rate import RateOptions, payload_bits
from cgfedllm.errors import PacketError
from cgfedllm.seeding import generator

_HEADER = struct.Struct("<If")  # seed of the rotation, scale
_MAX_BITS = 4
_LARGEST = np.finfo(np.float32).max
# centroids of the standard normal's Lloyd-Max quantisers (Max, IRE Trans. IT 6, 1960), positive
# halves, in 256ths
_CENTROIDS: dict[int, list[int]] = {
    1: [204],
    2: [116, 387],
    3: [63, 194, 344, 551],
    4: [33, 99, 168, 241, 322, 414, 530, 700],
}
# the encoder looks levels up in a table of this many entries a standard deviation
_PER_SIGMA = 128
_REACH = 6 * _PER_SIGMA


class EdenOptions(RateOptions):
    """Rate and scaling."""

    bpp: float = Field(
        default=1.0,
        gt=0,
        le=_MAX_BITS,
        allow_inf_nan=False,
        description="Bits per parameter of the whole packet, header included.",
    )
    scaling: Literal["least_squares", "unbiased"] = Field(
        default="least_squares",
        description="least_squares: least error of one packet, for error feedback. unbiased: the "
        "mean over rotations is the update itself, for averaging without error feedback (as far as "
        "the blocks of 4096 values, dealt out over the whole update, are of equal norm).",
    )


@register
class Eden(Codec):
    """Randomised Hadamard rotation and Lloyd-Max quantiser."""

    name = "eden"
    kind = "element-wise"
    rates = "0.01 to 4 bits"
    summary = "random rotation, then Lloyd-Max at 1 to 4 bits; below 1 bit by subsampling"
    paper = "EDEN, Vargaftik et al., arXiv 2108.08842"
    Options = EdenOptions

    options: EdenOptions

    def __init__(self, options: EdenOptions) -> None:
        super().__init__(options)
        self.unbiased = options.scaling == "unbiased"

    def payload_size(self, spec: AdapterSpec) -> int:
        """Seed, scale and the bit planes; nothing at all if the budget has no room for a bit."""
        planes = self._planes(spec)
        return _HEADER.size + sum(-(-count // 8) for count in planes) if planes else 0

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        planes = self._planes(context.spec)
        if not planes:
            return b""
        seed = zlib.crc32(update.vector.data)
        largest = float(np.abs(update.vector).max())
        if not largest:
            return bytes(self.payload_size(context.spec))
        shape = padded_shape(context.spec.size)
        values = np.zeros(shape, np.float32)
        flat = values.reshape(-1)[: update.vector.size]
        np.divide(update.vector, np.float32(largest), out=flat)
        rotated = values.reshape(-1)
        apply_signs(rotated, self._signs(context, seed, rotated.size))
        transform(values)
        energy = _inner(rotated, rotated)
        levels = _levels(rotated, float(np.sqrt(energy / rotated.size)), planes)
        scale = self._scale(rotated, levels, planes, energy) * largest / LENGTH
        body = b"".join(
            np.packbits(levels[:count] >> plane & 1).tobytes() for plane, count in enumerate(planes)
        )
        return _HEADER.pack(seed, scale) + body

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        planes = self._planes(context.spec)
        if not planes:
            return np.zeros(context.spec.size, np.float32)
        seed, scale = _HEADER.unpack_from(payload)
        if not np.isfinite(scale):
            raise PacketError(f"{self.name}: the scale is {scale}")
        if not scale:
            return np.zeros(context.spec.size, np.float32)
        levels = np.zeros(planes[0], np.uint8)
        at = _HEADER.size
        for plane, count in enumerate(planes):
            length = -(-count // 8)
            bits = np.frombuffer(payload, np.uint8, count=length, offset=at)
            levels[:count] |= np.unpackbits(bits, count=count) << plane
            at += length
        values = np.zeros(padded_shape(context.spec.size), np.float32)
        rotated = values.reshape(-1)
        for bits_each, part in _parts(planes):
            rotated[part] = np.take(_POINTS[bits_each], levels[part])
        transform(values)
        apply_signs(rotated, self._signs(context, seed, rotated.size))
        vector = rotated[: context.spec.size]
        with np.errstate(over="ignore"):  # cut off below
            vector *= np.float32(scale)
        np.clip(vector, -_LARGEST, _LARGEST, out=vector)
        return vector.copy()

    def _planes(self, spec: AdapterSpec) -> list[int]:
        """How many coordinates each bit plane covers: all, all, ..., some."""
        rows, blocks = padded_shape(spec.size)
        coordinates = rows * blocks
        budget = int(payload_bits(spec, self.options.bpp)) // 8 - _HEADER.size
        planes: list[int] = []
        while budget > 0 and len(planes) < _MAX_BITS:
            count = min(coordinates, 8 * budget)
            planes.append(count)
            budget -= -(-count // 8)
        return planes

    def _signs(self, context: CodecContext, seed: int, count: int) -> NDArray[np.uint8]:
        return random_signs(generator(context.seed, "eden", context.round, seed), count)

    def _scale(
        self, rotated: Float32Array, levels: NDArray[np.uint8], planes: list[int], energy: float
    ) -> float:
        aligned = square = 0.0
        for bits, part in _parts(planes):
            points = np.take(_POINTS[bits], levels[part])
            aligned += _inner(rotated[part], points)
            square += _inner(points, points)
        return energy / aligned if self.unbiased else aligned / square


def _levels(rotated: Float32Array, sigma: float, planes: list[int]) -> NDArray[np.uint8]:
    """Level numbers of the coordinates sent."""
    levels = np.empty(planes[0], np.uint8)
    for bits, part in _parts(planes):
        index = (rotated[part] * np.float32(_PER_SIGMA / sigma)).clip(-_REACH, _REACH - 1)
        index += np.float32(_REACH)
        levels[part] = np.take(_LEVELS[bits], index.astype(np.int32))
    return levels


def _inner(a: Float32Array, b: Float32Array) -> float:
    """Inner product in float64, in an order that does not depend on threads."""
    return float(
        sum(np.multiply(a[block], b[block], dtype=np.float64).sum() for block in blocks(a.size))
    )


def _parts(planes: list[int]) -> Iterator[tuple[int, slice]]:
    """Bits a coordinate, and blocks of the coordinates that have as many."""
    ends = [*planes[1:], 0]
    for bits, (start, end) in enumerate(zip(planes, ends, strict=True), start=1):
        for block in blocks(start - end):
            yield bits, slice(end + block.start, end + block.stop)


def _points_of(bits: int) -> Float32Array:
    """Centroids by level number; levels count from the most negative one."""
    half = _CENTROIDS[bits]
    return np.array([-c for c in reversed(half)] + half, np.float32)


def _levels_of(bits: int) -> NDArray[np.uint8]:
    """Level by place: the nearest centroid of each cell of the encoder's table."""
    centres = (np.arange(-_REACH, _REACH) + 0.5) * 256 / _PER_SIGMA
    distance = np.abs(centres[:, None] - _points_of(bits)[None, :])
    nearest: NDArray[np.uint8] = np.argmin(distance, axis=1).astype(np.uint8)
    return nearest


_POINTS = {bits: _points_of(bits) for bits in _CENTROIDS}
_LEVELS = {bits: _levels_of(bits) for bits in _CENTROIDS}
