"""`cgfedllm record`, and `cgfedllm inspect` of what it makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cgfedllm import api
from cgfedllm.cli import app
from cgfedllm.codecs import codec_class
from cgfedllm.config import Config, load_config


@pytest.fixture
def cli() -> Callable[..., Any]:
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    heard: list[tuple[Any, ...]] = []

    def record(config: Config, to: Path, kind: str, overwrite: bool) -> api.RecordingResult:
        heard.append((config, to, kind, overwrite))
        run = api.RunResult(config.run_dir, config.run_dir / "adapter", [], kind == "centralised")
        return api.RecordingResult(run, to or config.run_dir / "recording", 90, 10, 9, 331776000)

    monkeypatch.setattr(api, "record", record)
    return heard


Cli = Callable[..., Any]
Calls = list[tuple[Any, ...]]


def test_record(cli: Cli, calls: Calls, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[federation]\nrounds = 7\n")
    result = cli(
        "record", file, "--to", tmp_path / "r", "--set", "seed=3", "--name", "n",
        "--output", tmp_path / "out", "--overwrite",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    ((config, to, kind, overwrite),) = calls
    assert (config.seed, config.federation.rounds) == (3, 7)
    assert config.run_dir == tmp_path / "out" / "n"
    assert (to, kind, overwrite) == (tmp_path / "r", "federated", True)
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines == {
        "recording": str(tmp_path / "r"),
        "updates": "90",
        "rounds": "10",
        "clients": "9",
        "size": "316 MiB",
    }


def test_quiet_and_json(cli: Cli, calls: Calls) -> None:
    assert cli("record", "--quiet").stdout == "runs/run/recording\n"
    tree = json.loads(cli("record", "--json").stdout)
    assert (tree["updates"], tree["recording_dir"]) == (90, "runs/run/recording")


def test_interrupted(cli: Cli, calls: Calls) -> None:
    result = cli("record", "--kind", "centralised")
    assert result.exit_code == 130
    assert "the same command" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--kind", "local"], "one of federated, centralised, local-only"),
        (["--quiet", "--json"], "exclude each other"),
    ],
)
def test_usage_errors(cli: Cli, calls: Calls, args: list[str], message: str) -> None:
    result = cli("record", *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert calls == []


def test_a_lossy_uplink_is_a_usage_error(cli: Cli) -> None:
    result = cli("record", "--set", "uplink.name=int8")
    assert result.exit_code == 2
    assert "lossy" in result.stderr


def test_inspect(cli: Cli, write: Callable[..., Path]) -> None:
    folder = write()
    facts = json.loads(cli("inspect", folder, "--json").stdout)
    assert facts["kind"] == "recording"
    assert facts["updates"] == "12 of 3 clients"
    assert facts["steps"] == "4 an update"
    assert json.loads(cli("inspect", folder / "index.json", "--json").stdout) == facts


def test_inspect_of_a_damaged_one(cli: Cli, write: Callable[..., Path]) -> None:
    folder = write()
    (folder / "round-000002.safetensors").unlink()
    result = cli("inspect", folder)
    assert result.exit_code == 1
    assert "round-000002.safetensors is missing" in result.stderr


def test_record_then_inspect(cli: Cli, tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny_config("federation.rounds=1", "evaluation.clients=false")
    (tmp_path / "c.toml").write_text(config.to_toml())
    result = cli("record", tmp_path / "c.toml", "--quiet")
    assert result.exit_code == 0, result.output
    path = Path(result.stdout.strip())
    assert path == config.run_dir / "recording"
    assert "3 of 3 clients" in cli("inspect", path).stdout


RECORDINGS = sorted((Path(__file__).parents[2] / "configs" / "recordings").glob("*.toml"))


def test_ready_configurations_are_there() -> None:
    assert {path.stem for path in RECORDINGS} == {
        f"{data}_{steps}" for data in ("medquad", "gsm8k", "dolly") for steps in (4, 32)
    }


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_ready_configurations_record_what_their_names_say(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert config.training.local_steps == int(path.stem.split("_")[1])
    assert codec_class(config.uplink.name).lossless
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    command = f"cgfedllm record configs/recordings/{path.name} --to runs/recordings/{path.stem}"
    assert first == f"# {command}"
    assert second == "#"
