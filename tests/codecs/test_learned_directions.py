"""What `learned` knows of the long axis: from gradients, and from how the adapter has grown."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecState, make_codec
from cgfedllm.codecs.learned.directions import (
    ENERGIES,
    WEIGHTS,
    missed,
    read_directions,
    unknown,
    weighted_grams,
)
from cgfedllm.codecs.learned.fitting import learn
from cgfedllm.codecs.learned.grown import grown_directions

A, B = "m.layers.0.q_proj.lora_A.weight", "m.layers.0.q_proj.lora_B.weight"
SPEC = AdapterSpec.from_shapes({A: (4, 60), B: (40, 4)})


def orthonormal(count: int, n: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, count)))[0].T


def gradients(
    count: int, vectors: dict[str, np.ndarray], noise: float = 0.1
) -> list[AdapterUpdate]:
    """Rows along some directions, ever weaker ones, and a little of everything."""
    rng = np.random.default_rng(1)
    updates = []
    for _ in range(count):
        update = AdapterUpdate.zeros(SPEC)
        for name, view in update.views().items():
            along = rng.standard_normal((4, len(vectors[name]))) * 2.0 ** -np.arange(
                len(vectors[name])
            )
            n = vectors[name].shape[1]
            rows = along @ vectors[name] + noise / np.sqrt(n) * rng.standard_normal((4, n))
            # whatever the length of a step, it says as much
            view[...] = (rows if name == A else rows.T) * rng.uniform(0.01, 10)
        updates.append(update)
    return updates


TRUE = {A: orthonormal(3, 60), B: orthonormal(3, 40, 1)}


def test_directions_of_gradients_are_found() -> None:
    known = read_directions(SPEC, learn(SPEC, gradients(30, TRUE), 3))
    for name, vectors in TRUE.items():
        cosines = np.abs((known[name].vectors * vectors).sum(axis=1))
        assert (cosines > 0.98).all()


def test_energies_are_shares_and_fall() -> None:
    tensors = learn(SPEC, gradients(30, TRUE), 3)
    for energies in tensors[ENERGIES]:
        assert (np.diff(energies[:-1]) < 0).all()
        assert energies[:-1].sum() == pytest.approx(1, abs=0.05)
    assert missed(tensors) < 0.05 < missed(learn(SPEC, gradients(30, TRUE, noise=2.0), 3))


def test_weights_of_a_are_the_inputs_moments_and_of_b_are_equal() -> None:
    tensors = learn(SPEC, gradients(30, TRUE), 3)
    of_a, of_b = tensors[WEIGHTS]
    assert (of_b == 1).all()
    ratios = tensors[ENERGIES][0] / tensors[ENERGIES][0][0]
    np.testing.assert_allclose(of_a / of_a[0], ratios, rtol=1e-5)
    mean = (of_a[:-1].sum() + 57 * of_a[-1]) / 60
    assert mean == pytest.approx(1, rel=1e-5)


def test_more_directions_than_there_are_stay_zero() -> None:
    single = [AdapterUpdate.zeros(SPEC)]
    single[0].views()[A][0] = 1
    tensors = learn(SPEC, single, 8)
    assert not tensors[A][1:].any()
    assert not tensors[B].any()
    for name in (ENERGIES, WEIGHTS):
        assert (tensors[name] > 0).all()


def test_learning_in_parts_finds_what_all_of_it_holds() -> None:
    few, many = (learn(SPEC, gradients(count, TRUE, 0.5), 3)[A] for count in (8, 60))
    vectors = [
        own / np.linalg.norm(own.astype(float), axis=1, keepdims=True) for own in (few, many)
    ]
    for own, least in zip(vectors, (0.85, 0.97), strict=True):
        assert np.abs((own * TRUE[A]).sum(axis=1)).min() > least


# three that read one input with different errors, and one that reads another
ATTENTION = AdapterSpec.from_shapes(
    {
        f"m.layers.{layer}.self_attn.{module}.lora_{factor}.weight": (4, 60)
        if factor == "A"
        else (60, 4)
        for layer in range(2)
        for module in ("q_proj", "k_proj", "v_proj", "o_proj")
        for factor in "AB"
    }
)


def of_attention(count: int) -> list[AdapterUpdate]:
    rng = np.random.default_rng(2)
    inputs = {
        (layer, own): orthonormal(6, 60, 10 * layer + own) for layer in range(2) for own in range(2)
    }
    updates = []
    for _ in range(count):
        update = AdapterUpdate.zeros(ATTENTION)
        for factor in ATTENTION:
            vectors = inputs[factor.layer, int("o_proj" in factor.name)]
            # each module's errors pick others of the input's directions
            strengths = 1 + rng.permutation(6) if factor.kind == "A" else np.ones(6)
            rows = rng.standard_normal((4, 6)) * strengths @ vectors
            rows += 0.1 * rng.standard_normal((4, 60))
            update.views()[factor.name][...] = rows if factor.kind == "A" else rows.T
        updates.append(update)
    return updates


def test_factors_that_read_one_input_share_its_directions() -> None:
    tensors = learn(ATTENTION, of_attention(20), 6)
    names = {
        (factor.layer, factor.module.rpartition(".")[2], factor.kind): factor.name
        for factor in ATTENTION
    }
    for layer in range(2):
        query, key, value, out = (tensors[names[layer, f"{m}_proj", "A"]] for m in "qkvo")
        assert (query == key).all()
        assert (query == value).all()
        assert not (query == out).all()
        # errors are a module's own, even where they happen to be alike
        assert not (
            tensors[names[layer, "q_proj", "B"]] == tensors[names[layer, "k_proj", "B"]]
        ).all()
    assert not (tensors[names[0, "q_proj", "A"]] == tensors[names[1, "q_proj", "A"]]).all()


def test_what_is_shared_is_sent_once() -> None:
    codec, shared = make_codec("learned", {"directions": 6}), learn(ATTENTION, of_attention(20), 6)
    apart, rng = dict(shared), np.random.default_rng(3)
    for name, own in shared.items():
        if ".k_proj.lora_A" in name or ".v_proj.lora_A" in name:
            apart[name] = rng.permuted(own, axis=1)
    sizes = [len(codec.pack_state(CodecState.of(tensors))) for tensors in (shared, apart)]
    # 4 of 16 factors' directions
    assert sizes[0] < 0.85 * sizes[1]


def test_energies_are_each_factors_own() -> None:
    tensors = learn(ATTENTION, of_attention(20), 6)
    of_query, of_key = (
        tensors[ENERGIES][k]
        for k, factor in enumerate(ATTENTION)
        if factor.layer == 0 and factor.kind == "A" and factor.module[-6:] in ("q_proj", "k_proj")
    )
    assert not (of_query == of_key).all()
    np.testing.assert_allclose([of_query[:-1].sum(), of_key[:-1].sum()], 1, atol=0.05)


def test_vectors_are_units_and_products_exact() -> None:
    known = read_directions(SPEC, learn(SPEC, gradients(30, TRUE), 3))[A]
    np.testing.assert_allclose(np.linalg.norm(known.vectors, axis=1), 1, rtol=1e-6)
    rows = np.random.default_rng(3).standard_normal((4, 60)).astype(np.float32)
    np.testing.assert_allclose(known.along(rows), rows @ known.vectors.T, atol=3e-3)
    order = np.random.default_rng(4).permutation(60)
    shuffled = type(known)(known.whole[:, order], known.energies, known.weights)
    assert (known.along(rows) == shuffled.along(rows[:, order])).all()


def test_a_gram_in_the_inputs_moments_weighs_directions() -> None:
    known = read_directions(SPEC, learn(SPEC, gradients(30, TRUE), 3))[A]
    rows = np.random.default_rng(3).standard_normal((4, 60)).astype(np.float32)
    moments = known.weights[-1] * np.eye(60)
    for vector, weight in zip(known.vectors.astype(float), known.weights[:-1], strict=True):
        moments += (weight - known.weights[-1]) * np.outer(vector, vector)
    found = weighted_grams([rows], [known])[0]
    np.testing.assert_allclose(found, rows @ moments @ rows.T, rtol=2e-3, atol=2e-2)


def test_a_state_that_knows_nothing() -> None:
    tensors = unknown(SPEC, 5)
    assert {name: array.shape for name, array in tensors.items()} == {
        A: (5, 60),
        B: (5, 40),
        ENERGIES: (2, 6),
        WEIGHTS: (2, 6),
    }
    assert not read_directions(SPEC, tensors)[A].vectors.any()


# ---- where the adapter has grown ----------------------------------------------------------------


@given(st.integers(0, 100))
def test_growth_lies_along_its_directions(seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((3, 4, 30))
    vectors, shares = grown_directions(rows, np.zeros((len(rows), 4, 0)))
    for own, growth, share in zip(vectors.astype(float), rows, shares, strict=True):
        np.testing.assert_allclose(own @ own.T, np.eye(4), atol=1e-3)
        np.testing.assert_allclose(growth @ own.T @ own, growth, atol=1e-2)
        energies = np.square(growth @ own.T).sum(axis=0)
        np.testing.assert_allclose(share, energies / energies.sum(), atol=1e-3)
        assert (np.diff(share) <= 0).all()


def test_growth_of_low_rank_has_fewer_directions() -> None:
    rows = np.zeros((2, 4, 30))
    rows[0] = np.outer([1.0, 2.0, -1.0, 0.5], orthonormal(1, 30)[0])
    vectors, shares = grown_directions(rows, np.zeros((len(rows), 4, 0)))
    assert np.abs(vectors[0, 0] @ orthonormal(1, 30)[0]) == pytest.approx(1, abs=1e-3)
    assert not vectors[0, 1:].any()
    np.testing.assert_array_equal(shares[0], [1, 0, 0, 0])
    assert not vectors[1].any()
    assert not shares[1].any()


def test_what_has_grown_along_known_directions_needs_no_others() -> None:
    rows = 1e-3 * np.random.default_rng(0).standard_normal((2, 4, 30))
    vectors, shares = grown_directions(rows, np.ones((2, 4, 3)))
    assert not vectors.any()
    assert not shares.any()
