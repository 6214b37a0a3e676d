"""Error feedback: nothing is lost, only late."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import Codec, CodecContext, codec_names, make_codec
from cgfedllm.codecs.feedback import encode_with_feedback
from cgfedllm.errors import AdapterError, CodecError

SPEC = AdapterSpec.from_shapes({"m.0.q.lora_A.weight": (2, 9), "m.0.q.lora_B.weight": (7, 2)})


def update(seed: int, scale: float = 1e-3) -> AdapterUpdate:
    rng = np.random.default_rng(seed)
    return AdapterUpdate(SPEC, (rng.standard_normal(SPEC.size) * scale).astype(np.float32))


def context_of(codec: Codec, round: int) -> CodecContext:
    return CodecContext(SPEC, round, state=codec.initial_state(SPEC))


@pytest.fixture(params=codec_names())
def codec(request: pytest.FixtureRequest) -> Codec:
    return make_codec(request.param)


def test_what_is_sent_and_what_is_kept_make_what_was_wanted(codec: Codec) -> None:
    context = context_of(codec, round=2)
    first = encode_with_feedback(codec, update(0), context)
    assert first.residual is not None
    second = encode_with_feedback(codec, update(1), context, residual=first.residual, decay=0.5)
    assert second.residual is not None
    wanted = update(1) + first.residual.scaled(0.5)
    # a difference of float32 values that are not alike is rounded
    kept = (second.decoded + second.residual).vector
    np.testing.assert_allclose(kept, wanted.vector, rtol=1e-6, atol=1e-9)
    seen = codec.decode(second.packet, context)
    assert seen.vector.tobytes() == second.decoded.vector.tobytes()


def test_lossless_codecs_keep_nothing(codec: Codec) -> None:
    out = encode_with_feedback(codec, update(0), context_of(codec, round=1))
    assert out.residual is not None
    assert (out.residual.norm() == 0) == codec.lossless


@given(rounds=st.integers(2, 60), seed=st.integers(0, 1000), name=st.sampled_from(codec_names()))
def test_the_sum_of_what_is_decoded_follows_the_sum_of_updates(
    rounds: int, seed: int, name: str
) -> None:
    codec = make_codec(name)
    residual = None
    sent = wanted = np.zeros(SPEC.size)
    for round_ in range(rounds):
        change = update(seed + round_)
        out = encode_with_feedback(codec, change, context_of(codec, round_), residual=residual)
        residual = out.residual
        sent = sent + out.decoded.vector
        wanted = wanted + change.vector
    # all that is missing is the last residual, however many rounds went by
    assert residual is not None
    np.testing.assert_allclose(sent + residual.vector, wanted, rtol=0, atol=1e-6)
    if name in ("raw", "bf16", "int8"):  # coarse codecs fall further behind
        assert np.abs(sent - wanted).max() < 1e-3


def test_a_constant_too_small_for_one_round_arrives_over_many() -> None:
    codec = make_codec("int8")
    change = AdapterUpdate.zeros(SPEC)
    change.vector[:] = 1e-3
    change.vector[0] = 1.0  # the first row's step is 1 / 127, far above its other values
    residual, total = None, AdapterUpdate.zeros(SPEC)
    for round_ in range(100):
        out = encode_with_feedback(codec, change, CodecContext(SPEC, round_), residual=residual)
        residual, total = out.residual, total + out.decoded
    assert total.vector[1] == pytest.approx(0.1, abs=0.005)
    once = codec.decode(codec.encode(change, CodecContext(SPEC, 1)), CodecContext(SPEC, 1))
    assert once.vector[1] == 0


def test_decay_zero_forgets(codec: Codec) -> None:
    context = context_of(codec, round=1)
    plain = codec.encode(update(0), context)
    out = encode_with_feedback(codec, update(0), context, residual=update(1), decay=0.0)
    assert out.packet == plain


def test_disabled_is_plain_encoding(codec: Codec) -> None:
    context = context_of(codec, round=1)
    out = encode_with_feedback(codec, update(0), context, residual=update(1), enabled=False)
    assert out.residual is None
    assert out.packet == codec.encode(update(0), context)
    assert out.decoded.vector.tobytes() == codec.decode(out.packet, context).vector.tobytes()


def test_bad_input(codec: Codec) -> None:
    context = context_of(codec, round=1)
    broken = update(0)
    broken.vector[0] = np.nan
    with pytest.raises(CodecError):
        encode_with_feedback(codec, broken, context)
    other = AdapterUpdate.zeros(AdapterSpec.from_shapes({"x": (SPEC.size,)}))
    with pytest.raises(AdapterError):
        encode_with_feedback(codec, update(0), context, residual=other)
