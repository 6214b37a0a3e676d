"""What every codec keeps, whatever it does inside. A new codec inherits all of this by its name.

Rates are in test_codecs_rate.py, golden packets in test_codecs_golden.py.
"""

import contextlib
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import (
    Codec,
    CodecContext,
    CodecOptions,
    CodecState,
    codec_class,
    codec_names,
    make_codec,
    register,
)
from cgfedllm.codecs.packet import Packet
from cgfedllm.errors import CodecError, PacketError

from .contexts import begun, taught
from .hostile import resealed

pytestmark = pytest.mark.filterwarnings("error")

FLOAT32_MAX = float(np.finfo(np.float32).max)

# ---- the cases ----------------------------------------------------------------------------------

LAYER = "base_model.model.model.layers.0.self_attn"
# large enough that a codec with rate control sends something at the tests' generous rate
SPEC = AdapterSpec.from_shapes(
    {f"{LAYER}.q_proj.lora_A.weight": (8, 24), f"{LAYER}.q_proj.lora_B.weight": (16, 8)}
)
SPECS = {
    "usual": SPEC,
    "small": AdapterSpec.from_shapes(
        {f"{LAYER}.q_proj.lora_A.weight": (2, 5), f"{LAYER}.q_proj.lora_B.weight": (3, 2)}
    ),
    "one element": AdapterSpec.from_shapes({"x": (1,)}),
    "one element A": AdapterSpec.from_shapes({"m.0.q.lora_A.weight": (1, 1)}),
    "only B": AdapterSpec.from_shapes({"m.0.q.lora_B.weight": (7, 3)}),
    "odd shapes": AdapterSpec.from_shapes(
        {
            "scalar": (),
            "vector": (5,),
            "conv.lora_A.weight": (2, 3, 2, 2),
            "conv.lora_B.weight": (4, 2, 2, 2),
            "cube": (2, 3, 4),
        }
    ),
}
SPECS_BY_NAME = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def one_hot(size: int, value: float) -> np.ndarray:
    vector = np.zeros(size, np.float32)
    vector[size // 2] = value
    return vector


def alternating(size: int, value: float) -> np.ndarray:
    return np.where(np.arange(size) % 2, -value, value).astype(np.float32)


VECTORS: dict[str, Callable[[int], np.ndarray]] = {
    "zero": lambda n: np.zeros(n, np.float32),
    "minus zero": lambda n: np.full(n, -0.0, np.float32),
    "constant": lambda n: np.full(n, 0.3, np.float32),
    "one hot": lambda n: one_hot(n, 1.0),
    "one hot, huge": lambda n: one_hot(n, -1e38),
    "huge": lambda n: alternating(n, 1e38),
    "largest": lambda n: alternating(n, FLOAT32_MAX),
    "tiny": lambda n: alternating(n, 1e-30),
    "denormal": lambda n: alternating(n, 1e-41),
    "smallest denormal": lambda n: np.full(n, 1e-45, np.float32),
    "bf16 values": lambda n: alternating(n, 1.5),
    "mixed magnitudes": lambda n: np.logspace(-44, 38, n).astype(np.float32),
    "normal": lambda n: np.random.default_rng(1).standard_normal(n).astype(np.float32),
}
VECTORS_BY_NAME = pytest.mark.parametrize("vector", VECTORS.values(), ids=VECTORS)


def context_of(codec: Codec, spec: AdapterSpec, round: int = 3) -> CodecContext:
    previous = np.random.default_rng(5).standard_normal(spec.size, np.float32)
    previous *= np.float32(1e-3)
    return CodecContext(
        spec, round, 11, taught(codec, spec), previous=previous, start=begun(codec, spec)
    )


def normal(spec: AdapterSpec, seed: int = 0) -> AdapterUpdate:
    rng = np.random.default_rng(seed)
    return AdapterUpdate(spec, rng.standard_normal(spec.size, np.float32) * np.float32(1e-3))


# ---- round trip ---------------------------------------------------------------------------------


@SPECS_BY_NAME
@VECTORS_BY_NAME
def test_round_trip(codec: Codec, spec: AdapterSpec, vector: Callable[[int], np.ndarray]) -> None:
    update = AdapterUpdate(spec, vector(spec.size))
    before = update.vector.copy()
    blob = codec.encode(update, context_of(codec, spec))
    decoded = codec.decode(blob, context_of(codec, spec))
    assert decoded.spec.hash == spec.hash
    assert decoded.vector.dtype == np.float32
    assert decoded.vector.shape == (spec.size,)
    assert decoded.is_finite()
    assert update.vector.tobytes() == before.tobytes(), "encode changed its input"
    assert codec.encode(update, context_of(codec, spec)) == blob, "the same input gave other bytes"
    if codec.lossless:
        assert decoded.vector.tobytes() == before.tobytes()


@SPECS_BY_NAME
def test_zero_stays_zero(codec: Codec, spec: AdapterSpec) -> None:
    # without a previous aggregate, that is: no prediction
    context = replace(context_of(codec, spec), previous=None)
    blob = codec.encode(AdapterUpdate.zeros(spec), context)
    assert not codec.decode(blob, context).vector.any()


@given(data=st.data())
def test_any_finite_update(all_codecs: list[Codec], data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from(all_codecs))
    spec = data.draw(st.sampled_from(list(SPECS.values())))
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    vector = data.draw(npst.arrays(np.float32, spec.size, elements=finite))
    decoded = codec.decode(
        codec.encode(AdapterUpdate(spec, vector), context_of(codec, spec)), context_of(codec, spec)
    )
    assert decoded.is_finite()


# why a codec's values may be farther from the update than zeros are
FARTHER: dict[str, Callable[[Any], str]] = {
    "zero": lambda options: "sends nothing",
    "qsgd": lambda options: "has more variance than bias to gain" if options.unbiased else "",
    **dict.fromkeys(
        ("cg_cnn", "cg_resnet", "cg_unet"),
        lambda options: "has learned nothing yet" if options.preset == "printed" else "",
    ),
}


def test_decoding_reduces_the_error(
    codec: Codec,
    lora_spec: Callable[[int, int], AdapterSpec],
    realistic: Callable[[AdapterSpec, int], AdapterUpdate],
) -> None:
    if codec.name in FARTHER and (reason := FARTHER[codec.name](codec.options)):
        pytest.skip(reason)
    spec = lora_spec(4, 256)
    update = realistic(spec, 0)
    decoded = codec.decode(codec.encode(update, context_of(codec, spec)), context_of(codec, spec))
    assert (update - decoded).norm() < update.norm()


def test_decoded_values_are_writable_and_its_own(codec: Codec) -> None:
    blob = codec.encode(normal(SPEC), context_of(codec, SPEC))
    first = codec.decode(blob, context_of(codec, SPEC))
    first.vector[:] = 1
    assert codec.decode(blob, context_of(codec, SPEC)).vector.tolist() != first.vector.tolist()


@SPECS_BY_NAME
def test_packet_size_is_exact(codec: Codec, spec: AdapterSpec) -> None:
    size = codec.packet_size(spec)
    if size is not None:
        assert len(codec.encode(normal(spec), context_of(codec, spec))) == size
        assert len(codec.encode(AdapterUpdate.zeros(spec), context_of(codec, spec))) == size


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_updates_are_refused(codec: Codec, bad: float) -> None:
    update = normal(SPEC)
    update.vector[4] = bad
    with pytest.raises(CodecError, match="NaN or infinity"):
        codec.encode(update, context_of(codec, SPEC))


def test_update_of_another_adapter_is_refused(codec: Codec) -> None:
    with pytest.raises(CodecError, match="another adapter"):
        codec.encode(normal(SPECS["only B"]), context_of(codec, SPEC))


def test_nothing_is_remembered(codec: Codec) -> None:
    first, second = normal(SPEC, 1), normal(SPEC, 2)
    there = [codec.encode(update, context_of(codec, SPEC)) for update in (first, second)]
    back = [codec.encode(update, context_of(codec, SPEC)) for update in (second, first)]
    assert there == back[::-1]
    values = [codec.decode(blob, context_of(codec, SPEC)).vector.tobytes() for blob in there]
    again = [codec.decode(blob, context_of(codec, SPEC)).vector.tobytes() for blob in back]
    assert values == again[::-1]


# ---- what is not this run's packet --------------------------------------------------------------


def test_replayed_packet_is_refused(codec: Codec) -> None:
    blob = codec.encode(normal(SPEC), context_of(codec, SPEC, round=3))
    with pytest.raises(PacketError, match="round is 3, expected 4"):
        codec.decode(blob, context_of(codec, SPEC, round=4))


def test_packet_for_another_adapter_is_refused(codec: Codec) -> None:
    blob = codec.encode(normal(SPECS["only B"]), context_of(codec, SPECS["only B"]))
    with pytest.raises(PacketError, match="spec hash"):
        codec.decode(blob, context_of(codec, SPEC))


def test_packet_of_another_codec_is_refused(codec: Codec) -> None:
    for name in set(codec_names()) - {codec.name}:
        other = make_codec(name)
        blob = other.encode(normal(SPEC), context_of(other, SPEC))
        with pytest.raises(PacketError, match="codec is"):
            codec.decode(blob, context_of(codec, SPEC))


def test_packet_of_another_codec_version_is_refused(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = codec.encode(normal(SPEC), context_of(codec, SPEC))
    monkeypatch.setattr(type(codec), "version", codec.version + 1)
    with pytest.raises(PacketError, match="codec version"):
        codec.decode(blob, context_of(codec, SPEC))


def test_packet_of_another_state_is_refused(codec: Codec) -> None:
    blob = codec.encode(normal(SPEC), context_of(codec, SPEC))
    other = CodecContext(SPEC, round=3, state=CodecState(hash=b"\1" * 8))
    with pytest.raises(PacketError, match="state hash"):
        codec.decode(blob, other)


# ---- damage -------------------------------------------------------------------------------------


def mutations(blob: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Damaged copies, never equal to the original."""
    rng = random.Random(seed)
    made = 0
    while made < count:
        damaged = bytearray(blob)
        at = rng.randrange(len(damaged))
        match rng.randrange(8):
            case 0:
                damaged[at] ^= 1 << rng.randrange(8)
            case 1:
                damaged[at] = rng.randrange(256)
            case 2:
                for _ in range(rng.randrange(2, 20)):
                    damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            case 3:
                del damaged[at : at + rng.randrange(1, 9)]
            case 4:
                damaged[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 5:
                del damaged[at:]
            case 6:
                damaged += rng.randbytes(rng.randrange(1, 40))
            case 7:
                other = rng.randrange(len(damaged))
                damaged[at], damaged[other] = damaged[other], damaged[at]
        if damaged != blob:
            made += 1
            yield bytes(damaged)


def check_mutations(codec: Codec, count: int) -> None:
    context = context_of(codec, SPEC)
    blob = codec.encode(normal(SPEC), context)
    for damaged in mutations(blob, count, seed=count):
        with pytest.raises(PacketError):
            codec.decode(damaged, context)
        start = time.perf_counter()
        try:
            decoded = codec.decode(resealed(damaged), context)
        except PacketError:
            continue
        finally:
            assert time.perf_counter() - start < 1
        assert decoded.is_finite()
        assert decoded.vector.shape == (SPEC.size,)


def test_damage_is_detected(codec: Codec) -> None:
    check_mutations(codec, 2_000)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", codec_names())
def test_damage_is_detected_at_length(name: str) -> None:
    has_rate = "bpp" in codec_class(name).Options.model_fields
    check_mutations(make_codec(name, {"bpp": 2.0} if has_rate else {}), 100_000)


def test_damage_does_not_make_the_decoder_allocate(codec: Codec) -> None:
    context = context_of(codec, SPEC)
    blob = codec.encode(normal(SPEC), context)
    codec.decode(blob, context)
    tracemalloc.start()
    try:
        for damaged in mutations(blob, 200, seed=1):
            with contextlib.suppress(PacketError):
                codec.decode(resealed(damaged), context)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20 + 64 * SPEC.size


def test_every_truncation_and_every_single_bit_is_detected(codec: Codec) -> None:
    context = context_of(codec, SPEC)
    blob = codec.encode(normal(SPEC), context)
    for end in range(len(blob)):
        with pytest.raises(PacketError):
            codec.decode(blob[:end], context)
    for bit in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PacketError):
            codec.decode(bytes(damaged), context)


@given(blob=st.binary(max_size=300))
def test_noise_is_refused(blob: bytes) -> None:
    for name in codec_names():
        codec = make_codec(name)
        with pytest.raises(PacketError):
            codec.decode(blob, context_of(codec, SPEC))


@given(data=st.data())
def test_any_payload_in_a_valid_packet(all_codecs: list[Codec], data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from(all_codecs))
    spec = data.draw(st.sampled_from(list(SPECS.values())))
    size = codec.payload_size(spec)
    length = st.integers(0, 400) if size is None else st.just(size) | st.integers(0, 400)
    n = data.draw(length)
    blob = Packet(
        codec=codec.name,
        codec_version=codec.version,
        spec_hash=spec.hash,
        state_hash=context_of(codec, spec).state.hash,
        round=3,
        parameters=spec.size,
        payload=data.draw(st.binary(min_size=n, max_size=n)),
        uses_previous=data.draw(st.booleans()),
    ).to_bytes()
    try:
        decoded = codec.decode(blob, context_of(codec, spec))
    except PacketError:
        return
    assert decoded.is_finite()


def test_infinity_in_a_valid_packet_is_refused() -> None:
    spec = SPECS["one element"]
    for name, payload in {"raw": b"\0\0\x80\x7f", "bf16": b"\xc0\x7f"}.items():
        codec = make_codec(name)
        packet = Packet(name, codec.version, spec.hash, bytes(8), 3, spec.size, payload)
        with pytest.raises(PacketError, match="NaN or infinity"):
            codec.decode(packet.to_bytes(), context_of(codec, spec))


# ---- registry and context -----------------------------------------------------------------------


def test_every_codec_says_what_it_is(codec: Codec) -> None:
    assert codec.summary
    assert codec.kind in ("control", "element-wise", "structured", "learned")
    assert codec.rates
    assert all(field.description for field in codec.Options.model_fields.values())
    assert codec.version >= 1
    assert codec_class(codec.name) is type(codec)


def test_unknown_option_is_refused(codec: Codec) -> None:
    with pytest.raises(CodecError, match="no_such_option"):
        make_codec(codec.name, {"no_such_option": 1})


def test_unknown_codec_names_the_nearest() -> None:
    with pytest.raises(CodecError, match="did you mean 'int8'"):
        make_codec("int9")
    with pytest.raises(CodecError, match="known: "):
        make_codec("????")


@pytest.mark.parametrize("name", ["raw", "", "thirteen_char", "naïve"])
def test_names_that_cannot_be_registered(name: str) -> None:
    class Misnamed(codec_class("raw")):  # type: ignore[misc]
        Options = CodecOptions

    Misnamed.name = name
    with pytest.raises(CodecError):
        register(Misnamed)


@pytest.mark.parametrize("round", [-1, 2**32])
def test_rounds_that_do_not_fit(round: int) -> None:
    with pytest.raises(CodecError, match="32"):
        CodecContext(SPEC, round=round)


def test_largest_round_fits(codec: Codec) -> None:
    context = context_of(codec, SPEC, round=2**32 - 1)
    assert codec.decode(codec.encode(normal(SPEC), context), context).is_finite()
