"""Linear mode of `learned`: packets of many clients add up before they are decoded."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, CodecState, Start, make_codec
from cgfedllm.codecs.feedback import encode_with_feedback
from cgfedllm.codecs.learned import Learned
from cgfedllm.codecs.learned.directions import ENERGIES, WEIGHTS, orthonormal
from cgfedllm.codecs.learned.fitting import learn
from cgfedllm.codecs.packet import HEADER_SIZE
from cgfedllm.errors import CodecError, PacketError

from .hostile import sealed

LAYERS, WIDTH, RANK, DIRECTIONS = 3, 96, 4, 6
SPEC = AdapterSpec.from_shapes(
    {
        f"m.layers.{layer}.{module}.lora_{kind}.weight": shape
        for layer in range(LAYERS)
        for module in ("q_proj", "o_proj")
        for kind, shape in (("A", (RANK, WIDTH)), ("B", (WIDTH // 2, RANK)))
    }
)
COEFFICIENTS = LAYERS * 2 * 2 * RANK * DIRECTIONS
# room for all coefficients at any width
ALL = {"bpp": 4.0, "bits": 8}


def normal(seed: int, scale: float = 1e-3) -> AdapterUpdate:
    values = np.random.default_rng(seed).standard_normal(SPEC.size, np.float32)
    return AdapterUpdate(SPEC, values * np.float32(scale))


def begun(seed: int = 0) -> Start:
    """A as drawn, both factors grown a little."""
    origin = normal(seed, 0.1)
    for name, view in origin.views().items():
        if "lora_B" in name:
            view[...] = 0
    return Start(origin.vector + normal(seed + 1, 1e-2).vector, origin.vector)


def combined(bases: Mapping[str, np.ndarray], seed: int, scale: float) -> AdapterUpdate:
    """An update along a few directions of each factor, the first ones above all."""
    rng, update = np.random.default_rng(seed), AdapterUpdate.zeros(SPEC)
    for name, view in update.views().items():
        weights = scale * 2.0 ** -np.arange(DIRECTIONS)
        rows = rng.standard_normal((RANK, DIRECTIONS)) * weights @ bases[name]
        view[...] = rows if "lora_A" in name else rows.T
    return update


def trained() -> CodecState:
    rng = np.random.default_rng(5)
    shapes = {factor.name: (max(factor.shape), DIRECTIONS) for factor in SPEC}
    bases = {name: np.linalg.qr(rng.standard_normal(own))[0].T for name, own in shapes.items()}
    return CodecState.of(learn(SPEC, [combined(bases, at, 1.0) for at in range(8)], DIRECTIONS))


STATE = trained()
CONTEXT = CodecContext(SPEC, 3, start=begun(), state=STATE)


def along(seed: int, scale: float = 1e-2) -> AdapterUpdate:
    """An update as `training.subspace` leaves them: along the state's directions alone."""
    return combined(orthonormal(SPEC, STATE), seed, scale)


def linear(**options: Any) -> Learned:
    wanted = {"directions": DIRECTIONS, "scale_exponent": -12, **options}
    codec = make_codec("learned", wanted)
    assert isinstance(codec, Learned)
    return codec


def energy(levels: np.ndarray) -> float:
    return float(np.square(levels, dtype=np.float64).sum())


def payload_of(packet: bytes) -> bytes:
    return packet[HEADER_SIZE:]


# ---- sums ---------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 1000),
    clients=st.integers(1, 5),
    bits=st.integers(2, 16),
    exponent=st.integers(-18, -8),
    bpp=st.sampled_from([0.3, 1.0, 8.0]),
    metric=st.sampled_from(["effect", "parameters"]),
    grown=st.booleans(),
)
def test_a_sum_of_packets_decodes_to_the_sum(
    seed: int, clients: int, bits: int, exponent: int, bpp: float, metric: str, grown: bool
) -> None:
    codec = linear(bpp=bpp, bits=bits, scale_exponent=exponent, metric=metric, grown=grown)
    packets = [codec.encode(normal(seed + i, 10.0 ** -(1 + i)), CONTEXT) for i in range(clients)]
    levels = [codec.levels(packet, CONTEXT) for packet in packets]
    assert all(np.abs(own).max() <= codec.reach for own in levels)
    total = np.sum(levels, axis=0, dtype=np.int64)
    found = codec.decode(codec.packet_of(total, CONTEXT), CONTEXT).vector
    wanted = np.sum([codec.decode(p, CONTEXT).vector for p in packets], axis=0, dtype=np.float64)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * max(np.abs(wanted).max(), 1e-9))


