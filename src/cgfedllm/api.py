"""The public API: everything the command line does, as functions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cgfedllm import events
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.analysis.candidates import REFERENCES, Candidate
from cgfedllm.analysis.curves import ComparisonEntry
from cgfedllm.config import WITHOUT_FLUSH, Config
from cgfedllm.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    RecordingError,
    RunInterrupted,
)
from cgfedllm.interrupt import check_interrupt, stoppable
from cgfedllm.metrics import RoundRecord
from cgfedllm.runs import RunFolder
from cgfedllm.storage import remove_leftovers
from cgfedllm.workspace import Workspace, workspace_for

if TYPE_CHECKING:
    from cgfedllm.bench import BenchResult

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


@dataclass(frozen=True)
class SplitResult:
    """Loss on one set of rows."""

    name: str
    nll: float
    perplexity: float
    rows: int
    label_tokens: int


@dataclass(frozen=True)
class EvaluationResult:
    """Loss of an adapter, and of the base model without it, on the same rows."""

    split: str
    adapter: list[SplitResult]
    base: list[SplitResult] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str]]:
        """For a table of two columns."""
        before = {result.name: result.nll for result in self.base}
        return [
            (
                result.name,
                f"NLL {result.nll:.4f} (base {before[result.name]:.4f}, "
                f"{result.nll - before[result.name]:+.4f}), perplexity {result.perplexity:.2f}, "
                f"{result.rows} rows, {result.label_tokens} tokens",
            )
            for result in self.adapter
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return asdict(self)


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
    with RunFolder.create(config, overwrite=overwrite) as folder:
        return _federate(config, folder, listeners)


def resume(run_dir: Path | str, *, listeners: Sequence[Listener] = ()) -> RunResult:
    """Go on with a run after its last full round; a complete run is returned as it is.

    Raises
    ------
    CheckpointError
        If the folder is not a run, or its checkpoints do not fit its configuration.
    """
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
        for part in (folder.checkpoints_dir, folder.adapter_dir, *folder.clients_dir.glob("*")):
            remove_leftovers(part)
        folder.note_resume(records[-1].round if records else 0)
        return _federate(config, folder, [*_recorder_of(folder, config), *listeners])


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
    kind: Literal["federated", "centralised"] = "federated",
    overwrite: bool = False,
    listeners: Sequence[Listener] = (),
) -> RecordingResult:
    """Run an experiment and keep every client's update of every round.

    Called again it goes on with a federated run that was stopped, and with its recording; a
    centralised one has no checkpoints and starts again. A complete one is returned as it is.

    Parameters
    ----------
    config : Config
        The experiment. Its uplink must be lossless: a recording holds what clients computed.
    to : path-like, optional
        Folder of the recording, new or empty; by default ``recording`` in the run folder.
    kind : str
        "federated", or "centralised": the reference of that name, recorded as one client whose
        updates are the changes over each round's worth of steps.
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
    from cgfedllm.tgap.index import is_recording
    from cgfedllm.tgap.recorder import Recorder, check_goes_on, check_lossless
    from cgfedllm.tgap.writer import check_vacant

    if kind not in ("federated", "centralised"):
        raise ConfigError(f"a recording is federated or centralised; got {kind!r}")
    if kind == "centralised":
        config = config.with_overrides({"name": f"{config.name}-{kind}", **WITHOUT_FLUSH})
    else:
        check_lossless(config)
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
    loop = ClosedLoop(config, candidates, seeds, tuning, _Cells(listeners), target)
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
        ``NAME`` or ``NAME:key=value,key=value``; all registered ones by default.
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
        peers=peers,
        rates=rates,
        updates=updates,
        seed=seed,
        structure=structure,
        memory=memory,
        progress=progress,
    )


def evaluate(
    path: Path | str, *, config: Config | None = None, split: str = "heldout"
) -> EvaluationResult:
    """Negative log-likelihood of an adapter on a run's rows, beside the base model's.

    Parameters
    ----------
    path : path-like
        A run folder, or a PEFT adapter folder together with `config`.
    config : Config, optional
        Model and data; a run folder has its own.
    split : str
        "heldout" (the global set), "validation" or "test" (one row a client).

    Raises
    ------
    CheckpointError, AdapterError, ConfigError
        If there is no adapter, it does not fit the model, or the split is unknown or empty.
    """
    if split not in ("heldout", "validation", "test"):
        raise ConfigError(f"split is one of heldout, validation, test; got {split!r}")
    folder = RunFolder(path)
    adapter_dir = folder.adapter_dir if folder.exists() else Path(path)
    config = config or (folder.config() if folder.exists() else None)
    if config is None:
        raise ConfigError(f"{path} is not a run folder; say with --config what to evaluate it on")
    workspace = Workspace(config, Path(path))
    adapter = _load_adapter(adapter_dir, workspace)
    return EvaluationResult(
        split=split,
        adapter=_scores(workspace, adapter, split),
        base=_scores(workspace, workspace.start, split),
    )


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
    adapter = _load_adapter(folder.adapter_dir, workspace)
    if merge:
        workspace.reset_frozen_factors()
        workspace.model.set_adapter(adapter)
        workspace.model.save_merged(target)
    else:
        _save(target, workspace, adapter)
    return target


