"""The facts about updates, on updates whose facts are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cgfedllm.adapter import AdapterUpdate, Factor
from cgfedllm.analysis.structure import (
    DIRECTIONS,
    excess_kurtosis,
    first_pair_share,
    measure_structure,
    rank_rows,
)

from .recordings import SPEC, noise, write_recording

KINDS = ["q_proj.A", "q_proj.B", "v_proj.A", "v_proj.B"]


def test_the_rank_axis_comes_first() -> None:
    a, b = SPEC.factors[:2]
    assert rank_rows(np.zeros(a.shape, np.float32), a).shape == (4, 40)
    assert rank_rows(np.zeros(b.shape, np.float32), b).shape == (4, 32)
    wide = Factor.parse("layers.0.q.lora_B.weight", (2, 8))  # fewer outputs than rank
    assert rank_rows(np.zeros((2, 8), np.float32), wide).shape == (8, 2)
    other = Factor.parse("layers.0.norm", (5,))
    assert rank_rows(np.zeros(5, np.float32), other).shape == (1, 5)


def test_excess_kurtosis_of_known_densities() -> None:
    rng = np.random.default_rng(0)
    assert excess_kurtosis(np.array([-1, 1, 1, -1], np.float32)) == pytest.approx(-2)
    uniform = rng.random(200_000).astype(np.float32)
    assert excess_kurtosis(uniform) == pytest.approx(-1.2, abs=0.02)
    normal = rng.standard_normal(200_000).astype(np.float32)
    assert excess_kurtosis(normal) == pytest.approx(0, abs=0.05)
    assert np.isnan(excess_kurtosis(np.ones(3, np.float32)))


def test_first_pair_share_by_hand() -> None:
    assert first_pair_share(np.diag([3.0, 1.0]).astype(np.float32)) == pytest.approx(0.9)
    assert first_pair_share(np.ones((2, 5), np.float32)) == pytest.approx(1)
    assert np.isnan(first_pair_share(np.zeros((2, 5), np.float32)))


def test_noise_has_no_structure(tmp_path: Path) -> None:
    found = measure_structure(write_recording(tmp_path / "r", rounds=8))
    assert found.updates == 24
    assert found.excess_kurtosis == pytest.approx(0, abs=0.3)
    assert found.client_cosine == pytest.approx(0, abs=0.05)
    assert found.mean_cosine == pytest.approx(0, abs=0.1)
    assert list(found.subspace) == KINDS
    for kind in KINDS:
        assert found.subspace[kind] == pytest.approx(found.subspace_by_chance[kind], abs=0.08)
    assert found.subspace_by_chance["q_proj.A"] == DIRECTIONS / 40
    assert found.subspace_by_chance["q_proj.B"] == DIRECTIONS / 32


def test_a_shared_subspace_is_found_whatever_the_clients_norms(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    bases = {f.name: np.linalg.qr(rng.standard_normal((max(f.shape), 6)))[0] for f in SPEC}

    def make(number: int, client: int) -> AdapterUpdate:
        own = np.random.default_rng([number, client])
        update = AdapterUpdate.zeros(SPEC)
        for factor in SPEC:
            inside = own.standard_normal((4, 6)) @ bases[factor.name].T
            inside /= np.linalg.norm(inside)
            outside = own.standard_normal((4, len(bases[factor.name])))
            outside -= outside @ bases[factor.name] @ bases[factor.name].T
            outside /= np.linalg.norm(outside)
            rows = (0.9**0.5 * inside + 0.1**0.5 * outside) * 10.0**client
            update.views()[factor.name][...] = rows if factor.kind == "A" else rows.T
        return update

    found = measure_structure(write_recording(tmp_path / "r", make, rounds=6))
    for kind in KINDS:  # 0.9, and a little of the rest in the two directions left
        assert 0.89 < found.subspace[kind] < 0.94


def test_cosines_between_clients_and_rounds(tmp_path: Path) -> None:
    common = noise(0, 0).vector

    def make(number: int, client: int) -> AdapterUpdate:
        return AdapterUpdate(SPEC, common + noise(number, client + 1).vector)

    found = measure_structure(write_recording(tmp_path / "r", make, rounds=5))
    assert found.client_cosine == pytest.approx(0.5, abs=0.06)
    # weights 1, 2, 3: the mean's noise has variance (1 + 4 + 9) / 36
    assert found.mean_cosine == pytest.approx(1 / (1 + 14 / 36), abs=0.06)


def test_a_short_recording_tells_what_it_can(tmp_path: Path) -> None:
    found = measure_structure(write_recording(tmp_path / "r", rounds=1, clients=1))
    assert found.subspace == {}
    assert np.isnan(found.client_cosine)
    assert np.isnan(found.mean_cosine)
    assert set(found.first_pair) == set(KINDS)
