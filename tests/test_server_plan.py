"""What ends first on a server as clients become more."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cgfedllm.config import load_config
from cgfedllm.errors import ConfigError
from cgfedllm.plan import Link, make_plan
from cgfedllm.server_plan import ServerPlan

PLAN = ServerPlan(
    mbit=1000.0,
    clients=100,
    received=100 * 10**6,
    sent=200 * 10**6,
    reply_seconds=0.02,
    rehearsed=1000,
    memory=10**9,
    memory_here=10**10,
    reply_memory=0,
    transfer_seconds=4.0,
)


def test_a_round_is_as_many_times_a_reply_as_there_are_clients() -> None:
    assert PLAN.cpu_seconds == pytest.approx(2.0)
    assert PLAN.receive_seconds == pytest.approx(0.8)
    assert PLAN.send_seconds == pytest.approx(1.6)


def test_each_means_suffices_up_to_where_it_takes_longer_than_a_clients_line() -> None:
    limits = PLAN.limits
    assert limits == pytest.approx(
        {"one core": 200.0, "sending": 250.0, "receiving": 500.0, "memory": math.inf}
    )
    assert PLAN.first == "clients"
    for name in ("one core", "sending", "receiving"):
        at = limits[name] / PLAN.clients
        scaled = replace(
            PLAN,
            clients=round(limits[name]),
            received=round(at * 100 * 10**6),
            sent=round(at * 200 * 10**6),
        )
        times = {
            "one core": scaled.cpu_seconds,
            "sending": scaled.send_seconds,
            "receiving": scaled.receive_seconds,
        }
        assert times[name] == pytest.approx(PLAN.client_seconds, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"reply_seconds": 0.2}, "one core"),
        ({"sent": 10**9}, "sending"),
        ({"received": 10**9}, "receiving"),
        ({"mbit": 100.0}, "sending"),
        ({"transfer_seconds": 1.0}, "one core"),
        ({"reply_memory": 10**7, "memory": 2 * 10**10}, "memory"),
        ({"reply_memory": 9 * 10**7, "memory": 9 * 10**9 + 10**8}, "clients"),
    ],
)
def test_the_first_limit_is_named(changes: dict[str, Any], first: str) -> None:
    assert replace(PLAN, **changes).first == first


def test_training_gives_the_server_time() -> None:
    busy = replace(PLAN, transfer_seconds=1.0)
    assert busy.first == "one core"
    training = replace(busy, training_seconds=60.0)
    assert training.first == "clients"
    assert training.limits["one core"] == pytest.approx(61 * busy.limits["one core"])
    assert dict(training.rows())["server, a round"] == "100 clients wait for themselves"


def test_memory_of_strategies_that_need_every_reply_ends() -> None:
    growing = replace(PLAN, memory=10**9 + 100 * 10**7, reply_memory=10**7)
    assert growing.limits["memory"] == pytest.approx(900)
    assert growing.first == "clients"


def test_sizes_that_depend_on_the_values_leave_the_line_out() -> None:
    unknown = replace(PLAN, received=None, sent=None, transfer_seconds=None)
    assert unknown.limits == {"memory": math.inf}
    assert dict(unknown.rows())["  receives"] == "depends on the values"
    json.dumps(unknown.to_dict(), allow_nan=False)


def planned(tiny_model: Path, *settings: str, clients: int, **options: Any) -> Any:
    config = load_config(None, [f'model.id="{tiny_model}"', "uplink.name=int8", *settings])
    return make_plan(config, clients=clients, **options)


def test_a_server_is_planned_only_if_asked_for(tiny_model: Path) -> None:
    assert planned(tiny_model, clients=5).server is None
    plan = planned(tiny_model, clients=5, server_mbit=100.0, link=Link(1.0, 1.0))
    server = plan.server
    assert server.clients == 5
    assert server.received == 5 * plan.uplink.packet
    assert server.transfer_seconds == server.client_seconds == plan.round_seconds
    assert server.memory == plan.memory.server
    assert server.reply_seconds > 0
    assert server.rehearsed == plan.model.trained
    assert [label for label, _ in plan.rows()][-6:] == [label for label, _ in server.rows()]
    tree = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert tree["server"]["limits"]["memory"] is None
    assert tree["server"]["first"] == server.first


def test_strategies_that_need_every_reply_are_planned_to_hold_them(tiny_model: Path) -> None:
    plan = planned(tiny_model, "federation.strategy.name=krum", clients=8, server_mbit=100.0)
    more = planned(tiny_model, "federation.strategy.name=krum", clients=9, server_mbit=100.0)
    assert plan.server.reply_memory > 0
    assert more.server.memory - plan.server.memory == plan.server.reply_memory


def test_traffic_of_a_round_adds_up_to_that_of_the_run(tiny_model: Path) -> None:
    plan = planned(tiny_model, "federation.rounds=4", clients=6, server_mbit=100.0)
    assert 4 * plan.server.sent == pytest.approx(plan.downlink.total, abs=4)
    assert 4 * plan.server.received == plan.uplink.total


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_training_takes_time(tiny_model: Path, seconds: float) -> None:
    with pytest.raises(ConfigError, match="training takes"):
        planned(tiny_model, clients=2, server_mbit=1.0, training_seconds=seconds)


@pytest.mark.parametrize("speed", [0.0, -1.0, math.nan, math.inf])
def test_a_line_needs_a_speed(tiny_model: Path, speed: float) -> None:
    with pytest.raises(ConfigError, match="server's line"):
        planned(tiny_model, clients=2, server_mbit=speed)
