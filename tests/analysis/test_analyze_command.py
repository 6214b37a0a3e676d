"""`cgfedllm analyze` from recordings to files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cgfedllm.cli import app

from .recordings import noise, write_recording

Cli = Callable[..., Any]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    monkeypatch.delenv("CGFEDLLM_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, [*map(str, args)])


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than all else, and others look at them."""
    for name in ("open_loop.draw_open_loop", "analysis.draw_study"):
        monkeypatch.setattr(f"cgfedllm.report.figures.{name}", lambda results, folder: [])


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_tables_figures_and_the_terminal(
    cli: Cli, tmp_path: Path, codec_file: Callable[..., Path]
) -> None:
    recording = write_recording(tmp_path / "one", lambda r, c: noise(r, c).scaled(1e-3), rounds=4)
    codec_file(tmp_path / "learned.safetensors", recording, [1])
    result = cli(
        "analyze", "-r", "one", "--codec", "int8", "--codec-file", "learned.safetensors",
        "--to", "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    assert {r["codec"] for r in rows(out / "fidelity.csv")} == {"int8", "halves", "zero"}
    assert [r["codec"] for r in rows(out / "rate.csv")] == ["int8", "halves", "zero"]
    assert {r["place"] for r in rows(out / "noise.csv")} == {"update", "latent"}
    assert {r["sigma"] for r in rows(out / "noise.csv")} == {
        "0", "5e-05", "0.0005", "0.005", "0.05", "0.5",
    }  # fmt: skip
    assert len(rows(out / "swap.csv")) == 3
    assert rows(out / "distributions.csv")
    for name in ("fidelity", "modules", "rate", "swap", "noise", "distributions", "scales"):
        assert (out / f"{name}_one.png").stat().st_size > 5000
        assert (out / f"{name}_one.svg").exists()
    told = json.loads((out / "analysis.json").read_text())
    assert told["command"] == (
        "cgfedllm analyze --recording one --codec int8 --codec-file learned.safetensors "
        "--updates 64 --seed 0 --to out"
    )
    assert str(tmp_path) not in (out / "analysis.json").read_text()
    assert told["environment"]["versions"]["numpy"]
    assert told["recordings"]["one"]["clients"] == 3
    assert told["codec_files"]["learned"]["splits"]["train"]["rounds"] == [[1]]
    assert "halves:state=learned" in result.stdout
    assert "fitted on rounds 1" in result.stdout


def test_parts_and_json(cli: Cli, tmp_path: Path) -> None:
    write_recording(tmp_path / "one")
    result = cli("analyze", "-r", "one", "--codec", "int8", "--parts", "rate, swap", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [r["codec"] for r in told["rate"]] == ["int8", "zero"]
    assert not told["fidelity"]
    # here, where nothing else is said
    assert {p.name for p in (tmp_path / "analysis").iterdir() if p.suffix != ".svg"} == {
        "analysis.json", "rate.csv", "rate_one.png", "swap.csv", "swap_one.png",
    }  # fmt: skip


@pytest.mark.usefixtures("no_figures")
def test_the_bench_takes_codec_files_too(
    cli: Cli, tmp_path: Path, codec_file: Callable[..., Path]
) -> None:
    recording = write_recording(tmp_path / "one", rounds=4)
    codec_file(tmp_path / "early.safetensors", recording, [1, 2])
    codec_file(tmp_path / "late.safetensors", recording, [3, 4])
    result = cli(
        "bench", "codecs", "-r", "one", "--codec", "int8", "--codec-file", "early.safetensors",
        "--codec-file", "late.safetensors", "--to", "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = [r for r in rows(tmp_path / "out" / "codecs.csv") if r["codec"] == "halves"]
    assert [json.loads(r["options"]) for r in found] == [{"state": "early"}]
    told = json.loads((tmp_path / "out" / "open_loop.json").read_text())
    assert "it was fitted on" in told["refused"][0]["reason"]
    assert set(told["codec_files"]) == {"early", "late"}


@pytest.mark.usefixtures("no_figures", "halves")
def test_what_has_learned_nothing_is_left_out_by_default(cli: Cli, tmp_path: Path) -> None:
    write_recording(tmp_path / "one")
    for command in (("bench", "codecs", "--rate", 4), ("analyze", "--parts", "rate")):
        result = cli(*command, "-r", "one", "--updates", 1, "--to", "out", "--json")
        assert result.exit_code == 0, result.output
        told = json.loads(result.stdout)
        names = {r["codec"] for r in (told.get("codecs") or told["rate"])}
        assert "int8" in names
        assert "halves" not in names


def test_mistakes_are_told_politely(cli: Cli, tmp_path: Path) -> None:
    write_recording(tmp_path / "short", rounds=1)
    write_recording(tmp_path / "good")
    write_recording(tmp_path / "alone", clients=1)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for args, told in (
        ([], "needs a recording"),
        (["-r", "short"], "one round only"),
        (["-r", "nowhere"], "nowhere"),
        (["-r", "alone", "--parts", "swap"], "one client a round"),
        (["-r", "good", "--parts", "nose"], "'nose'"),
        (["-r", "good", "--codec", "nit8"], "did you mean 'int8'"),
        (["-r", "good", "--codec-file", "bad.safetensors"], "no codec file"),
        (["-r", "good", "--codec-file", "missing.safetensors"], "does not exist"),
    ):
        result = cli("analyze", *args)
        assert result.exit_code in (1, 2), (args, result.output)
        assert told in result.stderr, (args, result.stderr)
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "analysis").exists()
