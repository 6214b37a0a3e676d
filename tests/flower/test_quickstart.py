"""The example app, as it is and with its codec, on the in-process engine."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from cgfedllm.federation.inprocess import InProcessGrid
from cgfedllm.flower.choice import choose

EXAMPLE = Path(__file__).parents[2] / "examples" / "flower_quickstart"
PROJECT = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
CLIENTS = 2


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """Server and client app of the example."""
    monkeypatch.syspath_prepend(EXAMPLE)
    from digits import client_app, server_app

    return server_app, client_app


def federate(digits: tuple[ModuleType, ModuleType], **changes: Any) -> Any:
    server_app, client_app = digits
    run_config = {**PROJECT["tool"]["flwr"]["app"]["config"], **changes}

    def context(node: int, node_config: dict[str, Any]) -> Context:
        return Context(1, node, node_config, RecordDict(), run_config)

    contexts = {
        index + 2: context(index + 2, {"partition-id": index, "num-partitions": CLIENTS})
        for index in range(CLIENTS)
    }
    return server_app.federate(InProcessGrid(client_app.app, contexts), context(1, {}))


def accuracy(result: Any) -> float:
    return float(
        result.evaluate_metrics_serverapp[max(result.evaluate_metrics_serverapp)]["accuracy"]
    )


def test_it_learns_with_its_codec_as_it_does_without(
    digits: tuple[ModuleType, ModuleType],
) -> None:
    plain = federate(digits, codec="", **{"num-server-rounds": 1})
    coded = federate(digits, codec="eden:bpp=1", **{"num-server-rounds": 2})
    assert accuracy(plain) > 0.4
    assert accuracy(coded) > 0.7
    assert "cgfedllm-uplink-bytes" not in plain.train_metrics_clientapp[1]
    assert coded.train_metrics_clientapp[2]["cgfedllm-uplink-ratio"] > 25
    assert coded.train_metrics_clientapp[2]["train-loss"] > 0


def test_its_project_file_names_what_is_there(digits: tuple[ModuleType, ModuleType]) -> None:
    server_app, client_app = digits
    components = PROJECT["tool"]["flwr"]["app"]["components"]
    assert components == {
        "serverapp": f"{server_app.__name__}:app",
        "clientapp": f"{client_app.__name__}:app",
    }
    assert choose(PROJECT["tool"]["flwr"]["app"]["config"]["codec"]).codec.name == "lowrank"
