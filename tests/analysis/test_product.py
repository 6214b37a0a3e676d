"""The effective change, without ever forming it, is the effective change."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.analysis.product import ProductFidelity
from cgfedllm.lora import initial_adapter

from .recordings import SPEC, noise


def change(start: AdapterUpdate, update: AdapterUpdate, module: str) -> np.ndarray:
    """All changes of B A of one kind of module, end to end, by the definition."""
    before, after = start.views(), (start + update).views()
    return np.concatenate(
        [
            (
                after[b.name].astype(np.float64) @ after[a.name].astype(np.float64)
                - before[b.name].astype(np.float64) @ before[a.name].astype(np.float64)
            ).reshape(-1)
            for a, b in SPEC.pairs()
            if a.module.endswith(module)
        ]
    )


def test_against_the_definition() -> None:
    start, true, decoded = noise(0, 0), noise(1, 0).scaled(0.1), noise(2, 0).scaled(0.1)
    decoded = true + decoded.scaled(0.5)
    fidelity = ProductFidelity(SPEC)
    fidelity.add(start, true, decoded)
    assert list(fidelity.kinds) == ["q_proj", "v_proj"]
    for module, found in fidelity.kinds.items():
        x, y = change(start, true, module), change(start, decoded, module)
        assert found.signal == pytest.approx(float(x @ x), rel=1e-4)
        assert found.snr_db == pytest.approx(
            10 * math.log10(float(x @ x) / float((x - y) @ (x - y))), rel=1e-4
        )
        assert found.cosine == pytest.approx(
            float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)), rel=1e-5
        )


def test_nothing_lost_is_exact() -> None:
    fidelity = ProductFidelity(SPEC)
    fidelity.add(noise(0, 0), noise(1, 0), noise(1, 0))
    assert fidelity.total().snr_db == math.inf
    assert fidelity.total().cosine == pytest.approx(1)


def test_errors_of_b_count_for_as_much_as_the_a_they_meet() -> None:
    # at the start B is zero: an error of A alone does not reach the product, one of B does
    start, true = initial_adapter(SPEC, 0), noise(1, 0).scaled(1e-3)
    for kind, lost in (("A", False), ("B", True)):
        decoded = AdapterUpdate(SPEC, true.vector.copy())
        for factor in SPEC:
            if factor.kind == kind:
                decoded.views()[factor.name][...] = 0
        fidelity = ProductFidelity(SPEC)
        fidelity.add(start, true, decoded)
        assert (fidelity.total().snr_db < 1) == lost
