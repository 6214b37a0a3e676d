"""One report of several runs: outcomes, curves, and what was configured differently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cgfedllm.errors import CheckpointError
from cgfedllm.metrics import ModuleRecord, RoundRecord
from cgfedllm.report.html.page import write_comparison
from cgfedllm.runs import RunFolder

MakeRun = Callable[..., RunFolder]
ReadPage = Callable[[Path], Any]


@pytest.fixture
def pair(
    make_run: MakeRun, make_records: Callable[..., list[RoundRecord]]
) -> tuple[RunFolder, RunFolder]:
    """A run over raw, and one that sends four times fewer bytes."""
    raw = make_records()
    for record in raw:
        record.uplink_bytes_total = record.uplink_bytes_fp32_total
    one = make_run(raw, "name=raw")
    return one, make_run(make_records(), "name=int8", "uplink.name=int8", "seed=7")


@pytest.fixture
def compare(tmp_path: Path, read_page: ReadPage) -> Callable[..., Any]:
    return lambda *runs: read_page(write_comparison(runs, tmp_path / "out" / "compared.html"))


def test_outcomes_side_by_side(
    pair: tuple[RunFolder, RunFolder], compare: Callable[..., Any]
) -> None:
    page = compare(*pair)
    assert page.of("h1") == ["Comparison of 2 runs"]
    table = page.table("Outcome of each run")
    assert list(table) == ["raw", "int8"]
    assert table["int8"] == {
        "run": "int8", "rounds": "3", "NLL before": "3.0000", "NLL after": "2.4000",
        "change": "−0.6000", "uplink": "7.91 MiB", "fewer than fp32": "4.00x",
        "bits per parameter": "8", "time": "1:11 min",
    }  # fmt: skip
    assert table["raw"]["uplink"] == "31.6 MiB"


def test_curves_and_time(pair: tuple[RunFolder, RunFolder], compare: Callable[..., Any]) -> None:
    page = compare(*pair)
    assert page.of("figcaption") == [
        "Held-out NLL against uplink bytes",
        "Held-out NLL over rounds",
    ]
    against_bytes, _ = page.of("desc")
    # round 0 has sent nothing, so the curve starts after round 1
    assert "int8: 2.8000 at 2.64 MiB, 2.4000 at 7.91 MiB" in against_bytes
    assert "raw: 2.8000 at 10.5 MiB, 2.4000 at 31.6 MiB" in against_bytes
    assert "before training: 3.0000." in against_bytes
    bars = [a["aria-label"] for tag, a in page.tags if tag == "svg" and a.get("class") == "stack"]
    assert bars == ["Time of raw: 1:11 min", "Time of int8: 1:11 min"]


def test_what_was_kept_has_a_column_a_run(
    make_run: MakeRun,
    make_records: Callable[..., list[RoundRecord]],
    keeping: list[RoundRecord],
    compare: Callable[..., Any],
) -> None:
    exact = make_records()
    for record in exact:
        for client in record.clients:
            client.fidelity = {"q_proj.A": ModuleRecord(1.0, 1.0, 0.0)}
    page = compare(
        make_run(keeping, "name=int4"), make_run(exact, "name=raw"),
        make_run(make_records(), "name=old"),
    )  # fmt: skip
    table = page.table("SNR of the packets by module (dB)")
    assert list(table) == ["q_proj A", "q_proj B", "v_proj A", "v_proj B", "all modules"]
    columns = {"int4": "20.00", "raw": "exact", "old": "–"}
    assert table["q_proj A"] == {"module and factor": "q_proj A", **columns}
    assert [table["q_proj B"][run] for run in columns] == ["1.76", "–", "–"]
    (told,) = [text for text in page.of("desc") if text.startswith("int4: 5.")]
    assert "raw" not in told


def test_only_settings_that_differ(
    pair: tuple[RunFolder, RunFolder], compare: Callable[..., Any]
) -> None:
    table = compare(*pair).table("Settings that differ")
    assert table["uplink.name"] == {"setting": "uplink.name", "raw": "raw", "int8": "int8"}
    assert table.keys() == {"uplink.name", "seed"}


def test_equal_runs_and_equal_names(
    make_run: MakeRun, records: list[RoundRecord], compare: Callable[..., Any]
) -> None:
    run = make_run(records)
    page = compare(run, run)
    assert "Nothing but the names." in page.text
    assert len(page.table("Outcome of each run")) == 2


def test_losses_that_do_not_compare_are_called_out(
    pair: tuple[RunFolder, RunFolder],
    make_run: MakeRun,
    records: list[RoundRecord],
    compare: Callable[..., Any],
) -> None:
    assert "do not compare" not in compare(*pair).text
    for record in records:
        record.heldout_nll = 5.0
    assert "their losses do not compare" in compare(pair[0], make_run(records)).text


def test_runs_that_are_not_through_sent_nothing_or_have_no_round(
    make_run: MakeRun, records: list[RoundRecord], compare: Callable[..., Any]
) -> None:
    reference = [RoundRecord(r, heldout_nll=3.0 - 0.1 * r) for r in range(4)]
    page = compare(
        make_run([], "name=empty"),
        make_run(records[:2], "name=stopped"),
        make_run(reference, "name=reference"),
    )
    table = page.table("Outcome of each run")
    assert table["empty"]["rounds"] == "0 of 3 (unfinished)"
    assert table["stopped"]["rounds"] == "1 of 3 (unfinished)"
    assert table["reference"]["rounds"] == "3"
    assert table["reference"]["bits per parameter"] == "–"
    assert "Not all runs have come to their end" in page.text


def test_nothing_to_draw(make_run: MakeRun, compare: Callable[..., Any]) -> None:
    page = compare(make_run([], "name=a"), make_run([], "name=b"))
    assert page.of("figcaption") == []
    assert list(page.table("Outcome of each run")) == ["a", "b"]


def test_a_folder_that_is_no_run(
    make_run: MakeRun, tmp_path: Path, compare: Callable[..., Any]
) -> None:
    with pytest.raises(CheckpointError, match="not a run folder"):
        compare(make_run([]), RunFolder(tmp_path / "missing"))
