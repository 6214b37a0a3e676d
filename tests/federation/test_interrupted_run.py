"""Ctrl-C, SIGTERM and a full disk: the run stops, nothing written is harmed, it can go on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import cgfedllm
from cgfedllm import events
from cgfedllm.config import Config
from cgfedllm.errors import FederationError, RunInterrupted, StorageError
from cgfedllm.runs import RunFolder

MakeConfig = Callable[..., Config]
Outcome = Callable[[Path], dict[str, Any]]
Listener = Callable[[events.Event], None]

LOSSY = (
    "uplink.name=int8",
    "downlink.name=int8",
    "federation.strategy.name=fedavgm",
    "lora.dropout=0.1",
)


def signal_at(
    kind: type, *, round_: int, client: str | None = None, number: int = signal.SIGINT
) -> Listener:
    """Sends this process a signal at an event, as Ctrl-C does."""
    now, done = 0, False

    def listen(event: events.Event) -> None:
        nonlocal now, done
        if isinstance(event, events.RoundStarted):
            now = event.round
        fits = client is None or getattr(event, "client", None) == client
        if isinstance(event, kind) and now == round_ and fits and not done:
            done = True
            os.kill(os.getpid(), number)

    return listen


@pytest.fixture
def unbroken(undisturbed: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return undisturbed(*LOSSY)


# ---- Ctrl-C -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "client"),
    [
        (events.ClientStarted, "south"),
        (events.StepFinished, "south"),
        (events.ClientFinished, "south"),
        (events.RoundStarted, None),
        (events.EvaluationProgress, None),
        (events.RoundFinished, None),
    ],
)
def test_the_run_stops_and_resumes_to_the_same_result(
    tiny_config: MakeConfig,
    outcome: Outcome,
    unbroken: dict[str, Any],
    kind: type,
    client: str | None,
) -> None:
    config = tiny_config(*LOSSY)
    handlers = signal.getsignal(signal.SIGINT)
    result = cgfedllm.run(config, listeners=[signal_at(kind, round_=2, client=client)])
    assert result.interrupted
    assert result.records[-1].round == (2 if kind is events.RoundFinished else 1)
    assert not result.adapter_dir.exists()
    assert signal.getsignal(signal.SIGINT) is handlers
    resumed = cgfedllm.resume(result.run_dir)
    assert not resumed.interrupted
    assert outcome(resumed.run_dir) == unbroken


def test_the_current_client_finishes_and_the_next_does_not_start(tiny_config: MakeConfig) -> None:
    heard: list[str] = []
    notices: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.ClientStarted | events.ClientFinished):
            heard.append(f"{type(event).__name__} {event.client}")
        if isinstance(event, events.Notice):
            notices.append(event.text)

    stop = signal_at(events.StepFinished, round_=1, client="south")
    cgfedllm.run(tiny_config(), listeners=[listen, stop])
    assert heard[-2:] == ["ClientStarted south", "ClientFinished south"]
    assert any("stopping after the current client" in text for text in notices)


def test_sigterm_stops_a_run_like_ctrl_c(tiny_config: MakeConfig) -> None:
    stop = signal_at(events.StepFinished, round_=1, number=signal.SIGTERM)
    assert cgfedllm.run(tiny_config(), listeners=[stop]).interrupted


def test_a_second_ctrl_c_stops_at_once_and_the_run_still_resumes(
    tiny_config: MakeConfig, outcome: Outcome, unbroken: dict[str, Any]
) -> None:
    config = tiny_config(*LOSSY)
    first = signal_at(events.ClientStarted, round_=2, client="south")
    second = signal_at(events.StepFinished, round_=2, client="south")
    with pytest.raises(KeyboardInterrupt):
        cgfedllm.run(config, listeners=[first, second])
    assert [r.round for r in RunFolder(config.run_dir).records()] == [0, 1]
    resumed = cgfedllm.resume(config.run_dir)
    assert outcome(resumed.run_dir) == unbroken


def test_a_run_that_was_stopped_in_the_last_evaluation_is_not_complete(
    tiny_config: MakeConfig,
) -> None:
    config = tiny_config("federation.rounds=1")
    stop = signal_at(events.EvaluationProgress, round_=1)
    assert cgfedllm.run(config, listeners=[stop]).interrupted
    assert len(cgfedllm.resume(config.run_dir).records) == 2


def test_a_comparison_stops_and_goes_on(tiny_config: MakeConfig) -> None:
    config = tiny_config("federation.rounds=1", "evaluation.clients=false")
    stop = signal_at(events.StepFinished, round_=1, client="south")
    with pytest.raises(RunInterrupted):
        cgfedllm.compare(config, ["raw", "int8"], listeners=[stop])
    assert len(cgfedllm.compare(config, ["raw", "int8"]).entries) == 2


def test_the_command_line_says_how_to_go_on(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """In a process of its own, stopped by a signal it sends itself, resumed by another."""
    file = tmp_path / "experiment.toml"
    config = tiny_config("federation.rounds=2")
    file.write_text(config.to_toml())
    code = (
        "import os, signal, sys\n"
        "from cgfedllm import events\n"
        "from cgfedllm.cli import main\n"
        "def stop(event):\n"
        "    if isinstance(event, events.ClientFinished) and event.round == 2:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "events._listeners.append(stop)\n"
        "main()\n"
    )
    stopped = subprocess.run(
        [sys.executable, "-c", code, "run", str(file), "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert stopped.returncode == 130, stopped.stderr
    command = f"cgfedllm resume {config.run_dir}"
    assert command in stopped.stderr
    resumed = subprocess.run(
        [sys.executable, "-m", "cgfedllm.cli", *command.split()[1:], "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.strip() == str(config.run_dir / "adapter")


# ---- a full disk --------------------------------------------------------------------------------


@contextmanager
def full_disk(
    monkeypatch: pytest.MonkeyPatch, name: str, call: str, *, below: str = ""
) -> Iterator[list[Path]]:
    """``os.write`` or ``os.fsync`` fails for files whose name holds `name` (in a folder)."""
    hit: list[Path] = []
    paths: dict[int, Path] = {}
    opened, original = os.open, getattr(os, call)

    def opening(path: Any, *args: Any, **kwargs: Any) -> int:
        descriptor = opened(path, *args, **kwargs)
        paths[descriptor] = Path(os.fsdecode(path))
        return descriptor

    def failing(descriptor: int, *args: Any) -> Any:
        path = paths.get(descriptor)
        if path is not None and name in path.name and (not below or path.parent.name == below):
            hit.append(path)
            if call == "write":  # a part fits before the disk is full
                original(descriptor, bytes(args[0])[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(descriptor, *args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opening)
        patch.setattr(os, call, failing)
        yield hit


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize(
    ("file", "kept"),
    [
        ("round-000002", 2),
        ("metrics.jsonl", 0),
        ("adapter_model.safetensors", 4),
        ("adapter_config.json", 4),
    ],
)
def test_a_full_disk_stops_the_run_and_harms_nothing(
    tiny_config: MakeConfig,
    outcome: Outcome,
    unbroken: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    kept: int,
    call: str,
) -> None:
    config = tiny_config(*LOSSY)
    with full_disk(monkeypatch, file, call) as hit:
        with pytest.raises(StorageError, match=r"No space left.*free some space.*resume") as caught:
            cgfedllm.run(config)
        assert hit
        assert caught.value.errno == errno.ENOSPC
        assert file in str(caught.value)
    assert len(RunFolder(config.run_dir).records()) == kept
    assert not list(config.run_dir.rglob(".*.tmp"))
    resumed = cgfedllm.resume(config.run_dir)
    assert outcome(resumed.run_dir) == unbroken


def test_a_disk_full_when_the_codec_is_left_is_no_loss(
    tiny_config: MakeConfig, learned: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (f"uplink.name={learned.MEAN}", "uplink.adapt_every=1", "federation.rounds=2")
    config = tiny_config(*settings)
    with full_disk(monkeypatch, "codec.safetensors", "write") as hit:
        with pytest.raises(StorageError, match=r"codec\.safetensors: No space left"):
            cgfedllm.run(config)
        assert hit
    folder = RunFolder(config.run_dir)
    assert not folder.codec_path.exists()
    assert len(cgfedllm.resume(config.run_dir).records) == 3
    assert folder.codec_path.exists()


def test_a_disk_full_at_the_very_start_leaves_no_run_behind(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("federation.rounds=1")
    with full_disk(monkeypatch, "config.toml", "write"), pytest.raises(StorageError):
        cgfedllm.run(config)
    assert not RunFolder(config.run_dir).exists()
    assert len(cgfedllm.run(config).records) == 2


@pytest.mark.parametrize("file", ["memory-", "reference-"])
def test_a_client_whose_disk_is_full_sits_out_until_it_has_room(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """What it held is untouched: it goes on from there as soon as it can write again."""
    config = tiny_config(*LOSSY, "evaluation.clients=false")
    told: list[str] = []
    full: list[Any] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.RoundStarted) and event.round == 2:
            full.append(full_disk(monkeypatch, file, "write", below="south"))
            full[0].__enter__()
        if isinstance(event, events.RoundFinished) and event.record.round == 2:
            full[0].__exit__(None, None, None)
        if isinstance(event, events.Notice) and event.level == "warning":
            told.append(event.text)

    records = cgfedllm.run(config, listeners=[listen]).records
    assert [[c.client for c in record.clients] for record in records[1:]] == [
        ["north", "south", "west"],
        ["north", "west"],
        ["north", "south", "west"],
    ]
    (failure,) = records[2].failures
    assert failure.client == "south"
    assert "No space left" in failure.reason
    assert "free some space" in failure.reason
    assert told == [f"round 2: south is left out: {failure.reason}"]
    held = sorted(path.name for path in (config.run_dir / "clients" / "south").iterdir())
    assert f"{file}000001.safetensors" in held or f"{file}000000.safetensors" in held
    assert not [name for name in held if name.endswith(".tmp")]


@pytest.mark.parametrize("file", ["memory-", "reference-"])
def test_clients_whose_disk_is_full_are_left_out_with_that_reason(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    config = tiny_config(*LOSSY, "evaluation.clients=false")
    with (
        full_disk(monkeypatch, file, "write"),
        pytest.raises(FederationError, match=r"round 1 had too few.*No space left"),
    ):
        cgfedllm.run(config)
    assert [r.round for r in RunFolder(config.run_dir).records()] == [0]
    assert len(cgfedllm.resume(config.run_dir).records) == 4
