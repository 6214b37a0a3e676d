"""The linear sketch: sums of packets, one map for all clients, a new one every round."""

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, Sketch, make_codec
from cgfedllm.codecs.feedback import encode_with_feedback
from cgfedllm.codecs.packet import HEADER_SIZE
from cgfedllm.errors import CodecError, PacketError

SPEC = AdapterSpec.from_shapes({"m.0.q.lora_A.weight": (8, 2048), "m.0.q.lora_B.weight": (2048, 8)})
CONTEXT = CodecContext(SPEC, round=4, seed=9)


def update(seed: int, scale: float = 1e-3) -> AdapterUpdate:
    rng = np.random.default_rng(seed)
    return AdapterUpdate(SPEC, (rng.standard_normal(SPEC.size) * scale).astype(np.float32))


def sketch(**options: object) -> Sketch:
    codec = make_codec("sketch", options)
    assert isinstance(codec, Sketch)
    return codec


@pytest.mark.parametrize("bits", [2, 5, 8, 16])
@pytest.mark.parametrize("exponent", [None, -14])
def test_the_sum_of_packets_is_the_packet_of_the_sum(bits: int, exponent: int | None) -> None:
    codec = sketch(bpp=1.0, bits=bits, scale_exponent=exponent)
    packets = [codec.encode(update(i, 10.0**-i), CONTEXT) for i in range(2, 5)]
    total = codec.decode(codec.add(packets, CONTEXT), CONTEXT)
    wanted = sum(codec.decode(p, CONTEXT).vector.astype(np.float64) for p in packets)
    np.testing.assert_allclose(total.vector, wanted, atol=1e-6 * np.abs(wanted).max())


def test_sums_of_sums() -> None:
    codec = sketch(bpp=0.5)
    packets = [codec.encode(update(i), CONTEXT) for i in range(4)]
    at_once = codec.add(packets, CONTEXT)
    in_two = codec.add([codec.add(packets[:2], CONTEXT), codec.add(packets[2:], CONTEXT)], CONTEXT)
    assert codec.decode(at_once, CONTEXT).vector.tobytes() == (
        codec.decode(in_two, CONTEXT).vector.tobytes()
    )


def test_adding_nothing_much() -> None:
    codec = sketch(bpp=0.5)
    zero, some = codec.encode(AdapterUpdate.zeros(SPEC), CONTEXT), codec.encode(update(0), CONTEXT)
    assert not codec.decode(codec.add([zero, zero], CONTEXT), CONTEXT).vector.any()
    alone = codec.decode(some, CONTEXT).vector
    np.testing.assert_array_equal(
        codec.decode(codec.add([zero, some], CONTEXT), CONTEXT).vector, alone
    )
    with pytest.raises(CodecError, match="no packets"):
        codec.add([], CONTEXT)


def test_scales_too_far_apart_are_refused() -> None:
    codec = sketch(bpp=0.5)
    packets = [codec.encode(update(0, scale), CONTEXT) for scale in (1e30, 1e-30)]
    with pytest.raises(CodecError, match="scale_exponent"):
        codec.add(packets, CONTEXT)


def test_packets_of_two_rounds_are_not_added() -> None:
    codec = sketch(bpp=0.5)
    later = CodecContext(SPEC, round=5, seed=9)
    with pytest.raises(PacketError, match="round"):
        codec.add([codec.encode(update(0), CONTEXT), codec.encode(update(0), later)], CONTEXT)


def test_packets_of_one_fixed_scale_add_as_plain_integers() -> None:
    codec = sketch(bpp=2.0, bits=8, scale_exponent=-12)
    payloads = [
        np.frombuffer(codec.encode(update(i), CONTEXT), np.uint8, offset=HEADER_SIZE)
        for i in range(2)
    ]
    assert payloads[0][:3].tobytes() == payloads[1][:3].tobytes()
    levels = sum(p[3:].astype(int) - 128 for p in payloads)
    added = np.frombuffer(
        codec.add([codec.encode(update(i), CONTEXT) for i in range(2)], CONTEXT),
        np.uint8,
        offset=HEADER_SIZE,
    )
    assert added[:3].tobytes() == payloads[0][:3].tobytes()
    np.testing.assert_array_equal(added[3:].astype(int) - 128, levels)


def test_what_is_kept_is_the_share_of_directions() -> None:
    for bpp in (0.8, 2.0, 4.0):
        codec = sketch(bpp=bpp)
        share = codec.numbers(SPEC) / SPEC.size
        decoded = codec.decode(codec.encode(update(0), CONTEXT), CONTEXT)
        assert (update(0) - decoded).norm() ** 2 == pytest.approx(
            (1 - share) * update(0).norm() ** 2, rel=0.03
        )


def test_all_directions_at_full_rate() -> None:
    codec = sketch(bpp=8.1)
    decoded = codec.decode(codec.encode(update(0), CONTEXT), CONTEXT)
    assert (update(0) - decoded).norm() < 0.01 * update(0).norm()


def test_all_clients_share_a_map_and_every_round_has_its_own() -> None:
    codec = sketch(bpp=0.8)
    other = sketch(bpp=0.8)
    first = codec.decode(codec.encode(update(0), CONTEXT), CONTEXT)
    again = other.decode(other.encode(update(0), CONTEXT), CONTEXT)
    assert first.vector.tobytes() == again.vector.tobytes()
    for context in (CodecContext(SPEC, 5, 9), CodecContext(SPEC, 4, 10)):
        apart = codec.decode(codec.encode(update(0), context), context)
        cosine = first.vector @ apart.vector / (first.norm() * apart.norm())
        # projections on two independent tenths of all directions have a tenth in common
        assert 0 < cosine < 0.2


def test_error_feedback_reaches_all_directions() -> None:
    codec, residual = sketch(bpp=2.0), None
    wanted = update(0)
    sent = AdapterUpdate.zeros(SPEC)
    for round_ in range(12):
        change = wanted if round_ == 0 else AdapterUpdate.zeros(SPEC)
        out = encode_with_feedback(codec, change, CodecContext(SPEC, round_), residual=residual)
        residual, sent = out.residual, sent + out.decoded
    # three quarters are left after each round
    assert (wanted - sent).norm() < 1.2 * 0.75**6 * wanted.norm()


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_rate(bits: int) -> None:
    spec = AdapterSpec.from_shapes({"x": (300_000,)})
    values = np.random.default_rng(0).standard_normal(spec.size).astype(np.float32)
    for bpp in (0.05, 0.4, 1.9):
        blob = sketch(bpp=bpp, bits=bits).encode(
            AdapterUpdate(spec, values), CodecContext(spec, round=0)
        )
        assert len(blob) * 8 / spec.size == pytest.approx(bpp, rel=0.01)


def test_a_rate_beyond_all_directions_is_refused() -> None:
    with pytest.raises(CodecError, match=r"the nearest is 4"):
        sketch(bpp=6.0, bits=4).encode(update(0), CONTEXT)
