"""Coding against the previous aggregate: both ends hold it and say so, or neither uses it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs import Codec, CodecContext, CodecOptions, codec_names, make_codec
from cgfedllm.codecs.packet import HEADER_SIZE, Packet
from cgfedllm.errors import PacketError

SPEC = AdapterSpec.from_shapes({"m.0.q.lora_A.weight": (2, 9), "m.0.q.lora_B.weight": (7, 2)})
FLAGS = 5  # offset of the flags byte


class Difference(Codec):
    """The bare difference from the previous aggregate; notes what it was given."""

    name = "difference"
    summary = "for tests"
    uses_previous = True

    def __init__(self) -> None:
        super().__init__(CodecOptions())
        self.seen: list[bool] = []

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        self.seen.append(context.previous is not None)
        return (update.vector - self._known(context)).tobytes()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        self.seen.append(context.previous is not None)
        return np.frombuffer(payload, np.float32) + self._known(context)

    @staticmethod
    def _known(context: CodecContext) -> Float32Array:
        return np.float32(0) if context.previous is None else context.previous


@pytest.fixture(params=[*codec_names(), "difference"])
def codec(request: pytest.FixtureRequest) -> Iterator[Codec]:
    return Difference() if request.param == "difference" else make_codec(request.param)


def normal(seed: int) -> AdapterUpdate:
    values = np.random.default_rng(seed).standard_normal(SPEC.size) * 1e-3
    return AdapterUpdate(SPEC, values.astype(np.float32))


def context(codec: Codec, previous: AdapterUpdate | None = None) -> CodecContext:
    known = None if previous is None else previous.vector.copy()
    state = codec.initial_state(SPEC)
    return CodecContext(SPEC, round=3, seed=11, state=state, previous=known)


def resealed(blob: bytes) -> bytes:
    """With a checksum that fits the rest."""
    crc = zlib.crc32(blob[HEADER_SIZE:], zlib.crc32(blob[:48]))
    return blob[:48] + crc.to_bytes(4, "little") + blob[HEADER_SIZE:]


def test_the_flag_says_whether_the_previous_aggregate_was_used(codec: Codec) -> None:
    with_it = codec.encode(normal(0), context(codec, normal(1)))
    without = codec.encode(normal(0), context(codec))
    assert (with_it[FLAGS], without[FLAGS]) == (int(codec.uses_previous), 0)
    assert Packet.from_bytes(with_it).uses_previous == codec.uses_previous
    if not codec.uses_previous:
        assert with_it == without


def test_both_ends_decode_the_same_with_it_and_without(codec: Codec) -> None:
    for given in (context(codec, normal(1)), context(codec)):
        blob = codec.encode(normal(0), given)
        first, second = codec.decode(blob, given), codec.decode(blob, given)
        assert first.vector.tobytes() == second.vector.tobytes()
        assert given.previous is None or np.array_equal(given.previous, normal(1).vector)


def test_a_self_contained_packet_is_decoded_without_it_wherever_it_is_held(codec: Codec) -> None:
    blob = codec.encode(normal(0), context(codec))
    alone, holding = (codec.decode(blob, context(codec, known)) for known in (None, normal(1)))
    assert alone.vector.tobytes() == holding.vector.tobytes()


def test_codecs_see_it_only_as_the_packet_says() -> None:
    codec = Difference()
    blob = codec.encode(normal(0), context(codec))
    codec.decode(blob, context(codec, normal(1)))
    blob = codec.encode(normal(0), context(codec, normal(1)))
    codec.decode(blob, context(codec, normal(1)))
    assert codec.seen == [False, False, True, True]


def test_who_does_not_hold_it_refuses_a_packet_that_needs_it() -> None:
    codec = Difference()
    blob = codec.encode(normal(0), context(codec, normal(1)))
    with pytest.raises(PacketError, match="previous aggregate, which is not held here"):
        codec.decode(blob, context(codec))


def test_codecs_that_do_not_use_it_refuse_the_flag(codec: Codec) -> None:
    if codec.uses_previous:
        pytest.skip("uses it")
    blob = bytearray(codec.encode(normal(0), context(codec)))
    blob[FLAGS] = 1
    with pytest.raises(PacketError, match="which this codec does not use"):
        codec.decode(resealed(bytes(blob)), context(codec, normal(1)))


@pytest.mark.parametrize("flags", [2, 3, 0x80, 0xFF])
def test_other_flags_are_refused(codec: Codec, flags: int) -> None:
    blob = bytearray(codec.encode(normal(0), context(codec, normal(1))))
    blob[FLAGS] = flags
    with pytest.raises(PacketError, match=f"flags {flags:#04x} are not known"):
        codec.decode(resealed(bytes(blob)), context(codec, normal(1)))


# ---- sizes to expect ----------------------------------------------------------------------------


class Budget(CodecOptions):
    bpp: float = 0.3


class Budgeted(Difference):
    Options = Budget

    def __init__(self) -> None:
        super().__init__()
        self.options = Budget()


def test_expected_size_is_exact_or_what_is_asked_for_or_unknown() -> None:
    assert make_codec("int8").expected_size(SPEC) == make_codec("int8").packet_size(SPEC)
    assert Budgeted().expected_size(SPEC) == math.ceil(0.3 * SPEC.size / 8)
    assert Difference().expected_size(SPEC) is None
