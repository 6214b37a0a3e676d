"""The open-loop bench from recordings to tables and figures."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cgfedllm.analysis.open_loop import measure
from cgfedllm.analysis.open_loop_rows import OpenLoop
from cgfedllm.analysis.peers import PREFIX, peer_version
from cgfedllm.analysis.portable import portable_tree
from cgfedllm.analysis.samples import UPDATES, count_updates
from cgfedllm.analysis.structure import Structure, measure_structure
from cgfedllm.analysis.trials import RATES, read_candidate, trials
from cgfedllm.codecs import codec_names
from cgfedllm.config import Config
from cgfedllm.errors import ConfigError
from cgfedllm.report.open_loop import read_results, write_results
from cgfedllm.runs import environment

if TYPE_CHECKING:
    from cgfedllm.tgap.recording import Recording

Progress = Callable[[int, int, str], None]
"""Told how many updates are done, of how many, and what is worked on."""


@dataclass(frozen=True)
class BenchResult:
    """What the bench found and wrote.

    Parameters
    ----------
    results : list of OpenLoop
        One a recording.
    structures : dict of str to Structure
        Facts by recording, where they were asked for.
    files : list of Path
        Tables and figures.
    """

    results: list[OpenLoop]
    structures: dict[str, Structure] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


def bench_codecs(
    recordings: Sequence[Path | str],
    to: Path | str,
    *,
    codecs: Sequence[str] = (),
    peers: Sequence[str] = (),
    rates: Sequence[float] = (),
    updates: int = UPDATES,
    seed: int = 0,
    structure: bool = False,
    memory: bool = False,
    progress: Progress = lambda done, total, what: None,
) -> BenchResult:
    """Code recorded updates one by one with every codec at every rate; see `api.bench_codecs`."""
    from cgfedllm.report.figures.open_loop import draw_open_loop

    rates = tuple(rates) or RATES
    _check(recordings, rates, updates)
    # before anything is measured, so that a missing one is reported at once
    versions = {name.removeprefix(PREFIX): peer_version(name) for name in peers}
    candidates = [read_candidate(text) for text in codecs or codec_names()]
    candidates += [(PREFIX + name, {}) for name in versions]
    opened = _open(recordings)
    counts = {name: count_updates(recording, updates) for name, recording in opened.items()}
    tried = len(trials(candidates, rates))
    total = tried * sum(counts.values())
    about = {
        "command": _command(recordings, to, codecs, peers, rates, updates, seed, structure, memory),
        "environment": _environment(seed),
        "recordings": {name: _origin(recording) for name, recording in opened.items()},
    }
    if versions:
        about["peers"] = versions
    found = BenchResult([])
    finished = 0
    for name, recording in opened.items():

        def tick(what: str, done: int, name: str = name, before: int = finished) -> None:
            progress(before + done, total, f"{name}: {what}")

        found.results.append(
            measure(
                name,
                recording,
                candidates,
                rates=rates,
                updates=updates,
                seed=seed,
                memory=memory,
                tick=tick,
            )
        )
        finished += tried * counts[name]
        if structure:
            progress(finished, total, f"{name}: structure")
            found.structures[name] = measure_structure(recording)
        # after every recording: hours of the next ones may be lost, these are not
        written = write_results(Path(to), found.results, found.structures, about)
        # from the tables, so that they are all it takes to draw the figures again
        written += draw_open_loop(read_results(Path(to)), Path(to))
        found.files[:] = written
    return found


def _check(recordings: Sequence[Path | str], rates: Sequence[float], updates: int) -> None:
    if not recordings:
        raise ConfigError("no recording is given; make one with `cgfedllm record`")
    if not all(0 < rate <= 32 for rate in rates):
        raise ConfigError(
            f"rates are bits per parameter, above 0 and at most 32; got {list(rates)}"
        )
    if updates < 1:
        raise ConfigError(f"updates must be 1 or more; got {updates}")


def _open(folders: Sequence[Path | str]) -> dict[str, Recording]:
    """Recordings by name: that of the folder, or of the run it is in, told apart by a number."""
    from cgfedllm.tgap.recording import Recording

    opened: dict[str, Recording] = {}
    for folder in folders:
        path = Path(folder).resolve()
        base = path.parent.name if path.name == "recording" else path.name
        name, number = base, 1
        while name in opened:
            number += 1
            name = f"{base}-{number}"
        opened[name] = Recording.open(folder)
    return opened


def _environment(seed: int) -> dict[str, Any]:
    known = environment(Config(seed=seed))
    known.pop("command")  # holds this machine's paths; the command is told as it can be repeated
    return known


def _origin(recording: Recording) -> dict[str, Any]:
    return {
        "updates": len(recording),
        "rounds": len(recording.rounds()),
        "clients": len(recording.clients()),
        "local_steps": sorted({entry.steps for entry in recording.entries}),
        "spec_hash": recording.spec.hash.hex(),
        "config": portable_tree(recording.config),
    }


def _command(
    recordings: Sequence[Path | str],
    to: Path | str,
    codecs: Sequence[str],
    peers: Sequence[str],
    rates: Sequence[float],
    updates: int,
    seed: int,
    structure: bool,
    memory: bool,
) -> str:
    words = ["cgfedllm", "bench", "codecs"]
    for folder in recordings:
        words += ["--recording", str(folder)]
    for codec in codecs:
        words += ["--codec", codec]
    for peer in peers:
        words += ["--peer", peer]
    for rate in rates if tuple(rates) != RATES else ():
        words += ["--rate", f"{rate:g}"]
    words += ["--updates", str(updates), "--seed", str(seed), "--to", str(to)]
    words += ["--structure"] * structure + ["--memory"] * memory
    return shlex.join(words)
