"""How far a bench or evaluation is: a bar on a terminal, lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cgfedllm.events import EvaluationProgress, Event

_RECENT_SECONDS = 20.0
"""Time left is told from this much of the past, so that a pause or a slow codec is forgotten."""


class BenchProgress:
    """Shows how many steps are done, of how many.

    Parameters
    ----------
    console : Console, optional
        By default stderr: stdout is for results.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr, highlight=False)
        self._live: Progress | None = None
        self._said = ""
        self._since = time.monotonic()

    def update(self, done: int, total: int, what: str) -> None:
        """Tell that `done` of `total` steps are done, `what` being worked on."""
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=done, total=total, what=what)
        elif what != self._said:
            spent = time.monotonic() - self._since
            self._console.print(
                f"[{spent:6.1f} s] {done}/{total} {what}", markup=False, soft_wrap=True
            )
        self._said = what

    def hear(self, event: Event) -> None:
        """Show the progress of an evaluation (`events.listening`)."""
        if isinstance(event, EvaluationProgress):
            self.update(event.done, event.total, event.what)

    def __enter__(self) -> BenchProgress:
        if self._console.is_terminal:
            self._live = Progress(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[what]}", markup=False),
                console=self._console,
                transient=True,
                speed_estimate_period=_RECENT_SECONDS,
            )
            self._live.add_task("", total=None, what="")
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
