"""Every codec's decoder against whoever knows the wire format and can compute a checksum.

Plain damage is in test_codecs_contract.py. Here packets are valid up to their payload, for several
adapters, rates and states, so that what decodes them is reached: it gives finite values of the
right shape or a `PacketError`, reads no more symbols than a multiple of the adapter's size and
takes no more memory than that, whatever the packet says.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import Codec, CodecContext, CodecState, codec_names, make_codec
from cgfedllm.codecs.learned import Learned
from cgfedllm.codecs.learned.directions import ENERGIES, WEIGHTS
from cgfedllm.codecs.packet import HEADER_SIZE, Packet
from cgfedllm.errors import CodecError, PacketError

from .conftest import CASES
from .contexts import begun, taught
from .hostile import bare, dictating, resealed, sealed

pytestmark = pytest.mark.filterwarnings("error")

# a handful of draws decide everything, and a network's first use takes its time
SHORT = settings(max_examples=30, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=6_000, suppress_health_check=list(HealthCheck))

LAYER = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
SPECS = (
    AdapterSpec.from_shapes(
        {
            LAYER.format(layer, module, kind): shape
            for layer in range(3)
            for module, width in (("q_proj", 24), ("v_proj", 10))
            for kind, shape in (("A", (4, 20)), ("B", (width, 4)))
        }
    ),
    AdapterSpec.from_shapes({"m.0.q.lora_A.weight": (1, 1), "m.0.q.lora_B.weight": (1, 1)}),
    AdapterSpec.from_shapes({"vector": (7,), "cube": (3, 2, 4), "m.1.q.lora_B.weight": (70, 66)}),
)
RATED = ("ecsq", "topk", "eden", "qsgd", "dct", "lowrank", "sketch", "learned")
RATES = (0.1, 1.0, 3.0)


@cache
def codec_of(case: str, rate: float | None) -> Codec | None:
    """A codec of the contract's cases, at another rate if it has one."""
    name, options = CASES[case]
    if rate is not None:
        if name not in RATED:
            return None
        options = {**options, "bpp": rate}
    try:
        return make_codec(name, options)
    except CodecError:
        return None  # has no such rate


@cache
def context_of(case: str, spec: int, start: str) -> CodecContext:
    """What both ends hold: usual values, none, or the largest that there are."""
    codec, own = codec_of(case, None), SPECS[spec]
    assert codec is not None
    context = CodecContext(own, 3, 11, taught(codec, own))
    if start == "none":
        return context
    most = np.full(own.size, 3e38 if start == "huge" else 1e-3, np.float32)
    begins = begun(codec, own)
    if begins is not None and start == "huge":
        begins = replace(begins, adapter=most)
    return replace(context, previous=most, start=begins)


@cache
def honest(case: str, rate: float | None, spec: int, start: str) -> bytes:
    """What a client sends of an ordinary update."""
    codec, context = codec_of(case, rate), context_of(case, spec, start)
    assert codec is not None
    values = np.random.default_rng(spec).standard_normal(context.spec.size, np.float32)
    return codec.encode(AdapterUpdate(context.spec, values), context)


def check(codec: Codec, blob: bytes, context: CodecContext) -> None:
    """Decoded to an update, or refused by name; nothing else."""
    refused = ""
    try:
        decoded = codec.decode(blob, context)
    except PacketError as error:
        refused = str(error)
    if refused:
        assert len(refused) < 500
        return
    assert decoded.is_finite()
    assert decoded.vector.shape == (context.spec.size,)


@st.composite
def situations(draw: st.DrawFn) -> tuple[str, float | None, int, str]:
    """A codec at a rate, an adapter and what both ends hold."""
    case = draw(st.sampled_from(sorted(CASES)))
    rate = draw(st.sampled_from((None, *RATES)))
    rate = None if codec_of(case, rate) is None else rate
    spec = draw(st.integers(0, len(SPECS) - 1))
    return case, rate, spec, draw(st.sampled_from(("usual", "none", "huge")))


def at_length(test: Callable[..., None]) -> Callable[..., None]:
    """The same property for minutes."""
    return pytest.mark.slow(pytest.mark.timeout(3600)(LONG(test)))


# ---- symbols to order ---------------------------------------------------------------------------


