"""The reproduction from nothing to its table, on a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cgfedllm.config import Config
from cgfedllm.errors import CheckpointError, ConfigError
from cgfedllm.report.figures.paper import plot_paper
from cgfedllm.reproduce.paper import PaperResult, Reproduction
from cgfedllm.reproduce.results import Entry, markdown, table
from cgfedllm.reproduce.rows import ROWS, Row

FEW = [row for row in ROWS if row.key in ("base", "centralised", "fedavg", "cg_cnn-fair")]
SETTINGS = (
    "federation.rounds=2",
    "evaluation.every=0",
    "evaluation.clients=false",
    "tgap.rounds=3",
    "tgap.epochs=2",
    "tgap.validation_clients=0.34",
    "data.d1_share=0.4",
)


@pytest.fixture
def reproduce(tiny_config: Callable[..., Config], tmp_path: Path) -> Callable[[], PaperResult]:
    config = tiny_config(*SETTINGS)
    return Reproduction(config, tmp_path / "paper", benchmarks=(), rows=FEW).run


def test_one_call_gives_table_and_figure_and_a_second_one_trains_nothing(
    reproduce: Callable[[], PaperResult], tmp_path: Path
) -> None:
    result = reproduce()
    assert {path.name for path in result.files} == {
        "paper.json",
        "paper.csv",
        "paper.md",
        "paper.png",
        "paper.svg",
    }
    tree = json.loads((tmp_path / "paper" / "paper.json").read_text())
    assert tree["missing"] == []
    rows = {row["key"]: row for row in tree["rows"]}
    assert list(rows) == [row.key for row in FEW]
    # nothing is sent by those that do not federate; the codec sends less than FedAvg
    assert rows["base"]["uplink_bytes"] == rows["centralised"]["uplink_bytes"] == 0
    assert 0 < rows["cg_cnn-fair"]["uplink_bytes"] < rows["fedavg"]["uplink_bytes"]
    assert rows["fedavg"]["times_fewer"] == pytest.approx(1, rel=0.05)
    # training helps, and what TGAP sent is charged to whom it served
    assert rows["fedavg"]["heldout_nll"] < rows["base"]["heldout_nll"]
    assert rows["cg_cnn-fair"]["tgap_bytes"] > 0 == rows["fedavg"]["tgap_bytes"]
    assert rows["cg_cnn-fair"]["snr_db"] is not None
    assert str(tmp_path) not in (tmp_path / "paper" / "paper.json").read_text()

    runs = tmp_path / "runs"
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("metrics.jsonl")}
    assert len(before) >= 3
    assert [e.heldout_nll for e in reproduce().entries] == [e.heldout_nll for e in result.entries]
    assert before == {path: path.stat().st_mtime_ns for path in runs.rglob("metrics.jsonl")}


def test_rows_that_are_not_there_yet_are_named(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row for row in FEW if not row.codec]
    job = Reproduction(tiny_config(*SETTINGS), tmp_path / "paper", benchmarks=(), rows=rows)
    original = Row.config

    def only_fedavg(self: Row, *args: str) -> Config:
        if self.key != "fedavg":
            raise CheckpointError("the disk went away")
        return original(self, *args)

    monkeypatch.setattr(Row, "config", only_fedavg)
    with pytest.raises(CheckpointError, match="disk went away"):
        job.run()
    tree = json.loads((tmp_path / "paper" / "paper.json").read_text())
    assert [row["key"] for row in tree["rows"]] == ["base"]
    assert tree["missing"] == ["centralised", "fedavg"]


def test_what_cannot_be_reproduced(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'base'"):
        Reproduction(tiny_config(), tmp_path, rows=[FEW[2]]).run()
    with pytest.raises(ConfigError, match="gsm8k"):
        Reproduction(tiny_config(), tmp_path, benchmarks=("gsm8k",)).run()
    blind = tiny_config(*SETTINGS, "evaluation.heldout=false")
    job = Reproduction(blind, tmp_path, benchmarks=(), rows=[FEW[0], FEW[2]])
    with pytest.raises(ConfigError, match="heldout"):
        job.run()


# ---- the table ----------------------------------------------------------------------------------


def score(name: str, value: float, error: float | None) -> dict[str, object]:
    return {"name": name, "value": value, "standard_error": error}


ENTRIES = [
    Entry(
        ROWS[0],
        2.5,
        benchmarks={"mmlu": {"chance": 0.25, "groups": [score("STEM", 0.25, 0.01)]}},
    ),
    Entry(
        ROWS[2],
        2.0,
        uplink_bytes=1000,
        uplink_bytes_fp32=64000,
        bpp=0.5,
        benchmarks={"mmlu": {"chance": 0.25, "groups": [score("STEM", 0.305, None)]}},
    ),
    Entry(ROWS[-1], 2.1),
]


def test_accuracies_are_per_cent_with_their_errors() -> None:
    text = markdown(ENTRIES)
    assert "| Base | 25.0 ± 1.0 |" in text
    assert "| FedAvg-LoRA | 30.5 |" in text
    assert "64.0" in text  # times fewer
    assert text.count(ROWS[-1].label) == 1  # it was asked nothing, so it is in one table only


def test_every_line_of_the_table_has_every_column() -> None:
    names, cells = table(ENTRIES)
    assert {len(line) for line in cells} == {len(names)}
    assert cells[1][names.index("mmlu: STEM")] == pytest.approx(30.5)
    assert cells[2][names.index("mmlu: STEM")] is None


def test_only_results_files_are_drawn(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match="reproduce paper"):
        plot_paper(tmp_path / "other.json", tmp_path / "figure")
