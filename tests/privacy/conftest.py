"""A small adapter, updates of any norm, and plans with a given noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.privacy.plan import PrivacyPlan

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="session")
def spec() -> AdapterSpec:
    """40,000 numbers: enough for their spread to be told within a percent."""
    return AdapterSpec.from_shapes(
        {f"{LAYER}.lora_A.weight": (8, 2500), f"{LAYER}.lora_B.weight": (2500, 8)}
    )


@pytest.fixture(scope="session")
def update_of(spec: AdapterSpec) -> Callable[[int, float], AdapterUpdate]:
    """``update_of(seed, norm)``: a direction drawn from the seed."""

    def make(seed: int, norm: float) -> AdapterUpdate:
        values = np.random.default_rng(seed).standard_normal(spec.size)
        return AdapterUpdate(spec, (norm * values / np.linalg.norm(values)).astype(np.float32))

    return make


@pytest.fixture
def plan() -> Callable[..., PrivacyPlan]:
    """``plan(mechanism, ...)``: noise multiplier 3, clip 0.5, 2 rounds, 4 clients."""

    def make(mechanism: Any, **changes: Any) -> PrivacyPlan:
        return PrivacyPlan(
            **{
                "mechanism": mechanism, "clip": 0.5, "epsilon": 8.0, "delta": 1e-5,
                "multiplier": 3.0, "rounds": 2, "clients": 4, **changes,
            }
        )  # fmt: skip

    return make