def symbols_to_order(situation: tuple[str, float | None, int, str], seed: int) -> None:
    case, rate, spec, start = situation
    codec, context = codec_of(case, rate), context_of(case, spec, start)
    assert codec is not None
    size = codec.payload_size(context.spec)
    coded = b"\1" if size is None else bytes(size)
    blob = sealed(codec, context, coded, uses_previous=codec.uses_previous and start != "none")
    with dictating(seed) as dictated:
        check(codec, blob, context)
    assert dictated.read <= 64 * context.spec.size + 65_536


@SHORT
@given(situations(), st.integers(0, 2**32 - 1))
def test_any_symbols_are_decoded_or_refused(situation: Any, seed: int) -> None:
    symbols_to_order(situation, seed)


@at_length
@given(situations(), st.integers(0, 2**32 - 1))
def test_any_symbols_are_decoded_or_refused_at_length(situation: Any, seed: int) -> None:
    symbols_to_order(situation, seed)


def numbers_to_order(situation: tuple[str, float | None, int, str], seed: int) -> None:
    case, rate, spec, start = situation
    codec, context = codec_of(case, rate), context_of(case, spec, start)
    assert codec is not None
    payload = bare(codec, codec.payload_size(context.spec), seed)
    if codec.name == "zstd":  # what is in the frame is what matters
        width = 2 if "bfloat16" in case else 4
        payload = zstandard.ZstdCompressor().compress(bare(codec, width * context.spec.size, seed))
    check(codec, sealed(codec, context, payload), context)


@SHORT
@given(situations(), st.integers(0, 2**32 - 1))
def test_extreme_numbers_are_decoded_or_refused(situation: Any, seed: int) -> None:
    numbers_to_order(situation, seed)


@at_length
@given(situations(), st.integers(0, 2**32 - 1))
def test_extreme_numbers_are_decoded_or_refused_at_length(situation: Any, seed: int) -> None:
    numbers_to_order(situation, seed)


# ---- honest packets put together anew -----------------------------------------------------------


@st.composite
def edits(draw: st.DrawFn) -> list[tuple[str, float, float, bytes]]:
    """What is done to a payload, places as shares of its length."""
    what = st.sampled_from(("flip", "cut", "drop", "repeat", "insert", "splice", "zero", "ones"))
    places = st.floats(0, 1, exclude_max=True)
    return draw(
        st.lists(
            st.tuples(what, places, places, st.binary(min_size=1, max_size=24)),
            min_size=1,
            max_size=4,
        )
    )


def edited(payload: bytes, other: bytes, changes: list[tuple[str, float, float, bytes]]) -> bytes:
    for what, first, second, extra in changes:
        begin, end = sorted((int(first * len(payload)), int(second * len(payload))))
        match what:
            case "flip" if payload:
                bit = int(second * 8)
                flipped = payload[begin] ^ (1 << bit)
                payload = payload[:begin] + bytes([flipped]) + payload[begin + 1 :]
            case "cut":
                payload = payload[:end]
            case "drop":
                payload = payload[:begin] + payload[end:]
            case "repeat":
                payload = payload[:end] + payload[begin:]
            case "insert":
                payload = payload[:begin] + extra + payload[begin:]
            case "splice":  # the beginning of one, the rest of another
                payload = payload[:begin] + other[begin:]
            case "zero":
                payload = payload[:begin] + bytes(end - begin) + payload[end:]
            case "ones":
                payload = payload[:begin] + b"\xff" * (end - begin) + payload[end:]
    return payload


def packets_put_together(
    situation: tuple[str, float | None, int, str],
    other: tuple[str, float | None, int, str],
    changes: Any,
) -> None:
    case, rate, spec, start = situation
    codec, context = codec_of(case, rate), context_of(case, spec, start)
    assert codec is not None
    blob = honest(*situation)
    # the same codec at another rate, or another codec altogether, on whatever adapter
    payload = edited(blob[HEADER_SIZE:], honest(*other)[HEADER_SIZE:], changes)
    check(codec, resealed(blob[:HEADER_SIZE] + payload), context)
    if payload != blob[HEADER_SIZE:]:
        with pytest.raises(PacketError):
            codec.decode(blob[:HEADER_SIZE] + payload, context)


@SHORT
@given(situations(), situations(), edits())
def test_packets_put_together_anew(situation: Any, other: Any, changes: Any) -> None:
    packets_put_together(situation, other, changes)


@at_length
@given(situations(), situations(), edits())
def test_packets_put_together_anew_at_length(situation: Any, other: Any, changes: Any) -> None:
    packets_put_together(situation, other, changes)


# ---- headers ------------------------------------------------------------------------------------


