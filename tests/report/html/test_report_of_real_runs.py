"""Runs leave a report behind, stopped ones too, and none fails for the want of it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cgfedllm
from cgfedllm import api, events
from cgfedllm.config import Config
from cgfedllm.errors import ConfigError
from cgfedllm.runs import RunFolder

MakeConfig = Callable[..., Config]
ReadPage = Callable[[Path], Any]

SMALL = ("federation.rounds=2", "training.local_steps=1")


def test_a_run_writes_its_report(tiny_config: MakeConfig, read_page: ReadPage) -> None:
    result = cgfedllm.run(tiny_config(*SMALL, "uplink.name=int8"))
    page = read_page(RunFolder(result.run_dir).report_path)
    assert "finished" in page.of("span")
    change = f"{result.records[0].heldout_nll - result.records[-1].heldout_nll:.4f}"
    assert change in page.text
    assert set(page.table("Clients over the whole run")) == {"north", "south", "west"}
    assert page.table("Change of the weights by module, over all layers")
    sent = page.table("Bytes of the whole run, over all clients")["Uplink"]
    assert sent["codec"] == "int8"
    kept = page.table("SNR and cosine by module, over the whole run")
    assert float(kept["all modules"]["SNR (dB)"]) > 15
    # written anew, it is the same
    before = RunFolder(result.run_dir).report_path.read_bytes()
    assert api.report([result.run_dir]).read_bytes() == before


def test_a_stopped_run_says_so_and_the_resumed_one_too(
    tiny_config: MakeConfig, read_page: ReadPage
) -> None:
    def stop(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished) and event.record.round == 1:
            signal.raise_signal(signal.SIGINT)

    stopped = api.run(tiny_config(*SMALL), listeners=[stop])
    assert stopped.interrupted
    path = RunFolder(stopped.run_dir).report_path
    assert "Stopped before its end: 1 of 2 rounds done." in read_page(path).text
    api.resume(stopped.run_dir)
    page = read_page(path)
    assert "finished" in page.of("span")
    assert "went on after round 1" in page.text


def test_references_have_one_each(
    tiny_config: MakeConfig, read_page: ReadPage, tmp_path: Path
) -> None:
    results = [api.reference(tiny_config(*SMALL), kind) for kind in ("centralised", "local-only")]
    for result in results:
        page = read_page(RunFolder(result.run_dir).report_path)
        assert "2 rounds of training without a federation: nothing travelled." in page.text
    both = api.report([result.run_dir for result in results], tmp_path / "both.html")
    assert list(read_page(both).table("Outcome of each run")) == [
        "tiny-centralised",
        "tiny-local-only",
    ]


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("a bug")])
def test_a_report_that_cannot_be_written_is_a_warning(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("cgfedllm.report.html.page.render", fail)
    heard: list[events.Event] = []
    result = api.run(tiny_config(*SMALL), listeners=[heard.append])
    assert len(result.records) == 3
    assert not result.interrupted
    [warning] = [event for event in heard if isinstance(event, events.Notice)
                 and event.level == "warning"]  # fmt: skip
    assert f"the report could not be written ({error})" in warning.text
    assert f"cgfedllm report {result.run_dir}" in warning.text


def test_a_report_of_nothing() -> None:
    with pytest.raises(ConfigError, match="needs a run folder"):
        api.report([])
