"""AdapterSpec and AdapterUpdate: names, order, views, arithmetic, refusals."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Factor
from cgfedllm.errors import AdapterError

Q = "base_model.model.model.layers.3.self_attn.q_proj"
SHAPES = {
    f"{Q}.lora_A.weight": (2, 5),
    f"{Q}.lora_B.weight": (4, 2),
    "base_model.model.lm_head.lora_A.weight": (2, 3),
    "scale": (3,),
}


@pytest.fixture
def spec() -> AdapterSpec:
    return AdapterSpec.from_shapes(SHAPES)


def counting(spec: AdapterSpec, start: int = 0) -> AdapterUpdate:
    return AdapterUpdate(spec, np.arange(start, start + spec.size, dtype=np.float32))


@pytest.mark.parametrize(
    ("name", "layer", "module", "kind"),
    [
        (f"{Q}.lora_A.weight", 3, "self_attn.q_proj", "A"),
        (f"{Q}.lora_B.default.weight", 3, "self_attn.q_proj", "B"),
        ("transformer.h.11.attn.c_attn.lora_A.weight", 11, "attn.c_attn", "A"),
        ("base_model.model.lm_head.lora_B.weight", None, "base_model.model.lm_head", "B"),
        ("bias", None, "bias", ""),
    ],
)
def test_names_are_read(name: str, layer: int | None, module: str, kind: str) -> None:
    factor = Factor.parse(name, (2, 3))
    assert (factor.layer, factor.module, factor.kind, factor.size) == (layer, module, kind, 6)


def test_slices_tile_the_vector_in_order(spec: AdapterSpec) -> None:
    assert len(spec) == 4
    assert spec.size == 10 + 8 + 6 + 3
    end = 0
    for factor in spec:
        where = spec.slices[factor.name]
        assert (where.start, where.stop - where.start) == (end, factor.size)
        end = where.stop
    assert end == spec.size


def test_pairs_are_the_factors_that_multiply(spec: AdapterSpec) -> None:
    assert [(a.name, b.name) for a, b in spec.pairs()] == [
        (f"{Q}.lora_A.weight", f"{Q}.lora_B.weight")
    ]


def test_json_round_trip_and_hash(spec: AdapterSpec) -> None:
    again = AdapterSpec.from_json(spec.to_json())
    assert again == spec
    assert again.hash == spec.hash
    assert len(spec.hash) == 8
    reordered = AdapterSpec.from_shapes(dict(reversed(SHAPES.items())))
    assert reordered.hash != spec.hash


def test_hash_is_what_the_wire_format_says() -> None:
    spec = AdapterSpec.from_shapes({"a": (2, 3)})
    assert spec.to_json() == '[["a",[2,3]]]'
    assert spec.hash.hex() == "9e65a904445b6935"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{}",
        "[]",
        "3",
        "null",
        '"ab"',
        "[1]",
        '[["a"]]',
        '[["a", 3]]',
        '[["a", [1.5]]]',
        '[["a", ["2"]]]',
        '[["a", [true]]]',
        '[["a", [0]]]',
        '[["a", [-2, -3]]]',
        "[[1, [2]]]",
        '[["a", [2]], ["a", [2]]]',
        "[" * 100_000,
    ],
)
def test_text_that_is_no_spec(text: str) -> None:
    with pytest.raises(AdapterError):
        AdapterSpec.from_json(text)


@given(st.recursive(st.none() | st.integers() | st.text(), lambda s: st.lists(s, max_size=3)))
def test_any_json_is_a_spec_or_an_adapter_error(value: object) -> None:
    with contextlib.suppress(AdapterError):
        AdapterSpec.from_json(json.dumps(value))


@pytest.mark.parametrize("shapes", [{}, {"a": (0, 3)}, {"a": (-1, -2)}])
def test_spec_refuses(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(AdapterError):
        AdapterSpec.from_shapes(shapes)


def test_spec_refuses_repeated_names() -> None:
    factor = Factor.parse("a", (1,))
    with pytest.raises(AdapterError, match=r"repeated: \['a'\]"):
        AdapterSpec((factor, factor))


def test_views_share_memory(spec: AdapterSpec) -> None:
    update = AdapterUpdate.zeros(spec)
    views = update.views()
    assert {name: view.shape for name, view in views.items()} == SHAPES
    views["scale"][1] = 7
    assert update.vector[spec.slices["scale"]].tolist() == [0, 7, 0]


def test_arrays_round_trip(spec: AdapterSpec) -> None:
    update = counting(spec)
    again = AdapterUpdate.from_arrays(spec, update.views())
    assert again.vector.tolist() == update.vector.tolist()


def test_arrays_that_do_not_match(spec: AdapterSpec) -> None:
    views: dict[str, np.ndarray] = dict(AdapterUpdate.zeros(spec).views())
    with pytest.raises(AdapterError, match="unknown"):
        AdapterUpdate.from_arrays(spec, {**views, "more": np.zeros(1)})
    with pytest.raises(AdapterError, match="shape"):
        AdapterUpdate.from_arrays(spec, {**views, "scale": np.zeros((3, 1))})
    del views["scale"]
    with pytest.raises(AdapterError, match="missing"):
        AdapterUpdate.from_arrays(spec, views)


@pytest.mark.parametrize(
    "vector", [np.zeros(27, np.float64), np.zeros(26, np.float32), np.zeros((27, 1), np.float32)]
)
def test_vectors_that_do_not_fit(spec: AdapterSpec, vector: np.ndarray) -> None:
    with pytest.raises(AdapterError, match="27 float32"):
        AdapterUpdate(spec, vector)


def test_arithmetic(spec: AdapterSpec) -> None:
    one, two = counting(spec), counting(spec, 5)
    assert (one + two).vector.tolist() == (one.vector + two.vector).tolist()
    assert (two - one).vector.tolist() == [5.0] * spec.size
    assert two.scaled(0.5).vector.dtype == np.float32
    assert two.scaled(0.5).vector[0] == 2.5
    assert AdapterUpdate.zeros(spec).norm() == 0
    assert one.norm() == pytest.approx(np.linalg.norm(one.vector))


def test_norm_does_not_overflow(spec: AdapterSpec) -> None:
    huge = AdapterUpdate(spec, np.full(spec.size, 1e38, np.float32))
    assert huge.norm() == pytest.approx(1e38 * np.sqrt(spec.size))


def test_equal_specs_combine_and_others_do_not(spec: AdapterSpec) -> None:
    same = AdapterSpec.from_shapes(SHAPES)
    assert (counting(spec) - counting(same)).norm() == 0
    other = AdapterSpec.from_shapes({"x": (spec.size,)})
    with pytest.raises(AdapterError, match="two different"):
        counting(spec) + counting(other)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_finite(spec: AdapterSpec, bad: float) -> None:
    update = AdapterUpdate.zeros(spec)
    assert update.is_finite()
    update.vector[3] = bad
    assert not update.is_finite()
