"""A codec for tests that codes what differs from the previous aggregate, in eight bits a value.

Registered by importing it; `kill_and_resume.py` does so in its own process.
"""

from __future__ import annotations

import numpy as np

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs import Codec, CodecContext
from cgfedllm.codecs.base import _REGISTRY

NAME = "test-delta"


class DeltaCodec(Codec):
    """One scale and an int8 a value, of the update less the previous aggregate."""

    name = NAME
    summary = "for tests"
    uses_previous = True

    def payload_size(self, spec: AdapterSpec) -> int:
        return 4 + spec.size

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        rest = update.vector - _known(context)
        scale = np.maximum(np.abs(rest).max() / np.float32(127), np.float32(1e-30))
        return np.float32(scale).tobytes() + np.round(rest / scale).astype(np.int8).tobytes()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        scale = np.frombuffer(payload[:4], np.float32)
        return _known(context) + scale * np.frombuffer(payload[4:], np.int8).astype(np.float32)


def _known(context: CodecContext) -> Float32Array:
    return np.zeros(context.spec.size, np.float32) if context.previous is None else context.previous


_REGISTRY.setdefault(NAME, DeltaCodec)
