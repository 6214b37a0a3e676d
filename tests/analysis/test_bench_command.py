"""`cgfedllm bench codecs` from recordings to files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cgfedllm.cli import app

from .recordings import write_recording

Cli = Callable[..., Any]
COLUMNS = [
    "recording", "codec", "options", "asked_bpp", "bpp", "times_fewer_than_fp32", "snr_db",
    "cosine", "aggregate_snr_db", "aggregate_cosine", "swap_snr_db", "encode_ms", "decode_ms",
    "peak_extra_bytes", "updates", "n_parameters",
]  # fmt: skip


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    monkeypatch.delenv("CGFEDLLM_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, ["bench", "codecs", *map(str, args)])


def test_tables_figures_and_the_terminal(cli: Cli, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_recording(tmp_path / name)
    result = cli(
        "--recording", tmp_path / "one", "--recording", tmp_path / "two",
        "--codec", "raw", "--codec", "bf16", "--codec", "int8", "--updates", 6, "--structure",
        "--to", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader((tmp_path / "out" / "codecs.csv").open()))
    assert list(rows[0]) == COLUMNS
    raw = [row for row in rows if row["codec"] == "raw"]
    assert [row["recording"] for row in raw] == ["one", "two"]
    assert raw[0]["snr_db"] == raw[0]["aggregate_snr_db"] == "inf"
    assert raw[0]["asked_bpp"] == raw[0]["peak_extra_bytes"] == ""
    assert raw[0]["updates"] == "6"
    modules = list(csv.DictReader((tmp_path / "out" / "modules.csv").open()))
    assert {row["module"] for row in modules} == {"q_proj.A", "q_proj.B", "v_proj.A", "v_proj.B"}
    told = json.loads((tmp_path / "out" / "open_loop.json").read_text())
    assert told["command"].startswith("cgfedllm bench codecs --recording ")
    assert "--structure" in told["command"]
    assert told["environment"]["versions"]["numpy"]
    assert told["recordings"]["one"]["local_steps"] == [4]
    assert told["rounds"]["one"] == [4, 6]
    assert "inf" in {row["snr_db"] for row in told["codecs"]}
    facts = list(csv.DictReader((tmp_path / "out" / "structure.csv").open()))
    assert {row["recording"] for row in facts} == {"one", "two"}
    assert "excess kurtosis within factors" in {row["fact"] for row in facts}
    for figure in ("rate_snr", "rate_cosine", "modules_one", "modules_two", "codecs/int8"):
        assert (tmp_path / "out" / f"{figure}.png").stat().st_size > 5000
        assert (tmp_path / "out" / f"{figure}.svg").exists()
    assert "one, open loop" in result.stdout
    assert "exact" in result.stdout
    assert "(previous, scaled)" in result.stdout
    assert "what the updates look like" in result.stdout


def test_figures_are_drawn_again_from_the_tables(cli: Cli, tmp_path: Path) -> None:
    write_recording(tmp_path / "one")
    cli("--recording", "one", "--codec", "int8", "--codec", "ecsq", "--rate", 0.5, "--to", "out")
    figures = sorted((tmp_path / "out").rglob("*.svg"))
    before = [path.read_bytes() for path in figures]
    for path in figures:
        path.unlink()
    result = cli("--plot", "out")
    assert result.exit_code == 0, result.output
    assert [path.read_bytes() for path in figures] == before
    (tmp_path / "out" / "models.csv").unlink()
    result = cli("--plot", "out")
    assert result.exit_code == 1
    assert "models.csv is missing or damaged" in result.stderr


def test_json_goes_to_stdout_alone(cli: Cli, tmp_path: Path) -> None:
    write_recording(tmp_path / "one")
    result = cli("--recording", "one", "--codec", "int8", "--json", "--memory")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [row["codec"] for row in told["codecs"]][-1] == "int8"
    assert told["codecs"][-1]["peak_extra_bytes"] > 0
    # outside of a checkout the folder is here
    assert (tmp_path / "open_loop" / "codecs.csv").exists()


def test_in_a_checkout_results_go_to_the_other_results(cli: Cli, tmp_path: Path) -> None:
    write_recording(tmp_path / "one")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    assert cli("--recording", "one", "--codec", "int8").exit_code == 0
    assert (tmp_path / "benchmarks" / "results" / "open_loop" / "codecs.csv").exists()


def test_a_recording_inside_a_run_is_named_after_the_run(cli: Cli, tmp_path: Path) -> None:
    write_recording(tmp_path / "first" / "recording")
    write_recording(tmp_path / "again" / "first")
    result = cli(
        "-r", "first/recording", "-r", "again/first", "--codec", "int8", "--json", "--updates", 3
    )
    assert {row["recording"] for row in json.loads(result.stdout)["codecs"]} == {
        "first", "first-2",
    }  # fmt: skip


def test_mistakes_are_told_politely(cli: Cli, tmp_path: Path) -> None:
    write_recording(tmp_path / "short", rounds=1)
    write_recording(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    for args, told in (
        ([], "needs a recording"),
        (["--recording", "empty"], "empty"),
        (["--recording", "short"], "one round only"),
        (["--recording", "nowhere"], "nowhere"),
        (["--recording", "good", "--codec", "nit8"], "did you mean 'int8'"),
        (["--recording", "good", "--codec", "int8:bpp=1"], "bpp"),
        (["--recording", "good", "--rate", "0"], "above 0"),
    ):
        result = cli(*args)
        assert result.exit_code in (1, 2), (args, result.output)
        assert told in result.stderr, (args, result.stderr)
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "open_loop").exists()
