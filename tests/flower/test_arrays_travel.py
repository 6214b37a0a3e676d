"""Whatever arrays an app sends come back: under their names, in their types, exact or close."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cgfedllm.errors import AdapterError, CodecError
from cgfedllm.flower.arrays import DTYPES, Layout, check_alike, checksum, may_become, read_arrays

from .apps import Arrays, Listening, app_of, arrays_in, grid_of, record_of, wrapped

FLOATS = ("float16", "float32", "float64")


def sent_and_returned(held: Arrays, trained: Arrays, codec: str) -> Arrays:
    """What the server has of `trained`, which one client makes of `held`."""
    inner, grid = Listening(), grid_of(app_of(codec, lambda *_: trained), [2])
    wrapped(codec, inner).start(grid, record_of(held), num_rounds=1)
    (reply,) = inner.replies
    assert reply.has_content(), reply.error.reason
    return arrays_in(reply.content["arrays"])


def layout(arrays: Arrays) -> Layout:
    return Layout(arrays, {name: array.dtype for name, array in arrays.items()})


def coded(**arrays: Any) -> list[str]:
    spec = layout(arrays).spec
    return [] if spec is None else [factor.name for factor in spec]


# ---- any arrays ---------------------------------------------------------------------------------


@st.composite
def two_versions(draw: st.DrawFn) -> tuple[Arrays, Arrays]:
    """Arrays of any kind, and others of the same names and shapes, some in other types."""
    names = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5, unique=True))
    held, trained = {}, {}
    for name in names:
        shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=24))
        before = draw(st.sampled_from(DTYPES))
        after = draw(st.sampled_from([dtype for dtype in DTYPES if may_become(before, dtype)]))
        for arrays, dtype in ((held, before), (trained, after)):
            rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
            if dtype.kind == "f":
                arrays[name] = rng.standard_normal(shape).astype(dtype)
            elif dtype.kind == "c":
                arrays[name] = (rng.standard_normal(shape) * (1 - 2j)).astype(dtype)
            else:
                top = 2 if dtype.kind == "b" else min(np.iinfo(dtype).max, 2**62)
                arrays[name] = np.array(rng.integers(0, top, shape)).astype(dtype)
    return held, trained


@settings(max_examples=60)
@given(two_versions(), st.sampled_from(["raw", "int8", "lowrank:bpp=1"]))
def test_names_shapes_types_and_order_survive_and_exact_arrays_are_exact(
    versions: tuple[Arrays, Arrays], codec: str
) -> None:
    held, trained = versions
    got = sent_and_returned(held, trained, codec)
    assert list(got) == list(held)
    plan = Layout(held, {name: array.dtype for name, array in trained.items()})
    for name, array in trained.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
        if name in plan.exact:
            assert got[name].tobytes() == array.tobytes()
        elif codec == "raw":
            bound = 2e-3 if np.float16 in (array.dtype, held[name].dtype) else 1e-5
            np.testing.assert_allclose(got[name], array, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("codec", ["int8", "ecsq:bpp=2", "lowrank:bpp=2", "learned:bpp=2"])
def test_a_coded_matrix_comes_back_close_and_in_its_type(codec: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    held = {"w": rng.standard_normal((48, 64)).astype(dtype)}
    change = np.outer(rng.standard_normal(48), rng.standard_normal(64))
    got = sent_and_returned(held, {"w": (held["w"] + change).astype(dtype)}, codec)["w"]
    assert got.dtype == dtype
    left = got.astype(np.float64) - held["w"] - change
    assert np.square(left).sum() < 0.25 * np.square(change).sum()


def test_an_average_of_integers_is_a_float_and_the_reply_stays_an_integer() -> None:
    """Flower's FedAvg sends counters as float64 from the second round on; clients answer int64."""
    held = {"count": np.array(3.5), "table": np.full((20, 20), 0.5)}
    trained = {"count": np.array(9), "table": np.full((20, 20), 7)}
    got = sent_and_returned(held, trained, "lowrank:bpp=0.5")
    assert (got["count"].dtype, got["count"][()]) == (np.int64, 9)
    assert got["table"].dtype == np.int64
    assert (got["table"] == 7).all()


