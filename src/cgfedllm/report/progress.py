"""Where a run stands, gathered from its events; knows nothing of how it is shown."""

from __future__ import annotations

import time
from collections.abc import Callable

from cgfedllm.events import (
    ClientFinished,
    ClientStarted,
    EvaluationProgress,
    Event,
    RoundFinished,
    RoundStarted,
    RunStarted,
    StepFinished,
)
from cgfedllm.metrics import RoundRecord

_SMOOTHING = 0.3


class Progress:
    """Numbers for a progress display.

    Parameters
    ----------
    clock : callable
        Seconds; another one in tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._training_since: float | None = None
        self._done_at_start = 0
        self.rounds = 0
        """Rounds of the whole run; 0 until it has started."""
        self.round = 0
        """The round going on."""
        self.done = 0
        """Rounds finished, those before a resume included."""
        self.clients_sampled = 0
        self.clients_done = 0
        self.client: str | None = None
        self.step = 0
        self.steps = 0
        self.loss: float | None = None
        self.tokens_per_second: float | None = None
        self.evaluating: EvaluationProgress | None = None
        self.record: RoundRecord | None = None
        """The round finished last."""
        self.nll_change: float | None = None
        """Held-out NLL of that round less that of the evaluation before it."""
        self._nll: float | None = None

    def update(self, event: Event) -> None:
        """Take an event in."""
        if isinstance(event, RunStarted):
            self.rounds = event.rounds
            self.done = self._done_at_start = event.resumed_from
            # one watcher may see several runs, as in a comparison
            self.record = self.nll_change = self._nll = self._training_since = None
        elif isinstance(event, RoundStarted):
            self._start_round(event)
        elif isinstance(event, ClientStarted):
            self.client, self.step, self.steps = event.client, 0, event.steps
            self.evaluating = None
        elif isinstance(event, StepFinished):
            self._finish_step(event)
        elif isinstance(event, ClientFinished):
            self.clients_done += 1
            self.client = None
        elif isinstance(event, EvaluationProgress):
            self.evaluating = event
        elif isinstance(event, RoundFinished):
            self._finish_round(event.record)

    def fraction(self) -> float:
        """Share of the run's rounds that is done, the round going on included in parts."""
        return (self.done + self._share_of_round()) / self.rounds if self.rounds else 0.0

    def seconds_left(self) -> float | None:
        """Time until the last round ends at the speed so far; None before one can tell."""
        if self._training_since is None or not self.rounds:
            return None
        worked = self.done + self._share_of_round() - self._done_at_start
        if worked < 0.05:  # the first steps are slow and say little
            return None
        spent = self._clock() - self._training_since
        return max(0.0, spent * (self.rounds - self._done_at_start - worked) / worked)

    def _start_round(self, event: RoundStarted) -> None:
        self.round, self.clients_sampled, self.clients_done = event.round, event.clients, 0
        self.client = self.evaluating = None
        if event.round > 0 and self._training_since is None:
            self._training_since = self._clock()

    def _finish_step(self, event: StepFinished) -> None:
        if self.client != event.client:  # training without a federation starts no clients
            self.client, self.steps = event.client, 0
        self.step, self.loss = event.step, event.loss
        self.evaluating = None
        if event.seconds > 0:
            speed = event.tokens / event.seconds
            before = self.tokens_per_second
            self.tokens_per_second = (
                speed if before is None else before + _SMOOTHING * (speed - before)
            )

    def _finish_round(self, record: RoundRecord) -> None:
        self.record = record
        self.done = max(self.done, record.round)
        self.clients_done = self.clients_sampled = 0
        self.client = self.evaluating = None
        now, before = record.heldout_nll, self._nll
        self.nll_change = now - before if now is not None and before is not None else None
        self._nll = now if now is not None else before

    def _share_of_round(self) -> float:
        if self.round <= self.done or not self.clients_sampled:
            return 0.0
        within = self.step / self.steps if self.client is not None and self.steps else 0.0
        return min(1.0, (self.clients_done + within) / self.clients_sampled)
