"""The paper's analyses from recordings to tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cgfedllm.analysis.fitted import load_fitted
from cgfedllm.analysis.portable import portable_command, repeated
from cgfedllm.analysis.sources import known_environment, open_recordings, origin
from cgfedllm.analysis.study import UPDATES, Study, check_recording, read_parts, study
from cgfedllm.analysis.trials import Trial, read_candidate, untaught
from cgfedllm.codecs import codec_class
from cgfedllm.errors import ConfigError
from cgfedllm.report.analysis import write_studies

Progress = Callable[[int, int, str], None]
"""Told how many encodings are done, of how many, and what is worked on."""

_PREDICTOR = "zero"


@dataclass(frozen=True)
class AnalysisResult:
    """What was found and written.

    Parameters
    ----------
    studies : list of Study
        One a recording.
    files : list of Path
        Tables and figures.
    """

    studies: list[Study] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


def analyse_recordings(
    recordings: Sequence[Path | str],
    to: Path | str,
    *,
    codecs: Sequence[str] = (),
    codec_files: Sequence[Path | str] = (),
    parts: Sequence[str] = (),
    updates: int = UPDATES,
    seed: int = 0,
    progress: Progress = lambda done, total, what: None,
) -> AnalysisResult:
    """Analyse recordings one by one; see `api.analyze`."""
    from cgfedllm.report.figures.analysis import draw_study

    chosen = read_parts(parts)
    if updates < 1:
        raise ConfigError(f"updates must be 1 or more; got {updates}")
    trials = _trials(codecs, codec_files)
    opened = open_recordings(recordings)
    for recording in opened.values():
        check_recording(recording, parts)
    files = {t.fitted.name: t.fitted.file.card for t in trials if t.fitted is not None}
    about: dict[str, Any] = {
        "command": _command(recordings, to, codecs, codec_files, parts, updates, seed),
        "parts": list(chosen),
        "environment": known_environment(seed),
        "recordings": {name: origin(recording) for name, recording in opened.items()},
        **({"codec_files": files} if files else {}),
    }
    found = AnalysisResult()
    figures: list[Path] = []
    for name, recording in opened.items():

        def tick(what: str, done: int, total: int, name: str = name) -> None:
            progress(done, total, f"{name}: {what}")

        one = study(name, recording, trials, parts=chosen, updates=updates, seed=seed, tick=tick)
        found.studies.append(one)
        # after every recording: hours of the next ones may be lost, these are not
        tables = write_studies(Path(to), found.studies, about)
        figures += draw_study(one, Path(to))
        found.files[:] = [*tables, *figures]
    return found


def _trials(codecs: Sequence[str], codec_files: Sequence[Path | str]) -> list[Trial]:
    """Candidates at one rate each, the predictor that sends nothing among them.

    Without a name: all that lose something and need no training; beside codec files only those
    that are named.
    """
    default = [name for name in untaught() if not codec_class(name).lossless]
    named = [read_candidate(text) for text in codecs or ([] if codec_files else default)]
    trials = [Trial(name, options) for name, options in named]
    trials += [Trial(one.file.name, {}, fitted=one) for one in load_fitted(codec_files)]
    if all(trial.codec != _PREDICTOR for trial in trials):
        trials.append(Trial(_PREDICTOR, {}))
    return trials


def _command(
    recordings: Sequence[Path | str],
    to: Path | str,
    codecs: Sequence[str],
    codec_files: Sequence[Path | str],
    parts: Sequence[str],
    updates: int,
    seed: int,
) -> str:
    words = ["cgfedllm", "analyze"]
    words += repeated("--recording", recordings) + repeated("--codec", codecs)
    words += repeated("--codec-file", codec_files)
    if parts:
        words += ["--parts", ",".join(parts)]
    words += ["--updates", str(updates), "--seed", str(seed), "--to", str(to)]
    return portable_command(words)
