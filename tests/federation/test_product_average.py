"""Averaging products B A exactly, and the gap that averaging the factors apart leaves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.federation.product import ProductGap, average_products

pytestmark = pytest.mark.filterwarnings("error")
RandomAdapter = Callable[..., AdapterUpdate]


def products(adapter: AdapterUpdate) -> list[np.ndarray]:
    views = adapter.views()
    return [
        views[b.name].astype(np.float64) @ views[a.name].astype(np.float64)
        for a, b in adapter.spec.pairs()
    ]


def mean_products(adapters: list[AdapterUpdate], weights: np.ndarray) -> list[np.ndarray]:
    columns = zip(*(products(adapter) for adapter in adapters), strict=True)
    return [sum(w * p for w, p in zip(weights, column, strict=True)) for column in columns]


def best_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def uniform(count: int) -> np.ndarray:
    return np.full(count, 1 / count)


def exact_gap(adapters: list[AdapterUpdate], weights: np.ndarray, mean: AdapterUpdate) -> float:
    wanted, apart = mean_products(adapters, weights), products(mean)
    difference = sum(np.square(w - a).sum() for w, a in zip(wanted, apart, strict=True))
    return float(np.sqrt(difference / sum(np.square(w).sum() for w in wanted)))


def mean_of_factors(adapters: list[AdapterUpdate], weights: np.ndarray) -> AdapterUpdate:
    total = sum(w * a.vector.astype(np.float64) for w, a in zip(weights, adapters, strict=True))
    return AdapterUpdate(adapters[0].spec, np.asarray(total, np.float32))


@pytest.fixture(scope="module")
def wide() -> AdapterSpec:
    return AdapterSpec.from_shapes(
        {
            f"m.layers.{layer}.{module}.lora_{kind}.weight": shape
            for layer in range(4)
            for module in ("q_proj", "v_proj")
            for kind, shape in (("A", (4, 48)), ("B", (40, 4)))
        }
    )


# ---- the average --------------------------------------------------------------------------------


def test_mean_of_rank_r_is_met_exactly(spec: AdapterSpec, random_adapter: RandomAdapter) -> None:
    """Clients that share A (or B) have a mean product of rank r."""
    shared = random_adapter(0)
    adapters = []
    for seed in (1, 2, 3):
        adapter = random_adapter(seed)
        for a, _ in spec.pairs():
            adapter.views()[a.name][...] = shared.views()[a.name]
        adapters.append(adapter)
    weights = np.array([0.5, 0.2, 0.3])
    averaged = average_products(adapters, weights)
    for got, wanted in zip(products(averaged), mean_products(adapters, weights), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@settings(max_examples=25)
@given(clients=st.integers(2, 6), seed=st.integers(0, 1000))
def test_mean_of_higher_rank_gets_its_best_approximation(clients: int, seed: int) -> None:
    spec = AdapterSpec.from_shapes({"l.lora_A.weight": (2, 9), "l.lora_B.weight": (8, 2)})
    rng = np.random.default_rng(seed)
    adapters = [
        AdapterUpdate(spec, rng.standard_normal(spec.size).astype(np.float32))
        for _ in range(clients)
    ]
    weights = rng.dirichlet(np.ones(clients))
    (got,) = products(average_products(adapters, weights))
    (wanted,) = mean_products(adapters, weights)
    best = np.linalg.norm(wanted - best_rank(wanted, 2))
    assert np.linalg.norm(wanted - got) <= best * (1 + 1e-4) + 1e-6


def test_it_is_closer_to_the_mean_product_than_averaging_the_factors(
    spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    adapters = [random_adapter(seed) for seed in range(3)]
    weights = uniform(3)
    ours = exact_gap(adapters, weights, average_products(adapters, weights))
    apart = exact_gap(adapters, weights, mean_of_factors(adapters, weights))
    assert ours < 0.8 * apart


def test_one_client_comes_back_with_its_product_unchanged(
    spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    adapter = random_adapter(4)
    averaged = average_products([adapter], np.ones(1))
    for got, wanted in zip(products(averaged), products(adapter), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    np.testing.assert_allclose(averaged.vector, adapter.vector, atol=1e-4)


def test_a_stays_near_the_averaged_a(spec: AdapterSpec, random_adapter: RandomAdapter) -> None:
    """Clients that moved a little from a common start, as after one round."""
    start = random_adapter(0)
    adapters = [start + random_adapter(seed, scale=0.02) for seed in (1, 2, 3)]
    mean = mean_of_factors(adapters, uniform(3))
    averaged = average_products(adapters, uniform(3))
    for a, b in spec.pairs():
        for name in (a.name, b.name):
            wanted = mean.views()[name]
            distance = np.linalg.norm(averaged.views()[name] - wanted)
            assert distance < 0.05 * np.linalg.norm(wanted)


def test_arrays_that_are_no_pair_are_averaged_plainly(random_adapter: RandomAdapter) -> None:
    spec = AdapterSpec.from_shapes({"m.lora_B.weight": (3, 2), "bias": (4,)})
    adapters = [random_adapter(seed, on=spec) for seed in range(3)]
    weights = np.array([0.1, 0.2, 0.7])
    averaged = average_products(adapters, weights)
    expected = mean_of_factors(adapters, weights)
    np.testing.assert_array_equal(averaged.vector, expected.vector)


# ---- hard cases ---------------------------------------------------------------------------------


def ill_conditioned(case: str, adapter: AdapterUpdate) -> AdapterUpdate:
    for a, b in adapter.spec.pairs():
        view_a, view_b = adapter.views()[a.name], adapter.views()[b.name]
        match case:
            case "B zero":  # every adapter starts so
                view_b[...] = 0
            case "A zero":
                view_a[...] = 0
            case "all zero":
                view_a[...] = view_b[...] = 0
            case "parallel rows":
                view_a[...] = view_a[:1]
            case "rank one":
                view_b[:, 1:] = 0
            case "tiny":
                view_b[...] *= np.float32(1e-30)
            case "huge":
                view_b[...] *= np.float32(1e15)
    return adapter


@pytest.mark.parametrize(
    "case", ["B zero", "A zero", "all zero", "parallel rows", "rank one", "tiny", "huge"]
)
def test_degenerate_adapters_give_finite_factors_with_the_right_product(
    case: str, spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    adapters = [ill_conditioned(case, random_adapter(seed)) for seed in range(3)]
    averaged = average_products(adapters, uniform(3))
    assert averaged.is_finite()
    for (a, _), got, wanted in zip(
        spec.pairs(), products(averaged), mean_products(adapters, uniform(3)), strict=True
    ):
        best = best_rank(wanted, a.shape[0])
        assert np.linalg.norm(got - best) <= 1e-4 * np.linalg.norm(wanted) + 1e-35


@pytest.mark.parametrize("case", ["B zero", "parallel rows", "rank one"])
def test_no_direction_is_left_with_both_factors_zero(
    case: str, spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    """No gradient would ever lead away from there."""
    adapters = [ill_conditioned(case, random_adapter(seed)) for seed in range(3)]
    views = average_products(adapters, uniform(3)).views()
    for a, b in spec.pairs():
        rows = np.linalg.norm(views[a.name], axis=1) + np.linalg.norm(views[b.name], axis=0)
        assert rows.min() > 0.1


def test_rank_above_the_matrix_size_works(random_adapter: RandomAdapter) -> None:
    spec = AdapterSpec.from_shapes({"l.lora_A.weight": (8, 3), "l.lora_B.weight": (5, 8)})
    adapters = [random_adapter(seed, on=spec) for seed in range(2)]
    (got,) = products(average_products(adapters, uniform(2)))
    (wanted,) = mean_products(adapters, uniform(2))
    np.testing.assert_allclose(got, wanted, atol=1e-4)


# ---- the gap ------------------------------------------------------------------------------------


def test_identical_clients_have_no_gap(spec: AdapterSpec, random_adapter: RandomAdapter) -> None:
    gap, adapter = ProductGap(spec), random_adapter(1)
    for weight in (1.0, 5.0):
        gap.add(adapter, weight)
    assert gap.value(adapter) == pytest.approx(0, abs=1e-6)


def test_the_estimate_is_close_to_the_exact_gap(
    wide: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    adapters = [random_adapter(seed, on=wide) for seed in range(4)]
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    gap = ProductGap(wide)
    for adapter, weight in zip(adapters, weights, strict=True):
        gap.add(adapter, weight)
    mean = mean_of_factors(adapters, weights / 10)
    assert gap.value(mean) == pytest.approx(exact_gap(adapters, weights / 10, mean), rel=0.1)


def test_there_is_no_gap_without_products_or_clients(
    spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    only_b = AdapterSpec.from_shapes({"m.lora_B.weight": (3, 2)})
    gap = ProductGap(only_b)
    gap.add(random_adapter(0, on=only_b), 1.0)
    assert gap.value(AdapterUpdate.zeros(only_b)) is None
    assert ProductGap(spec).value(random_adapter(0)) is None
    zero = ProductGap(spec)
    zero.add(AdapterUpdate.zeros(spec), 1.0)
    assert zero.value(AdapterUpdate.zeros(spec)) is None
