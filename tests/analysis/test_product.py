"""The effective change, without ever forming it, is the effective change."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.analysis.product import ProductFidelity, adapter_states, why_no_states
from cgfedllm.config import Config, load_config
from cgfedllm.lora import initial_adapter
from cgfedllm.tgap.recording import Recording, RecordingWriter

from .recordings import SPEC, noise, write_recording


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


class TestStates:
    def test_the_start_and_what_every_round_added(self, tmp_path: Path) -> None:
        recording = write_recording(tmp_path / "r", lambda r, c: noise(r, c).scaled(1e-2))
        states = adapter_states(recording, [1, 4])
        assert sorted(states) == [1, 4]
        start = initial_adapter(SPEC, recording.config.seed)
        np.testing.assert_array_equal(states[1].vector, start.vector)
        total = start.vector.astype(np.float64)
        for number in (1, 2, 3):
            total += sum((1 + c) * 1e-2 * noise(number, c).vector.astype(np.float64) for c in range(3)) / 6  # fmt: skip  # noqa: E501
        np.testing.assert_allclose(states[4].vector, total, atol=1e-6)

    def test_the_server_rate_counts(self, tmp_path: Path) -> None:
        config = load_config(None, ["federation.server_lr=0.5"])
        states = adapter_states(self._written(tmp_path / "r", config, range(1, 3)), [2])
        expected = initial_adapter(SPEC, 0) + noise(1, 0).scaled(0.5)
        np.testing.assert_allclose(states[2].vector, expected.vector, rtol=1e-6)

    def test_where_they_do_not_follow(self, tmp_path: Path) -> None:
        momentum = load_config(None, ["federation.strategy.name=fedavgm"])
        for name, config, rounds, why in (
            ("momentum", momentum, range(1, 3), "fedavgm"),
            ("gap", Config(), (1, 3), "every round"),
            ("late", Config(), (2, 3), "every round"),
        ):
            recording = self._written(tmp_path / name, config, rounds)
            assert why in (why_no_states(recording) or "")
        assert why_no_states(self._written(tmp_path / "good", Config(), range(1, 3))) is None

    def _written(self, folder: Path, config: Config, rounds: object) -> Recording:
        with RecordingWriter(folder, SPEC, config, environment={}) as writer:
            for number in rounds:  # type: ignore[attr-defined]
                writer.add(noise(number, 0), round=number, client="a", steps=1, weight=1.0)
                writer.finish_round()
        return Recording.open(folder)
