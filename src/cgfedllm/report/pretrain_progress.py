"""What a person sees while a codec is pre-trained: the run that collects updates, then the fit."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cgfedllm.events import EvaluationProgress, Event, FitEpoch, FitStarted, Notice, RunStarted
from cgfedllm.report.console import Mode, Watcher, watcher
from cgfedllm.report.units import count_of

_SIGN_OF_LIFE_SECONDS = 15.0


class PretrainProgress:
    """A listener; on stderr, because stdout is for the result.

    Parameters
    ----------
    mode : str
        "auto" (a bar on a terminal, lines elsewhere) or "quiet".
    console : Console, optional
        By default stderr.
    clock : callable
        Seconds, for the pauses between lines.
    """

    def __init__(
        self,
        mode: Mode = "auto",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mode: Mode = mode
        self._console = console or Console(file=sys.stderr, highlight=False)
        self._watch: Watcher | None = None
        self._fit: FitStarted | None = None
        self._bar: Progress | None = None
        self._clock = clock
        self._spoke = clock()

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        if self._mode == "quiet":
            return
        if isinstance(event, FitStarted):
            self._stop_watching()
            self._begin(event)
        elif isinstance(event, FitEpoch):
            self._epoch(event)
        elif isinstance(event, Notice) and self._watch is None:
            self._say(event.text if event.level == "info" else f"{event.level}: {event.text}")
        elif self._fit is not None and isinstance(event, EvaluationProgress):
            self._evaluate(event)
        elif isinstance(event, RunStarted) or self._watch is not None:
            self._collecting(event)

    def __enter__(self) -> PretrainProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop_watching()
        if self._bar is not None:
            self._bar.stop()

    def _collecting(self, event: Event) -> None:
        if self._watch is None:
            # not before there is a run: its bars and those of the fit would be drawn together
            self._watch = watcher(self._mode, stdout=self._console.file)
            self._watch.__enter__()
        self._watch(event)

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            self._watch = None

    def _begin(self, event: FitStarted) -> None:
        self._fit = event
        after = f", going on after epoch {event.resumed_from}" if event.resumed_from else ""
        self._say(
            f"fitting {event.codec} on {count_of(event.updates, 'update')}, judged by "
            f"{count_of(event.validation, 'other')}, at most {count_of(event.epochs, 'epoch')}"
            f"{after}"
        )
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[what]}", markup=False),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.add_task("epochs", total=event.epochs, completed=event.resumed_from, what="")
            self._bar.start()

    def _epoch(self, event: FitEpoch) -> None:
        done = int(event.row["epoch"])
        what = (
            f"validation SNR {event.row['validation_snr_db']:.2f} dB, best after epoch {event.best}"
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, what=what)
        elif done == 1 or self._clock() - self._spoke >= _SIGN_OF_LIFE_SECONDS:
            epochs = self._fit.epochs if self._fit else done
            self._say(f"epoch {done}/{epochs}: {what}")

    def _evaluate(self, event: EvaluationProgress) -> None:
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                description="coding",
                completed=event.done,
                total=event.total,
                what=event.what,
            )

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)
        self._spoke = self._clock()
