"""`zstd`: a general compressor, as a control for what needs no model of updates at all.

::

    float32 (or bfloat16) --byte planes--> [ byte 0 of all | byte 1 of all | ... ] --zstd--> frame

Sorted by place in the number, the bytes of signs and exponents lie together and compress; those
of mantissas are as good as random. The payload is one Zstandard frame (RFC 8878). Packets of two
versions of the zstd library may differ; each decodes what the other wrote.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import zstandard
from pydantic import Field

from cgfedllm.adapter import AdapterUpdate, Float32Array
from cgfedllm.codecs.base import Codec, CodecContext, CodecOptions, register
from cgfedllm.codecs.bf16 import from_bfloat16, to_bfloat16
from cgfedllm.codecs.parts.frames import FrameError, open_frame
from cgfedllm.errors import PacketError


class ZstdOptions(CodecOptions):
    """What is compressed, and how hard."""

    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="float32 is lossless; bfloat16 is rounded as by the codec bf16.",
    )
    level: int = Field(
        default=3, ge=1, le=19, description="Effort of the compressor, 1 (fast) to 19 (slow)."
    )


@register
class Zstd(Codec):
    """Lossless compression of the float32 or bfloat16 bytes."""

    name = "zstd"
    lossless = True
    kind = "control"
    rates = "about 28 bits, or 12"
    summary = "Zstandard over byte planes of float32 (exact) or bfloat16"
    paper = "RFC 8878"
    Options = ZstdOptions

    options: ZstdOptions

    def __init__(self, options: ZstdOptions) -> None:
        super().__init__(options)
        self.lossless = options.dtype == "float32"

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        if self.lossless:
            values = update.vector.astype("<f4", copy=False).view(np.uint8)
        else:
            values = to_bfloat16(update.vector).view(np.uint8)
        planes = np.ascontiguousarray(values.reshape(-1, self._width).T)
        return zstandard.ZstdCompressor(level=self.options.level).compress(planes.data)

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        size = self._width * context.spec.size
        try:
            raw = open_frame(payload, least=size, most=size)
        except FrameError as error:
            raise PacketError(f"{self.name}: the payload cannot be read: {error}") from None
        planes = np.frombuffer(raw, np.uint8).reshape(self._width, -1)
        values = np.ascontiguousarray(planes.T).reshape(-1)
        if self.lossless:
            return values.view("<f4").astype(np.float32, copy=False)
        return from_bfloat16(values.view("<u2"))

    @property
    def _width(self) -> int:
        return 4 if self.lossless else 2
