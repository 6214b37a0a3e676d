"""Where the adapter stood before a round follows from what every round added."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cgfedllm.config import Config, load_config
from cgfedllm.lora import initial_adapter
from cgfedllm.tgap.recording import Recording, RecordingWriter
from cgfedllm.tgap.starts import adapter_states, why_no_states

from ..analysis.recordings import SPEC, noise, write_recording


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
