"""The open-loop bench from recordings to tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cgfedllm.analysis.fitted import load_fitted
from cgfedllm.analysis.open_loop import measure
from cgfedllm.analysis.open_loop_rows import OpenLoop
from cgfedllm.analysis.peers import PREFIX, peer_version
from cgfedllm.analysis.portable import portable_command, repeated
from cgfedllm.analysis.samples import UPDATES, count_updates
from cgfedllm.analysis.sources import known_environment, open_recordings, origin
from cgfedllm.analysis.structure import Structure, measure_structure
from cgfedllm.analysis.trials import RATES, read_candidate, trials, untaught
from cgfedllm.errors import ConfigError
from cgfedllm.report.open_loop import read_results, write_results

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
    codec_files: Sequence[Path | str] = (),
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
    _check(rates, updates)
    # before anything is measured, so that a missing one is reported at once
    versions = {name.removeprefix(PREFIX): peer_version(name) for name in peers}
    candidates = [read_candidate(text) for text in codecs or untaught()]
    fitted = load_fitted(codec_files)
    candidates += [(PREFIX + name, {}) for name in versions]
    opened = open_recordings(recordings)
    counts = {name: count_updates(recording, updates) for name, recording in opened.items()}
    tried = len(trials(candidates, rates, fitted))
    total = tried * sum(counts.values())
    about = {
        "command": _command(
            recordings, to, codecs, codec_files, peers, rates, updates, seed, structure, memory
        ),
        "environment": known_environment(seed),
        "recordings": {name: origin(recording) for name, recording in opened.items()},
    }
    if fitted:
        about["codec_files"] = {one.name: one.file.card for one in fitted}
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
                fitted=fitted,
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


def _check(rates: Sequence[float], updates: int) -> None:
    if not all(0 < rate <= 32 for rate in rates):
        raise ConfigError(
            f"rates are bits per parameter, above 0 and at most 32; got {list(rates)}"
        )
    if updates < 1:
        raise ConfigError(f"updates must be 1 or more; got {updates}")


def _command(
    recordings: Sequence[Path | str],
    to: Path | str,
    codecs: Sequence[str],
    codec_files: Sequence[Path | str],
    peers: Sequence[str],
    rates: Sequence[float],
    updates: int,
    seed: int,
    structure: bool,
    memory: bool,
) -> str:
    words = ["cgfedllm", "bench", "codecs"]
    words += repeated("--recording", recordings) + repeated("--codec", codecs)
    words += repeated("--codec-file", codec_files)
    words += repeated("--peer", peers)
    words += repeated("--rate", (f"{r:g}" for r in rates) if tuple(rates) != RATES else ())
    words += ["--updates", str(updates), "--seed", str(seed), "--to", str(to)]
    words += ["--structure"] * structure + ["--memory"] * memory
    return portable_command(words)
