"""`bf16`: the upper half of every float32, rounded to nearest even. Half the bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs.base import Codec, CodecContext, register

# largest finite bfloat16; a float32 beyond it would round up to infinity
_MAX_BITS = np.uint16(0x7F7F)


@register
class Bf16(Codec):
    """16 bits a parameter, relative error at most 2**-8."""

    name = "bf16"
    kind = "control"
    rates = "16 bits"
    summary = "bfloat16: 16 bits a parameter, relative error at most 2^-8"
    paper = "Kalamkar et al., arXiv 1905.12322"

    def payload_size(self, spec: AdapterSpec) -> int:
        """Two bytes a parameter."""
        return 2 * spec.size

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        return to_bfloat16(update.vector).tobytes()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        return from_bfloat16(np.frombuffer(payload, "<u2"))


def to_bfloat16(values: Float32Array) -> NDArray[np.uint16]:
    """Bits of the nearest finite bfloat16 of finite values, ties to even, little endian."""
    bits = values.view(np.uint32)
    # add half of the last kept bit (minus one, plus its parity: ties to even), then cut;
    # cannot overflow 32 bits because the input is finite
    upper = bits >> np.uint32(16)
    upper &= np.uint32(1)
    upper += np.uint32(0x7FFF)
    upper += bits
    upper >>= np.uint32(16)
    halves = upper.astype("<u2")
    sign = halves & np.uint16(0x8000)
    np.minimum(halves & np.uint16(0x7FFF), _MAX_BITS, out=halves)
    halves |= sign
    return halves


def from_bfloat16(bits: NDArray[np.uint16]) -> Float32Array:
    """The values of some bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bfloat16_above(values: Float32Array) -> NDArray[np.uint16]:
    """Bits of the least bfloat16 not below values that are finite and not negative, if finite."""
    upper = ((values.view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)).astype("<u2")
    np.minimum(upper, _MAX_BITS, out=upper)
    return upper
