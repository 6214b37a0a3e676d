"""The tables say what came out, and fit into 80 columns."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from cgfedllm.metrics import RoundRecord
from cgfedllm.report.comparison import ComparisonEntry, comparison_table, entries_to_dicts
from cgfedllm.report.summary import mean_train_loss, summarise
from cgfedllm.report.tables import final_table, print_final

Maker = Callable[..., list[RoundRecord]]


def render(thing: Any, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(thing)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines())
    return text


def row(text: str, start: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(start)).split()


def test_final_table_counts_bytes_nll_and_time(records: list[RoundRecord]) -> None:
    text = render(final_table(records, uplink_codec="int8", downlink_codec="raw"))
    assert row(text, "uplink") == [
        "uplink", "(int8)", "7.91", "MiB", "31.6", "MiB", "4.00x", "8.00",
    ]  # fmt: skip
    assert row(text, "downlink")[-2:] == ["1.00x", "32.00"]
    assert row(text, "global") == ["global", "3.0000", "2.4000", "-0.6000"]
    assert row(text, "torch") == ["torch", "3.0900", "2.4900", "-0.6000"]
    assert "1:11 min over 3 rounds" in text
    assert "train 45.0 s (64 %)" in " ".join(text.split())
    assert "1 client reply could not be used" in text


def test_what_a_codec_that_learns_costs_is_a_line_of_its_own(
    learning: list[RoundRecord], make_records: Maker
) -> None:
    text = render(final_table(learning, uplink_codec="cg_cnn"))
    assert row(text, "codec state") == ["codec", "state,", "down", "3.00", "MiB"]
    assert row(text, "pre-training") == ["pre-training,", "up", "5.00", "MiB"]
    assert "pre-training, down" not in text
    assert row(text, "downlink")[-2:] == ["1.00x", "32.00"]
    plain = summarise(learning).to_dict()
    assert (plain["codec_bytes"], plain["tgap_uplink_bytes"]) == (3 * 2**20, 5 * 2**20)
    without = render(final_table(make_records()))
    assert "codec state" not in without
    assert "pre-training" not in without


def test_a_comparison_names_it_below(learning: list[RoundRecord], make_records: Maker) -> None:
    entries = [ComparisonEntry("raw", 0, make_records()), ComparisonEntry("cg_cnn", 0, learning)]
    text = render(comparison_table(entries))
    assert "codec state sent down, not in uplink: cg_cnn 3.00 MiB" in text
    assert "pre-training, up, not in uplink: cg_cnn 5.00 MiB" in text
    assert "raw 0" not in text
    assert "not in uplink" not in render(comparison_table(entries[:1]))


def test_final_table_of_nothing() -> None:
    text = render(final_table([]))
    assert row(text, "uplink")[-1] == "-"
    assert "NLL" not in text


def test_final_table_without_evaluation() -> None:
    text = render(final_table([RoundRecord(1, uplink_bytes_total=10, uplink_bytes_fp32_total=40)]))
    assert "NLL" not in text
    assert row(text, "uplink")[-2:] == ["4.00x", "8.00"]


def test_many_clients_are_cut_to_the_extremes(make_records: Maker) -> None:
    text = render(final_table(make_records(2, tuple(f"c{i:03d}" for i in range(100)))))
    assert "(90 clients between, mean)" in text
    assert sum(line.startswith("c0") for line in text.splitlines()) == 10


def test_the_last_evaluation_counts_and_is_named(records: list[RoundRecord]) -> None:
    records[3].heldout_nll = None
    records[3].client_nll = {}
    text = render(final_table(records))
    assert row(text, "global")[2] == "2.6000"
    assert "last evaluated after round 2" in " ".join(text.split())


def test_a_resumed_run_is_summed_up_over_all_its_rounds(records: list[RoundRecord]) -> None:
    summary = summarise(records)
    assert summary.rounds == 3
    assert summary.uplink.sent == records[-1].uplink_bytes_total
    assert summary.seconds["total"] == pytest.approx(6.1 + 3 * 21.5)
    phases = sum(v for k, v in summary.seconds.items() if k != "total")
    assert phases == pytest.approx(summary.seconds["total"])
    json.dumps(summary.to_dict(), allow_nan=False)


def test_mean_train_loss_is_weighted_by_examples(records: list[RoundRecord]) -> None:
    record = records[1]
    record.clients[0].train_loss, record.clients[0].examples = 1.0, 800
    assert mean_train_loss(record) == pytest.approx((800 * 1.0 + 200 * 2.8) / 1000)
    assert mean_train_loss(records[0]) is None


def test_paths_are_never_cut(records: list[RoundRecord]) -> None:
    console = Console(file=StringIO(), width=80, color_system=None)
    print_final(console, records, run_dir="/runs/" + "x" * 200, adapter_dir="/a/" + "y" * 200)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"Adapter  /a/{'y' * 200}\n" in text
    assert f"Run      /runs/{'x' * 200}\n" in text


def test_client_names_are_not_markup(make_records: Maker) -> None:
    text = render(final_table(make_records(1, ("[red]a[/]", "b"))))
    assert "[red]a[/]" in text


def test_comparison_pairs_by_seed(make_records: Maker) -> None:
    entries = []
    for seed in (0, 1):
        for codec, worse in (("raw", 0.0), ("int8", 0.01 + 0.02 * seed)):
            records = make_records(2)
            for record in records:
                record.heldout_nll = (record.heldout_nll or 0.0) + 0.5 * seed + worse
            entries.append(ComparisonEntry(codec, seed, records))
    text = render(comparison_table(entries))
    assert "reference" in row(text, "raw")
    # the seeds differ by 0.5, the pairs only by 0.01 and 0.03
    assert row(text, "int8")[-6:-2] == ["+0.0200", "±0.0100", "100.0", "%"]
    assert "mean over seeds 0, 1" in text
    plain = entries_to_dicts(entries)
    assert plain[1]["codec"] == "int8"
    assert plain[1]["uplink"]["times_fewer"] == pytest.approx(4.0)


def test_comparison_with_one_seed_has_no_spread(make_records: Maker) -> None:
    text = render(comparison_table([ComparisonEntry(c, 0, make_records(1)) for c in ("a", "b")]))
    assert "±" not in text
    assert "standard" not in text


def test_comparison_of_nothing() -> None:
    render(comparison_table([]))
