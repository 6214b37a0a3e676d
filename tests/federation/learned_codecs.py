"""Codecs for tests that learn: one that loses nothing, one whose packets depend on what it learned.

Registered by importing it; `kill_and_resume.py` does so in its own process.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs import CodecContext, CodecOptions, CodecState
from cgfedllm.codecs.base import _REGISTRY
from cgfedllm.codecs.learning import LearnedCodec
from cgfedllm.errors import CodecStateError
from cgfedllm.seeding import generator

EXACT, MEAN = "test-exact", "test-mean"


class Learner(LearnedCodec):
    """Knows a table that never changes and the running mean of what it has seen."""

    rates = "-"
    summary = "for tests"

    def initial_state(self, spec: AdapterSpec, seed: int = 0) -> CodecState:
        table = generator(seed, "table").standard_normal(16).astype(np.float32)
        return CodecState.of({"table": table, "mean": np.zeros(spec.size, np.float32)})

    def fit(self, *args: Any, **kwargs: Any) -> CodecState:
        raise NotImplementedError

    def adapt(
        self, state: CodecState, updates: Sequence[AdapterUpdate], *, round: int, seed: int
    ) -> CodecState:
        seen = np.mean([update.vector for update in updates], axis=0, dtype=np.float64)
        mean = (0.5 * (state.tensors["mean"] + seen)).astype(np.float32)
        return CodecState.of({**state.tensors, "mean": mean}, state.version + 1)

    def pack_state(self, state: CodecState, base: CodecState | None = None) -> bytes:
        if base is None:
            return super().pack_state(state)
        return struct.pack("<I", state.version) + state.tensors["mean"].tobytes()

    def unpack_state(
        self, blob: bytes, spec: AdapterSpec, base: CodecState | None = None
    ) -> CodecState:
        if base is None:
            return super().unpack_state(blob, spec)
        if len(blob) != increment_size(spec):
            raise CodecStateError(f"{len(blob)} bytes are no increment")
        mean = np.frombuffer(blob[4:], np.float32)
        return CodecState.of({**base.tensors, "mean": mean}, int.from_bytes(blob[:4], "little"))


def increment_size(spec: AdapterSpec) -> int:
    return 4 + 4 * spec.size


class ExactCodec(Learner):
    """Sends the update as it is, whatever it has learned."""

    name = EXACT
    lossless = True

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        return update.vector.tobytes()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        return np.frombuffer(payload, np.float32).copy()


class MeanOptions(CodecOptions):
    levels: int = Field(default=127, ge=1, le=127)


class MeanCodec(Learner):
    """One scale and an int8 a value, of the update less the mean."""

    name = MEAN
    Options = MeanOptions
    options: MeanOptions

    def payload_size(self, spec: AdapterSpec) -> int:
        return 4 + spec.size

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        rest = update.vector - context.state.tensors["mean"]
        scale = np.float32(max(np.abs(rest).max() / self.options.levels, 1e-30))
        return scale.tobytes() + np.round(rest / scale).astype(np.int8).tobytes()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        scale = np.frombuffer(payload[:4], np.float32)
        rest = scale * np.frombuffer(payload[4:], np.int8).astype(np.float32)
        return np.asarray(context.state.tensors["mean"] + rest, np.float32)


for codec in (ExactCodec, MeanCodec):
    _REGISTRY.setdefault(codec.name, codec)
