"""Clients and networks that fail: each costs the round its own share, and is named with why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import cgfedllm
from cgfedllm import events
from cgfedllm.config import Config
from cgfedllm.federation.directory import STRAY

MakeConfig = Callable[..., Config]
Outcome = Callable[[Path], dict[str, Any]]

TIMEOUT = "no reply within 30 s"
# what is said of each, where that has numbers of the run
KINDS = {
    **dict.fromkeys(("lost", "silent", "late"), TIMEOUT),
    "stale": "packet round is 1, expected 2",
    **dict.fromkeys(("crash", "corrupt", "cut", "oversized", "foreign state"), ""),
    **dict.fromkeys(("not finite", "nan metrics", "mute"), ""),
}


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def run(told: list[str]) -> Callable[[Config], cgfedllm.RunResult]:
    """Run and listen to warnings."""

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Notice) and event.level == "warning":
            told.append(event.text)

    return lambda config: cgfedllm.run(config, listeners=[listen])


SETTINGS = ("federation.timeout=30", "evaluation.clients=false")


def test_every_kind_of_fault_is_tried(faults: ModuleType) -> None:
    assert {*KINDS, "twice"} == set(faults.KINDS) == set(faults.REASONS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_costs_its_own_share_and_is_told_and_written_down(
    kind: str,
    tiny_config: MakeConfig,
    run: Callable[..., Any],
    told: list[str],
    faults: ModuleType,
    without_south: dict[str, Any],
    outcome: Outcome,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grids = faults.install(monkeypatch, faults.planned({("south", 2): kind}))
    result = run(tiny_config(*SETTINGS))
    assert grids[0].happened == [("south", 2, kind)]
    assert [[c.client for c in record.clients] for record in result.records[1:]] == [
        ["north", "south", "west"],
        ["north", "west"],
        ["north", "south", "west"],
    ]
    (failure,) = result.records[2].failures
    assert failure.client == "south"
    assert faults.REASONS[kind] in failure.reason
    assert KINDS[kind] in failure.reason
    assert f"round 2: south is left out: {failure.reason}" in told
    late = [("south", STRAY)] if kind == "late" else []
    assert [(f.client, f.reason) for f in result.records[3].failures] == late
    assert len(told) == 1 + len(late)
    # nothing of what it sent, or of how it failed, is in the result
    assert outcome(result.run_dir)["adapter"] == without_south["adapter"]
    losses = [row["heldout_nll"] for row in without_south["rounds"]]
    assert [record.heldout_nll for record in result.records] == losses


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return {}


@pytest.fixture
def without_south(
    kept: dict[str, Any],
    tiny_config: MakeConfig,
    outcome: Outcome,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """Outcome of a run in whose second round one client raises before it trains; made once."""
    from cgfedllm.training.local import LocalTrainer

    if not kept:
        train = LocalTrainer.train

        def failing(self: LocalTrainer, *args: Any, **kwargs: Any) -> Any:
            if (kwargs["client"], kwargs["round"]) == ("south", 2):
                raise RuntimeError("out of luck")
            return train(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(LocalTrainer, "train", failing)
            kept.update(outcome(cgfedllm.run(tiny_config(*SETTINGS, "name=plain")).run_dir))
    return kept


def test_a_second_reply_does_not_count(
    tiny_config: MakeConfig,
    run: Callable[..., Any],
    told: list[str],
    faults: ModuleType,
    undisturbed: Callable[..., dict[str, Any]],
    outcome: Outcome,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faults.install(monkeypatch, faults.planned({("south", 2): "twice"}))
    result = run(tiny_config(*SETTINGS))
    assert [(f.client, f.reason) for f in result.records[2].failures] == [("south", STRAY)]
    assert told == [f"round 2: south: {STRAY}"]
    assert outcome(result.run_dir)["adapter"] == undisturbed(*SETTINGS)["adapter"]


def test_clients_that_lose_three_messages_in_ten_are_caught_up_and_the_run_learns(
    tiny_config: MakeConfig,
    run: Callable[..., Any],
    told: list[str],
    faults: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With error feedback and a lossy downlink, whose increments a client that misses one lacks."""
    grids = faults.install(monkeypatch, faults.at_random(0, 0.3, ["lost"]))
    config = tiny_config(*SETTINGS, "federation.rounds=6", "uplink.name=int8", "downlink.name=int8")
    records = run(config).records
    lost = grids[0].happened
    assert len(lost) >= 4
    for record in records[1:]:
        gone = {client for client, round_, _ in lost if round_ == record.round}
        assert {f.client for f in record.failures} == gone
        assert {c.client for c in record.clients} == {"north", "south", "west"} - gone
    assert len(told) == len(lost)
    assert records[-1].heldout_nll < records[0].heldout_nll


