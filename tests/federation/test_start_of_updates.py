"""Where an update starts from is the same at both ends, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import blake2b

import numpy as np
import pytest

import cgfedllm
from cgfedllm.adapter import AdapterUpdate, Float32Array
from cgfedllm.codecs import Codec, CodecContext
from cgfedllm.codecs.base import _REGISTRY
from cgfedllm.config import Config
from cgfedllm.errors import PacketError

MakeConfig = Callable[..., Config]
DIGEST = 16


class StartCodec(Codec):
    """All values, after a digest of where they start from; the other end must have the same."""

    name = "test-start"
    kind = "control"
    rates = "32 bits"
    summary = "for tests"
    uses_start = True

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        return digest(context) + update.vector.tobytes()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        if payload[:DIGEST] != digest(context):
            raise PacketError("the two ends start from different adapters")
        return np.frombuffer(payload[DIGEST:], np.float32).copy()


def digest(context: CodecContext) -> bytes:
    start = context.start
    assert start is not None
    assert start.origin is not None
    assert start.origin.any()
    both = start.adapter.tobytes() + start.origin.tobytes()
    return blake2b(both, digest_size=DIGEST).digest()


@pytest.fixture
def start_codec() -> Iterator[str]:
    _REGISTRY[StartCodec.name] = StartCodec
    yield StartCodec.name
    del _REGISTRY[StartCodec.name]


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("federation.stateless=true",),
        ("downlink.name=int8",),
        ("downlink.name=int8", "federation.stateless=true"),
        ("downlink.name=lowrank", "downlink.options={bpp = 2.0}", "federation.fraction_train=0.67"),
        ("federation.strategy.name=fedadam",),
    ],
)
def test_both_ends_start_from_the_same_adapter(
    tiny_config: MakeConfig, start_codec: str, settings: tuple[str, ...]
) -> None:
    config = tiny_config(f"uplink.name={start_codec}", "federation.rounds=3", *settings)
    records = cgfedllm.run(config).records[1:]
    assert len(records) == 3
    for record in records:
        assert record.clients
        assert not record.failures
