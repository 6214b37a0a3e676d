"""Clipping bounds what one client can do, and noise is as loud as the plan says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.privacy.ledger import Ledger
from cgfedllm.privacy.mechanism import clip_update, private_mean, protect_update, withhold
from cgfedllm.privacy.noise import KEY_BYTES, gaussians, uniforms
from cgfedllm.privacy.plan import PrivacyPlan

UpdateOf = Callable[[int, float], AdapterUpdate]
MakePlan = Callable[..., PrivacyPlan]


def norm(vector: np.ndarray) -> float:
    return float(np.linalg.norm(vector.astype(np.float64)))


class TestClip:
    def test_longer_ones_are_scaled_down_and_never_longer_after_rounding(
        self, update_of: UpdateOf
    ) -> None:
        for seed in range(20):
            update = update_of(seed, 7.0)
            clipped = clip_update(update, 0.3)
            assert 0.3 * (1 - 1e-6) < norm(clipped.vector) <= 0.3
            cosine = float(clipped.vector @ update.vector) / (norm(clipped.vector) * 7.0)
            assert cosine == pytest.approx(1, abs=1e-6)

    def test_shorter_ones_stay_as_they_are(self, update_of: UpdateOf, spec: AdapterSpec) -> None:
        update = update_of(0, 0.29)
        assert clip_update(update, 0.3) is update
        assert clip_update(AdapterUpdate.zeros(spec), 0.3).norm() == 0


class TestLocal:
    def test_the_noise_is_as_loud_as_stated(
        self, update_of: UpdateOf, plan: MakePlan, tmp_path: Path
    ) -> None:
        update = update_of(1, 2.0)
        sent = protect_update(update, plan("local"), tmp_path, client="a", round=1)
        noise = sent.vector - clip_update(update, 0.5).vector
        # any update may be replaced by any other: 2 C, times the multiplier
        assert noise.std() == pytest.approx(3.0 * 2 * 0.5, rel=0.02)
        assert abs(noise.mean()) < 0.05
        assert abs(float(noise[:-1] @ noise[1:])) / float(noise @ noise) < 0.02

    def test_the_same_release_is_repeated_to_the_bit_and_another_has_other_noise(
        self, update_of: UpdateOf, plan: MakePlan, tmp_path: Path
    ) -> None:
        def send(seed: int, number: int, client: str = "a") -> np.ndarray:
            return protect_update(
                update_of(seed, 0.4), plan("local"), tmp_path / client, client=client, round=number
            ).vector

        first = send(1, 1)
        np.testing.assert_array_equal(send(1, 1), first)
        noise = [
            first - update_of(1, 0.4).vector,
            send(2, 1) - update_of(2, 0.4).vector,
            send(1, 1, "b") - update_of(1, 0.4).vector,
        ]
        for a in range(3):
            for b in range(a):
                assert abs(float(noise[a] @ noise[b])) / (norm(noise[a]) * norm(noise[b])) < 0.03

    def test_what_noise_does_not_hide_is_not_reported(self, plan: MakePlan) -> None:
        report = {"train-loss": 1.0, "tokens": 12, "update-norm": 3.0, "num-examples": 4}
        kept = dict(report)
        withhold(kept, plan("central"))
        withhold(kept, None)
        assert kept == report
        withhold(kept, plan("local"))
        assert kept == {"update-norm": 3.0, "num-examples": 4}


class TestCentral:
    def test_clients_clip_and_add_nothing(
        self, update_of: UpdateOf, plan: MakePlan, tmp_path: Path
    ) -> None:
        update = update_of(1, 2.0)
        sent = protect_update(update, plan("central"), tmp_path, client="a", round=1)
        np.testing.assert_array_equal(sent.vector, clip_update(update, 0.5).vector)
        assert not list(tmp_path.iterdir())

    def test_one_client_moves_the_mean_by_the_clip_over_the_expected_clients_at_most(
        self, update_of: UpdateOf, spec: AdapterSpec, plan: MakePlan, tmp_path: Path
    ) -> None:
        # with next to no noise what is left is the sum itself
        quiet = plan("central", multiplier=1e-12, rounds=50, sampling=0.5)

        def mean(updates: list[AdapterUpdate], name: str) -> np.ndarray:
            ledger = quiet.ledger(tmp_path / name, "server")
            return private_mean(updates, spec, quiet, ledger, round=1)[0].vector

        members = [update_of(seed, length) for seed, length in ((1, 9.0), (2, 0.1), (3, 0.5))]
        whole = mean(members, "all")
        for index in range(3):
            without = mean(members[:index] + members[index + 1 :], f"without {index}")
            assert norm(whole - without) <= 0.5 / 2 * (1 + 1e-6)
        # and the bound is reached by whoever is clipped
        assert norm(whole - mean(members[1:], "again")) == pytest.approx(0.5 / 2, rel=1e-5)

    def test_the_noise_on_the_mean_is_as_loud_as_stated(
        self, update_of: UpdateOf, spec: AdapterSpec, plan: MakePlan, tmp_path: Path
    ) -> None:
        loud = plan("central")
        members = [update_of(seed, 2.0) for seed in (1, 2, 3)]
        mean, _ = private_mean(members, spec, loud, loud.ledger(tmp_path, "server"), round=1)
        total = sum(clip_update(update, 0.5).vector for update in members)
        noise = mean.vector - total / 4  # four were expected, three came
        assert noise.std() == pytest.approx(3.0 * 0.5 / 4, rel=0.02)

    def test_nobody_drawn_is_noise_alone(
        self, spec: AdapterSpec, plan: MakePlan, tmp_path: Path
    ) -> None:
        loud = plan("central")
        mean, _ = private_mean([], spec, loud, loud.ledger(tmp_path, "server"), round=1)
        assert mean.vector.std() == pytest.approx(3.0 * 0.5 / 4, rel=0.02)


class TestNoise:
    def test_gaussians_are_gaussian_in_body_and_tail(self) -> None:
        values = gaussians(b"k" * KEY_BYTES, 1_000_000, "test")
        assert abs(values.mean()) < 0.005
        assert values.std() == pytest.approx(1, abs=0.005)
        assert np.mean(values**4) == pytest.approx(3, abs=0.05)
        for bound, share in ((1.0, 0.158655), (3.0, 0.0013499), (4.0, 3.167e-5)):
            assert np.mean(values > bound) == pytest.approx(share, rel=0.35)
            assert np.mean(values < -bound) == pytest.approx(share, rel=0.35)

    def test_key_and_labels_decide(self) -> None:
        key = b"k" * KEY_BYTES
        first = gaussians(key, 100, "a", 1)
        np.testing.assert_array_equal(first, gaussians(key, 100, "a", 1))
        for other in (
            gaussians(b"l" * KEY_BYTES, 100, "a", 1),
            gaussians(key, 100, "a", 2),
            gaussians(key, 100, "a1"),
        ):
            assert not np.array_equal(first, other)

    def test_uniforms_fill_the_open_interval(self) -> None:
        values = uniforms(b"k" * KEY_BYTES, 100_000, "test")
        assert 0 < values.min() < 1e-3
        assert 1 - 1e-3 < values.max() < 1
        assert values.mean() == pytest.approx(0.5, abs=0.005)


def test_a_seed_repeats_the_noise_of_each_owner(update_of: UpdateOf, tmp_path: Path) -> None:
    values = update_of(1, 1.0).vector

    def noise(name: str, seed: int | None, owner: str) -> np.ndarray:
        return Ledger(tmp_path / name, 1, seed=seed, owner=owner).noise(values, 1)

    first = noise("one", 7, "a")
    np.testing.assert_array_equal(first, noise("two", 7, "a"))
    assert not np.array_equal(first, noise("three", 7, "b"))
    assert not np.array_equal(first, noise("four", 8, "a"))
    assert not np.array_equal(noise("five", None, "a"), noise("six", None, "a"))
