"""A tiny model, adapters that answer unlike each other, and a folder of invented questions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.config import load_config
from cgfedllm.model import AdaptedModel, load_adapted_model

from .questions import write_hub


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hub(
        tmp_path_factory.mktemp("hub"),
        ceval={"computer_network": 12, "law": 7},
        mmlu={"anatomy": 15, "philosophy": 6, "virology": 9},
        gsm8k=6,
    )


@pytest.fixture(scope="session")
def model(tiny_model: Path) -> AdaptedModel:
    base = [f'model.id="{tiny_model}"', "model.device=cpu", "lora.rank=4"]
    return load_adapted_model(load_config(None, base))


@pytest.fixture(scope="session")
def adapters(model: AdaptedModel) -> dict[str, AdapterUpdate]:
    """The base model, and two adapters that answer unlike it."""
    rng = np.random.default_rng(0)
    found = {"base": AdapterUpdate.zeros(model.spec)}
    for name in ("first", "second"):
        values = rng.normal(scale=0.3, size=model.spec.size).astype(np.float32)
        found[name] = AdapterUpdate(model.spec, values)
    return found
