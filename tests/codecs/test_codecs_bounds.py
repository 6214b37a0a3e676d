"""How far each of the plain codecs may be off."""

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, make_codec

SPEC = AdapterSpec.from_shapes({"m.0.q.lora_A.weight": (3, 4), "m.0.q.lora_B.weight": (5, 3)})
CONTEXT = CodecContext(SPEC, round=1)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
VECTORS = npst.arrays(np.float32, SPEC.size, elements=FINITE | st.floats(-1, 1, width=32))


def through(name: str, vector: np.ndarray, **options: Any) -> AdapterUpdate:
    codec = make_codec(name, options)
    return codec.decode(codec.encode(AdapterUpdate(SPEC, vector), CONTEXT), CONTEXT)


@given(VECTORS)
def test_raw_is_exact_to_the_bit(vector: np.ndarray) -> None:
    assert through("raw", vector).vector.tobytes() == vector.tobytes()


@given(VECTORS)
def test_bf16_is_within_one_part_in_256(vector: np.ndarray) -> None:
    error = np.abs(through("bf16", vector).vector.astype(np.float64) - vector)
    smallest = 2.0**-134  # half of the smallest bfloat16 denormal
    assert (error <= np.maximum(np.abs(vector.astype(np.float64)) * 2.0**-8, smallest)).all()


@given(VECTORS)
def test_bf16_keeps_what_is_bf16_already(vector: np.ndarray) -> None:
    once = through("bf16", vector).vector
    assert through("bf16", once).vector.tobytes() == once.tobytes()


def test_bf16_rounds_to_nearest_even_like_torch() -> None:
    import torch

    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    values = np.concatenate([bits, ties]).view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 3.38e38)]
    spec = AdapterSpec.from_shapes({"x": (values.size,)})
    context = CodecContext(spec, round=1)
    codec = make_codec("bf16")
    ours = codec.decode(codec.encode(AdapterUpdate(spec, values), context), context)
    theirs = torch.from_numpy(values).bfloat16().float().numpy()
    assert ours.vector.tobytes() == theirs.tobytes()


@given(VECTORS)
def test_int8_is_within_half_a_step_of_its_row(vector: np.ndarray) -> None:
    decoded = through("int8", vector)
    for name, wanted in AdapterUpdate(SPEC, vector).views().items():
        got = decoded.views()[name]
        # a row is the long axis: rows of A, columns of B
        axis = 0 if "lora_B" in name else 1
        largest = np.abs(wanted.astype(np.float64)).max(axis=axis, keepdims=True)
        step = np.maximum(largest / 127, 2.0**-126)
        error = np.abs(wanted.astype(np.float64) - got)
        assert (error <= 0.5 * step * (1 + 1e-4)).all()


def test_int8_rows_do_not_disturb_each_other() -> None:
    update = AdapterUpdate.zeros(SPEC)
    views = update.views()
    views["m.0.q.lora_A.weight"][0] = 1e6
    views["m.0.q.lora_A.weight"][1] = 1e-6
    views["m.0.q.lora_B.weight"][:, 0] = 1e6
    views["m.0.q.lora_B.weight"][:, 1] = 1e-6
    np.testing.assert_allclose(through("int8", update.vector).vector, update.vector, rtol=1e-6)


@given(VECTORS, st.integers(1, 6))
def test_int4_is_within_half_a_step_of_its_group(vector: np.ndarray, group: int) -> None:
    decoded = through("int4", vector, group=group)
    for name, wanted in AdapterUpdate(SPEC, vector).views().items():
        by_column = "lora_B" in name
        rows = (wanted.T if by_column else wanted).astype(np.float64)
        got = decoded.views()[name].T if by_column else decoded.views()[name]
        for start in range(0, rows.shape[1], group):
            own = rows[:, start : start + group]
            # scales are rounded up to bfloat16, 2^-7 at most, but stay below what overflows
            largest = np.abs(own).max(axis=1, keepdims=True)
            step = np.maximum(largest / 7 * (1 + 2.0**-7), 2.0**-126)
            error = np.abs(own - got[:, start : start + group])
            assert (error <= 0.5 * step * (1 + 1e-4)).all()


@given(VECTORS)
def test_sign_sends_signs_and_the_mean_magnitude_of_a_row(vector: np.ndarray) -> None:
    decoded = through("sign", vector)
    for name, wanted in AdapterUpdate(SPEC, vector).views().items():
        axis = 0 if "lora_B" in name else 1
        mean = np.abs(wanted.astype(np.float64)).mean(axis=axis, keepdims=True)
        signs = np.where(wanted < 0, -1, 1)
        np.testing.assert_array_equal(decoded.views()[name], (signs * mean).astype(np.float32))


@given(VECTORS)
def test_zstd_is_exact_or_bf16(vector: np.ndarray) -> None:
    assert through("zstd", vector).vector.tobytes() == vector.tobytes()
    half = through("zstd", vector, dtype="bfloat16", level=19).vector
    assert half.tobytes() == through("bf16", vector).vector.tobytes()


def test_zstd_says_which_of_its_forms_is_lossless() -> None:
    assert make_codec("zstd").lossless
    assert not make_codec("zstd", {"dtype": "bfloat16"}).lossless


@given(VECTORS, st.floats(0, 100, width=32))
def test_zero_takes_the_previous_aggregate(previous: np.ndarray, scale: float) -> None:
    codec = make_codec("zero", {"scale": scale})
    context = CodecContext(SPEC, round=1, previous=previous)
    blob = codec.encode(AdapterUpdate.zeros(SPEC), context)
    assert len(blob) == 52
    largest = float(np.finfo(np.float32).max)
    wanted = (previous.astype(np.float64) * scale).clip(-largest, largest)
    np.testing.assert_allclose(codec.decode(blob, context).vector, wanted, rtol=1e-6, atol=1e-37)