def _federate(config: Config, folder: RunFolder, listeners: Sequence[Listener]) -> RunResult:
    # engines are chosen here and nowhere else; the apps do not know which one runs them
    from cgfedllm.federation.engine import run_in_process

    with _watched(config, folder, listeners):
        try:
            run_in_process(config, folder.path)
        except RunInterrupted:
            return RunResult(folder.path, folder.adapter_dir, folder.records(), interrupted=True)
    return RunResult(folder.path, folder.adapter_dir, folder.records(), interrupted=False)


def _train_reference(
    config: Config, kind: str, overwrite: bool, listeners: Sequence[Listener]
) -> RunResult:
    """Train a reference in the folder that `config` names."""
    from cgfedllm.training.reference import train_centralised, train_local_only

    with RunFolder.create(config, overwrite=overwrite) as folder:
        workspace = _workspace(config, folder)
        with _watched(config, folder, listeners):
            _announce(workspace, kind)
            try:
                if kind == "centralised":
                    adapter = train_centralised(workspace, folder.append)
                    _save(folder.adapter_dir, workspace, adapter)
                else:
                    for name, own in train_local_only(workspace, folder.append).items():
                        _save(folder.adapter_dir / name, workspace, own)
            except RunInterrupted:
                return RunResult(folder.path, folder.adapter_dir, folder.records(), True)
        return RunResult(folder.path, folder.adapter_dir, folder.records(), False)


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


class _Cells:
    """Runs the cells of a comparison, each in the folder its configuration names."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners
        self._parameters: dict[str, int] = {}

    def check(self, config: Config) -> None:
        """Refuse to take an earlier run of another configuration for a cell."""
        from cgfedllm.federation.checkpoint import config_fingerprint

        folder = RunFolder(config.run_dir)
        if folder.exists() and config_fingerprint(folder.config()) != config_fingerprint(config):
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
        if result.interrupted:
            check_interrupt()
            raise RunInterrupted("comparison stopped; run the same command again to go on")
        return result.records

    def parameters(self, config: Config) -> int:
        """Values in one update, by arithmetic alone."""
        from cgfedllm.plan import make_plan

        key = Config(model=config.model, lora=config.lora).to_toml()
        if key not in self._parameters:
            self._parameters[key] = make_plan(config).model.trained
        return self._parameters[key]


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


def _load_adapter(folder: Path, workspace: Workspace) -> AdapterUpdate:
    """Values of an adapter folder on the model's full spec."""
    from cgfedllm.peft_format import WEIGHTS, load_adapter

    if not (folder / WEIGHTS).exists():
        raise CheckpointError(
            f"{folder} holds no adapter yet; let the run finish (cgfedllm resume {folder.parent})"
        )
    loaded = load_adapter(folder)
    try:
        return AdapterUpdate.from_arrays(workspace.model.full_spec, loaded.views())
    except AdapterError as error:
        raise AdapterError(f"{folder} does not fit this model and [lora] table: {error}") from None


def _scores(workspace: Workspace, adapter: AdapterUpdate, split: str) -> list[SplitResult]:
    from cgfedllm.evaluation.nll import evaluate_nll

    owners = [None] if split == "heldout" else list(workspace.data.clients)
    results = []
    for owner in owners:
        examples = workspace.examples(owner, split)
        if not examples:
            continue
        result = evaluate_nll(
            workspace.model,
            adapter,
            examples,
            packed=workspace.packed,
            batch_size=workspace.config.evaluation.batch_size,
        )
        name = "held-out" if owner is None else owner.name
        results.append(
            SplitResult(name, result.nll, result.perplexity, result.rows, result.label_tokens)
        )
    if not results:
        raise ConfigError(
            f"the {split!r} split is empty; set data.splits.{split} (or data.heldout_source)"
        )
    return results
