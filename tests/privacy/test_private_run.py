"""Whole runs under a privacy budget: what is spent, what leaves a client, what a restart costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cgfedllm
from cgfedllm import api, events
from cgfedllm.config import Config
from cgfedllm.errors import PrivacyError
from cgfedllm.peft_format import load_adapter
from cgfedllm.runs import RunFolder
from cgfedllm.workspace import Workspace

MakeConfig = Callable[..., Config]

FAST = (
    "federation.rounds=2", "training.local_steps=1", "evaluation.heldout=false",
    "evaluation.clients=false", "privacy.delta=1e-5",
)  # fmt: skip
LOCAL = (*FAST, "privacy.mechanism=local", "privacy.epsilon=8.0")
CENTRAL = (*FAST, "privacy.mechanism=central", "federation.weighting=uniform")
CLIENTS = ("north", "south", "west")


class Stop(Exception):
    pass


def releases(folder: Path) -> list[int]:
    """Rounds of the releases in a ledger."""
    return [number for number, _ in json.loads((folder / "privacy.json").read_text())["releases"]]


def notices(told: list[events.Event]) -> str:
    return "\n".join(event.text for event in told if isinstance(event, events.Notice))


def test_local_noise_is_what_leaves_a_client(tiny_config: MakeConfig) -> None:
    config = tiny_config(*LOCAL, "uplink.name=int8", "uplink.error_feedback=false")
    told: list[events.Event] = []
    result = cgfedllm.run(config, listeners=[told.append])
    spent = [record.epsilon for record in result.records]
    assert spent[0] == 0
    assert spent == sorted(spent)
    assert 0.99 * 8 < spent[-1] <= 8
    workspace = Workspace(config, result.run_dir)
    plan = workspace.privacy
    assert plan is not None
    for record in result.records[1:]:
        for client in record.clients:
            # of the noise, next to which a clipped update is nothing
            loud = plan.noise_std * np.sqrt(workspace.spec.size)
            assert client.update_norm == pytest.approx(loud, rel=0.05)
            assert (client.train_loss, client.tokens) == (0, 0)
    for name in CLIENTS:
        assert releases(result.run_dir / "clients" / name) == [1, 2]
    assert not (result.run_dir / "privacy.json").exists()
    received = [event for event in told if isinstance(event, events.UpdateReceived)]
    assert "train-loss" not in received[0].metrics
    assert "epsilon 8 at delta 1e-05 over 2 rounds" in notices(told)


def test_noise_is_secret_unless_it_is_to_be_repeatable(tiny_config: MakeConfig) -> None:
    def adapter(*settings: str) -> np.ndarray:
        result = cgfedllm.run(tiny_config(*LOCAL, "federation.rounds=1", *settings))
        return load_adapter(result.adapter_dir).vector

    secret = [adapter(f"name=secret{number}") for number in (1, 2)]
    repeated = [adapter(f"name=again{number}", "privacy.repeatable=true") for number in (1, 2)]
    assert not np.array_equal(*secret)
    np.testing.assert_array_equal(*repeated)


def test_a_round_that_is_repeated_is_the_same_release(tiny_config: MakeConfig) -> None:
    def stop(event: events.Event) -> None:
        # all clients have sent, nothing is written down yet
        if isinstance(event, events.RoundAggregated) and event.round == 2:
            raise Stop

    config = tiny_config(*LOCAL)
    sent: list[np.ndarray] = []

    def keep(event: events.Event) -> None:
        if isinstance(event, events.UpdateReceived) and event.round == 2:
            sent.append(event.update.vector.copy())

    with pytest.raises(Stop):
        cgfedllm.run(config, listeners=[keep, stop])
    result = cgfedllm.resume(config.run_dir, listeners=[keep])
    assert len(sent) == 6
    for first, again in zip(sent[:3], sent[3:], strict=True):
        np.testing.assert_array_equal(first, again)
    for name in CLIENTS:
        assert releases(result.run_dir / "clients" / name) == [1, 2]


def test_a_client_whose_budget_is_spent_sends_nothing_more(tiny_config: MakeConfig) -> None:
    config = tiny_config(*LOCAL, "federation.rounds=1")
    ledger = config.run_dir / "clients" / "north" / "privacy.json"
    spent = {
        "format": "cgfedllm-privacy-ledger", "version": 1, "key": "00" * 32,
        "releases": [[1, "0" * 32]],
    }  # fmt: skip

    def spend(event: events.Event) -> None:
        if isinstance(event, events.RoundStarted) and event.round == 1:
            ledger.parent.mkdir(parents=True, exist_ok=True)
            ledger.write_text(json.dumps(spent))

    result = cgfedllm.run(config, listeners=[spend])
    (failure,) = result.records[1].failures
    assert failure.client == "north"
    assert "budget is spent" in failure.reason
    assert [client.client for client in result.records[1].clients] == ["south", "west"]


def test_central_noise_is_added_once_to_a_mean_of_clipped_updates(
    tiny_config: MakeConfig,
) -> None:
    config = tiny_config(*CENTRAL, "privacy.clip=0.05")
    told: list[events.Event] = []
    result = cgfedllm.run(config, listeners=[told.append])
    workspace = Workspace(config, result.run_dir)
    plan = workspace.privacy
    assert plan is not None
    for event in told:
        if isinstance(event, events.UpdateReceived):
            assert 0 < event.update.norm() <= 0.05 * (1 + 1e-6)
    loud = plan.noise_std / 3 * np.sqrt(workspace.spec.size)
    for record in result.records[1:]:
        assert record.update_norm == pytest.approx(loud, rel=0.1)
        assert all(client.train_loss > 0 for client in record.clients)  # the server is trusted
    assert releases(result.run_dir) == [1, 2]
    assert not list((result.run_dir / "clients").glob("*/privacy.json"))
    assert [record.epsilon for record in result.records][-1] <= 8


def test_with_sampling_each_client_is_drawn_on_its_own(tiny_config: MakeConfig) -> None:
    config = tiny_config(
        *CENTRAL, "federation.rounds=6", "federation.fraction_train=0.4",
        "privacy.repeatable=true", "privacy.noise_multiplier=20.0", "seed=1",
    )  # fmt: skip
    result = cgfedllm.run(config)
    drawn = [len(record.clients) for record in result.records[1:]]
    assert len(set(drawn)) > 1  # no fixed number
    assert 0 in drawn  # a round without anybody is noise, and counts
    assert all(record.update_norm > 0 for record in result.records[1:])
    assert releases(result.run_dir) == [1, 2, 3, 4, 5, 6]


def test_an_adaptive_norm_is_told_to_clients_and_survives_a_restart(
    tiny_config: MakeConfig,
) -> None:
    settings = (
        *CENTRAL, "privacy.adaptive_clip.enabled=true", "privacy.adaptive_clip.rate=1.0",
        "privacy.clip=0.05", "privacy.repeatable=true", "federation.rounds=4",
    )  # fmt: skip

    def stop(event: events.Event) -> None:
        # noise is drawn, the norm has moved, nothing is written down yet
        if isinstance(event, events.RoundAggregated) and event.round == 3:
            raise Stop

    norms: dict[int, list[float]] = {}

    def keep(event: events.Event) -> None:
        if isinstance(event, events.UpdateReceived):
            assert event.metrics["within-clip"] in (0, 1)
            norms.setdefault(event.round, []).append(event.update.norm())

    whole = cgfedllm.run(tiny_config(*settings, "name=whole"), listeners=[keep])
    clips = [record.clip for record in whole.records]
    assert clips[:2] == [None, 0.05]
    assert len(set(clips[1:])) == 4
    for record in whole.records[1:]:
        assert record.clip is not None
        assert max(norms[record.round]) <= record.clip * (1 + 1e-6)
    config = tiny_config(*settings, "name=broken")
    with pytest.raises(Stop):
        cgfedllm.run(config, listeners=[stop])
    resumed = cgfedllm.resume(config.run_dir)
    assert [record.clip for record in resumed.records] == clips
    assert releases(resumed.run_dir) == [1, 2, 3, 4]
    np.testing.assert_array_equal(
        load_adapter(resumed.adapter_dir).vector, load_adapter(whole.adapter_dir).vector
    )
    assert resumed.records[-1].epsilon == whole.records[-1].epsilon


def test_a_run_that_would_overspend_does_not_start(tiny_config: MakeConfig) -> None:
    config = tiny_config(*LOCAL, "privacy.noise_multiplier=0.5")
    with pytest.raises(PrivacyError, match="nothing was started"):
        cgfedllm.run(config)
    assert not RunFolder(config.run_dir).records()


def test_losses_that_the_budget_does_not_cover_are_warned_of(tiny_config: MakeConfig) -> None:
    told: list[events.Event] = []
    config = tiny_config(*LOCAL, "federation.rounds=1", "evaluation.clients=true")
    cgfedllm.run(config, listeners=[told.append])
    assert "set evaluation.clients = false" in notices(told)


def test_budgets_are_compared_like_codecs(tiny_config: MakeConfig) -> None:
    def variant(epsilon: str) -> str:
        return f"eps{epsilon}:privacy.mechanism=local,privacy.epsilon={epsilon}"

    changes: dict[str, Any] = {"evaluation.heldout": True, "federation.rounds": 1}
    config = tiny_config(*FAST, "privacy.repeatable=true").with_overrides(changes)
    result = api.compare(config, ["raw"], variants=[variant("0.25"), variant("8.0")])
    assert not result.failures
    nll = {entry.codec: entry.records[-1].heldout_nll for entry in result.entries}
    assert set(nll) == {"raw", "eps0.25", "eps8.0"}
    assert nll["raw"] < nll["eps8.0"]  # noise of this size leaves nothing to learn
