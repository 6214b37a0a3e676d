"""A run killed at any moment and resumed ends as an unbroken one, bit for bit."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cgfedllm.config import load_config
from cgfedllm.runs import RunFolder
from cgfedllm.tgap.codec_file import load_codec_file

from ..tiny import settings as tiny_settings

SCRIPT = Path(__file__).with_name("kill_and_resume.py")


def script() -> ModuleType:
    found = importlib.util.spec_from_file_location("kill_and_resume", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


KILL = script()


@pytest.fixture(scope="module")
def run_scenarios(
    tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """``run_scenarios(names, *settings)``: one process that forks runs them all."""

    def make(names: list[str], *settings: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("killed")
        tiny = tiny_settings(tiny_model, tiny_data, folder / "runs")
        file = folder / "config.toml"
        file.write_text(load_config(None, [*tiny, *KILL.SETTINGS, *settings]).to_toml())
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(file), "unbroken", *names],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return make


def assert_same(runs: dict[str, Any], name: str, outcome: Callable[..., Any]) -> None:
    broken, unbroken = (outcome(Path(runs[each]["run_dir"])) for each in (name, "unbroken"))
    assert broken["rounds"] == unbroken["rounds"]
    assert broken["adapter"] == unbroken["adapter"]
    assert set(unbroken["adapter"]) == {"adapter_config.json", "adapter_model.safetensors"}


def assert_no_temp_files(runs: dict[str, Any]) -> None:
    left = [path for run in runs.values() for path in Path(run["run_dir"]).rglob(".*.tmp")]
    assert left == []


def test_a_run_killed_anywhere_ends_as_the_unbroken_one(
    run_scenarios: Callable[..., dict[str, Any]], outcome: Callable[..., Any]
) -> None:
    names = [KILL.EACH_IN_TURN, KILL.DAMAGED]
    runs = run_scenarios(names)
    assert [runs[name]["kills"] for name in names] == [len(KILL.POINTS), 1]
    for name in names:
        assert_same(runs, name, outcome)
    assert_no_temp_files(runs)


@pytest.mark.slow
def test_clients_that_are_away_for_rounds_are_resumed_too(
    run_scenarios: Callable[..., dict[str, Any]], outcome: Callable[..., Any]
) -> None:
    runs = run_scenarios(
        [KILL.AGAIN_AND_AGAIN],
        "federation.fraction_train=0.7",
        "evaluation.every=0",
        "federation.rounds=5",
    )
    assert runs[KILL.AGAIN_AND_AGAIN]["kills"] >= 2
    assert_same(runs, KILL.AGAIN_AND_AGAIN, outcome)


@pytest.mark.slow
def test_the_previous_aggregate_and_the_flush_are_resumed_too(
    run_scenarios: Callable[..., dict[str, Any]], outcome: Callable[..., Any], delta_codec: str
) -> None:
    names = [KILL.IN_THE_FLUSH, KILL.DAMAGED]
    runs = run_scenarios(
        names, f"uplink.name={delta_codec}", f"downlink.name={delta_codec}", "uplink.flush=int8"
    )
    before = list(KILL.POINTS).index(KILL.LAST_ROUND)
    assert runs[KILL.IN_THE_FLUSH]["kills"] == before + len(KILL.FLUSH_POINTS)
    for name in names:
        assert_same(runs, name, outcome)
    assert_no_temp_files(runs)
    last = outcome(Path(runs["unbroken"]["run_dir"]))["rounds"][-1]
    assert (last["round"], last["flush"]) == (4, True)


@pytest.mark.slow
def test_what_the_uplink_codec_has_learned_is_resumed_too(
    run_scenarios: Callable[..., dict[str, Any]], outcome: Callable[..., Any], learned: ModuleType
) -> None:
    names = [KILL.AROUND_THE_CODEC, KILL.DAMAGED]
    runs = run_scenarios(names, f"uplink.name={learned.MEAN}", "uplink.adapt_every=1")
    assert runs[KILL.AROUND_THE_CODEC]["kills"] == len(KILL.CODEC_POINTS)
    for name in names:
        assert_same(runs, name, outcome)
        left = [RunFolder(runs[each]["run_dir"]).codec_path for each in (name, "unbroken")]
        broken, unbroken = (load_codec_file(path).state for path in left)
        assert broken.version == 3
        assert broken.hash == unbroken.hash
    assert_no_temp_files(runs)
    assert outcome(Path(runs["unbroken"]["run_dir"]))["rounds"][-1]["codec_bytes"] > 0


@pytest.mark.slow
def test_each_point_on_its_own(
    run_scenarios: Callable[..., dict[str, Any]], outcome: Callable[..., Any]
) -> None:
    runs = run_scenarios([*KILL.POINTS, KILL.AGAIN_AND_AGAIN])
    for name in [*KILL.POINTS, KILL.AGAIN_AND_AGAIN]:
        assert_same(runs, name, outcome)
    assert_no_temp_files(runs)
