"""The server towards nodes it does not control: late, foreign, restarted, talking nonsense."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from cgfedllm import __version__, events
from cgfedllm.base_weights import BaseWeights
from cgfedllm.config import Config
from cgfedllm.errors import FederationError
from cgfedllm.federation import directory as nodes
from cgfedllm.federation import server_app
from cgfedllm.federation.client_app import make_client_app
from cgfedllm.federation.directory import Directory
from cgfedllm.federation.inprocess import InProcessGrid
from cgfedllm.federation.messages import CONFIG, METRICS
from cgfedllm.federation.server_app import Server
from cgfedllm.metrics import RoundRecord
from cgfedllm.runs import RunFolder
from cgfedllm.workspace import Workspace, workspace_for

MakeConfig = Callable[..., Config]
Answer = Callable[[Message], RecordDict]

SPEC_HASH = "00ff"
BASE = BaseWeights("organisation/model", "aa", "bb")


def about(client: str, **changes: Any) -> RecordDict:
    record = {
        "client": client, "rows": 1, "spec": SPEC_HASH, "release": __version__,
        "base-model": BASE.model, "base-vectors": BASE.vectors, "base-matrices": BASE.matrices,
        **changes,
    }  # fmt: skip
    return RecordDict({CONFIG: ConfigRecord(record)})


class Nodes(InProcessGrid):
    """A grid whose nodes come, go and answer a greeting as the test says."""

    complete = False

    def __init__(self, answers: dict[int, RecordDict | None]) -> None:
        self.answers = answers
        self.greeted: list[int] = []
        app = ClientApp()

        @app.query()
        def hello(message: Message, context: Context) -> Message:
            self.greeted.append(context.node_id)
            answer = self.answers[context.node_id]
            if answer is None:
                raise RuntimeError("no such thing here")
            return Message(answer, reply_to=message)

        super().__init__(app, {})

    def get_node_ids(self) -> Iterable[int]:
        for node in self.answers:
            self._contexts.setdefault(
                node,
                Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={}),
            )
        return list(self.answers)


def directory(answers: dict[int, RecordDict | None]) -> tuple[Directory, Nodes]:
    grid = Nodes(answers)
    return Directory(grid, SPEC_HASH, BASE, timeout=5.0), grid


@pytest.fixture
def notices() -> Iterable[list[str]]:
    heard: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Notice):
            heard.append(event.text)

    with events.listening(listen):
        yield heard


# ---- greeting -----------------------------------------------------------------------------------


def test_nodes_are_known_and_ordered_by_the_names_of_their_clients() -> None:
    known, _ = directory({7: about("b"), 3: about("c"), 9: about("a")})
    known.refresh()
    assert known.names() == ("a", "b", "c")
    assert known.nodes() == [9, 7, 3]
    assert (known.name(7), known.name(4)) == ("b", "node 4")


def test_a_node_is_greeted_once_and_newcomers_are_met_later() -> None:
    known, grid = directory({2: about("a")})
    known.refresh()
    grid.answers[3] = about("b")
    known.refresh()
    known.refresh()
    assert grid.greeted == [2, 3]
    assert known.names() == ("a", "b")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (about("x", release="0.0.0"), "x runs release 0.0.0"),
        (about("x", spec="beef"), "x has another adapter"),
        (
            about("x", **{"base-model": "organisation/model-instruct", "base-matrices": "cc"}),
            "x has other base weights: its model is 'organisation/model-instruct', this run's is "
            "'organisation/model'",
        ),
        (about("x", **{"base-vectors": "cc"}), "x has other base weights"),
        (about("x", **{"base-model": "\x1b[2J", "base-vectors": "cc"}), "its model is '?[2J'"),
        (about("x", **{"base-vectors": 7}), "x does not tell its base model"),
        (about("a"), "a client named 'a' is connected already"),
        (None, "no such thing here"),
        (RecordDict(), "does not answer as a client"),
        (about("x", rows="many", release="1"), "x runs release 1"),
        (RecordDict({CONFIG: ConfigRecord({"client": "x"})}), "does not answer as a client"),
        (RecordDict({METRICS: MetricRecord({"x": 1})}), "does not answer as a client"),
    ],
)
def test_nodes_that_run_something_else_are_left_out_with_a_word(
    answer: RecordDict | None, reason: str, notices: list[str]
) -> None:
    known, grid = directory({2: about("a"), 3: answer})
    known.refresh()
    known.refresh()
    assert known.names() == ("a",)
    assert grid.greeted == [2, 3]
    assert len(notices) == 1
    assert notices[0].startswith("node 3 is left out: ")
    assert reason in notices[0]


def test_a_node_whose_matrices_are_quantised_is_judged_by_the_rest() -> None:
    known, _ = directory({2: about("a"), 3: about("b", **{"base-matrices": ""})})
    known.refresh()
    assert known.names() == ("a", "b")


def test_a_node_that_does_not_answer_the_greeting_is_waited_for_once(
    faults: ModuleType, notices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = faults.Clock()
    monkeypatch.setattr(nodes, "time", clock)
    known, grid = directory({2: about("a"), 3: about("b")})
    answers = grid.pull_messages
    silent = {3}

    def pull(message_ids: Iterable[str]) -> Iterable[Message]:
        to = {i: grid._pending[i].metadata.dst_node_id for i in message_ids if i in grid._pending}
        return answers([i for i, node in to.items() if node not in silent])

    monkeypatch.setattr(grid, "pull_messages", pull)
    known.refresh()
    known.refresh()
    assert known.names() == ("a",)
    assert clock.now == 5.0
    assert notices == ["node 3 is left out: no reply to the greeting within 5 s"]
    silent.clear()
    away = grid.answers.pop(3)
    known.refresh()
    grid.answers[3] = away
    known.refresh()
    assert known.names() == ("a", "b")


def test_a_node_that_is_away_for_a_moment_is_greeted_again(
    faults: ModuleType, notices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A SuperNode that was killed and started again; Flower answers in its stead meanwhile."""
    clock = faults.Clock()
    monkeypatch.setattr(nodes, "time", clock)
    known, grid = directory({2: about("a"), 3: about("b")})
    answers, gone = grid.pull_messages, {3}

    def pull(message_ids: Iterable[str]) -> Iterable[Message]:
        for reply in answers(message_ids):
            node = reply.metadata.src_node_id
            if node in gone:
                away = Error(5, "Node Unavailable")
                reply = Message(away, reply_to=sent[reply.metadata.reply_to_message_id])
                reply.metadata.__dict__["_src_node_id"] = 1  # in the SuperLink's own name
            yield reply

    push, sent = grid.push_messages, {}

    def note(messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = list(push(messages))
        sent.update(zip(ids, messages, strict=True))
        return ids

    monkeypatch.setattr(grid, "push_messages", note)
    monkeypatch.setattr(grid, "pull_messages", pull)
    for _ in range(3):
        known.refresh()
    assert known.names() == ("a",)
    assert grid.greeted == [2, 3]  # not at every turn
    gone.clear()
    clock.now += 31
    known.refresh()
    assert known.names() == ("a", "b")
    assert notices == ["node 3 is not there and will be greeted again: Node Unavailable"]


def test_a_client_that_comes_back_under_another_node_id_takes_its_place() -> None:
    known, grid = directory({2: about("a"), 3: about("b")})
    known.refresh()
    del grid.answers[3]
    grid.answers[8] = about("b")
    known.refresh()
    assert known.names() == ("a", "b")
    assert known.nodes() == [2, 8]


# ---- a run --------------------------------------------------------------------------------------


class Slow(InProcessGrid):
    """Real clients behind a network that loses what `lost` says."""

    complete = False

    def __init__(self, contexts: dict[int, Context], lost: Callable[[Message], bool]) -> None:
        super().__init__(make_client_app(), contexts)
        self._lost = lost

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        arrived = [
            i for i in message_ids if i in self._pending and not self._lost(self._pending[i])
        ]
        return super().pull_messages(arrived)


def serve(config: Config, make: Callable[[dict[int, Context]], InProcessGrid]) -> list[RoundRecord]:
    """Run the server on nodes of the test's making; partitions in reverse order of node ids."""
    run_config = {"config": config.to_toml(), "run-dir": str(config.run_dir)}
    workspace = workspace_for(config.to_toml(), str(config.run_dir))
    count = len(workspace.data.clients)
    contexts = {
        50 - 7 * partition: Context(
            run_id=1,
            node_id=50 - 7 * partition,
            node_config={"partition-id": partition, "num-partitions": count},
            state=RecordDict(),
            run_config=run_config,
        )
        for partition in range(count)
    }
    with RunFolder.create(config) as folder:
        Server(make(contexts), workspace).run()
        return folder.records()


def test_a_client_that_does_not_answer_in_time_is_left_out(
    tiny_config: MakeConfig, faults: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "time", faults.Clock())
    names = {50 - 7 * partition: name for partition, name in enumerate(("north", "south", "west"))}

    def lost(message: Message) -> bool:
        south = names[message.metadata.dst_node_id] == "south"
        return south and message.metadata.message_type == "train"

    config = tiny_config("federation.rounds=1", "federation.timeout=30")
    records = serve(config, lambda contexts: Slow(contexts, lost))
    assert [c.client for c in records[1].clients] == ["north", "west"]
    assert [(f.client, f.reason) for f in records[1].failures] == [
        ("south", "no reply within 30 s")
    ]
    assert sorted(records[1].client_nll) == ["north", "south", "west"]


def test_node_ids_do_not_change_the_result(
    tiny_config: MakeConfig, outcome: Callable[[Path], dict[str, Any]]
) -> None:
    import cgfedllm

    settings = ("federation.fraction_train=0.7", "uplink.name=int8", "downlink.name=int8")
    config = tiny_config(*settings, "name=other-ids")
    serve(config, lambda contexts: InProcessGrid(make_client_app(), contexts))
    usual = cgfedllm.run(tiny_config(*settings))
    assert outcome(config.run_dir) == outcome(usual.run_dir)


def test_in_one_process_no_client_is_late(tiny_config: MakeConfig) -> None:
    """The last in the queue waits for all others; that is no reason to leave it out."""
    import cgfedllm

    records = cgfedllm.run(tiny_config("federation.rounds=1", "federation.timeout=0.001")).records
    assert len(records[1].clients) == 3
    assert records[1].failures == []


def test_too_few_nodes_stop_the_server_after_the_timeout(
    tiny_config: MakeConfig, faults: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_app, "time", faults.Clock())
    config = tiny_config("federation.min_clients=4", "federation.timeout=30")
    with pytest.raises(FederationError, match=r"3 clients are there.*min_clients is 4"):
        serve(config, lambda contexts: Slow(contexts, lambda message: False))


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({METRICS: MetricRecord({"nll": float("nan")})}),
        RecordDict({METRICS: MetricRecord({"nll": [1.0, 2.0]})}),
        RecordDict({CONFIG: ConfigRecord({"nll": "low"})}),
    ],
)
def test_nonsense_in_reply_to_an_evaluation_costs_only_that_figure(
    tiny_config: MakeConfig, content: RecordDict
) -> None:
    class Liar(InProcessGrid):
        def _deliver(self, message: Message) -> Message:
            metadata = message.metadata
            if metadata.message_type == "evaluate" and metadata.dst_node_id == 50:
                return Message(content, reply_to=message)
            return super()._deliver(message)

    config = tiny_config("federation.rounds=1")
    records = serve(config, lambda contexts: Liar(make_client_app(), contexts))
    for record in records:
        assert sorted(record.client_nll) == ["south", "west"]
        assert {failure.client for failure in record.failures} <= {"north"}
    assert len(records) == 2


