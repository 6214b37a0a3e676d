"""The public API: everything the command line does, as functions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cgfedllm import events
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.config import CodecConfig, Config
from cgfedllm.errors import AdapterError, CheckpointError, ConfigError, RunInterrupted
from cgfedllm.interrupt import check_interrupt, stoppable
from cgfedllm.metrics import RoundRecord
from cgfedllm.report.comparison import ComparisonEntry
from cgfedllm.runs import RunFolder
from cgfedllm.storage import remove_leftovers
from cgfedllm.workspace import Workspace, workspace_for

Listener = Callable[[events.Event], None]
Split = Literal["heldout", "validation", "test"]
REFERENCES = ("centralised", "local-only")


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
    """Runs of one experiment with several codecs and seeds."""

    entries: list[ComparisonEntry]


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
        return _federate(config, folder, listeners)


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
    named = config.with_overrides({"name": f"{config.name}-{kind}"})
    return _train_reference(named, kind, overwrite, listeners)


def compare(
    config: Config,
    codecs: Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    references: Sequence[str] = (),
    listeners: Sequence[Listener] = (),
) -> ComparisonResult:
    """Run one experiment with several uplink codecs; seeds are paired.

    Runs lie in ``output/NAME-CODEC-seedS``. Those that are complete are not run again, and those
    that were stopped are resumed, so a comparison can be filled over time.

    Parameters
    ----------
    codecs : sequence of str
        Names of uplink codecs; the one the configuration itself names keeps its options.
    seeds : sequence of int
        Each codec runs once a seed.
    references : sequence of str
        "centralised" and "local-only" rows, run once a seed as well.

    Raises
    ------
    RunInterrupted
        After Ctrl-C; call again to go on.
    """
    cells = {
        (label, seed): _cell(config, label, seed)
        for seed in seeds
        for label in (*references, *codecs)
    }
    for cell in cells.values():  # before hours are spent on the others
        _check_same(cell)
    entries = {
        (label, seed): ComparisonEntry(label, seed, _compared(cell, label, listeners))
        for (label, seed), cell in cells.items()
    }
    labels = dict.fromkeys((*codecs, *references))
    return ComparisonResult([entries[label, seed] for label in labels for seed in seeds])


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


def _cell(config: Config, label: str, seed: int) -> Config:
    """Configuration of one cell of a comparison, under the name of its run folder."""
    if label in REFERENCES:
        return config.with_overrides({"seed": seed, "name": f"{config.name}-seed{seed}-{label}"})
    changes: dict[str, Any] = {"seed": seed, "name": f"{config.name}-{label}-seed{seed}"}
    if label != config.uplink.name:
        changes |= {"uplink.name": label, "uplink.options": CodecConfig().options}
    return config.with_overrides(changes)


def _check_same(cell: Config) -> None:
    """Refuse to take an earlier run of another configuration for a cell of a comparison."""
    from cgfedllm.federation.checkpoint import config_fingerprint

    folder = RunFolder(cell.run_dir)
    if folder.exists() and config_fingerprint(folder.config()) != config_fingerprint(cell):
        raise ConfigError(
            f"{folder.path} holds a run of another configuration; compare under another "
            "--name, or remove it"
        )


def _compared(cell: Config, label: str, listeners: Sequence[Listener]) -> list[RoundRecord]:
    """Records of one cell of a comparison, run only as far as it has not been."""
    folder = RunFolder(cell.run_dir)
    if _is_complete(folder, cell):
        return folder.records()
    if label in REFERENCES:
        result = _train_reference(cell, label, True, listeners)
    elif folder.exists():
        result = resume(folder.path, listeners=listeners)
    else:
        result = run(cell, listeners=listeners)
    if result.interrupted:
        check_interrupt()
        raise RunInterrupted("comparison stopped; run the same command again to go on")
    return result.records


def _is_complete(folder: RunFolder, config: Config) -> bool:
    from cgfedllm.peft_format import CONFIG

    # the last file an adapter folder gets; "local-only" has one a client
    if not any(folder.adapter_dir.glob(f"**/{CONFIG}")):
        return False
    records = folder.records()
    return bool(records) and records[-1].round >= config.federation.rounds


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
