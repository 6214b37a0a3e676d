"""The tiny model, its data, and small experiments on them."""

from __future__ import annotations

import os

# before torch: two tests' worth of threads on two cores only get in each other's way
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from transformers import PreTrainedTokenizerFast

from cgfedllm.config import Config, load_config

from .tiny import build_tokenizer, settings, write_model, write_rows

# the same examples everywhere, and no test that fails because a machine was busy
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer


@pytest.fixture(scope="session")
def tiny_model(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """Folder of a random two-layer Llama, 64 wide, grouped-query attention, seeded."""
    return write_model(tmp_path_factory.mktemp("tiny-model"), tokenizer)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL file of 3 clients ("north", "south", "west") with 40 question/answer rows each."""
    return write_rows(tmp_path_factory.mktemp("tiny-data") / "rows.jsonl")


@pytest.fixture
def tiny_config(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes a small, fast experiment; arguments are overrides such as ``"lora.rank=2"``."""

    def make(*overrides: str, **changes: Any) -> Config:
        base = settings(tiny_model, tiny_data, tmp_path / "runs")
        config = load_config(None, [*base, *overrides])
        return config.with_overrides(changes) if changes else config

    return make
