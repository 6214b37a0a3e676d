"""`bf16`: the upper half of every float32, rounded to nearest even. Half the bytes."""

from __future__ import annotations

import numpy as np

from cgfedllm.adapter import AdapterUpdate, Float32Array
from cgfedllm.codecs.base import Codec, CodecContext, register
from cgfedllm.errors import PacketError

# largest finite bfloat16; a float32 beyond it would round up to infinity
_MAX_BITS = np.uint32(0x7F7F)


@register
class Bf16(Codec):
    """16 bits a parameter, relative error at most 2**-8."""

    name = "bf16"
    summary = "bfloat16: 16 bits a parameter, relative error at most 2^-8"

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        bits = update.vector.view(np.uint32)
        # add half of the last kept bit (minus one, plus its parity: ties to even), then cut;
        # cannot overflow 32 bits because the input is finite
        upper = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(
            16
        )
        magnitude = np.minimum(upper & np.uint32(0x7FFF), _MAX_BITS)
        return (magnitude | (upper & np.uint32(0x8000))).astype("<u2").tobytes()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        if len(payload) != 2 * context.spec.size:
            raise PacketError(
                f"bf16 payload is {len(payload)} bytes, {2 * context.spec.size} are needed"
            )
        upper = np.frombuffer(payload, "<u2").astype(np.uint32)
        return (upper << np.uint32(16)).view(np.float32)