def test_faults_of_all_kinds_at_once_leave_a_run_that_learns(
    tiny_config: MakeConfig,
    run: Callable[..., Any],
    faults: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    some = faults.at_random(1, 0.7)
    # if all failed in a round, its attempts would be spent
    plan = lambda client, round_: None if client == "north" else some(client, round_)  # noqa: E731
    grids = faults.install(monkeypatch, plan)
    config = tiny_config(*SETTINGS, "federation.rounds=8", "uplink.name=int8")
    records = run(config).records
    assert len({kind for _, _, kind in grids[0].happened}) >= 7
    for client, round_, kind in grids[0].happened:
        told = [f for f in records[round_].failures if f.client == client]
        assert told, (client, round_, kind)
    assert records[-1].heldout_nll < records[0].heldout_nll


def test_a_round_that_all_lose_is_tried_again_with_the_same_result(
    tiny_config: MakeConfig,
    run: Callable[..., Any],
    faults: ModuleType,
    undisturbed: Callable[..., dict[str, Any]],
    outcome: Outcome,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clients trained, their words were lost: they train the round again from where it began."""
    tries: list[tuple[str, int]] = []

    def once(client: str, round_: int) -> str | None:
        tries.append((client, round_))
        return "silent" if round_ == 2 and tries.count((client, 2)) == 1 else None

    settings = (*SETTINGS, "uplink.name=int8", "downlink.name=int8")
    faults.install(monkeypatch, once)
    result = run(tiny_config(*settings))
    assert result.records[2].attempts == 2
    assert outcome(result.run_dir)["adapter"] == undisturbed(*settings)["adapter"]


def test_a_node_that_is_gone_is_not_waited_for(faults: ModuleType) -> None:
    """Flower gives no message id where it cannot store a message for a node."""
    from flwr.app import Message, RecordDict
    from flwr.clientapp import ClientApp

    from cgfedllm.federation.directory import receive

    class Gone(faults.FaultyGrid):  # type: ignore[name-defined, misc]
        def push_messages(self, messages: Any) -> list[str]:
            super().push_messages(messages)
            return ["" for _ in messages]

        def pull_messages(self, message_ids: Any) -> list[Message]:
            raise AssertionError("nothing to wait for")

    grid = Gone(ClientApp(), {}, faults.planned({}))
    messages = [Message(RecordDict(), node, "train") for node in (2, 3)]
    assert list(receive(grid, messages, 30.0, pytest.fail)) == []


def test_flowers_word_that_a_reply_cannot_be_had_is_its_clients(faults: ModuleType) -> None:
    """Such an error comes in the server's name."""
    from flwr.app import Error, Message, RecordDict
    from flwr.clientapp import ClientApp

    from cgfedllm.federation.directory import receive

    class Unavailable(faults.FaultyGrid):  # type: ignore[name-defined, misc]
        def _deliver(self, message: Message) -> Message:
            reply = Message(Error(9, "objects are unavailable"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = 1
            return reply

    grid = Unavailable(ClientApp(), {}, faults.planned({}))
    message = Message(RecordDict(), 7, "train")
    (reply,) = receive(grid, [message], 30.0, pytest.fail)
    assert (reply.metadata.src_node_id, reply.error.reason) == (7, "objects are unavailable")
