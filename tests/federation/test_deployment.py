"""The same run on SuperLink and SuperNodes, over TLS with authenticated nodes, on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import cgfedllm
from cgfedllm.config import Config
from cgfedllm.metrics import RoundRecord
from cgfedllm.runs import RunFolder

from .deployment import Deployment, deployed, in_process, make_keys, until

MakeConfig = Callable[..., Config]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("deployment"), "north", "south") as up:
        yield up


def write_rows(tiny_data: Path, folder: Path) -> Path:
    """One file a client, and a held-out set that the server alone has."""
    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()]
    for client, name in (("north", "north"), ("south", "south"), ("west", "server")):
        own = [json.dumps(row) for row in rows if row["client"] == client]
        (folder / f"{name}.jsonl").write_text("\n".join(own) + "\n")
    return folder


@pytest.fixture(scope="module")
def clinics(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    return write_rows(tiny_data, tmp_path_factory.mktemp("clinics"))


@pytest.fixture
def job(tiny_config: MakeConfig, clinics: Path) -> MakeConfig:
    """A run whose nodes bring their own rows."""

    def make(*overrides: str) -> Config:
        return tiny_config(
            "data.source=node",
            f'data.heldout_source="{clinics / "server.jsonl"}"',
            "federation.rounds=2",
            "federation.clients=2",
            "federation.min_clients=2",
            "evaluation.clients=false",
            "uplink.name=lowrank",
            "uplink.options={bpp=0.5}",
            *overrides,
        )

    return make


def records(config: Config) -> list[RoundRecord]:
    return RunFolder(config.run_dir).records() if config.run_dir.exists() else []


def test_a_run_ends_as_in_one_process(
    deployment: Deployment, job: MakeConfig, clinics: Path, tmp_path: Path
) -> None:
    config = job()
    with (
        deployment.node("north", clinics / "north.jsonl"),
        deployment.node("south", clinics / "south.jsonl"),
        deployment.submit(config) as run,
    ):
        assert run.wait(900) == 0, run.log
    assert "held-out NLL" in run.log  # whoever starts it sees it go on
    rows = [clinics / "north.jsonl", clinics / "south.jsonl"]
    local = in_process(config, rows, tmp_path)
    cgfedllm.run(local)
    for remote, here in zip(records(config), records(local), strict=True):
        assert remote.heldout_nll == pytest.approx(here.heldout_nll, abs=1e-5)
        assert remote.uplink_bytes == here.uplink_bytes
        assert [client.client for client in remote.clients] == ["north", "south"][
            : remote.round * 2
        ]
        assert not remote.failures
    own, expected = (
        load_file(folder.run_dir / "adapter" / "adapter_model.safetensors")
        for folder in (config, local)
    )
    for name, values in expected.items():
        np.testing.assert_allclose(own[name], values, atol=1e-6)


def test_what_a_killed_supernode_and_a_killed_server_held_is_not_lost(
    deployment: Deployment, job: MakeConfig, clinics: Path, tmp_path: Path
) -> None:
    config = job("name=killed", "federation.rounds=4")
    whole = job("name=whole", "federation.rounds=4")
    with deployment.node("south", clinics / "south.jsonl"):
        with deployment.node("north", clinics / "north.jsonl"):
            with deployment.submit(whole) as run:
                assert run.wait(900) == 0, run.log
            with deployment.submit(config) as run:
                until(lambda: len(records(config)) > 2, "round 2", 900)
                deployment.kill_server_app()  # and, at the end of the block, node north
        done = len(records(config))
        with (
            deployment.node("north", clinics / "north.jsonl"),
            deployment.submit(config) as again,
        ):
            assert again.wait(900) == 0, again.log
    assert done < len(records(config)) == 5
    for resumed, unbroken in zip(records(config), records(whole), strict=True):
        assert resumed.heldout_nll == pytest.approx(unbroken.heldout_nll, abs=1e-5)
        assert resumed.uplink_bytes_total == unbroken.uplink_bytes_total


@pytest.mark.parametrize("what", ["unknown key", "no key", "no TLS", "wrong authority"])
def test_a_node_that_is_not_what_it_should_be_is_refused(
    deployment: Deployment, clinics: Path, tmp_path: Path, what: str
) -> None:
    make_keys(tmp_path / "other", "stranger")
    key: str | None = str(deployment.keys / "nodes" / "north")
    extra: tuple[str, ...] = ("--root-certificates", str(deployment.keys / "ca.crt"))
    said = {
        "unknown key": "Failed to activate SuperNode",
        "no key": "SuperNode authentication is enabled",
        "no TLS": "could not establish a connection",
        "wrong authority": "certificate verify failed",
    }[what]
    if what == "unknown key":
        key = str(tmp_path / "other" / "nodes" / "stranger")
    elif what == "no key":
        key = None
    elif what == "no TLS":
        key, extra = None, ("--insecure",)
    else:
        extra = ("--root-certificates", str(tmp_path / "other" / "ca.crt"))
    data = clinics / "north.jsonl"
    with deployment.supernode(
        key, *extra, "--max-retries", "1", name="stranger", data=data
    ) as node:
        assert node.wait() != 0
    assert said in node.log