def test_infinite_values_that_stay_are_no_fault() -> None:
    mask = np.triu(np.full((32, 32), -np.inf, np.float32), 1)
    got = sent_and_returned({"mask": mask}, {"mask": mask}, "int8")
    assert got["mask"].tobytes() == mask.tobytes()


# ---- what is coded ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_matrices_and_kernels_are_coded(dtype: str) -> None:
    found = coded(dense=np.zeros((16, 16), dtype), kernel=np.zeros((8, 4, 3, 3), dtype))
    assert found == ["dense", "kernel"]


def test_lora_factors_are_coded_however_small() -> None:
    names = [f"base_model.model.layers.0.q_proj.lora_{kind}.weight" for kind in "AB"]
    shapes = [(1, 12), (12, 1)]
    arrays = {name: np.zeros(shape) for name, shape in zip(names, shapes, strict=True)}
    spec = layout(arrays).spec
    assert spec is not None
    assert [factor.kind for factor in spec] == ["A", "B"]
    assert len(spec.pairs()) == 1


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(5000, np.float32),
        np.zeros((5000, 1, 1), np.float32),
        np.zeros((15, 17), np.float32),
        np.zeros((0, 300), np.float32),
        np.float32(1),
        np.zeros((64, 64), np.int64),
        np.zeros((64, 64), np.bool_),
        np.zeros((64, 64), np.complex64),
        np.full((64, 64), np.inf, np.float32),
        np.full((64, 64), np.nan, np.float32),
        np.full((64, 64), 1e300),
    ],
    ids=lambda array: f"{np.asarray(array).dtype}{np.shape(array)}",
)
def test_everything_else_is_exact(array: Any) -> None:
    assert coded(array=np.asarray(array)) == []


# ---- what cannot travel -------------------------------------------------------------------------


@pytest.mark.parametrize("values", [np.array(["text"]), np.array(["2026"], "datetime64[Y]")])
def test_arrays_that_are_no_numbers_are_refused(values: Any) -> None:
    with pytest.raises(AdapterError, match=r"array 'x' holds .* numbers and truth values only"):
        read_arrays(ArrayRecord({"x": Array(values)}))


def test_arrays_of_another_serialisation_are_refused() -> None:
    foreign = Array(dtype="float32", shape=(1,), stype="onnx", data=b"1234")
    with pytest.raises(AdapterError, match="serialised as 'onnx'"):
        read_arrays(ArrayRecord({"x": foreign}))


def test_arrays_in_another_byte_order_are_read_as_they_are_meant() -> None:
    (values,) = read_arrays(record_of({"x": np.arange(3, dtype=">f4")})).values()
    assert values.dtype == np.float32
    assert values.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("trained", "complaint"),
    [
        ({}, "misses array 'w'"),
        ({"w": np.zeros(2), "v": np.zeros(2)}, "has a new array 'v'"),
        ({"w": np.zeros((2, 1))}, "shape \\(2,\\) and came back with \\(2, 1\\)"),
        ({"w": np.zeros(2, complex)}, "sent as float64 and came back as complex128"),
    ],
)
def test_a_reply_has_the_arrays_that_were_sent(trained: Arrays, complaint: str) -> None:
    with pytest.raises(AdapterError, match=complaint):
        check_alike({"w": np.zeros(2)}, trained)


def test_values_that_are_not_finite_any_more_are_not_sent() -> None:
    held = {"bias": np.zeros(3, np.float32)}
    with pytest.raises(CodecError, match="'bias' holds NaN or infinity after training"):
        layout(held).exact_bytes({"bias": np.array([0, np.nan, 0], np.float32)})


# ---- checksum -----------------------------------------------------------------------------------


def test_checksums_tell_names_types_shapes_and_values_apart() -> None:
    versions: list[Arrays] = [
        {"a": np.zeros(4, np.float32)},
        {"b": np.zeros(4, np.float32)},
        {"a": np.zeros(4, np.int32)},
        {"a": np.zeros((2, 2), np.float32)},
        {"a": np.ones(4, np.float32)},
    ]
    assert len({checksum(record_of(arrays)) for arrays in versions}) == len(versions)
    two: Arrays = {"a": np.zeros(2), "b": np.ones(2)}
    assert checksum(record_of(two)) == checksum(record_of(dict(reversed(two.items()))))
