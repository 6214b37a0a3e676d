"""What `resume` accepts, what it refuses, and what it says then."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cgfedllm
from cgfedllm import events
from cgfedllm.codecs import codec_class, codec_names
from cgfedllm.config import Config
from cgfedllm.errors import CheckpointError, FederationError
from cgfedllm.federation.checkpoint import latest_checkpoint
from cgfedllm.runs import RunFolder, RunLockedError
from cgfedllm.storage import load_tensors, read_json, save_tensors
from cgfedllm.workspace import Workspace

MakeConfig = Callable[..., Config]
Outcome = Callable[[Path], dict[str, Any]]

LOSSY = (
    "uplink.name=int8",
    "downlink.name=int8",
    "federation.strategy.name=fedadam",
    "training.keep_optimizer=true",
    "lora.dropout=0.1",
)


class Stop(Exception):
    pass


def stop_after(round_: int) -> Callable[[events.Event], None]:
    """Breaks a run off between two rounds, by an error of the listener."""

    def listen(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished) and event.record.round == round_:
            raise Stop

    return listen


@pytest.fixture
def stopped(tiny_config: MakeConfig) -> Config:
    """A run of three rounds that got as far as the second."""
    config = tiny_config(*LOSSY)
    with pytest.raises(Stop):
        cgfedllm.run(config, listeners=[stop_after(2)])
    return config


@pytest.fixture
def unbroken(undisturbed: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return undisturbed(*LOSSY)


def checkpoints(config: Config) -> list[Path]:
    return sorted((config.run_dir / "checkpoints").glob("*"))


# ---- what it accepts ----------------------------------------------------------------------------


def test_a_stopped_run_goes_on_to_the_result_of_an_unbroken_one(
    stopped: Config, outcome: Outcome, unbroken: dict[str, Any]
) -> None:
    heard: list[int] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.RunStarted):
            heard.append(event.resumed_from)

    result = cgfedllm.resume(stopped.run_dir, listeners=[listen])
    assert heard == [2]
    assert not result.interrupted
    assert [record.round for record in result.records] == [0, 1, 2, 3]
    assert outcome(result.run_dir) == unbroken


@pytest.mark.parametrize("codec", codec_names())
def test_every_codecs_residuals_are_kept_decayed_and_found_again(
    tiny_config: MakeConfig, outcome: Outcome, codec: str
) -> None:
    settings = (
        f"uplink.name={codec}",
        "uplink.error_feedback_decay=0.5",
        "federation.rounds=2",
        "evaluation.clients=false",
    )
    config = tiny_config(*settings)
    with pytest.raises(Stop):
        cgfedllm.run(config, listeners=[stop_after(1)])
    kept = list((config.run_dir / "clients" / "north").glob("memory-*"))
    assert bool(kept) == (not codec_class(codec).lossless)
    unbroken = cgfedllm.run(tiny_config(*settings, "name=unbroken"))
    assert outcome(cgfedllm.resume(config.run_dir).run_dir) == outcome(unbroken.run_dir)


def test_a_complete_run_is_returned_untouched(tiny_config: MakeConfig) -> None:
    result = cgfedllm.run(tiny_config("federation.rounds=1"))
    before = {
        path: (path.stat().st_mtime_ns, path.stat().st_size)
        for path in result.run_dir.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    again = cgfedllm.resume(result.run_dir)
    assert again == result
    after = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in before}
    assert after == before


def test_a_run_folder_may_be_moved(stopped: Config, tmp_path: Path, outcome: Outcome) -> None:
    moved = tmp_path / "elsewhere" / "under another name"
    shutil.copytree(stopped.run_dir, moved)
    assert outcome(cgfedllm.resume(moved).run_dir) == outcome(
        cgfedllm.resume(stopped.run_dir).run_dir
    )


def test_trackers_may_be_changed_before_resuming(stopped: Config) -> None:
    path = stopped.run_dir / "config.toml"
    changed = stopped.with_overrides({"tracking.tensorboard": True})
    path.write_text(changed.to_toml())
    assert len(cgfedllm.resume(stopped.run_dir).records) == 4


def test_the_environment_notes_each_resumption(stopped: Config) -> None:
    cgfedllm.resume(stopped.run_dir)
    noted = read_json(stopped.run_dir / "environment.json")["resumed"]
    assert [entry["after_round"] for entry in noted] == [2]


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "empty"])
def test_a_damaged_newest_checkpoint_is_passed_over(
    stopped: Config, outcome: Outcome, unbroken: dict[str, Any], damage: str
) -> None:
    newest = checkpoints(stopped)[-1]
    content = bytearray(newest.read_bytes())
    if damage == "flipped bit":
        content[-100] ^= 1
    newest.write_bytes({"flipped bit": content, "cut short": content[:-50], "empty": b""}[damage])
    result = cgfedllm.resume(stopped.run_dir)
    assert outcome(result.run_dir) == unbroken


def test_a_lost_tail_of_the_metrics_is_written_again(stopped: Config) -> None:
    path = stopped.run_dir / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]) + '{"round": 2, "cl')
    assert [r.round for r in cgfedllm.resume(stopped.run_dir).records] == [0, 1, 2, 3]


def test_two_checkpoints_are_kept(stopped: Config) -> None:
    names = [path.name for path in checkpoints(stopped)]
    assert names == ["round-000001.safetensors", "round-000002.safetensors"]


# ---- what it refuses ----------------------------------------------------------------------------


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match=r"is not a run folder: it has no config\.toml"):
            cgfedllm.resume(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_configuration(stopped: Config) -> None:
    path = stopped.run_dir / "config.toml"
    original = path.read_text()
    path.write_text(stopped.with_overrides({"training.lr": 1e-4}).to_toml())
    kept = (stopped.run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"another configuration.*restore config\.toml"):
        cgfedllm.resume(stopped.run_dir)
    assert (stopped.run_dir / "metrics.jsonl").read_bytes() == kept
    path.write_text(original)
    assert len(cgfedllm.resume(stopped.run_dir).records) == 4


def test_checkpoints_of_another_rank(stopped: Config) -> None:
    path = stopped.run_dir / "config.toml"
    path.write_text(stopped.with_overrides({"lora.rank": 2}).to_toml())
    with pytest.raises(CheckpointError, match=r"another shape.*lora\.rank.*another name"):
        cgfedllm.resume(stopped.run_dir)


def test_checkpoints_of_another_format(stopped: Config) -> None:
    for path in checkpoints(stopped):
        tensors, metadata = load_tensors(path)
        save_tensors(path, tensors, {**metadata, "format": "0"})
    with pytest.raises(CheckpointError, match=r"format '0'.*reads '1'.*release that wrote it"):
        cgfedllm.resume(stopped.run_dir)


@pytest.mark.parametrize("missing", ["adapter", "reference", "record", "held"])
def test_incomplete_checkpoints(stopped: Config, missing: str) -> None:
    for path in checkpoints(stopped):
        tensors, metadata = load_tensors(path)
        tensors.pop(missing, None)
        metadata.pop(missing, None)
        save_tensors(path, tensors, metadata)
    with pytest.raises(CheckpointError, match="incomplete"):
        cgfedllm.resume(stopped.run_dir)


def test_all_checkpoints_damaged(stopped: Config) -> None:
    for path in checkpoints(stopped):
        path.write_bytes(path.read_bytes()[:100])
    kept = (stopped.run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"round-000002\.safetensors is damaged"):
        cgfedllm.resume(stopped.run_dir)
    assert (stopped.run_dir / "metrics.jsonl").read_bytes() == kept


def test_results_without_any_checkpoint(stopped: Config) -> None:
    shutil.rmtree(stopped.run_dir / "checkpoints")
    with pytest.raises(CheckpointError, match=r"up to round 2 but no checkpoint"):
        cgfedllm.resume(stopped.run_dir)
    assert [r.round for r in RunFolder(stopped.run_dir).records()] == [0, 1, 2]


def test_a_run_another_process_works_on(stopped: Config) -> None:
    with RunFolder(stopped.run_dir), pytest.raises(RunLockedError, match="in use by process"):
        cgfedllm.resume(stopped.run_dir)
    assert len(cgfedllm.resume(stopped.run_dir).records) == 4


def test_client_memory_of_another_adapter_leaves_the_client_out(stopped: Config) -> None:
    for path in (stopped.run_dir / "clients" / "south").glob("memory-*"):
        tensors, metadata = load_tensors(path)
        save_tensors(path, tensors, {**metadata, "spec": "00"})
    last = cgfedllm.resume(stopped.run_dir).records[-1]
    assert [client.client for client in last.clients] == ["north", "west"]
    assert "belongs to another adapter" in last.failures[0].reason


def test_a_resumed_run_can_fail_again_and_be_resumed_again(
    stopped: Config,
    outcome: Outcome,
    unbroken: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cgfedllm.training.local import LocalTrainer

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("still broken")

    with monkeypatch.context() as patch:
        patch.setattr(LocalTrainer, "train", fail)
        for _ in range(2):
            with pytest.raises(FederationError, match="still broken"):
                cgfedllm.resume(stopped.run_dir)
    result = cgfedllm.resume(stopped.run_dir)
    assert outcome(result.run_dir) == unbroken


# ---- checkpoints themselves ---------------------------------------------------------------------


def test_a_checkpoint_says_what_was_saved(stopped: Config) -> None:
    spec = Workspace(stopped, Path()).spec
    folder = RunFolder(stopped.run_dir)
    checkpoint = latest_checkpoint(folder.checkpoints_dir, spec, stopped)
    assert checkpoint.round == 2
    assert checkpoint.held == {"north": 2, "south": 2, "west": 2}
    sizes = {"m_t": 0, "v_t": 0}
    for name, values in checkpoint.strategy.items():
        sizes[name.split("/")[0]] += values.size
    assert sizes == {"m_t": spec.size, "v_t": spec.size}
    assert checkpoint.increment is not None
    assert (checkpoint.adapter - checkpoint.reference).norm() > 0
    kept, saved = folder.records()[2].to_dict(), checkpoint.record.to_dict()
    assert kept.pop("seconds").keys() == saved.pop("seconds").keys()
    assert kept == saved


def test_no_checkpoints_is_none(tmp_path: Path, tiny_config: MakeConfig) -> None:
    config = tiny_config()
    assert latest_checkpoint(tmp_path, Workspace(config, tmp_path).spec, config) is None