@SHORT
@given(situations(), st.data())
def test_headers_are_checked_before_anything_is_decoded(
    situation: Any, data: st.DataObject
) -> None:
    """Any header in front of an honest payload, its checksum right."""
    case, rate, spec, start = situation
    codec, context = codec_of(case, rate), context_of(case, spec, start)
    assert codec is not None
    honest_packet = Packet.from_bytes(honest(*situation))
    name = st.sampled_from([*codec_names(), "", "\x1b[2J", "../../etc", "x" * 12])
    eight = st.sampled_from([context.spec.hash, context.state.hash, bytes(8), b"\xff" * 8])
    number = st.sampled_from([0, 1, 3, context.spec.size, 2**31, 2**32 - 1])
    changed = replace(
        honest_packet,
        codec=data.draw(name),
        codec_version=data.draw(st.sampled_from([0, 1, 2, 65535])),
        spec_hash=data.draw(eight),
        state_hash=data.draw(eight),
        round=data.draw(number),
        parameters=data.draw(number),
        uses_previous=data.draw(st.booleans()),
    )
    check(codec, changed.to_bytes(), context)
    flags = bytearray(changed.to_bytes())
    flags[5] = data.draw(st.integers(2, 255))
    with pytest.raises(PacketError):
        codec.decode(resealed(bytes(flags)), context)


# ---- states -------------------------------------------------------------------------------------


def hostile_state(codec: Codec, spec: AdapterSpec, seed: int) -> CodecState:
    """A state that `check_state` lets pass and no fit would have made."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, values in taught(codec, spec).tensors.items():
        if values.dtype.kind == "f":
            most = 2.0**40 if isinstance(codec, Learned) else 3e38
            least = 2.0**-40 if isinstance(codec, Learned) else -3e38
            tensors[name] = rng.choice([least, most, 1.0], size=values.shape).astype(values.dtype)
        else:
            tensors[name] = rng.choice([-128, 0, 127], size=values.shape).astype(values.dtype)
        if name == "input.scale":
            tensors[name] = np.abs(tensors[name])
    return CodecState.of(tensors)


LEARNED = [
    case for case in CASES if CASES[case][0] in ("learned", "cg_cnn", "cg_resnet", "cg_unet")
]


@pytest.mark.parametrize("case", LEARNED)
@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32 - 1), st.integers(0, 2))
def test_states_that_no_fit_makes_decode_to_an_update_or_an_error(
    case: str, seed: int, spec: int
) -> None:
    codec = codec_of(case, None)
    assert codec is not None
    context = context_of(case, spec, "usual")
    hostile = replace(context, state=hostile_state(codec, context.spec, seed))
    codec.check_state(hostile.state, context.spec)  # type: ignore[attr-defined]
    size = codec.payload_size(context.spec)
    with dictating(seed):
        check(codec, sealed(codec, hostile, b"\1" if size is None else bytes(size)), hostile)
    values = np.random.default_rng(seed).standard_normal(context.spec.size, np.float32)
    try:
        blob = codec.encode(AdapterUpdate(context.spec, values), hostile)
    except CodecError:
        return
    check(codec, blob, hostile)


def test_weights_of_learned_states_are_bounded() -> None:
    """What the test above relies on."""
    codec = make_codec("learned")
    state = taught(codec, SPECS[0])
    for name in (ENERGIES, WEIGHTS):
        tensors = {**state.tensors, name: np.full_like(state.tensors[name], 2.0**41)}
        with pytest.raises(ValueError, match=name):
            codec.check_state(CodecState.of(tensors), SPECS[0])  # type: ignore[attr-defined]


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", codec_names())
def test_no_packet_takes_more_memory_than_the_adapter_allows(name: str) -> None:
    """At an adapter so large that what does not depend on it drops out."""
    width = 3_000
    spec = AdapterSpec.from_shapes(
        {
            LAYER.format(layer, "q_proj", kind): shape
            for layer in range(3)
            for kind, shape in (("A", (8, width)), ("B", (width, 8)))
        }
    )
    codec = make_codec(name, {"bpp": 0.5} if name in RATED else CASES[f"{name}()"][1])
    context = CodecContext(spec, 3, 11, taught(codec, spec), start=begun(codec, spec))
    size = codec.payload_size(spec)
    blobs = [sealed(codec, context, b"\1" if size is None else bare(codec, size, 5))]
    check(codec, blobs[0], context)  # what is made once, such as a network, is there already
    tracemalloc.start()
    try:
        for seed in range(6):
            with dictating(seed):
                check(codec, blobs[0], context)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20 + 16 * 4 * spec.size
