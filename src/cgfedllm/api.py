"""The public API: everything the command line does, as functions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cgfedllm import events
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.analysis.candidates import REFERENCES, Candidate
from cgfedllm.analysis.curves import ComparisonEntry
from cgfedllm.config import WITHOUT_FLUSH, Config
from cgfedllm.errors import (
    CheckpointError,
    ConfigError,
    RecordingError,
    RunInterrupted,
)
from cgfedllm.evaluating import EvaluationResult, evaluate_adapter, read_adapter
from cgfedllm.interrupt import check_interrupt, stoppable
from cgfedllm.metrics import RoundRecord
from cgfedllm.runs import RunFolder
from cgfedllm.storage import remove_leftovers
from cgfedllm.workspace import Workspace, workspace_for

if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from cgfedllm.analyses import AnalysisResult
    from cgfedllm.bench import BenchResult
    from cgfedllm.pretraining import PretrainResult
    from cgfedllm.reproduce.paper import PaperResult
    from cgfedllm.tgap.index import RecordingKind
    from cgfedllm.tgap.recording import Recording

Engine = Callable[[Config, Path], None]
"""Runs the federation to its end: configuration and run folder. It alone knows who carries the
messages."""
Listener = Callable[[events.Event], None]
Split = Literal["heldout", "validation", "test"]


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Parameters
    ----------
    run_dir : Path
        The run folder.
    adapter_dir : Path
        The adapter in PEFT format; there once the run is complete.
    records : list of RoundRecord
        One a round, from round 0.
    interrupted : bool
        Whether somebody stopped the run; `resume` goes on.
    """

    run_dir: Path
    adapter_dir: Path
    records: list[RoundRecord]
    interrupted: bool


