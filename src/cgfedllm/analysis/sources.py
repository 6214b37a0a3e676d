"""Recordings that are measured: opened, named, and what a results file tells of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cgfedllm.analysis.portable import portable_tree
from cgfedllm.config import Config
from cgfedllm.errors import ConfigError
from cgfedllm.runs import environment

if TYPE_CHECKING:
    from cgfedllm.tgap.recording import Recording


def open_recordings(folders: Sequence[Path | str]) -> dict[str, Recording]:
    """Recordings by name: that of the folder, or of the run it is in, told apart by a number.

    Raises
    ------
    ConfigError
        If none is given.
    RecordingError
        If one is missing or damaged.
    """
    from cgfedllm.tgap.recording import Recording

    if not folders:
        raise ConfigError("no recording is given; make one with `cgfedllm record`")
    opened: dict[str, Recording] = {}
    for folder in folders:
        path = Path(folder).resolve()
        base = path.parent.name if path.name == "recording" else path.name
        opened[untaken(base, opened)] = Recording.open(folder)
    return opened


def untaken(name: str, taken: dict[str, Any]) -> str:
    """The name itself, or with the first number behind it that makes it another."""
    chosen, number = name, 1
    while chosen in taken:
        number += 1
        chosen = f"{name}-{number}"
    return chosen


def origin(recording: Recording) -> dict[str, Any]:
    """Where a recording comes from, without this machine's folders; plain types."""
    return {
        "updates": len(recording),
        "rounds": len(recording.rounds()),
        "clients": len(recording.clients()),
        "local_steps": sorted({entry.steps for entry in recording.entries}),
        "spec_hash": recording.spec.hash.hex(),
        "config": portable_tree(recording.config),
    }


def known_environment(seed: int) -> dict[str, Any]:
    """Versions and hardware, without the command: it holds this machine's paths."""
    known = environment(Config(seed=seed))
    known.pop("command")
    return known
