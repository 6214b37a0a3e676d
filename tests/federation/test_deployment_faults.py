"""Nodes that misbehave behind a SuperLink, over TLS: each costs its round its own share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file

import cgfedllm
from cgfedllm.config import Config
from cgfedllm.federation.directory import STRAY
from cgfedllm.metrics import RoundRecord
from cgfedllm.runs import RunFolder

from . import faulty_node
from .deployment import deployed, in_process, until

MakeConfig = Callable[..., Config]

# by client and round: how it fails, and what the server says of it
FAULTS = {
    ("west", 1): ("crash", "the process died"),
    ("south", 2): ("stale", "packet round is 1, expected 2"),
    ("west", 2): ("corrupt", "checksum does not match"),
    ("south", 3): ("oversized", "cannot be right here"),
    ("west", 3): ("not finite", "NaN or infinity"),
    ("south", 4): ("late", "no reply within"),
    ("west", 4): ("mute", "does not carry one packet"),
    # it is not seen again
    ("west", 5): ("silent", "no reply within"),
}
ROUNDS = 5
NAMES = ("north", "south", "west")


@pytest.fixture
def clinics(tmp_path: Path, tiny_data: Path) -> Path:
    """Rows of each node, and a held-out set that the server alone has."""
    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()]
    folder = tmp_path / "clinics"
    folder.mkdir()
    for at, name in enumerate((*NAMES, "server")):
        own = [row for n, row in enumerate(rows) if n % 4 == at]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return folder


def failures(record: RoundRecord) -> dict[str, str]:
    """Client and reason; no client has two."""
    # in one process a late reply comes in the end; Flower keeps it to itself
    told = [(one.client, one.reason) for one in record.failures if one.reason != STRAY]
    assert len(told) == len(dict(told))
    return dict(told)


@pytest.mark.slow
@pytest.mark.timeout(4000)
def test_faulty_nodes_cost_their_own_share(
    tiny_config: MakeConfig,
    clinics: Path,
    faults: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config(
        "data.source=node",
        f'data.heldout_source="{clinics / "server.jsonl"}"',
        "federation.clients=3",
        f"federation.rounds={ROUNDS}",
        "evaluation.clients=false",
        "uplink.name=int8",
    )
    programs = {"north": faulty_node.write_supernode(tmp_path / "north")}
    for name in ("south", "west"):
        kinds = {round_: kind for (client, round_), (kind, _) in FAULTS.items() if client == name}
        programs[name] = faulty_node.write_client(tmp_path / name, kinds, config.run_dir)
    rows = {name: clinics / f"{name}.jsonl" for name in NAMES}
    folder = tmp_path / "deployment"
    folder.mkdir()
    with deployed(folder, *NAMES) as deployment, ExitStack() as stack:
        began = time.monotonic()
        nodes = [
            stack.enter_context(deployment.node(name, rows[name], programs[name])) for name in NAMES
        ]
        until(lambda: all(node.answered() for node in nodes), "the nodes")
        # long enough for who is sound, however busy the machine is; two rounds last that long
        timeout = max(60, round(8 * (time.monotonic() - began)))
        config = config.with_overrides({"federation.timeout": timeout})
        with deployment.submit(config) as run:
            assert run.wait(3600) == 0, run.log
            log, superlink = run.log, (folder / "superlink.log").read_text()
    records = RunFolder(config.run_dir).records()
    assert len(records) == ROUNDS + 1, log
    for record in records[1:]:
        expected = {c: said for (c, round_), (_, said) in FAULTS.items() if round_ == record.round}
        told = failures(record)
        assert told.keys() == expected.keys()
        assert [c.client for c in record.clients] == [n for n in NAMES if n not in expected]
        for client, said in expected.items():
            assert said in told[client]
            assert f"round {record.round}: {client} is left out: " in log
    # each of north's replies came twice: Flower takes the first
    assert "duplicate reply" in superlink

    faults.install(monkeypatch, faults.planned({at: kind for at, (kind, _) in FAULTS.items()}))
    local = in_process(config, rows.values(), tmp_path)
    cgfedllm.run(local)
    for remote, here in zip(records, RunFolder(local.run_dir).records(), strict=True):
        assert remote.heldout_nll == pytest.approx(here.heldout_nll, abs=1e-5)
        assert remote.uplink_bytes == here.uplink_bytes
        assert remote.downlink_bytes == here.downlink_bytes
        assert failures(remote).keys() == failures(here).keys()
    own, expected_values = (
        load_file(each.run_dir / "adapter" / "adapter_model.safetensors")
        for each in (config, local)
    )
    for name, values in expected_values.items():
        np.testing.assert_allclose(own[name], values, atol=1e-6)