@dataclass(frozen=True)
class ComparisonResult:
    """Runs of one experiment with several codecs and seeds.

    Parameters
    ----------
    entries : list of ComparisonEntry
        Runs that came to their end.
    results : Path
        The results file, with curves, summaries and the tuning.
    failures : dict of str
        Runs that failed, and why; the others went on.
    """

    entries: list[ComparisonEntry]
    results: Path
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordingResult:
    """A recording, and the run that it is of.

    Parameters
    ----------
    run : RunResult
        What the run left behind.
    path : Path
        Folder of the recording.
    updates, rounds, clients : int
        How much it holds so far.
    bytes : int
        What its updates weigh.
    """

    run: RunResult
    path: Path
    updates: int = 0
    rounds: int = 0
    clients: int = 0
    bytes: int = 0

    def rows(self) -> list[tuple[str, str]]:
        """For a table of two columns."""
        from cgfedllm.report.units import human_bytes

        return [
            ("recording", str(self.path)),
            ("updates", str(self.updates)),
            ("rounds", str(self.rounds)),
            ("clients", str(self.clients)),
            ("size", human_bytes(self.bytes)),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return {
            "recording_dir": str(self.path),
            "updates": self.updates,
            "rounds": self.rounds,
            "clients": self.clients,
            "bytes": self.bytes,
            "run_dir": str(self.run.run_dir),
            "interrupted": self.run.interrupted,
        }


def run(
    config: Config, *, overwrite: bool = False, listeners: Sequence[Listener] = ()
) -> RunResult:
    """Run federated fine-tuning in this process.

    Parameters
    ----------
    config : Config
        The experiment; `load_config` reads one.
    overwrite : bool
        Remove an earlier run of the same name first.
    listeners : sequence of callables
        Told every event (`cgfedllm.events`) while it runs.

    Returns
    -------
    RunResult
        With ``interrupted=True`` after Ctrl-C.

    Raises
    ------
    CgFedLlmError
        A named error for whatever went wrong; everything written before it stays.
    """
    return _run(config, overwrite, listeners, _in_process)


def serve(
    config: Config, grid: Grid, *, overwrite: bool = False, listeners: Sequence[Listener] = ()
) -> RunResult:
    """Run federated fine-tuning over one of Flower's engines, as its ServerApp.

    A run of the same name and configuration that was stopped goes on.

    Parameters
    ----------
    config : Config
        The experiment; its run folder is made here, on the server.
    grid : Grid
        What the engine gives a ServerApp.
    overwrite, listeners
        As for `run`.

    Raises
    ------
    CgFedLlmError
        As `run`.
    """

    def engine(config: Config, run_dir: Path) -> None:
        from cgfedllm.federation.server_app import Server

        Server(grid, workspace_for(config.to_toml(), str(run_dir))).run()

    folder = RunFolder(config.run_dir)
    if folder.exists() and not overwrite and _goes_on(folder, config):
        return _resume(folder.path, listeners, engine)
    return _run(config, overwrite, listeners, engine)


def resume(run_dir: Path | str, *, listeners: Sequence[Listener] = ()) -> RunResult:
    """Go on with a run after its last full round; a complete run is returned as it is.

    Raises
    ------
    CheckpointError
        If the folder is not a run, or its checkpoints do not fit its configuration.
    """
    return _resume(run_dir, listeners, _in_process)


def _run(
    config: Config, overwrite: bool, listeners: Sequence[Listener], engine: Engine
) -> RunResult:
    with RunFolder.create(config, overwrite=overwrite) as folder:
        return _federate(config, folder, listeners, engine)


def _resume(run_dir: Path | str, listeners: Sequence[Listener], engine: Engine) -> RunResult:
    folder = RunFolder(run_dir)
    config = folder.config()
    with folder:
        records = folder.records()
        if _is_complete(folder, config):
            return RunResult(folder.path, folder.adapter_dir, records, interrupted=False)
        if records and not any(folder.checkpoints_dir.glob("round-*")):
            raise CheckpointError(
                f"{folder.path} has results up to round {records[-1].round} but no checkpoint to "
                "go on from (references have none); start it again under another name, or with "
                "overwrite"
            )
        # we hold the lock, so temp files here are those of a process that was killed
        inside = (folder.checkpoints_dir, folder.adapter_dir, *folder.clients_dir.glob("*"))
        for part in (folder.path, *inside):
            remove_leftovers(part)
        folder.note_resume(records[-1].round if records else 0)
        return _federate(config, folder, [*_recorder_of(folder, config), *listeners], engine)


def reference(
    config: Config,
    kind: str,
    *,
    overwrite: bool = False,
    listeners: Sequence[Listener] = (),
) -> RunResult:
    """Train what federation is compared with, in a run folder of its own.

    Parameters
    ----------
    kind : str
        "centralised": one adapter on the pooled rows, with as many optimiser steps as all clients
        together. "local-only": every client on its own.

    Raises
    ------
    ConfigError
        If `kind` is neither.
    """
    if kind not in REFERENCES:
        raise ConfigError(f"reference is one of {', '.join(REFERENCES)}; got {kind!r}")
    named = config.with_overrides({"name": f"{config.name}-{kind}", **WITHOUT_FLUSH})
    return _train_reference(named, kind, overwrite, listeners)


def record(
    config: Config,
    to: Path | str | None = None,
    kind: RecordingKind = "federated",
    overwrite: bool = False,
    listeners: Sequence[Listener] = (),
) -> RecordingResult:
    """Run an experiment and keep every client's update of every round.

    Called again it goes on with a federated run that was stopped, and with its recording; the
    others have no checkpoints and start again. A complete one is returned as it is.

    Parameters
    ----------
    config : Config
        The experiment. Its uplink must be lossless: a recording holds what clients computed.
    to : path-like, optional
        Folder of the recording, new or empty; by default ``recording`` in the run folder.
    kind : str
        "federated"; "centralised": the reference of that name, recorded as one client whose
        updates are the changes over each round's worth of steps; or "local-only": every client on
        its own rows from start to end, recorded likewise.
    overwrite : bool
        Remove an earlier run of the same name, and a recording in `to`, first.
    listeners : sequence of callables
        Told every event (`cgfedllm.events`) while it runs.

    Raises
    ------
    ConfigError
        If the uplink is lossy, `kind` is unknown, or the run folder has another configuration.
    RecordingError
        If `to` holds something else, or the run was not recorded from its start.
    """
    from cgfedllm.tgap.index import KINDS
    from cgfedllm.tgap.recorder import check_lossless

    if kind not in KINDS:
        raise ConfigError(f"a recording is one of {', '.join(KINDS)}; got {kind!r}")
    if kind == "federated":
        check_lossless(config)
    return _record(config, to, kind, overwrite, listeners)


def _record(
    config: Config,
    to: Path | str | None,
    kind: RecordingKind,
    overwrite: bool,
    listeners: Sequence[Listener],
) -> RecordingResult:
    """Record what the server decodes, whatever the uplink."""
    from cgfedllm.tgap.index import is_recording
    from cgfedllm.tgap.recorder import Recorder, check_goes_on
    from cgfedllm.tgap.writer import check_vacant

    if kind != "federated":
        config = config.with_overrides({"name": f"{config.name}-{kind}", **WITHOUT_FLUSH})
    folder = RunFolder(config.run_dir)
    target = folder.recording_dir if to is None else Path(to)
    if target.resolve() == folder.path.resolve():
        raise ConfigError(f"{target} is the folder of the run itself; record into another one")
    started = folder.exists() and folder.has_progress() and not overwrite
    if started:
        check_goes_on(folder, target, config, kind)
    elif not overwrite or not (to is None or is_recording(target)):
        check_vacant(target)
    if started and (kind == "federated" or _is_complete(folder, config)):
        result = resume(folder.path, listeners=listeners)
    else:
        heard: list[Listener] = [Recorder(folder, target, config, kind), *listeners]
        if kind == "federated":
            result = run(config, overwrite=overwrite, listeners=heard)
        else:
            result = _train_reference(config, kind, overwrite or started, heard)
    return _recorded(result, target)


def pretrain(
    config: Config,
    codec: str,
    *,
    recordings: Sequence[Path | str] = (),
    to: Path | str | None = None,
    overwrite: bool = False,
    listeners: Sequence[Listener] = (),
) -> PretrainResult:
    """Fit a learned codec on recorded updates before it is used (TGAP).

    Without `recordings` updates are collected first, on D1 (`data.part`) and as ``[tgap]`` says,
    in the run ``OUTPUT/NAME-tgap``. Called again after a stop it goes on: with a federated run
    after its last round, with a fit after its last epoch, to the same codec. A complete one is
    returned as it is.

    Parameters
    ----------
    config : Config
        The experiment; table ``[tgap]`` says how updates are collected, sampled and held out.
    codec : str
        ``NAME`` or ``NAME:key=value,...``, a codec that learns.
    recordings : sequence of path-like
        Folders that `record` made, of one adapter.
    to : path-like, optional
        The codec file; ``OUTPUT/NAME-tgap/codec.safetensors`` by default.
    overwrite : bool
        Fit anew, and collect anew, whatever is there.
    listeners : sequence of callables
        Told every event (`cgfedllm.events`).

    Raises
    ------
    ConfigError
        If the codec learns nothing, or ``[tgap]`` asks for what cannot be.
    DataError
        If a client has no row for D1 or none for D2.
    RecordingError
        If a recording is missing, damaged, of another adapter than the rest, or too short to be
        split.
    CheckpointError
        If another codec or fit is there.
    RunInterrupted
        After Ctrl-C; call again to go on.
    """
    from cgfedllm.pretraining import Pretraining
    from cgfedllm.tgap.recording import Recording

    job = Pretraining(config, codec, to, collects=not recordings)
    opened = [Recording.open(folder) for folder in recordings]
    job.begin(overwrite)
    if not recordings:
        opened = [_collected(job.collecting, config.tgap.collect, overwrite, listeners)]
    with events.listening(*listeners):
        return job.run(opened)


def compare(
    config: Config,
    codecs: Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    variants: Sequence[str] = (),
    references: Sequence[str] = (),
    tune: Sequence[str] = (),
    tune_rounds: int | None = None,
    results: Path | str | None = None,
    listeners: Sequence[Listener] = (),
) -> ComparisonResult:
    """Train with several uplink codecs (or other settings): held-out NLL against bytes.

    Seeds are paired, and all runs share the split of the configuration's own seed. Runs lie in
    ``output/NAME-CODEC-seedS``. Those that are complete are not run again, and those that were
    stopped are resumed, so a comparison can be filled over time; the results file always tells
    what is there.

    Parameters
    ----------
    codecs : sequence of str
        Uplink codecs, ``NAME`` or ``NAME:key=value,key=value``; the first is what the others are
        compared with. The one the configuration itself names keeps its options.
    seeds : sequence of int
        Each candidate runs once a seed.
    variants : sequence of str
        ``LABEL:config.key=value,config.key=value``: other settings, compared like a codec.
    references : sequence of str
        "centralised" and "local-only" rows, run once a seed as well.
    tune : sequence of str
        ``KEY=value,value``: every candidate tries this grid first, with a seed of its own, and
        keeps what is best on the clients' validation rows. Nothing is tuned without it.
    tune_rounds : int, optional
        Rounds of a trial; by default as many as the run has.
    results : path-like, optional
        Results file; ``output/NAME-compare.json`` by default.

    Raises
    ------
    ConfigError
        If a candidate or the grid cannot be read, or a run folder holds another configuration.
    RunInterrupted
        After Ctrl-C; call again to go on.
    """
    from cgfedllm.analysis.candidates import candidates_of
    from cgfedllm.analysis.closed_loop import ClosedLoop
    from cgfedllm.analysis.tuning import parse_tuning

    candidates = candidates_of(config, codecs, variants, references)
    tuning = parse_tuning(tune, tune_rounds, config, seeds)
    target = Path(results or default_results(config))
    loop = ClosedLoop(config, candidates, seeds, tuning, Cells(listeners), target)
    outcome = loop.run()
    return ComparisonResult(outcome.entries, outcome.results, outcome.failures)


def default_results(config: Config) -> Path:
    """Where the results of a comparison go unless told otherwise."""
    return Path(config.output) / f"{config.name}-compare.json"


def plot_bench(folder: Path | str) -> list[Path]:
    """Draw the figures of `bench_codecs` anew from the tables it wrote; nothing is measured.

    Returns
    -------
    list of Path
        PNG and SVG files, in the same folder.

    Raises
    ------
    CheckpointError
        If a table is missing or damaged.
    """
    from cgfedllm.report.figures.open_loop import draw_open_loop
    from cgfedllm.report.open_loop import read_results

    return draw_open_loop(read_results(Path(folder)), Path(folder))


def plot_comparison(results: Path | str, to: Path | str | None = None) -> list[Path]:
    """Draw the figure of a results file of `compare`; nothing is run.

    Parameters
    ----------
    results : path-like
        The results file; cells may be missing in it.
    to : path-like, optional
        Where, without a suffix; beside the results file by default.

    Returns
    -------
    list of Path
        A PNG and an SVG.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged or something else.
    """
    from cgfedllm.analysis.closed_loop_file import read_results
    from cgfedllm.report.figures.closed_loop import plot_closed_loop

    return plot_closed_loop(read_results(results), to or Path(results).with_suffix(""))


def bench_codecs(
    recordings: Sequence[Path | str],
    to: Path | str,
    *,
    codecs: Sequence[str] = (),
    codec_files: Sequence[Path | str] = (),
    peers: Sequence[str] = (),
    rates: Sequence[float] = (),
    updates: int = 16,
    seed: int = 0,
    structure: bool = False,
    memory: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> BenchResult:
    """Code recorded updates one by one with every codec at every rate (open loop).

    Parameters
    ----------
    recordings : sequence of path-like
        Folders that `record` made.
    to : path-like
        Folder for tables and figures.
    codecs : sequence of str
        ``NAME`` or ``NAME:key=value,key=value``; by default all that need no training.
    codec_files : sequence of path-like
        Pre-trained codecs (`pretrain` writes them), at every rate if they have one to set. Each is
        refused where it was fitted on an update that is measured: the measured ones are of the
        later half of a recording's rounds.
    peers : sequence of str
        Other projects' compressors to measure beside them, by name (`analysis.peers`); none by
        default.
    rates : sequence of float
        Bits per parameter that codecs with a rate are asked for.
    updates : int
        Most updates measured of each recording.
    seed : int
        Seed that both ends share.
    structure : bool
        Also tell what the updates look like.
    memory : bool
        Also measure the memory one update takes.
    progress : callable
        Told how many updates are done, of how many, and what is worked on.

    Raises
    ------
    ConfigError
        If there is no recording, or a codec, a peer, a rate or a number cannot be used.
    MissingExtraError
        If a peer is not installed.
    RecordingError
        If a recording is missing or damaged.
    """
    from cgfedllm.bench import bench_codecs as bench

    return bench(
        recordings,
        to,
        codecs=codecs,
        codec_files=codec_files,
        peers=peers,
        rates=rates,
        updates=updates,
        seed=seed,
        structure=structure,
        memory=memory,
        progress=progress,
    )


def analyze(
    recordings: Sequence[Path | str],
    to: Path | str,
    *,
    codecs: Sequence[str] = (),
    codec_files: Sequence[Path | str] = (),
    parts: Sequence[str] = (),
    updates: int = 64,
    seed: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> AnalysisResult:
    """Analyse what codecs keep of recorded updates, and what updates look like.

    Parameters
    ----------
    recordings : sequence of path-like
        Folders that `record` made.
    to : path-like
        Folder for tables and figures.
    codecs : sequence of str
        ``NAME`` or ``NAME:key=value,key=value``; by default, and without codec files, all that lose
        something and need no training. The predictor that sends nothing is always beside them.
    codec_files : sequence of path-like
        Pre-trained codecs (`pretrain` writes them). Rounds that one was fitted on are marked, and
        left out of whatever is pooled.
    parts : sequence of str
        "fidelity", "rate", "swap", "noise", "distributions"; all by default.
    updates : int
        Most updates taken of each recording.
    seed : int
        Seed that both ends share, and of the noise.
    progress : callable
        Told how many encodings are done, of how many, and what is worked on.

    Raises
    ------
    ConfigError
        If there is no recording, or a codec, a part or a number cannot be used.
    CodecStateError
        If a codec file is missing or damaged.
    RecordingError
        If a recording is missing, damaged, or too short for what is asked.
    """
    from cgfedllm.analyses import analyse_recordings

    return analyse_recordings(
        recordings,
        to,
        codecs=codecs,
        codec_files=codec_files,
        parts=parts,
        updates=updates,
        seed=seed,
        progress=progress,
    )


def reproduce_paper(
    scale: str = "small",
    experiment: str | None = None,
    *,
    config: Config | None = None,
    to: Path | str | None = None,
    benchmarks: Sequence[str] = ("ceval", "mmlu"),
    hub: Path | str | None = None,
    shots: int = 0,
    per_subject: int | None = None,
    listeners: Sequence[Listener] = (),
) -> PaperResult:
    """The comparison of CG-FedLLM's paper: base, centralised, FedAvg, and its auto-encoders.

    Each step leaves its result in ``config.output``; called again, it goes on with what is missing.

    Parameters
    ----------
    scale : str
        "small" or "paper".
    experiment : str, optional
        Which of the scale's experiments; by default its first.
    config : Config, optional
        In place of the one that ships (`experiment_config`).
    to : path-like, optional
        Folder for table and figure; ``OUTPUT/NAME-paper`` by default.
    benchmarks : sequence of str
        "ceval", "mmlu", both or none; they need the extra `eval`.
    hub : path-like, optional
        Folder that holds the benchmarks' data sets under their hub ids.
    shots : int
        Worked examples in each prompt.
    per_subject : int, optional
        Questions asked of a subject; by default what the scale says.

    Raises
    ------
    ConfigError
        If scale or experiment do not exist, or a run folder holds another configuration.
    RunInterrupted
        After Ctrl-C; call again to go on.
    """
    from cgfedllm.reproduce.paper import Reproduction
    from cgfedllm.reproduce.scales import experiment_config, find_scale

    found = find_scale(scale)
    config = config or experiment_config(found, experiment)
    return Reproduction(
        config,
        Path(to) if to else Path(config.output) / f"{config.name}-paper",
        benchmarks=tuple(benchmarks),
        hub=None if hub is None else Path(hub),
        shots=shots,
        per_subject=per_subject or found.per_subject,
        about={"scale": scale, "experiment": experiment or found.experiments[0]},
        listeners=listeners,
    ).run()


def evaluate(
    path: Path | str,
    *,
    config: Config | None = None,
    split: str = "heldout",
    base: bool = True,
    benchmarks: Sequence[str] = (),
    shots: int = 0,
    per_subject: int | None = None,
    hub: Path | str | None = None,
    samples: int = 0,
    max_new_tokens: int = 256,
    to: Path | str | None = None,
) -> EvaluationResult:
    """Loss of an adapter on a run's rows, benchmarks and answers, beside the base model's.

    Parameters
    ----------
    path : path-like
        A run folder, or a PEFT adapter folder together with `config`.
    config : Config, optional
        Model and data; a run folder has its own.
    split : str
        "heldout" (the global set), "validation" or "test" (one row a client).
    base : bool
        Also evaluate the base model without the adapter.
    benchmarks : sequence of str
        "ceval", "mmlu", "gsm8k"; they need the extra `eval`.
    shots : int
        Worked examples in each prompt of a benchmark.
    per_subject : int, optional
        Most questions asked of a subject: a fixed random sample, the same in every evaluation.
    hub : path-like, optional
        Folder that holds the benchmarks' data sets under their hub ids; by default they come from
        the hub or its cache.
    samples : int
        Prompts of the split to be answered in words.
    max_new_tokens : int
        Most tokens of an answer in words.
    to : path-like, optional
        Folder for results. By default ``evaluation`` in the run folder (for an adapter on its own,
        in the working folder) where there is more than losses; called again, benchmarks go on
        where they were stopped.

    Raises
    ------
    CheckpointError, AdapterError, ConfigError
        If there is no adapter, it does not fit the model, the split is unknown or empty, or a
        number cannot be used.
    DataError
        If a benchmark's questions cannot be read.
    MissingExtraError
        If lm-eval is needed and not installed.
    """
    return evaluate_adapter(
        Path(path),
        config,
        split,
        base=base,
        benchmarks=benchmarks,
        shots=shots,
        per_subject=per_subject,
        hub=None if hub is None else Path(hub),
        samples=samples,
        max_new_tokens=max_new_tokens,
        to=None if to is None else Path(to),
    )


def report(runs: Sequence[Path | str], to: Path | str | None = None) -> Path:
    """Write the HTML report of a run, or one that compares several; nothing is trained.

    Parameters
    ----------
    runs : sequence of path-like
        Run folders, finished or not.
    to : path-like, optional
        The file. By default ``report.html`` in the run folder of a single run, and
        ``comparison.html`` in the working folder for several.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    CheckpointError
        If one of them is not a run folder.
    ConfigError
        If there is none.
    StorageError
        If the file cannot be written.
    """
    from cgfedllm.report.html.page import write_comparison, write_run_report

    if not runs:
        raise ConfigError("report needs a run folder")
    folders = [RunFolder(path) for path in runs]
    target = None if to is None else Path(to)
    if len(folders) == 1:
        return write_run_report(folders[0], target)
    return write_comparison(folders, target or Path("comparison.html"))


def export(run_dir: Path | str, to: Path | str, *, merge: bool = False) -> Path:
    """Write a run's adapter in PEFT format, or the whole model with the adapter merged in.

    Returns
    -------
    Path
        The folder written, `to`.

    Raises
    ------
    CheckpointError
        If the run has no adapter yet.
    StorageError
        If `to` cannot be written.
    """
    folder, target = RunFolder(run_dir), Path(to)
    workspace = Workspace(folder.config(), folder.path)
    adapter = read_adapter(folder.adapter_dir, workspace)
    if merge:
        workspace.reset_frozen_factors()
        workspace.model.set_adapter(adapter)
        workspace.model.save_merged(target)
    else:
        _save(target, workspace, adapter)
    return target


def _in_process(config: Config, run_dir: Path) -> None:
    from cgfedllm.federation.engine import run_in_process

    run_in_process(config, run_dir)


def _federate(
    config: Config, folder: RunFolder, listeners: Sequence[Listener], engine: Engine
) -> RunResult:
    with _watched(config, folder, listeners):
        try:
            engine(config, folder.path)
            interrupted = False
        except RunInterrupted:
            interrupted = True
        _write_report(folder)
    return RunResult(folder.path, folder.adapter_dir, folder.records(), interrupted)


def _train_reference(
    config: Config, kind: str, overwrite: bool, listeners: Sequence[Listener]
) -> RunResult:
    """Train a reference in the folder that `config` names."""
    from cgfedllm.training.reference import train_centralised, train_local_only

    with RunFolder.create(config, overwrite=overwrite) as folder:
        workspace = _workspace(config, folder)
        with _watched(config, folder, listeners):
            _announce(workspace, kind)
            interrupted = False
            try:
                if kind == "centralised":
                    adapter = train_centralised(workspace, folder.append)
                    _save(folder.adapter_dir, workspace, adapter)
                else:
                    for name, own in train_local_only(workspace, folder.append).items():
                        _save(folder.adapter_dir / name, workspace, own)
            except RunInterrupted:
                interrupted = True
            _write_report(folder)
        return RunResult(folder.path, folder.adapter_dir, folder.records(), interrupted)


def _write_report(folder: RunFolder) -> None:
    """Write the report; a run is worth more than its face, so nothing that goes wrong stops it."""
    from cgfedllm.report.html.page import write_run_report

    try:
        write_run_report(folder)
    except Exception as error:
        events.publish(
            events.Notice(
                f"the report could not be written ({error}); nothing else is missing, and "
                f"`cgfedllm report {folder.path}` tries again",
                level="warning",
            )
        )


def _collected(
    config: Config, kind: RecordingKind, overwrite: bool, listeners: Sequence[Listener]
) -> Recording:
    """A complete recording to pre-train on."""
    from cgfedllm.tgap.recording import Recording

    result = _record(config, None, kind, overwrite, listeners)
    if result.run.interrupted:
        again = "goes on" if kind == "federated" else "collects again"
        raise RunInterrupted(f"stopped while updates were collected; the same command {again}")
    return Recording.open(result.path)


def _recorder_of(folder: RunFolder, config: Config) -> list[Listener]:
    """What keeps the recording of a run that is recorded."""
    from cgfedllm.tgap.recorder import Recorder, noted

    target = noted(folder)
    return [] if target is None else [Recorder(folder, target, config)]


def _recorded(result: RunResult, target: Path) -> RecordingResult:
    from cgfedllm.tgap.recorder import check_rounds
    from cgfedllm.tgap.recording import Recording

    try:
        recording = Recording.open(target)
    except RecordingError:
        if result.interrupted:  # in its first round, perhaps
            return RecordingResult(result, target)
        raise
    if not result.interrupted:
        check_rounds(target, recording.rounds(), result.records[-1].round)
    return RecordingResult(
        result,
        target,
        updates=len(recording),
        rounds=len(recording.rounds()),
        clients=len(recording.clients()),
        bytes=recording.nbytes,
    )


@contextmanager
def _watched(config: Config, folder: RunFolder, listeners: Sequence[Listener]) -> Iterator[None]:
    import flwr.serverapp  # noqa: F401  # sets up its logging when it is first imported

    from cgfedllm.report.trackers import trackers

    # Flower reports every round on stderr; ours is told through events
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with ExitStack() as stack:
        active = [stack.enter_context(tracker) for tracker in trackers(config, folder)]
        stack.enter_context(events.listening(*active, *listeners))
        stack.enter_context(stoppable())
        yield


def _workspace(config: Config, folder: RunFolder) -> Workspace:
    return workspace_for(config.to_toml(), str(folder.path))


def _announce(workspace: Workspace, kind: str) -> None:
    events.publish(
        events.RunStarted(
            name=workspace.config.name,
            rounds=workspace.config.federation.rounds,
            clients=tuple(client.name for client in workspace.data.clients),
            parameters=workspace.spec.size,
            uplink_codec=f"none ({kind})",
            downlink_codec=f"none ({kind})",
        )
    )


class Cells:
    """Runs experiments, each in the folder its configuration names, as far as they have not been.

    Parameters
    ----------
    listeners : sequence of callables
        Told every event while one runs.
    """

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners
        self._parameters: dict[str, int] = {}

    def check(self, config: Config) -> None:
        """Refuse to take an earlier run of another configuration for a cell."""
        folder = RunFolder(config.run_dir)
        if folder.exists() and not _is_of(folder, config):
            raise ConfigError(
                f"{folder.path} holds a run of another configuration; compare under another "
                "--name, or remove it"
            )

    def finished(self, config: Config) -> list[RoundRecord] | None:
        """Records of a complete run."""
        folder = RunFolder(config.run_dir)
        return folder.records() if _is_complete(folder, config) else None

    def rounds_done(self, config: Config) -> int:
        """Rounds on disk."""
        records = RunFolder(config.run_dir).records()
        return records[-1].round if records else 0

    def complete(self, config: Config, candidate: Candidate) -> list[RoundRecord]:
        """Run only as far as it has not been."""
        known = self.finished(config)
        if known is not None:
            return known
        folder = RunFolder(config.run_dir)
        if candidate.kind == "reference":
            result = _train_reference(config, candidate.label, True, self._listeners)
        elif folder.exists():
            result = resume(folder.path, listeners=self._listeners)
        else:
            result = run(config, listeners=self._listeners)
        check_not_interrupted(result)
        return result.records

    def parameters(self, config: Config) -> int:
        """Values in one update, by arithmetic alone."""
        from cgfedllm.plan import make_plan

        key = Config(model=config.model, lora=config.lora).to_toml()
        if key not in self._parameters:
            self._parameters[key] = make_plan(config).model.trained
        return self._parameters[key]


def check_not_interrupted(result: RunResult) -> None:
    """Stop what a run is only a part of, if the run was stopped.

    Raises
    ------
    RunInterrupted
        If it was.
    """
    if result.interrupted:
        check_interrupt()
        raise RunInterrupted("stopped; run the same command again to go on")


def _goes_on(folder: RunFolder, config: Config) -> bool:
    """Whether the folder holds the beginning of this very run."""
    return _is_of(folder, config) and not _is_complete(folder, config)


def _is_of(folder: RunFolder, config: Config) -> bool:
    """Whether the run in the folder is of this configuration."""
    from cgfedllm.federation.checkpoint import config_fingerprint

    return config_fingerprint(folder.config()) == config_fingerprint(config)


def _is_complete(folder: RunFolder, config: Config) -> bool:
    from cgfedllm.peft_format import CONFIG

    # the last file an adapter folder gets; "local-only" has one a client
    if not any(folder.adapter_dir.glob(f"**/{CONFIG}")):
        return False
    records = folder.records()
    return bool(records) and records[-1].round >= config.last_round


def _save(folder: Path, workspace: Workspace, adapter: AdapterUpdate) -> None:
    from cgfedllm.peft_format import save_adapter

    whole = adapter if adapter.spec.size == workspace.model.full_spec.size else None
    save_adapter(folder, whole or workspace.whole(adapter), workspace.config)
