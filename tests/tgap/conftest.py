"""A small recording, made without any training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import base
from cgfedllm.config import Config
from cgfedllm.tgap.index import RecordingKind
from cgfedllm.tgap.recording import Recording, RecordingWriter

from .pca_codec import NAME, PcaCodec

LAYER = "base_model.model.model.layers.0.self_attn"
CLIENTS = ("north", "south", "west")
ROUNDS = 4


@pytest.fixture(scope="session")
def spec() -> AdapterSpec:
    """One module of one layer, rank 2."""
    return AdapterSpec.from_shapes(
        {f"{LAYER}.q_proj.lora_A.weight": (2, 7), f"{LAYER}.q_proj.lora_B.weight": (6, 2)}
    )


@pytest.fixture(scope="session")
def values(spec: AdapterSpec) -> Callable[[int, str], AdapterUpdate]:
    """``values(round, client)``: what that client sent in that round."""

    def make(round: int, client: str) -> AdapterUpdate:
        drawn = np.random.default_rng([round, *client.encode()]).standard_normal(spec.size)
        return AdapterUpdate(spec, drawn.astype(np.float32))

    return make


@pytest.fixture
def pca(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a codec that learns, registered for one test."""
    with monkeypatch.context() as patch:
        patch.setattr(base, "_REGISTRY", {**base._REGISTRY, NAME: PcaCodec})
        yield NAME


@pytest.fixture(scope="session")
def learnable(
    spec: AdapterSpec, values: Callable[[int, str], AdapterUpdate]
) -> Callable[[int, str], AdapterUpdate]:
    """As `values`, with most of the energy in two directions common to all."""
    directions = np.random.default_rng(7).standard_normal((2, spec.size))

    def make(round: int, client: str) -> AdapterUpdate:
        noise = values(round, client).vector
        return AdapterUpdate(spec, (3 * noise[:2] @ directions + 0.3 * noise).astype(np.float32))

    return make


@pytest.fixture
def write(
    spec: AdapterSpec, values: Callable[[int, str], AdapterUpdate], tmp_path: Path
) -> Callable[..., Path]:
    """``write(name, rounds, clients, kind, make)``: folder of a recording."""

    def make(
        name: str = "recording",
        rounds: int = ROUNDS,
        clients: tuple[str, ...] = CLIENTS,
        kind: RecordingKind = "federated",
        make: Callable[[int, str], AdapterUpdate] = values,
        config: Config | None = None,
    ) -> Path:
        with RecordingWriter(
            tmp_path / name, spec, config or Config(), kind=kind, environment={}
        ) as writer:
            for round_ in range(1, rounds + 1):
                for number, client in enumerate(clients, start=1):
                    writer.add(
                        make(round_, client),
                        round=round_,
                        client=client,
                        steps=4,
                        examples=10 * number,
                        tokens=100,
                        loss=2.5,
                    )
                writer.finish_round()
        return tmp_path / name

    return make


@pytest.fixture
def recording(write: Callable[..., Path]) -> Recording:
    """4 rounds of 3 clients."""
    return Recording.open(write())
