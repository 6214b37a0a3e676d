"""The closed loop: every candidate trains, with every seed, and pays for its bytes.

::

    for seed:                       breadth first: a matrix half filled is already a comparison
        for candidate:
            tune it                 before its first cell, on trials of its own
            run its cell            resumed where it was stopped, skipped where it is complete
            write the results file  atomically

What runs a cell is handed in, so this file knows nothing of engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cgfedllm import events
from cgfedllm.analysis import closed_loop_file
from cgfedllm.analysis.candidates import Candidate
from cgfedllm.analysis.closed_loop_file import Cell, Matrix
from cgfedllm.analysis.curves import ComparisonEntry
from cgfedllm.analysis.tuning import Choice, Setting, Trial, Tuning, Verdict, choose, judge
from cgfedllm.config import Config
from cgfedllm.errors import FederationError, TrainingError
from cgfedllm.metrics import RoundRecord
from cgfedllm.storage import write_json

_FAILURES = (TrainingError, FederationError)


class Runner(Protocol):
    """What runs cells and trials, each in the run folder that its configuration names."""

    def check(self, config: Config) -> None:
        """Raise ConfigError if the folder holds a run of another configuration."""

    def finished(self, config: Config) -> list[RoundRecord] | None:
        """Records of a complete run; None if there is none."""

    def rounds_done(self, config: Config) -> int:
        """Rounds on disk of a run that is not complete."""

    def complete(self, config: Config, candidate: Candidate) -> list[RoundRecord]:
        """Run as far as it has not been; raise RunInterrupted if it is stopped."""

    def parameters(self, config: Config) -> int:
        """Values in one update."""


@dataclass(frozen=True)
class Outcome:
    """What a comparison left behind.

    Parameters
    ----------
    entries : list of ComparisonEntry
        Runs that came to their end, candidate by candidate.
    results : Path
        The results file.
    failures : dict of str
        Cells (or tunings) that failed, and why.
    """

    entries: list[ComparisonEntry]
    results: Path
    failures: dict[str, str] = field(default_factory=dict)


class ClosedLoop:
    """One comparison.

    Parameters
    ----------
    base : Config
        What all candidates share.
    candidates : sequence of Candidate
        The first is what the others are compared with.
    seeds : sequence of int
        Every candidate runs once with each.
    tuning : Tuning or None
        The grid of trials; None: every candidate keeps its settings.
    runner : Runner
        Runs cells.
    results : Path
        File to write.
    """

    def __init__(
        self,
        base: Config,
        candidates: Sequence[Candidate],
        seeds: Sequence[int],
        tuning: Tuning | None,
        runner: Runner,
        results: Path,
    ) -> None:
        self._base = base
        self._candidates = list(candidates)
        self._tuning = tuning
        self._runner = runner
        self._results = results
        self._choices: dict[str, Choice] = {}
        self._verdicts: dict[str, Verdict] = {}
        self._matrix = Matrix(
            base,
            self._candidates,
            list(seeds),
            tuning,
            parameters=runner.parameters(base),
            own_parameters={c.label: runner.parameters(c.config(base)) for c in self._candidates},
        )

    def run(self) -> Outcome:
        """Fill the matrix.

        A cell whose training fails (it diverged, say) is noted with its reason and the others
        go on: a candidate that cannot be trained is a result too.

        Raises
        ------
        ConfigError
            If a run folder holds a run of another configuration.
        RunInterrupted
            After Ctrl-C; the same call goes on.
        """
        self._check()
        self._collect()
        self._write()
        for seed in self._matrix.seeds:
            for candidate in self._candidates:
                self._fill(candidate, seed)
        return Outcome(self._entries(), self._results, dict(self._matrix.failures))

    def _check(self) -> None:
        """Find foreign runs in the way before hours are spent on the others."""
        for candidate in self._candidates:
            if self._tuned(candidate):
                for trial in self._trials(candidate):
                    self._runner.check(trial.config)
            else:
                for seed in self._matrix.seeds:
                    self._runner.check(candidate.cell(self._base, seed, {}))

    def _collect(self) -> None:
        """Take in what is complete, so that the file never holds less than is known."""
        for candidate in self._candidates:
            if not self._tuning_is_done(candidate):
                continue
            for seed in self._matrix.seeds:
                config = self._cell(candidate, seed)
                if config is None:
                    continue
                self._runner.check(config)
                records = self._runner.finished(config)
                if records is not None:
                    self._done(candidate, seed, config, records)

    def _fill(self, candidate: Candidate, seed: int) -> None:
        if (candidate.label, seed) in self._matrix.cells:
            return
        config = self._cell(candidate, seed)
        if config is None:
            self._matrix.failures[f"{candidate.label}, seed {seed}"] = "every tuning trial failed"
        else:
            self._runner.check(config)
            try:
                records = self._runner.complete(config, candidate)
            except _FAILURES as error:
                self._matrix.failures[f"{candidate.label}, seed {seed}"] = str(error)
                events.publish(events.Notice(f"{config.name} failed: {error}", "warning"))
            else:
                self._done(candidate, seed, config, records)
        self._write()

    def _cell(self, candidate: Candidate, seed: int) -> Config | None:
        """Configuration of a cell, tuned if it is to be; None if no trial gave a setting."""
        setting: Setting | None = {}
        if self._tuned(candidate):
            setting = self._tune(candidate).setting
        return None if setting is None else candidate.cell(self._base, seed, setting)

    def _tuned(self, candidate: Candidate) -> bool:
        return self._tuning is not None and candidate.kind != "reference"

    def _trials(self, candidate: Candidate) -> list[Trial]:
        assert self._tuning is not None
        return self._tuning.trials(self._base, candidate)

    def _tuning_is_done(self, candidate: Candidate) -> bool:
        return not self._tuned(candidate) or all(
            self._runner.finished(trial.config) is not None for trial in self._trials(candidate)
        )

    def _tune(self, candidate: Candidate) -> Choice:
        """Run the candidate's trials, as far as they have not been, and choose."""
        assert self._tuning is not None
        if candidate.label not in self._choices:
            verdicts = [self._try(trial, candidate) for trial in self._trials(candidate)]
            choice = choose(verdicts, self._tuning.default(self._base, candidate))
            self._choices[candidate.label] = self._matrix.choices[candidate.label] = choice
            self._write()
        return self._choices[candidate.label]

    def _try(self, trial: Trial, candidate: Candidate) -> Verdict:
        name = trial.config.name
        if name not in self._verdicts:
            try:
                records = self._runner.complete(trial.config, candidate)
                self._verdicts[name] = judge(trial, records)
            except _FAILURES as error:
                self._verdicts[name] = Verdict(trial, None, failure=str(error))
        known = self._verdicts[name]
        return Verdict(trial, known.nll, known.clients, known.failure)

    def _done(
        self, candidate: Candidate, seed: int, config: Config, records: list[RoundRecord]
    ) -> None:
        self._matrix.cells[candidate.label, seed] = Cell(config, records)

    def _write(self) -> None:
        done = {}
        for candidate in self._candidates:
            for seed in self._matrix.seeds:
                # the folder's name does not depend on what tuning may yet choose
                config = candidate.cell(self._base, seed, {})
                if (candidate.label, seed) not in self._matrix.cells:
                    done[candidate.label, seed] = self._runner.rounds_done(config)
        write_json(self._results, closed_loop_file.document(self._matrix, done))

    def _entries(self) -> list[ComparisonEntry]:
        return [
            ComparisonEntry(c.label, seed, cell.records, self._matrix.scale(c.label))
            for c in self._candidates
            for seed in self._matrix.seeds
            if (cell := self._matrix.cells.get((c.label, seed)))
        ]
