"""Releases are counted before they are made, across restarts, and the budget ends."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest

from cgfedllm.errors import PrivacyError
from cgfedllm.privacy.ledger import Ledger


def values(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(50).astype(np.float32)


def test_the_budget_ends_and_repeating_is_free(tmp_path: Path) -> None:
    path = tmp_path / "privacy.json"
    first = Ledger(path, 2).noise(values(1), 1)
    # another process, after a crash, in the same round
    again = Ledger(path, 2)
    np.testing.assert_array_equal(again.noise(values(1), 1), first)
    assert again.releases == 1
    again.noise(values(2), 1)  # other values: another release
    with pytest.raises(PrivacyError, match="budget is spent: 2 releases"):
        Ledger(path, 2).noise(values(1), 2)
    np.testing.assert_array_equal(Ledger(path, 2).noise(values(1), 1), first)


def test_equal_values_of_two_rounds_have_noise_of_their_own(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "privacy.json", 2)
    assert not np.array_equal(ledger.noise(values(1), 1), ledger.noise(values(1), 2))


def test_the_file_is_for_its_owner_alone_and_tells_no_values(tmp_path: Path) -> None:
    path = tmp_path / "privacy.json"
    Ledger(path, 1).noise(values(1), 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (release,) = json.loads(path.read_text())["releases"]
    assert release[0] == 1
    assert len(release[1]) == 32


def test_a_draw_is_the_same_when_its_round_is_repeated(tmp_path: Path) -> None:
    path = tmp_path / "privacy.json"
    first = Ledger(path, 1).uniforms(9, 3)
    np.testing.assert_array_equal(Ledger(path, 1).uniforms(9, 3), first)
    assert not np.array_equal(Ledger(path, 1).uniforms(9, 4), first)


@pytest.mark.parametrize("damage", ["", "{}", '{"format": "cgfedllm-privacy-ledger"}', "[1]"])
def test_a_damaged_ledger_stops_everything(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "privacy.json"
    path.write_text(damage)
    with pytest.raises(PrivacyError, match="unknown"):
        Ledger(path, 2)
