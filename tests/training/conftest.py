"""Rows of random tokens and the tiny model with an adapter on it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.config import load_config
from cgfedllm.data.batching import IGNORE
from cgfedllm.data.encoding import Example
from cgfedllm.model import AdaptedModel, load_adapted_model

VOCABULARY = 200


def _row(rng: np.random.Generator, length: int, prompt: int) -> Example:
    ids = rng.integers(4, VOCABULARY, length).astype(np.int32)
    labels = ids.copy()
    labels[:prompt] = IGNORE
    return Example(ids, labels)


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., list[Example]]:
    """Random rows of given lengths; loss falls on what follows the prompt, a third of each."""

    def make(*lengths: int, seed: int = 0) -> list[Example]:
        rng = np.random.default_rng(seed)
        return [_row(rng, length, max(1, length // 3)) for length in lengths]

    return make


@pytest.fixture(scope="session")
def load(tiny_model: Path) -> Callable[..., AdaptedModel]:
    """The tiny model with an adapter of rank 4; loaded once for each set of overrides."""

    @cache
    def loaded(*overrides: str) -> AdaptedModel:
        base = [f'model.id="{tiny_model}"', "model.device=cpu", "lora.rank=4"]
        return load_adapted_model(load_config(None, [*base, *overrides]))

    return loaded


@pytest.fixture
def model(load: Callable[..., AdaptedModel]) -> AdaptedModel:
    return load()


@pytest.fixture(scope="session")
def random_adapter() -> Callable[..., AdapterUpdate]:
    """Values with A and B both away from zero, so that every factor has a gradient."""

    def make(model: AdaptedModel, seed: int = 0, scale: float = 0.1) -> AdapterUpdate:
        rng = np.random.default_rng(seed)
        values = rng.normal(scale=scale, size=model.spec.size).astype(np.float32)
        return AdapterUpdate(model.spec, values)

    return make
