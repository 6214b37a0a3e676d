"""Small adapters, and what two runs must have in common."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

import cgfedllm
from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import base
from cgfedllm.config import Config
from cgfedllm.federation.inprocess import InProcessGrid

from .outcome import read_outcome

LAYER = "base_model.model.model.layers.0.self_attn"


@pytest.fixture(scope="session")
def spec() -> AdapterSpec:
    """Two modules of one layer, rank 2."""
    return AdapterSpec.from_shapes(
        {
            f"{LAYER}.q_proj.lora_A.weight": (2, 7),
            f"{LAYER}.q_proj.lora_B.weight": (6, 2),
            f"{LAYER}.v_proj.lora_A.weight": (2, 5),
            f"{LAYER}.v_proj.lora_B.weight": (4, 2),
        }
    )


def beside(module: str) -> ModuleType:
    """A module beside this one that holds no tests."""
    found = importlib.util.spec_from_file_location(module, Path(__file__).with_name(f"{module}.py"))
    assert found is not None
    assert found.loader is not None
    loaded = importlib.util.module_from_spec(found)
    found.loader.exec_module(loaded)
    return loaded


@contextmanager
def registering(monkeypatch: pytest.MonkeyPatch, module: str) -> Iterator[ModuleType]:
    """Codecs of a module beside this one, registered for one test."""
    with monkeypatch.context() as patch:
        patch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
        yield beside(module)


@pytest.fixture(scope="session")
def faults() -> ModuleType:
    """The module of clients and networks that fail as planned."""
    return beside("fault_injection")


@pytest.fixture
def delta_codec(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a codec that uses the previous aggregate, registered for one test."""
    with registering(monkeypatch, "previous_codec") as module:
        yield module.NAME


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of two codecs that learn, registered for one test."""
    with registering(monkeypatch, "learned_codecs") as module:
        yield module


@pytest.fixture(scope="session")
def random_adapter(spec: AdapterSpec) -> Callable[..., AdapterUpdate]:
    """``random_adapter(seed, scale=1.0)``: normally distributed values."""

    def make(seed: int, scale: float = 1.0, on: AdapterSpec = spec) -> AdapterUpdate:
        values = np.random.default_rng(seed).standard_normal(on.size) * scale
        return AdapterUpdate(on, values.astype(np.float32))

    return make


@pytest.fixture(scope="session")
def outcome() -> Callable[[Path], dict[str, Any]]:
    """``outcome(run_dir)``: all that a run left behind and that does not depend on the clock."""

    return read_outcome


@pytest.fixture(scope="session")
def undisturbed_runs() -> dict[tuple[str, ...], dict[str, Any]]:
    return {}


@pytest.fixture
def undisturbed(
    tiny_config: Callable[..., Config],
    outcome: Callable[[Path], dict[str, Any]],
    undisturbed_runs: dict[tuple[str, ...], dict[str, Any]],
) -> Callable[..., dict[str, Any]]:
    """``undisturbed(*settings)``: outcome of a run that nobody stops, made once."""

    def make(*settings: str) -> dict[str, Any]:
        if settings not in undisturbed_runs:
            config = tiny_config(*settings, "name=undisturbed")
            undisturbed_runs[settings] = outcome(cgfedllm.run(config).run_dir)
        return undisturbed_runs[settings]

    return make


@pytest.fixture
def make_grid() -> Callable[..., InProcessGrid]:
    """``make_grid(nodes, app)``: an in-process grid with bare contexts."""

    def make(nodes: Iterable[int], app: ClientApp | None = None) -> InProcessGrid:
        contexts = {
            node: Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
            for node in nodes
        }
        return InProcessGrid(app or ClientApp(), contexts)

    return make
