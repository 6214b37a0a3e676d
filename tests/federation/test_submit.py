"""How an experiment gets to a SuperLink: through Flower's own command, as text."""

from __future__ import annotations

import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk

from cgfedllm.config import Config, parse_config
from cgfedllm.errors import FederationError
from cgfedllm.federation import submit as module
from cgfedllm.federation.submit import bundle, submit

MakeConfig = Callable[..., Config]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Flower's command line, which only notes what it was given."""
    seen: dict[str, Any] = {"returncode": 0}

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        settings = command[command.index("--run-config") + 1]
        seen["command"] = command
        seen["run_config"] = tomllib.loads(Path(settings).read_text())
        seen["fab"] = build_fab_from_disk(Path(command[command.index("run") + 1]))
        return subprocess.CompletedProcess(command, seen["returncode"])

    monkeypatch.setattr(module.subprocess, "run", run)
    return seen


def test_the_resolved_config_travels_as_text(
    tiny_config: MakeConfig, flower: dict[str, Any]
) -> None:
    config = tiny_config("data.source=node")
    submit(config, "federation", overwrite=True)
    assert parse_config(tomllib.loads(flower["run_config"]["config"])) == config
    assert flower["run_config"]["overwrite"] is True
    assert "federation" in flower["command"]
    assert "--federation-config" not in flower["command"]  # for simulations only


def test_no_code_travels(tiny_config: MakeConfig, flower: dict[str, Any]) -> None:
    submit(tiny_config(), "federation")
    assert len(flower["fab"]) < 2000


def test_a_simulation_has_a_node_for_each_client(
    tiny_config: MakeConfig, flower: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    submit(tiny_config("output=here"), "local")
    assert flower["command"][-1] == "num-supernodes=3"
    # its SuperLink may have been started in any folder
    assert f'output = "{tmp_path}/here"' in flower["run_config"]["config"]


def test_a_simulation_can_be_told_what_a_client_takes(
    tiny_config: MakeConfig, flower: dict[str, Any]
) -> None:
    submit(tiny_config(), "local", federation_config="client-resources-num-cpus=1")
    assert flower["command"][-1] == "num-supernodes=3 client-resources-num-cpus=1"
    submit(tiny_config(), "cluster", federation_config="num-supernodes=2")
    assert flower["command"][-1] == "num-supernodes=2"


def test_nodes_with_rows_of_their_own_cannot_be_simulated(
    tiny_config: MakeConfig, flower: dict[str, Any]
) -> None:
    with pytest.raises(FederationError, match="name the data"):
        submit(tiny_config("data.source=node"), "local")
    assert "command" not in flower


def test_what_flower_refuses_is_an_error(tiny_config: MakeConfig, flower: dict[str, Any]) -> None:
    flower["returncode"] = 1
    with pytest.raises(FederationError, match=r"'nowhere'.*flwr config list"):
        submit(tiny_config(), "nowhere")


def test_flwr_run_works_on_the_repository_too() -> None:
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())
    app, sent = own["tool"]["flwr"]["app"], bundle()["tool"]["flwr"]["app"]
    assert {**app, "fab-include": None} == {**sent, "fab-include": None}
    assert own["project"]["version"] == bundle()["project"]["version"]
    assert len(build_fab_from_disk(ROOT)) < 20_000
