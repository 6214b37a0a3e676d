"""`bf16`: the upper half of every float32, rounded to nearest even. Half the bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs.base import Codec, CodecContext, register

# largest finite bfloat16; a float32 beyond it would round up to infinity
_MAX_BITS = np.uint32(0x7F7F)


@register
class Bf16(Codec):
    """16 bits a parameter, relative error at most 2**-8."""

    name = "bf16"
    summary = "bfloat16: 16 bits a parameter, relative error at most 2^-8"

    def payload_size(self, spec: AdapterSpec) -> int:
        """Two bytes a parameter."""
        return 2 * spec.size

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        bits = update.vector.view(np.uint32)
        # add half of the last kept bit (minus one, plus its parity: ties to even), then cut;
        # cannot overflow 32 bits because the input is finite
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        upper = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        magnitude = np.minimum(upper & np.uint32(0x7FFF), _MAX_BITS)
        halves: NDArray[np.uint32] = magnitude | (upper & np.uint32(0x8000))
        return halves.astype("<u2").tobytes()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        upper = np.frombuffer(payload, "<u2").astype(np.uint32)
        return (upper << np.uint32(16)).view(np.float32)