def test_a_node_without_a_partition_says_what_it_lacks(
    tiny_config: MakeConfig, notices: list[str]
) -> None:
    config = tiny_config("federation.rounds=1")

    def make(contexts: dict[int, Context]) -> InProcessGrid:
        contexts[50].node_config.clear()
        return InProcessGrid(make_client_app(), contexts)

    records = serve(config, make)
    assert [c.client for c in records[1].clients] == ["south", "west"]
    assert any("no partition-id; start it with --node-config" in text for text in notices)


def test_a_node_keeps_its_memory_where_it_is_told_to(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config("federation.rounds=1", "uplink.name=int8")

    def make(contexts: dict[int, Context]) -> InProcessGrid:
        for context in contexts.values():
            context.node_config["state-dir"] = str(tmp_path / "state")
        return InProcessGrid(make_client_app(), contexts)

    serve(config, make)
    (run,) = (tmp_path / "state").iterdir()  # of another run of that name there would be another
    assert sorted(path.name for path in run.iterdir()) == ["north", "south", "west"]
    assert not (config.run_dir / "clients").exists()


def test_the_first_round_waits_for_a_latecomer_but_not_for_ever(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data has three clients; the third comes after two minutes, the others at once."""
    clock = [0.0]
    monkeypatch.setattr(server_app.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(
        server_app.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + 1)
    )

    class Latecomer(InProcessGrid):
        complete = False

        def get_node_ids(self) -> Iterable[int]:
            ids = list(super().get_node_ids())
            return ids if clock[0] >= comes else ids[:2]

    for comes, expected in ((30, 3), (120, 2)):
        clock[0] = 0.0
        name = f"name=after-{comes}"
        config = tiny_config("federation.rounds=1", "federation.fraction_train=1", name)
        heard: list[events.Event] = []
        with events.listening(heard.append):
            serve(config, lambda contexts: Latecomer(make_client_app(), contexts))
        started = next(event for event in heard if isinstance(event, events.RunStarted))
        assert len(started.clients) == expected


def test_a_workspace_serves_clients_that_only_evaluate(tiny_config: MakeConfig) -> None:
    """On a remote node each message may come to a fresh process; frozen A must be right there."""
    config = tiny_config("lora.freeze_a=true", "seed=4")
    fresh = Workspace(config, Path())
    Workspace(config.with_overrides({"seed": 5}), Path()).reset_frozen_factors()
    values = fresh.model.get_adapter(fresh.model.full_spec).views()
    expected = fresh.whole(fresh.start).views()
    for factor in fresh.model.full_spec:
        if factor.kind == "A":
            assert (values[factor.name] == expected[factor.name]).all()