def test_a_packet_made_of_its_own_numbers_is_the_same() -> None:
    codec = linear(**ALL)
    packet = codec.encode(normal(1), CONTEXT)
    assert codec.packet_of(codec.levels(packet, CONTEXT), CONTEXT) == packet


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_there_are(sign: int) -> None:
    codec = linear(**ALL, scale_exponent=-20)
    levels = np.full(codec.numbers(SPEC), sign * (2**31 - 1), np.int64)
    packet = codec.packet_of(levels, CONTEXT)
    assert (codec.levels(packet, CONTEXT) == levels).all()
    assert codec.decode(packet, CONTEXT).is_finite()


# ---- what is sent -------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["effect", "parameters"])
def test_what_lies_along_the_directions_comes_back(metric: str) -> None:
    update = along(1)
    codec = linear(bpp=16.0, bits=16, scale_exponent=-18, metric=metric)
    found = codec.decode(codec.encode(update, CONTEXT), CONTEXT)
    # small integers stand for directions, so they are not quite orthogonal
    assert (update - found).norm() < 0.03 * update.norm()


def test_what_is_cut_off_comes_with_error_feedback() -> None:
    codec, wanted = linear(**ALL, scale_exponent=-15), along(1)
    residual, sent = None, AdapterUpdate.zeros(SPEC)
    far = []
    for round_ in range(1, 13):
        change = wanted if round_ == 1 else AdapterUpdate.zeros(SPEC)
        context = replace(CONTEXT, round=round_)
        out = encode_with_feedback(codec, change, context, residual=residual)
        residual, sent = out.residual, sent + out.decoded
        far.append((wanted - sent).norm() / wanted.norm())
    assert far[0] > 0.3
    assert far[-1] < 0.01


def test_the_strongest_foretold_come_first() -> None:
    """A lower rate sends the beginning of what a higher one does."""
    codec, fewer = linear(**ALL), linear(bpp=0.3, bits=8)
    update = along(2)
    all_, some = (own.levels(own.encode(update, CONTEXT), CONTEXT) for own in (codec, fewer))
    assert some.size < COEFFICIENTS / 4
    assert all_.size == COEFFICIENTS
    np.testing.assert_array_equal(some, all_[: some.size])
    assert energy(some) > 0.7 * energy(all_)


@pytest.mark.parametrize("bits", [2, 7, 16])
@pytest.mark.parametrize("bpp", [0.3, 0.9, 30.0])
def test_all_packets_have_the_same_numbers_and_the_rate_that_was_asked_for(
    bits: int, bpp: float
) -> None:
    codec = linear(bpp=bpp, bits=bits)
    sizes = {
        len(codec.encode(update, replace(CONTEXT, round=round_, start=start)))
        for update in (normal(0), along(1), AdapterUpdate.zeros(SPEC))
        for round_, start in ((1, Start(begun().adapter)), (2, begun()), (3, begun(7)))
    }
    assert sizes == {codec.expected_size(SPEC)}
    assert 8 * max(sizes) < bpp * SPEC.size + 8
    if codec.numbers(SPEC) < COEFFICIENTS:
        assert 8 * max(sizes) > bpp * SPEC.size - bits
    else:
        assert codec.numbers(SPEC) == COEFFICIENTS
        assert bpp > 0.3


def test_where_the_adapter_has_grown_makes_no_difference() -> None:
    start = begun()
    alone = replace(CONTEXT, start=Start(start.adapter))
    assert linear(**ALL).encode(normal(1), CONTEXT) == linear(**ALL).encode(normal(1), alone)


@pytest.mark.parametrize("lacking", ["start", "state"])
def test_without_an_adapter_or_a_state_nothing_is_said(lacking: str) -> None:
    codec = linear(**ALL)
    state = codec.initial_state(SPEC)
    context = replace(CONTEXT, **({"start": None} if lacking == "start" else {"state": state}))
    packet = codec.encode(normal(1), context)
    assert not codec.levels(packet, context).any()
    assert not codec.decode(packet, context).vector.any()


def test_a_rate_below_one_number_sends_none() -> None:
    codec = linear(bpp=0.05)
    packet = codec.encode(normal(1), CONTEXT)
    assert len(packet) == HEADER_SIZE == codec.expected_size(SPEC)
    assert codec.packet_of(codec.levels(packet, CONTEXT), CONTEXT) == packet
    assert not codec.decode(packet, CONTEXT).vector.any()


# ---- what is refused ----------------------------------------------------------------------------


def test_ordinary_packets_do_not_add_up() -> None:
    codec = make_codec("learned", {"directions": DIRECTIONS})
    assert isinstance(codec, Learned)
    assert not codec.needs_state
    assert linear().needs_state
    with pytest.raises(CodecError, match=r"learned: .* set the option scale_exponent"):
        codec.reach  # noqa: B018


