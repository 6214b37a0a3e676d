"""What a person (or a script) sees while a run goes on.

Four ways to watch, all listeners and context managers:

- rich: live bars, one line a round above them (a terminal)
- plain: one line a round and a sign of life every few seconds, no control codes (a log file)
- quiet: nothing but the path of the adapter at the end
- json: one `RoundRecord` a line on stdout, a summary object at the end
"""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Literal

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cgfedllm import events
from cgfedllm.events import (
    EvaluationProgress,
    Event,
    Notice,
    RoundFinished,
    RunStarted,
    StepFinished,
)
from cgfedllm.metrics import RoundRecord
from cgfedllm.report.progress import Progress
from cgfedllm.report.summary import summarise
from cgfedllm.report.tables import print_final
from cgfedllm.report.units import count_of, human_bytes, human_ratio, human_seconds
from cgfedllm.runs import RunFolder

if TYPE_CHECKING:
    from cgfedllm.api import RunResult
    from cgfedllm.config import Config

Mode = Literal["auto", "rich", "plain", "quiet", "json"]
_SIGN_OF_LIFE_SECONDS = 15.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended, for the last words."""

    records: Sequence[RoundRecord]
    adapter_dir: Path
    run_dir: Path
    interrupted: bool = False
    uplink_codec: str = ""
    downlink_codec: str = ""
    report: Path | None = None


class Watcher(ABC):
    """A listener for one run; enter it before the run starts, `finish` it after."""

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    @abstractmethod
    def __call__(self, event: Event) -> None:
        """Hear an event."""

    @abstractmethod
    def finish(self, outcome: Outcome) -> None:
        """Say how the run ended."""


def watcher(mode: Mode = "auto", *, stdout: IO[str] | None = None) -> Watcher:
    """Choose a way to watch.

    Parameters
    ----------
    mode : str
        "auto" is rich on a terminal and plain elsewhere.
    stdout : text stream, optional
        Instead of `sys.stdout`.
    """
    stream = stdout if stdout is not None else sys.stdout
    if mode == "auto":
        mode = "rich" if Console(file=stream).is_terminal else "plain"
    if mode == "quiet":
        return QuietWatcher(stream)
    if mode == "json":
        return JsonWatcher(stream, sys.stderr)
    if mode == "plain":
        return PlainWatcher(stream)
    return RichWatcher(Console(file=stream, highlight=False))


def watch_run(call: Callable[[], RunResult], config: Config, mode: Mode = "auto") -> RunResult:
    """Do what runs an experiment, show it meanwhile, and say how it ended."""
    with watcher(mode) as watch, events.listening(watch):
        result = call()
    report = RunFolder(result.run_dir).report_path
    watch.finish(
        Outcome(
            records=result.records,
            adapter_dir=result.adapter_dir,
            run_dir=result.run_dir,
            interrupted=result.interrupted,
            uplink_codec=config.uplink.name,
            downlink_codec=config.downlink.name,
            report=report if report.is_file() else None,
        )
    )
    return result


class QuietWatcher(Watcher):
    """Prints the adapter's path when the run has ended, nothing else."""

    def __init__(self, stdout: IO[str]) -> None:
        self._stdout = stdout

    def __call__(self, event: Event) -> None:
        """Hear an event."""

    def finish(self, outcome: Outcome) -> None:
        """Print the path of the adapter."""
        if not outcome.interrupted:
            print(outcome.adapter_dir, file=self._stdout, flush=True)


class JsonWatcher(Watcher):
    """JSON lines on stdout, notices as plain text on stderr."""

    def __init__(self, stdout: IO[str], stderr: IO[str]) -> None:
        self._stdout = stdout
        self._stderr = stderr

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        if isinstance(event, RoundFinished):
            self._line(event.record.to_dict())
        elif isinstance(event, Notice):
            print(f"{event.level}: {event.text}", file=self._stderr, flush=True)

    def finish(self, outcome: Outcome) -> None:
        """Print the summary object, the only one with the key "summary"."""
        self._line(
            {
                "summary": summarise(outcome.records).to_dict(),
                "run_dir": str(outcome.run_dir),
                "adapter_dir": str(outcome.adapter_dir),
                "report": None if outcome.report is None else str(outcome.report),
                "interrupted": outcome.interrupted,
            }
        )

    def _line(self, value: object) -> None:
        print(json.dumps(value, ensure_ascii=False), file=self._stdout, flush=True)


