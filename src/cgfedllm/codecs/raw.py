"""`raw`: the float32 values themselves. The reference every ratio is taken against."""

from __future__ import annotations

import numpy as np

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs.base import Codec, CodecContext, register


@register
class Raw(Codec):
    """32 bits a parameter, exact."""

    name = "raw"
    lossless = True
    kind = "control"
    rates = "32 bits"
    summary = "float32 as is: 32 bits a parameter, exact"

    def payload_size(self, spec: AdapterSpec) -> int:
        """Four bytes a parameter."""
        return 4 * spec.size

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        return update.vector.astype("<f4", copy=False).tobytes()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        return np.frombuffer(payload, "<f4").astype(np.float32)
