"""`zero`: sends nothing. What the server can know without hearing from the client at all."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs.base import Codec, CodecContext, CodecOptions, register


class ZeroOptions(CodecOptions):
    """How far the prediction is trusted."""

    scale: float = Field(
        default=1.0,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="Factor on the previous aggregate; 0 decodes to zeros.",
    )


@register
class Zero(Codec):
    """Decodes to the previous aggregate, or to zeros where there is none."""

    name = "zero"
    kind = "control"
    rates = "0 bits"
    summary = "sends nothing: the previous aggregate is taken again, or zeros without one"
    uses_previous: ClassVar[bool] = True
    Options = ZeroOptions

    options: ZeroOptions

    def payload_size(self, spec: AdapterSpec) -> int:
        """Nothing."""
        return 0

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        return b""

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        if context.previous is None:
            return np.zeros(context.spec.size, np.float32)
        largest = np.finfo(np.float32).max
        with np.errstate(over="ignore"):
            scaled = context.previous * np.float32(self.options.scale)
        return np.clip(scaled, -largest, largest, out=scaled)