@pytest.mark.parametrize("bpp", [0.3, 4.0])
def test_packets_of_the_other_mode_are_refused(bpp: float) -> None:
    update, codec = normal(1), linear(bpp=bpp)
    ordinary = make_codec("learned", {"directions": DIRECTIONS, "bpp": bpp})
    with pytest.raises(PacketError, match="is of linear mode, and the option scale_exponent"):
        ordinary.decode(codec.encode(update, CONTEXT), CONTEXT)
    for own in (update, AdapterUpdate.zeros(SPEC)):
        blob = ordinary.encode(own, CONTEXT)
        with pytest.raises(PacketError, match="is not of linear mode"):
            codec.decode(blob, CONTEXT)
        with pytest.raises(PacketError, match="is not of linear mode"):
            codec.levels(blob, CONTEXT)


def test_a_packet_at_another_step_is_not_added() -> None:
    codec, other = linear(**ALL), linear(**ALL, scale_exponent=-13)
    blob = other.encode(normal(1), CONTEXT)
    with pytest.raises(PacketError, match="scale exponent is -13, not -12 as agreed"):
        codec.levels(blob, CONTEXT)
    # what says nothing says it at any step
    zero = other.encode(AdapterUpdate.zeros(SPEC), CONTEXT)
    assert not codec.levels(zero, CONTEXT).any()


def test_a_packet_is_read_with_what_it_was_made_with() -> None:
    codec = linear(**ALL)
    blob = codec.encode(normal(1), CONTEXT)
    with pytest.raises(PacketError, match="the adapter it changes"):
        codec.decode(blob, replace(CONTEXT, start=None))
    with pytest.raises(PacketError, match="state hash"):
        codec.decode(blob, replace(CONTEXT, state=codec.initial_state(SPEC)))
    other = linear(**ALL, metric="parameters")
    assert (other.decode(blob, CONTEXT).vector == codec.decode(blob, CONTEXT).vector).all()


def test_payloads_that_do_not_fit_are_refused() -> None:
    codec = linear(**ALL)
    payload = payload_of(codec.encode(normal(1), CONTEXT))
    numbers = payload[7:]

    def head(how: int, exponent: int, width: int) -> bytes:
        return struct.pack("<IhB", (7 << 29) + how, exponent, width)

    assert payload[:7] == head(2, -12, 8)
    spoiled = {
        "not of linear mode": (b"", payload[:3], b"\0" + payload[1:3] + b"\0" + payload[4:]),
        "its head is 3": (payload[:4], payload[:6]),
        "this rate needs": (payload[:-1], payload + b"\0", head(2, -12, 9) + numbers),
        "numbers of 1 bits": (head(2, -12, 1) + numbers,),
        "numbers of 33 bits": (head(2, -12, 33) + numbers,),
        "exponent 161 is out of range": (head(2, 161, 8) + numbers,),
        "exponent -201 is out of range": (head(2, -201, 8) + numbers,),
        "no axes number 3": (head(3, -12, 8) + numbers,),
        # those in which the adapter has grown are not for sums
        "no axes number 6": (head(6, -12, 8) + numbers,),
        "no axes number 536870911": (head(2**29 - 1, -12, 8) + numbers,),
    }
    for message, payloads in spoiled.items():
        for own in payloads:
            with pytest.raises(PacketError, match=message):
                codec.decode(sealed(codec, CONTEXT, own), CONTEXT)
    none = linear(bpp=0.05)
    with pytest.raises(PacketError, match="not of linear mode"):
        none.decode(sealed(none, CONTEXT, b"\1"), CONTEXT)
    with pytest.raises(PacketError, match="this rate needs none"):
        none.decode(sealed(none, CONTEXT, payload), CONTEXT)


def hostile_context(seed: int) -> CodecContext:
    """The most extreme state that is let pass, an adapter of the largest or smallest values."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.choice([2.0**-40, 2.0**40, 1.0], size=values.shape).astype(values.dtype)
        if name in (ENERGIES, WEIGHTS)
        else rng.choice([-128, 0, 127], size=values.shape).astype(values.dtype)
        for name, values in STATE.tensors.items()
    }
    values = rng.choice([3e38, 1e-38, 1.0, 0.0]) * rng.standard_normal(SPEC.size).clip(-1, 1)
    return replace(CONTEXT, state=CodecState.of(tensors), start=Start(values.astype(np.float32)))


@pytest.mark.filterwarnings("error")
@given(
    seed=st.integers(0, 1000),
    width=st.integers(2, 32),
    exponent=st.sampled_from([-200, -12, 0, 60, 160]),
    how=st.integers(0, 2),
)
def test_any_numbers_decode_to_finite_values_or_are_refused(
    seed: int, width: int, exponent: int, how: int
) -> None:
    codec, context, rng = linear(**ALL), hostile_context(seed), np.random.default_rng(seed)
    codec.check_state(context.state, SPEC)
    size = -(-codec.numbers(SPEC) * width // 8)
    body = rng.choice(np.array([0, 255, 128, 127], np.uint8), size=size).tobytes()
    payload = struct.pack("<IhB", (7 << 29) + how, exponent, width) + body
    try:
        found = codec.decode(sealed(codec, context, payload), context)
    except PacketError:
        return
    assert found.is_finite()
