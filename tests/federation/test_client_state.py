"""A client's memory: by round and version, so that a round can be repeated to the same result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.errors import CheckpointError
from cgfedllm.federation.client_state import ClientState

RandomAdapter = Callable[..., AdapterUpdate]
OTHER = AdapterSpec.from_shapes({"another.lora_A.weight": (2, 3)})


@pytest.fixture
def state(tmp_path: Path, spec: AdapterSpec) -> ClientState:
    return ClientState(tmp_path / "north", spec)


def moments(seed: int, size: int = 4) -> dict[str, np.ndarray]:
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    return {"exp_avg": values, "step": np.array([seed], np.float32)}


def test_a_new_client_remembers_nothing(state: ClientState) -> None:
    assert state.reference(0) is None
    assert state.residual(before_round=1) is None
    assert state.optimizer(before_round=1) is None


def test_references_are_kept_by_version(state: ClientState, random_adapter: RandomAdapter) -> None:
    for version in range(5):
        state.save_reference(version, random_adapter(version))
    assert [version for version in range(5) if state.reference(version) is not None] == [2, 3, 4]
    assert np.array_equal(state.reference(3).vector, random_adapter(3).vector)


def test_memory_is_read_as_it_was_before_a_round(
    state: ClientState, random_adapter: RandomAdapter
) -> None:
    for round_ in (2, 5, 6):  # the client was not sampled in the others
        state.save_memory(round_, residual=random_adapter(round_), optimizer=moments(round_))
    for before, expected in [(2, None), (3, 2), (5, 2), (6, 5), (7, 6), (100, 6)]:
        residual, optimizer = state.residual(before), state.optimizer(before)
        if expected is None:
            assert residual is None
            assert optimizer is None
        else:
            assert np.array_equal(residual.vector, random_adapter(expected).vector)
            assert optimizer.keys() == moments(expected).keys()
            assert np.array_equal(optimizer["exp_avg"], moments(expected)["exp_avg"])


def test_three_rounds_of_memory_are_kept(
    state: ClientState, tmp_path: Path, random_adapter: RandomAdapter
) -> None:
    for round_ in range(1, 8):
        state.save_memory(round_, residual=random_adapter(round_), optimizer=None)
    names = sorted(path.name for path in (tmp_path / "north").iterdir())
    assert names == [f"memory-{round_:06d}.safetensors" for round_ in (5, 6, 7)]


def test_a_repeated_round_replaces_what_came_after_it(
    state: ClientState, random_adapter: RandomAdapter
) -> None:
    """The run went back: what its first try at the later rounds left must not come up again."""
    for round_ in (1, 2, 3):
        state.save_memory(round_, residual=random_adapter(round_), optimizer=None)
        state.save_reference(round_, random_adapter(round_))
    state.save_memory(2, residual=random_adapter(20), optimizer=None)
    state.save_reference(2, random_adapter(20))
    assert np.array_equal(state.residual(before_round=4).vector, random_adapter(20).vector)
    assert np.array_equal(state.residual(before_round=2).vector, random_adapter(1).vector)
    assert state.reference(3) is None
    assert np.array_equal(state.reference(2).vector, random_adapter(20).vector)


def test_residual_and_moments_may_each_be_absent(
    state: ClientState, random_adapter: RandomAdapter
) -> None:
    state.save_memory(1, residual=random_adapter(1), optimizer=None)
    assert state.optimizer(before_round=2) is None
    state.save_memory(2, residual=None, optimizer=moments(2))
    assert state.residual(before_round=3) is None
    assert state.optimizer(before_round=3) is not None


def test_nothing_to_keep_writes_nothing(state: ClientState, tmp_path: Path) -> None:
    state.save_memory(1, residual=None, optimizer=None)
    state.save_memory(1, residual=None, optimizer={})
    assert not (tmp_path / "north").exists()


def test_a_zero_residual_is_something_to_keep(state: ClientState, spec: AdapterSpec) -> None:
    state.save_memory(1, residual=AdapterUpdate.zeros(spec), optimizer=None)
    assert state.residual(before_round=2).norm() == 0


def test_memory_of_another_adapter_is_refused(
    state: ClientState, tmp_path: Path, random_adapter: RandomAdapter
) -> None:
    state.save_memory(1, residual=random_adapter(1), optimizer=moments(1))
    state.save_reference(1, random_adapter(1))
    other = ClientState(tmp_path / "north", OTHER)
    for read in (other.residual, other.optimizer):
        with pytest.raises(CheckpointError, match=r"another adapter.*another name or state folder"):
            read(2)
    with pytest.raises(CheckpointError, match="another adapter"):
        other.reference(1)


def test_damaged_memory_is_named_and_so_is_the_remedy(
    state: ClientState, tmp_path: Path, random_adapter: RandomAdapter
) -> None:
    state.save_memory(1, residual=random_adapter(1), optimizer=moments(1))
    path = tmp_path / "north" / "memory-000001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for read in (state.residual, state.optimizer):
        with pytest.raises(CheckpointError, match=r"memory-000001.* remove it"):
            read(2)


@pytest.mark.parametrize("keep", [0, 10, -1])
def test_a_damaged_reference_counts_as_missing(
    state: ClientState, tmp_path: Path, random_adapter: RandomAdapter, keep: int
) -> None:
    """The server then sends it again; nothing is lost but bytes."""
    state.save_reference(1, random_adapter(1))
    path = tmp_path / "north" / "reference-000001.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert state.reference(1) is None
