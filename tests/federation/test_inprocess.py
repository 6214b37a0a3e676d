"""The in-process engine: a Flower Grid without a network, with a network's separation."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from packaging.version import Version

from cgfedllm.errors import DataError
from cgfedllm.federation.inprocess import InProcessGrid

MakeGrid = Callable[..., InProcessGrid]


def app_of(function: Callable[[Message, Context], Message]) -> ClientApp:
    app = ClientApp()
    app.train()(function)
    return app


def echo(message: Message, context: Context) -> Message:
    content = RecordDict({"metrics": MetricRecord({"node": context.node_id})})
    return Message(content, reply_to=message)


def train_messages(nodes: list[int]) -> list[Message]:
    return [Message(RecordDict(), node, "train") for node in nodes]


# ---- Flower's interface -------------------------------------------------------------------------


def test_flower_is_the_version_whose_insides_are_relied_on() -> None:
    """The engine sets a private class of Flower; after an upgrade, read it again first."""
    assert Version("1.42") <= Version(version("flwr")) < Version("1.43")


def test_every_abstract_method_of_flowers_grid_is_there(make_grid: MakeGrid) -> None:
    assert not InProcessGrid.__abstractmethods__
    assert isinstance(make_grid([2]), Grid)
    ours = {name for name in Grid.__abstractmethods__ if name in vars(InProcessGrid)}
    assert ours == Grid.__abstractmethods__


def test_messages_can_be_made_outside_of_flowers_engines() -> None:
    """In a process of its own: other tests have made grids in this one."""
    code = (
        "from flwr.app import Message, RecordDict\n"
        "from flwr.clientapp import ClientApp\n"
        "from cgfedllm.federation.inprocess import InProcessGrid\n"
        "InProcessGrid(ClientApp(), {})\n"
        "message = Message(RecordDict(), 7, 'train')\n"
        "print(message.metadata.src_node_id, message.metadata.dst_node_id)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "7"], done.stderr


def test_create_message_makes_what_message_makes(make_grid: MakeGrid) -> None:
    message = make_grid([2]).create_message(RecordDict(), "train", 2, "3", ttl=9.0)
    metadata = message.metadata
    assert (metadata.dst_node_id, metadata.message_type) == (2, "train")
    assert (metadata.group_id, metadata.ttl) == ("3", 9.0)


def test_the_run_can_be_read_and_set(make_grid: MakeGrid) -> None:
    grid = make_grid([2])
    run = grid.run
    grid.set_run(run)
    assert grid.run is run


# ---- delivery -----------------------------------------------------------------------------------


def test_nodes_are_listed_in_order(make_grid: MakeGrid) -> None:
    assert list(make_grid([9, 3, 5]).get_node_ids()) == [3, 5, 9]


def test_each_message_reaches_its_node_and_comes_back(make_grid: MakeGrid) -> None:
    grid = make_grid([2, 3, 4], app_of(echo))
    messages = train_messages([4, 2])
    replies = list(grid.send_and_receive(messages))
    assert [reply.content["metrics"]["node"] for reply in replies] == [4, 2]
    assert [reply.metadata.src_node_id for reply in replies] == [4, 2]
    sent = [message.metadata.message_id for message in messages]
    assert [reply.metadata.reply_to_message_id for reply in replies] == sent


def test_a_message_runs_when_its_reply_is_pulled_and_only_once(make_grid: MakeGrid) -> None:
    ran: list[int] = []

    def note(message: Message, context: Context) -> Message:
        ran.append(context.node_id)
        return echo(message, context)

    grid = make_grid([2, 3], app_of(note))
    ids = list(grid.push_messages(train_messages([2, 3])))
    assert ran == []
    assert len(list(grid.pull_messages(ids))) == 1
    assert ran == [2]
    assert len(list(grid.pull_messages(ids))) == 1
    assert ran == [2, 3]
    assert list(grid.pull_messages(ids)) == []
    assert list(grid.pull_messages(["unknown"])) == []


def test_contents_are_copied_both_ways(make_grid: MakeGrid) -> None:
    kept: list[RecordDict] = []

    def scribble(message: Message, context: Context) -> Message:
        message.content["config"]["value"] = 99
        reply = RecordDict({"arrays": ArrayRecord({"x": Array(np.zeros(2, np.float32))})})
        kept.append(reply)
        return Message(reply, reply_to=message)

    grid = make_grid([2], app_of(scribble))
    message = Message(RecordDict({"config": ConfigRecord({"value": 1})}), 2, "train")
    (reply,) = grid.send_and_receive([message])
    assert message.content["config"]["value"] == 1
    kept[0]["arrays"]["x"] = Array(np.ones(2, np.float32))
    kept[0]["more"] = ConfigRecord()
    assert reply.content["arrays"]["x"].numpy().sum() == 0
    assert "more" not in reply.content


def test_a_clients_context_lasts_and_is_its_own(make_grid: MakeGrid) -> None:
    def count(message: Message, context: Context) -> Message:
        seen = context.state.setdefault("count", MetricRecord({"n": 0}))
        seen["n"] += 1
        return Message(RecordDict({"metrics": MetricRecord({"n": seen["n"]})}), reply_to=message)

    grid = make_grid([2, 3], app_of(count))
    replies = grid.send_and_receive(train_messages([2, 2, 3, 2]))
    assert [reply.content["metrics"]["n"] for reply in replies] == [1, 2, 1, 3]


# ---- failure ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (DataError("client 'a' has no rows"), "client 'a' has no rows"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_an_exception_comes_back_as_an_error_with_its_reason(
    make_grid: MakeGrid, raised: Exception, reason: str
) -> None:
    def fail(message: Message, context: Context) -> Message:
        if context.node_id == 2:
            raise raised
        return echo(message, context)

    bad, good = make_grid([2, 3], app_of(fail)).send_and_receive(train_messages([2, 3]))
    assert bad.has_error()
    assert reason in bad.error.reason
    assert bad.metadata.src_node_id == 2
    assert good.has_content()


def test_an_unknown_node_answers_with_an_error(make_grid: MakeGrid) -> None:
    (reply,) = make_grid([2], app_of(echo)).send_and_receive(train_messages([8]))
    assert "no node 8" in reply.error.reason


def test_a_message_type_the_app_does_not_know_answers_with_an_error(make_grid: MakeGrid) -> None:
    message = Message(RecordDict(), 2, "evaluate")
    (reply,) = make_grid([2], app_of(echo)).send_and_receive([message])
    assert reply.has_error()


def test_ctrl_c_is_no_clients_failure(make_grid: MakeGrid) -> None:
    def stop(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(make_grid([2], app_of(stop)).send_and_receive(train_messages([2])))
