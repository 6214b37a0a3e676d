"""Run folders: layout, locks, records that survive a crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cgfedllm.config import Config, load_config
from cgfedllm.errors import CheckpointError, StorageError
from cgfedllm.metrics import ClientRecord, FailureRecord, RoundRecord
from cgfedllm.runs import RunExistsError, RunFolder, RunLockedError
from cgfedllm.storage import read_json


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(None, [f"output={str(tmp_path)!r}", "name=trial", "seed=7"])


def _record(round: int) -> RoundRecord:
    client = ClientRecord("ü", 8, 4, 1000, 2.5, 0.1, 100, 200, 1.0, 0.1, 0.1)
    return RoundRecord(
        round, clients=[client], failures=[FailureRecord("b", "NaN")], heldout_nll=2.0
    )


def test_create_writes_config_and_environment(config: Config) -> None:
    with RunFolder.create(config) as run:
        assert run.config() == config
        facts = read_json(run.environment_path)
    assert facts["seed"] == 7
    assert facts["versions"]["python"].startswith("3.")
    assert facts["versions"]["numpy"]
    assert facts["cpus"] >= 1
    assert facts["memory_bytes"] > 0
    assert facts["command"] == sys.argv


def test_records_round_trip(config: Config) -> None:
    with RunFolder.create(config) as run:
        assert run.records() == []
        for round in range(3):
            run.append(_record(round))
    assert RunFolder(config.run_dir).records() == [_record(r) for r in range(3)]


def test_records_from_before_codecs_learned_are_read(config: Config) -> None:
    with RunFolder.create(config) as run:
        run.append(_record(1))
        line = json.loads(run.metrics_path.read_text())
        new = {key for key in line if key.startswith(("codec_", "tgap_"))}
        assert len(new) == 4
        row = {key: value for key, value in line.items() if key not in new}
        for client in row["clients"]:
            del client["codec_bytes"]
        run.metrics_path.write_text(json.dumps(row) + "\n")
        assert run.records() == [_record(1)]


def test_a_torn_last_line_is_passed_over_and_healed(config: Config) -> None:
    with RunFolder.create(config) as run:
        run.append(_record(0))
        with run.metrics_path.open("a") as file:
            file.write('{"round": 1, "clie')
        assert run.records() == [_record(0)]
        run.append(_record(1))
        assert run.records() == [_record(0), _record(1)]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"round": 1}'])
def test_a_damaged_line_is_named(config: Config, line: str) -> None:
    with RunFolder.create(config) as run:
        run.append(_record(0))
        with run.metrics_path.open("a") as file:
            file.write(line + "\n")
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2"):
            run.records()


def test_truncate_after(config: Config) -> None:
    with RunFolder.create(config) as run:
        run.truncate_after(0)  # nothing there yet
        for round in range(4):
            run.append(_record(round))
        run.truncate_after(2)
        assert [r.round for r in run.records()] == [0, 1, 2]


def test_a_run_with_progress_is_not_overwritten_by_accident(config: Config) -> None:
    with RunFolder.create(config) as run:
        run.append(_record(0))
        run.append(_record(1))
    with pytest.raises(RunExistsError, match=r"done up to round 1.*cgfedllm resume.*--overwrite"):
        RunFolder.create(config)
    assert len(run.records()) == 2


def test_a_run_without_progress_is_simply_started_again(config: Config) -> None:
    RunFolder.create(config).release()
    RunFolder.create(config).release()


def test_overwrite_removes_the_run_and_nothing_else(config: Config) -> None:
    with RunFolder.create(config) as run:
        run.append(_record(1))
        for folder in (
            run.checkpoints_dir,
            run.clients_dir,
            run.adapter_dir,
            run.tensorboard_dir,
            run.evaluation_dir,
        ):
            folder.mkdir()
            (folder / "file").touch()
        run.report_path.touch()
        (run.path / "notes.txt").write_text("mine")
    with RunFolder.create(config, overwrite=True) as run:
        names = {p.name for p in run.path.iterdir()}
    assert names == {"config.toml", "environment.json", "notes.txt", ".lock"}


def test_overwrite_refuses_what_is_not_a_run(config: Config) -> None:
    foreign = config.run_dir / "adapter"
    foreign.mkdir(parents=True)
    (foreign / "precious").touch()
    with pytest.raises(RunExistsError, match="not a run folder"):
        RunFolder.create(config, overwrite=True)
    assert (foreign / "precious").exists()


def test_one_process_at_a_time(config: Config) -> None:
    with RunFolder.create(config):
        with pytest.raises(RunLockedError, match="in use by process"):
            RunFolder(config.run_dir).acquire()
        script = "import sys; from cgfedllm.runs import RunFolder; RunFolder(sys.argv[1]).acquire()"
        done = subprocess.run(
            [sys.executable, "-c", script, str(config.run_dir)], capture_output=True, timeout=60
        )
        assert b"RunLockedError" in done.stderr
    with RunFolder(config.run_dir):  # free again
        pass


def test_who_is_busy(config: Config) -> None:
    folder = RunFolder(config.run_dir)
    assert not folder.is_busy()
    with RunFolder.create(config) as run:
        assert folder.is_busy()
        # by another process, that is
        assert not run.is_busy()
    assert not folder.is_busy()
    with folder:  # asking has left no lock behind
        pass


def test_a_refused_create_frees_the_lock(config: Config) -> None:
    with RunFolder.create(config) as run:
        run.append(_record(0))
    with pytest.raises(RunExistsError):
        RunFolder.create(config)
    with RunFolder(config.run_dir):
        pass


def test_a_killed_process_frees_the_lock(config: Config) -> None:
    script = """
import os, sys
from cgfedllm.runs import RunFolder
RunFolder(sys.argv[1]).acquire()
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", script, str(config.run_dir)], timeout=60)
    assert done.returncode == -9
    with RunFolder(config.run_dir):
        pass


def test_config_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a run folder"):
        RunFolder(tmp_path).config()
    (tmp_path / "config.toml").write_text("= 3")
    with pytest.raises(CheckpointError, match="cannot be read"):
        RunFolder(tmp_path).config()


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(StorageError, match="cannot work in"):
        RunFolder(tmp_path / "x" / "y").acquire()


def test_resumes_are_noted(config: Config) -> None:
    with RunFolder.create(config) as run:
        run.note_resume(3)
        run.note_resume(5)
        facts = read_json(run.environment_path)
    assert [r["after_round"] for r in facts["resumed"]] == [3, 5]
    assert facts["seed"] == 7
