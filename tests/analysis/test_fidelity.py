"""SNR and cosine are what PROTOCOL says they are: sums over sums, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.analysis.fidelity import Fidelity, ModuleFidelity, snr_db

ATTENTION = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"


def vector(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_snr_and_cosine_by_hand() -> None:
    fidelity = Fidelity()
    fidelity.add(vector(3, 4), vector(3, 0))
    # ||x||^2 = 25, ||x - y||^2 = 16, <x, y> = 9, ||y||^2 = 9
    assert fidelity.snr_db == pytest.approx(10 * math.log10(25 / 16))
    assert fidelity.cosine == pytest.approx(9 / math.sqrt(25 * 9))


def test_sums_are_pooled_before_anything_is_divided() -> None:
    fidelity = Fidelity()
    fidelity.add(vector(10, 0), vector(9, 0))
    fidelity.add(vector(1, 0), vector(0, 0))
    assert fidelity.snr_db == pytest.approx(10 * math.log10(101 / 2))


def test_snr_does_not_grow_with_the_number_of_elements() -> None:
    rng = np.random.default_rng(0)
    for n in (100, 100_000):
        x = rng.standard_normal(n).astype(np.float32)
        noise = rng.standard_normal(n).astype(np.float32) * np.float32(0.1)
        fidelity = Fidelity()
        fidelity.add(x, x + noise)
        assert fidelity.snr_db == pytest.approx(20, abs=2)


def test_no_error_is_infinite_and_zero_says_nothing() -> None:
    exact, nothing = Fidelity(), Fidelity()
    exact.add(vector(1, 2), vector(1, 2))
    nothing.add(vector(1, 2), vector(0, 0))
    assert (exact.snr_db, exact.cosine) == (math.inf, pytest.approx(1.0))
    assert (nothing.snr_db, nothing.cosine) == (0.0, 0.0)


def test_without_a_signal_there_is_no_number() -> None:
    assert math.isnan(Fidelity().snr_db)
    assert math.isnan(Fidelity().cosine)
    assert math.isnan(snr_db(0.0, 1.0))


def test_large_vectors_are_summed_in_float64() -> None:
    x = np.full(4_000_000, 0.1, np.float32)
    fidelity = Fidelity()
    fidelity.add(x, np.zeros_like(x))
    assert fidelity.signal == pytest.approx(4_000_000 * float(np.float32(0.1)) ** 2, rel=1e-9)


def test_kinds_of_factors_pool_over_layers_and_sum_to_the_whole() -> None:
    spec = AdapterSpec.from_shapes(
        {
            ATTENTION.format(layer, module, factor): ((2, 3) if factor == "A" else (4, 2))
            for layer in (0, 1)
            for module in ("q_proj", "v_proj")
            for factor in "AB"
        }
    )
    rng = np.random.default_rng(0)
    x = AdapterUpdate(spec, rng.standard_normal(spec.size).astype(np.float32))
    y = AdapterUpdate(spec, x.vector.copy())
    for layer in (0, 1):
        y.views()[ATTENTION.format(layer, "q_proj", "A")][...] = 0
    modules, whole = ModuleFidelity(spec), Fidelity()
    modules.add(x, y)
    whole.add(x.vector, y.vector)
    assert list(modules.kinds) == ["q_proj.A", "q_proj.B", "v_proj.A", "v_proj.B"]
    assert modules.kinds["q_proj.A"].snr_db == 0
    assert modules.kinds["v_proj.B"].snr_db == math.inf
    assert modules.total().snr_db == pytest.approx(whole.snr_db)
    assert modules.total().cosine == pytest.approx(whole.cosine)
