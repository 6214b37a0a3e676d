"""Watching a run: rich, plain, quiet and JSON, from events alone."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from cgfedllm import events as ev
from cgfedllm.metrics import RoundRecord
from cgfedllm.report.console import (
    JsonWatcher,
    Outcome,
    PlainWatcher,
    QuietWatcher,
    RichWatcher,
    Watcher,
    watcher,
)
from cgfedllm.report.progress import Progress

CLIENTS = ("numpy", "torch", "transformers")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def play(watch: Watcher, records: list[RoundRecord], clock: Clock, stop: str = "") -> None:
    """Publish a run of 3 rounds; `stop` ends in the midst of round 2, client torch, step 2."""
    watch(ev.RunStarted("trial", 3, CLIENTS, 921_600, "int8", "raw"))
    watch(ev.RoundStarted(0, 0))
    watch(ev.RoundFinished(records[0]))
    watch(ev.Notice("12 rows were cut [to 512 tokens]"))
    for record in records[1:]:
        watch(ev.RoundStarted(record.round, 3))
        for client in CLIENTS:
            watch(ev.ClientStarted(client, record.round, 4))
            for step in range(1, 5):
                clock.now += 2.0
                watch(ev.StepFinished(client, step, 2.345, 2000, 1.0))
                if stop and (record.round, client, step) == (2, "torch", 2):
                    return
            watch(ev.ClientFinished(client, record.round, 2.3, 1000))
        watch(ev.EvaluationProgress("held-out", 1, 4))
        watch(ev.EvaluationProgress("held-out", 4, 4))
        watch(ev.RoundFinished(record))
    watch(ev.Notice("client 'x' left out: NaN loss", "warning"))


def _outcome(records: list[RoundRecord], interrupted: bool = False) -> Outcome:
    return Outcome(
        records, Path("runs/trial/adapter"), Path("runs/trial"), interrupted, "int8", "raw"
    )


def _text(console: Console) -> str:
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def _rich(clock: Clock) -> tuple[RichWatcher, Console]:
    console = Console(file=StringIO(), width=80, color_system=None)
    return RichWatcher(console, clock), console


def test_rich_prints_a_line_a_round(records: list[RoundRecord]) -> None:
    clock = Clock()
    watch, console = _rich(clock)
    play(watch, records, clock)
    watch.finish(_outcome(records))
    text = _text(console)
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines)
    header = next(line for line in lines if line.startswith("round"))
    last = next(line for line in lines if line.startswith("3/3"))
    assert last.split() == [
        "3/3", "2.4000", "-0.2000", "2.64", "MiB", "7.91", "MiB", "4.00x", "21.5", "s",
    ]  # fmt: skip
    assert len(header) == len(last)
    assert "info: 12 rows were cut [to 512 tokens]" in text
    assert "warning: client 'x' left out" in text
    assert "runs/trial/adapter" in text


def test_codec_state_is_told_in_the_rounds_that_send_it(learning: list[RoundRecord]) -> None:
    said = "codec state 3.00 MiB down (total 3.00 MiB)"
    clock = Clock()
    watch, console = _rich(clock)
    play(watch, learning, clock)
    lines = _text(console).splitlines()
    assert [line.strip() for line in lines if "codec state" in line] == [said]
    assert lines[next(i for i, line in enumerate(lines) if said in line) - 1].startswith("2/3")
    assert all(len(line) <= 80 for line in lines)
    out = StringIO()
    play(PlainWatcher(out, clock), learning, clock)
    assert [said in line for line in out.getvalue().splitlines() if line.startswith("round ")] == [
        False, False, True, False,
    ]  # fmt: skip


def test_rich_bars_show_where_the_run_is(records: list[RoundRecord]) -> None:
    clock = Clock()
    watch, console = _rich(clock)
    console.print(watch.render())
    assert "setting up" in _text(console)
    play(watch, records, clock, stop="in round 2")
    console.print(watch.render())
    bars = _text(console).splitlines()[-4:]
    assert "1/3" in bars[0]
    assert "left" in bars[0]
    assert "1/3" in bars[1]
    assert "2/4 torch" in bars[2]
    assert "loss 2.345, 2,000 tokens/s" in bars[3]
    watch(ev.EvaluationProgress("held-out", 1, 4))
    console.print(watch.render())
    assert "1/4 held-out" in _text(console).splitlines()[-2]


def test_rich_works_live(records: list[RoundRecord]) -> None:
    clock = Clock()
    console = Console(file=StringIO(), width=80, force_terminal=True)
    with RichWatcher(console, clock) as watch:
        play(watch, records, clock)
    watch.finish(_outcome(records))
    assert "runs/trial/adapter" in _text(console)


def test_plain_has_no_control_codes_and_tells_enough(records: list[RoundRecord]) -> None:
    clock, out = Clock(), StringIO()
    watch = PlainWatcher(out, clock)
    play(watch, records, clock)
    watch.finish(_outcome(records))
    text = out.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    assert "trial: 3 clients, 3 rounds; 921,600 parameters (3.52 MiB as fp32)" in text
    assert "round 2/3: held-out NLL 2.6000 (-0.2000), uplink 2.64 MiB (total 5.27 MiB" in text
    assert "4.00x fewer than fp32), 1 reply not used, 21.5 s, about 24.0 s left" in text
    assert "\n12 rows were cut" in text
    assert "warning: client 'x' left out" in text
    assert "Adapter  runs/trial/adapter" in text


def test_plain_gives_signs_of_life_but_not_every_step(records: list[RoundRecord]) -> None:
    clock, out = Clock(), StringIO()
    play(PlainWatcher(out, clock), records, clock)
    signs = [line for line in out.getvalue().splitlines() if line.startswith("  round")]
    # one after 16 of the 24 seconds of each round; 36 steps were made
    assert len(signs) == 3
    assert signs[0] == "  round 1/3: client 2/3 (torch), step 4/4, loss 2.345, 2,000 tokens/s"


def test_quiet_prints_the_adapter_and_nothing_else(records: list[RoundRecord]) -> None:
    out = StringIO()
    watch = QuietWatcher(out)
    play(watch, records, Clock())
    watch.finish(_outcome(records))
    assert out.getvalue() == "runs/trial/adapter\n"


def test_json_is_one_object_a_line(records: list[RoundRecord]) -> None:
    out, err = StringIO(), StringIO()
    watch = JsonWatcher(out, err)
    play(watch, records, Clock())
    watch.finish(_outcome(records))
    *rounds, last = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [RoundRecord.from_dict(row) for row in rounds] == records
    assert last["adapter_dir"] == "runs/trial/adapter"
    assert last["interrupted"] is False
    assert last["summary"]["uplink"]["times_fewer"] == pytest.approx(4.0)
    assert "warning: client 'x'" in err.getvalue()


def test_an_interrupted_run_names_no_adapter(records: list[RoundRecord]) -> None:
    quiet, plain = StringIO(), StringIO()
    QuietWatcher(quiet).finish(_outcome(records[:2], interrupted=True))
    PlainWatcher(plain).finish(_outcome(records[:2], interrupted=True))
    assert quiet.getvalue() == ""
    assert "Adapter" not in plain.getvalue()
    assert "global" in plain.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("auto", PlainWatcher), ("plain", PlainWatcher), ("rich", RichWatcher),
     ("quiet", QuietWatcher), ("json", JsonWatcher)],
)  # fmt: skip
def test_modes(mode: str, kind: type[Watcher]) -> None:
    assert isinstance(watcher(mode, stdout=StringIO()), kind)  # type: ignore[arg-type]


def test_time_left_follows_the_rounds_done_in_this_process() -> None:
    clock = Clock()
    progress = Progress(clock)
    progress.update(ev.RunStarted("r", 10, ("a", "b"), 10, "raw", "raw", resumed_from=6))
    progress.update(ev.RoundStarted(7, 2))
    assert progress.seconds_left() is None
    progress.update(ev.ClientStarted("a", 7, 4))
    clock.now = 10.0
    progress.update(ev.StepFinished("a", 2, 1.0, 10, 1.0))
    # a quarter of round 7 took 10 s; 3.75 rounds are left
    assert progress.seconds_left() == pytest.approx(150.0)
    progress.update(ev.RoundFinished(RoundRecord(7)))
    assert progress.seconds_left() == pytest.approx(30.0)
    assert progress.fraction() == pytest.approx(0.7)


def test_a_round_tried_again_starts_over() -> None:
    progress = Progress(Clock())
    progress.update(ev.RunStarted("r", 2, ("a", "b"), 10, "raw", "raw"))
    for _ in range(2):
        progress.update(ev.RoundStarted(1, 2))
        assert progress.clients_done == 0
        progress.update(ev.ClientStarted("a", 1, 4))
        progress.update(ev.ClientFinished("a", 1, 1.0, 10))
    assert progress.fraction() == pytest.approx(0.25)


def test_plain_signs_of_life_name_what_goes_on() -> None:
    clock, out = Clock(), StringIO()
    watch = PlainWatcher(out, clock)
    watch(ev.RunStarted("r", 2, ("a", "b"), 10, "raw", "raw"))
    watch(ev.RoundStarted(1, 2))
    watch(ev.ClientStarted("a", 1, 1))
    watch(ev.ClientFinished("a", 1, 1.0, 10))
    for event in (
        ev.EvaluationProgress("held-out", 1, 2),
        ev.EvaluationProgress("held-out", 2, 2),
        ev.StepFinished("centralised", 3, 1.5, 100, 0.1),
    ):
        clock.now += 20
        watch(event)
    assert out.getvalue().splitlines()[1:] == [
        "  round 1/2: evaluating held-out, batch 1/2",
        "  round 1/2: evaluating held-out, batch 2/2",
        "  round 1/2: client 2/2 (centralised), step 3, loss 1.500, 1,000 tokens/s",
    ]
    assert "None" not in out.getvalue()


def test_a_second_run_is_not_compared_with_the_first() -> None:
    progress = Progress()
    for _ in range(2):  # as `cgfedllm compare` does
        progress.update(ev.RunStarted("r", 1, ("a",), 10, "raw", "raw"))
        for round_, nll in enumerate((3.0, 2.0)):
            progress.update(ev.RoundFinished(RoundRecord(round=round_, heldout_nll=nll)))
            assert progress.nll_change == (None if round_ == 0 else -1.0)
