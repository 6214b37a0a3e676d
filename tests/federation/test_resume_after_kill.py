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

SCRIPT = Path(__file__).with_name("kill_and_resume.py")
# every piece of state there is matters to this run
SETTINGS = (
    "uplink.name=int8",
    "downlink.name=int8",
    "federation.strategy.name=fedadam",
    "lora.dropout=0.1",
    "training.keep_optimizer=true",
    "data.format=qa",
    "data.max_length=96",
    "data.splits.validation=0.1",
    "data.splits.heldout=0.1",
    "lora.rank=4",
    "model.device=cpu",
    "training.batch_size=4",
    "training.local_steps=2",
    "training.lr=5e-3",
    "federation.rounds=3",
    "tracking.tensorboard=false",
)


def script() -> ModuleType:
    found = importlib.util.spec_from_file_location("kill_and_resume", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


POINTS = [*script().POINTS, script().DAMAGED, script().AGAIN_AND_AGAIN]


@pytest.fixture(scope="module", params=["all clients", "some clients"])
def runs(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    tiny_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """Every scenario, run by one process that forks."""
    folder = tmp_path_factory.mktemp("killed")
    where = (
        f'model.id="{tiny_model}"',
        f'data.source="{tiny_data}"',
        f'output="{folder / "runs"}"',
    )
    some: tuple[str, ...] = ()
    names = ["unbroken", *POINTS]
    if request.param == "some clients":
        # clients are away for rounds, and hold old references
        some = ("federation.fraction_train=0.7", "evaluation.every=0", "federation.rounds=5")
        names = ["unbroken", script().AGAIN_AND_AGAIN]
    config = load_config(None, [*SETTINGS, *where, *some])
    file = folder / "config.toml"
    file.write_text(config.to_toml())
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(file), *names],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def same(runs: dict[str, dict[str, Any]], point: str, outcome: Callable[..., Any]) -> None:
    broken, unbroken = (outcome(Path(runs[name]["run_dir"])) for name in (point, "unbroken"))
    assert broken["rounds"] == unbroken["rounds"]
    assert broken["adapter"] == unbroken["adapter"]


@pytest.mark.parametrize("runs", ["all clients"], indirect=True)
@pytest.mark.parametrize("point", POINTS)
def test_resumed_run_ends_as_the_unbroken_one(
    point: str, runs: dict[str, dict[str, Any]], outcome: Callable[..., Any]
) -> None:
    assert runs[point]["kills"] >= 1, "the point was never reached"
    same(runs, point, outcome)


@pytest.mark.parametrize("runs", ["all clients"], indirect=True)
def test_no_temp_file_of_a_killed_process_is_left(runs: dict[str, dict[str, Any]]) -> None:
    left = [path for run in runs.values() for path in Path(run["run_dir"]).rglob(".*.tmp")]
    assert left == []


@pytest.mark.parametrize("runs", ["some clients"], indirect=True)
def test_partial_participation_resumes_too(
    runs: dict[str, dict[str, Any]], outcome: Callable[..., Any]
) -> None:
    point = script().AGAIN_AND_AGAIN
    assert runs[point]["kills"] >= 2
    same(runs, point, outcome)