class PlainWatcher(Watcher):
    """Lines for a log file."""

    def __init__(self, stdout: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._stdout = stdout
        self._clock = clock
        self._progress = Progress(clock)
        self._spoke = clock()

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        progress = self._progress
        progress.update(event)
        if isinstance(event, RunStarted):
            self._say(headline(event))
        elif isinstance(event, RoundFinished):
            line = f"round {event.record.round}/{progress.rounds}: {round_line(progress)}"
            left = progress.seconds_left()
            self._say(line + (f", about {human_seconds(left)} left" if left else ""))
        elif isinstance(event, Notice):
            self._say(event.text if event.level == "info" else f"{event.level}: {event.text}")
        elif (
            isinstance(event, StepFinished | EvaluationProgress)
            # a silent log looks like a hung run
            and self._clock() - self._spoke >= _SIGN_OF_LIFE_SECONDS
        ):
            self._say(f"  round {progress.round}/{progress.rounds}: {activity(progress)}")

    def finish(self, outcome: Outcome) -> None:
        """Print the final table."""
        # wide, so that no cell and no path is folded; a log has no width
        console = Console(file=self._stdout, width=120, color_system=None, highlight=False)
        _print_outcome(console, outcome)

    def _say(self, line: str) -> None:
        print(line, file=self._stdout, flush=True)
        self._spoke = self._clock()


class RichWatcher(Watcher):
    """Live bars in a terminal, with a line printed above them as each round finishes.

    Parameters
    ----------
    console : Console
        Where to draw.
    clock : callable
        Seconds, for the time left.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._progress = Progress(clock)
        self._live = Live(
            get_renderable=self.render, console=console, refresh_per_second=4, transient=True
        )

    def __enter__(self) -> Watcher:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        self._progress.update(event)
        if isinstance(event, RunStarted):
            self._print(f"[bold]{escape(headline(event))}[/]")
            self._print(f"[bold]{_columns('round', 'held-out NLL', '', 'uplink', 'total')}"
                        f"{'fewer':>8}{'time':>12}[/]")  # fmt: skip
        elif isinstance(event, RoundFinished):
            self._print(self._row(event.record))
        elif isinstance(event, Notice):
            style = "yellow" if event.level == "warning" else "cyan"
            self._print(f"[{style}]{event.level}:[/] {escape(event.text)}")

    def finish(self, outcome: Outcome) -> None:
        """Print the final table."""
        self._live.stop()
        _print_outcome(self._console, outcome)

    def render(self) -> RenderableType:
        """Draw the bars as they stand now."""
        p = self._progress
        if not p.rounds:
            return Text("setting up ...", style="dim")
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=10, no_wrap=True)
        grid.add_column(width=22)
        grid.add_column(no_wrap=True)
        left = p.seconds_left()
        after = f"   {human_seconds(left)} left" if left is not None else ""
        grid.add_row("rounds", _bar(p.fraction()), f"{p.done}/{p.rounds}{after}")
        if p.evaluating is not None:
            event = p.evaluating
            share = event.done / event.total if event.total else 0.0
            grid.add_row(
                "evaluating", _bar(share), Text(f"{event.done}/{event.total} {event.what}")
            )
        else:
            if p.clients_sampled:
                share = p.clients_done / p.clients_sampled
                grid.add_row("clients", _bar(share), f"{p.clients_done}/{p.clients_sampled}")
            if p.client is not None:
                share = p.step / p.steps if p.steps else 0.0
                grid.add_row("steps", _bar(share), Text(f"{steps_done(p)} {p.client}"))
        return Group(grid, Text(f"{'':11}{numbers(p)}", style="dim", no_wrap=True))

    def _row(self, record: RoundRecord) -> str:
        p = self._progress
        nll = f"{record.heldout_nll:.4f}" if record.heldout_nll is not None else "-"
        change = p.nll_change
        colour = "green" if change is not None and change < 0 else "red"
        text = _columns(
            f"{record.round}/{p.rounds}",
            nll,
            f"{change:+.4f}" if change is not None else "",
            human_bytes(record.uplink_bytes),
            human_bytes(record.uplink_bytes_total),
        )
        if change is not None:
            text = text.replace(f"{change:+.4f}", f"[{colour}]{change:+.4f}[/]", 1)
        fewer, spent = human_ratio(_fewer(record)), human_seconds(record.seconds.get("total", 0.0))
        codec = f"\n{'':9}{_codec_state(record)}" if record.codec_bytes else ""
        return f"{text}{fewer:>8}{spent:>12}{codec}"

    def _print(self, markup: str) -> None:
        self._console.print(markup, highlight=False)


def headline(event: RunStarted) -> str:
    """One line on what is about to run."""
    again = f", going on after round {event.resumed_from}" if event.resumed_from else ""
    weight = human_bytes(4 * event.parameters)
    return (
        f"{event.name}: {count_of(len(event.clients), 'client')}, "
        f"{count_of(event.rounds, 'round')}{again}; "
        f"{event.parameters:,} parameters ({weight} as fp32), "
        f"uplink {event.uplink_codec}, downlink {event.downlink_codec}"
    )


def round_line(progress: Progress) -> str:
    """Sum up the round that has just finished."""
    record = progress.record
    if record is None:
        return ""
    parts = []
    if record.heldout_nll is not None:
        change = progress.nll_change
        shown = f" ({change:+.4f})" if change is not None else ""
        parts.append(f"held-out NLL {record.heldout_nll:.4f}{shown}")
    if record.uplink_bytes:
        parts.append(
            f"uplink {human_bytes(record.uplink_bytes)} "
            f"(total {human_bytes(record.uplink_bytes_total)}, "
            f"{human_ratio(_fewer(record))} fewer than fp32)"
        )
    if record.codec_bytes:
        parts.append(_codec_state(record))
    if record.secagg_uplink_bytes:
        up, down = record.secagg_uplink_bytes, record.secagg_downlink_bytes
        parts.append(f"secure aggregation {human_bytes(up)} up, {human_bytes(down)} down")
    if record.failures:
        parts.append(f"{count_of(len(record.failures), 'reply', 'replies')} not used")
    if "total" in record.seconds:
        parts.append(human_seconds(record.seconds["total"]))
    return ", ".join(parts)


def activity(progress: Progress) -> str:
    """Say what is being done right now."""
    if progress.evaluating is not None:
        event = progress.evaluating
        return f"evaluating {event.what}, batch {event.done}/{event.total}"
    if progress.client is None:
        return f"{progress.clients_done}/{progress.clients_sampled} clients done"
    who = progress.client
    if progress.clients_sampled:
        who = f"client {progress.clients_done + 1}/{progress.clients_sampled} ({who})"
    return f"{who}, step {steps_done(progress)}, {numbers(progress)}"


def steps_done(progress: Progress) -> str:
    """Steps of the client at work, against those it will make where that is known."""
    return f"{progress.step}/{progress.steps}" if progress.steps else str(progress.step)


def numbers(progress: Progress) -> str:
    """Loss and speed of the latest steps."""
    parts = []
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    return ", ".join(parts)


def _columns(round: str, nll: str, change: str, uplink: str, total: str) -> str:
    return f"{round:<9}{nll:>12}{change:>10}{uplink:>12}{total:>12}"


def _fewer(record: RoundRecord) -> float | None:
    sent = record.uplink_bytes_total
    return record.uplink_bytes_fp32_total / sent if sent else None


def _codec_state(record: RoundRecord) -> str:
    total = human_bytes(record.codec_bytes_total)
    return f"codec state {human_bytes(record.codec_bytes)} down (total {total})"


def _bar(share: float) -> Bar:
    return Bar(1.0, 0.0, min(max(share, 0.0), 1.0), width=22, color="cyan", bgcolor="grey23")


def _print_outcome(console: Console, outcome: Outcome) -> None:
    print_final(
        console,
        outcome.records,
        run_dir=outcome.run_dir,
        adapter_dir=None if outcome.interrupted else outcome.adapter_dir,
        uplink_codec=outcome.uplink_codec,
        downlink_codec=outcome.downlink_codec,
        report=outcome.report,
    )
