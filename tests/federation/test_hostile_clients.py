"""A server among clients that mean harm: whatever one says, it costs nothing but its own share."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp.strategy import FedAvg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cgfedllm import __version__, events
from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.base_weights import BaseWeights
from cgfedllm.codecs import CodecContext, make_codec
from cgfedllm.config import Config
from cgfedllm.data.names import is_safe_name, safe_names
from cgfedllm.federation.client_app import make_client_app
from cgfedllm.federation.directory import Directory
from cgfedllm.federation.downlink import Broadcaster
from cgfedllm.federation.inprocess import InProcessGrid
from cgfedllm.federation.messages import (
    ARRAYS,
    CONFIG,
    METRICS,
    NUM_EXAMPLES,
    PACKET,
    PACKET_STYPE,
    STATUS,
    adapter_record,
)
from cgfedllm.federation.server_app import Server
from cgfedllm.federation.strategy import CompressedStrategy
from cgfedllm.metrics import RoundRecord
from cgfedllm.report.console import watcher
from cgfedllm.report.trackers import TensorBoardTracker
from cgfedllm.runs import RunFolder
from cgfedllm.text import MOST, printable
from cgfedllm.workspace import workspace_for

MakeConfig = Callable[..., Config]
MakeGrid = Callable[..., InProcessGrid]

SPEC = AdapterSpec.from_shapes({"m.0.q.lora_A.weight": (2, 7), "m.0.q.lora_B.weight": (6, 2)})
SHORT = settings(max_examples=100, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=10_000, suppress_health_check=list(HealthCheck))

NAMES = {
    "a path upwards": "../../x",
    "a path": "a/b",
    "an absolute path": "/etc/passwd",
    "a path elsewhere": "a\\b",
    "hidden": ".bashrc",
    "an option": "-rf",
    "nothing": "",
    "white space": "a b",
    "a line break": "a\nb",
    "NUL": "a\0b",
    "a terminal escape": "\x1b]0;owned\x07",
    "a C1 control": "\x9b2J",
    "right to left": "abc\u202egpj",
    "no width": "north\u200b",
    "HTML": "<script>alert(1)</script>",
    "markup": "[red]x[/]",
    "ten million letters": "a" * 10**7,
}
NOT_TEXT: list[Any] = [1, 2.0, True, b"north", ["north"], [1, 2], [b"x"]]


# ---- what a client is called --------------------------------------------------------------------


class Answers(InProcessGrid):
    """Nodes that answer a greeting with what the test says."""

    def __init__(self, answers: dict[int, RecordDict | Error]) -> None:
        contexts = {
            node: Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
            for node in answers
        }
        super().__init__(make_client_app(), contexts)
        self.answers = answers

    def _deliver(self, message: Message) -> Message:
        return Message(self.answers[message.metadata.dst_node_id], reply_to=message)


def about(client: Any, /, **changes: Any) -> RecordDict:
    record = {
        "client": client, "rows": 1, "spec": "00ff", "release": __version__,
        "base-model": "m", "base-vectors": "aa", "base-matrices": "bb", **changes,
    }  # fmt: skip
    return RecordDict({CONFIG: ConfigRecord(record)})


def greeted(*answers: RecordDict | Error) -> tuple[Directory, list[str]]:
    """Who is known after greeting some nodes, and what is said of the others."""
    directory = Directory(
        Answers(dict(enumerate(answers, start=2))), "00ff", BaseWeights("m", "aa", "bb"), 5.0
    )
    said: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Notice):
            said.append(event.text)

    with events.listening(listen):
        directory.refresh()
    return directory, said


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_that_no_client_has_is_refused(name: str) -> None:
    directory, said = greeted(about("north"), about(name))
    assert directory.names() == ("north",)
    (notice,) = said
    assert "no name that a client can have" in notice
    assert notice.isprintable()
    assert len(notice) < 200


@pytest.mark.parametrize("value", NOT_TEXT, ids=repr)
@pytest.mark.parametrize("key", ["client", "release", "spec"])
def test_a_greeting_of_other_types_is_refused(key: str, value: Any) -> None:
    directory, said = greeted(about("north"), about("south", **{key: value}))
    assert directory.names() == ("north",)
    assert said == ["node 3 is left out: it does not answer as a client of this app does"]


@pytest.mark.parametrize(
    ("name", "other"), [("north", "North"), ("straße", "STRASSE"), ("σ", "ς"), ("ﬁ", "fi")]
)
def test_names_that_a_file_system_may_take_for_one_are_not_both_known(
    name: str, other: str
) -> None:
    directory, said = greeted(about(name), about(other))
    assert directory.names() == (name,)
    assert f"a client named {name!r} is connected already" in said[0]


@pytest.mark.parametrize("rows", [-1, 2**60, True, "many", [1, 2], 1.5])
def test_rows_that_cannot_be_are_not_counted(rows: Any) -> None:
    directory, said = greeted(about("north"), about("south", rows=rows))
    assert directory.names() == ("north", "south")
    assert said == []
    assert directory.rows().startswith("1 training rows in 2 clients; ")


@pytest.mark.parametrize(
    "answer",
    [
        about("south", release="\x1b[2J" * 10**6),
        about("south", spec="\x1b[2J" * 10**6),
        Error(2, "\x1b[2J" * 10**6),
    ],
)
def test_what_is_said_of_refused_nodes_is_short_and_printable(answer: Any) -> None:
    directory, said = greeted(about("north"), answer)
    assert directory.names() == ("north",)
    for text in (*said, directory.refusals()):
        assert text.isprintable()
        assert len(text) < 1_200


def test_many_refused_nodes_are_counted_and_few_of_them_quoted() -> None:
    answers = [about("x", release=f"0.0.{number}") for number in range(100)]
    directory, _ = greeted(*answers)
    told = directory.refusals()
    assert "100 were left out" in told
    assert len(told) < 1_000


@given(st.lists(st.text(max_size=80), min_size=1, max_size=8))
def test_every_name_that_data_gives_a_client_is_one_it_can_have(values: list[str]) -> None:
    names = safe_names(values)
    assert all(is_safe_name(name) for name in names)
    assert len({name.casefold() for name in names}) == len(names)
    assert all(Path("folder", name).parent == Path("folder") for name in names)


@given(st.text(max_size=100))
def test_a_name_that_a_client_can_have_stays_in_its_folder(name: str) -> None:
    if is_safe_name(name):
        assert Path("folder", name).parent == Path("folder")
        assert name.isprintable()
        assert not set(name) & set("/\\<>&\"'[]\0 ")


@given(st.text() | st.text(string.printable, min_size=MOST), st.integers(1, MOST))
def test_text_of_others_is_one_printable_line(text: str, most: int) -> None:
    shown = printable(text, most)
    assert shown.isprintable()
    assert len(shown) <= most + 3
    assert printable(shown, most + 3) == shown


# ---- any reply ----------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([0, -1, 2**53, 2**63, 10**400, 1e-320, 1e308, float("nan"), float("inf")]),
)
TEXT = st.text(max_size=30) | st.sampled_from(list(NAMES.values())[:-1])
KEYS = st.sampled_from([NUM_EXAMPLES, "steps", "train-loss", "train-seconds", "nll", STATUS]) | TEXT
BLOBS = st.binary(max_size=100) | st.sampled_from([b"CGFP" * 30, bytes(200)])
SHAPES = st.lists(st.integers(-(2**65), 2**65), max_size=4).map(tuple)


def lists_of(scalar: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return scalar | st.lists(scalar, max_size=4)


def metric_records() -> st.SearchStrategy[MetricRecord]:
    number = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.lists(st.floats(), max_size=3))
    return st.dictionaries(KEYS, SCALARS | number, max_size=6).map(MetricRecord)


def config_records() -> st.SearchStrategy[ConfigRecord]:
    value = st.one_of(
        lists_of(st.booleans()),
        lists_of(st.integers(-(2**70), 2**70)),
        lists_of(st.floats()),
        lists_of(TEXT),
        lists_of(BLOBS),
        st.just(["reference-missing", "codec-missing", "no-residual"]),
    )
    return st.dictionaries(KEYS, value, max_size=4).map(ConfigRecord)


def array_records(blobs: st.SearchStrategy[bytes]) -> st.SearchStrategy[ArrayRecord]:
    array = st.builds(
        lambda dtype, shape, stype, data: Array(dtype=dtype, shape=shape, stype=stype, data=data),
        TEXT | st.sampled_from(["uint8", "float32", "O"]),
        SHAPES,
        TEXT | st.just(PACKET_STYPE) | st.just("numpy.ndarray"),
        blobs,
    )
    name = st.just(PACKET) | TEXT
    return st.dictionaries(name, array, max_size=3).map(ArrayRecord)


def usable_packet() -> bytes:
    update = AdapterUpdate(SPEC, np.ones(SPEC.size, np.float32))
    return make_codec("raw").encode(update, CodecContext(SPEC, 1, 0))


def contents() -> st.SearchStrategy[RecordDict]:
    """Any records under any names, the right ones often."""
    blobs = BLOBS | st.just(usable_packet())
    right = st.builds(
        lambda arrays, metrics: {ARRAYS: arrays, METRICS: metrics},
        array_records(blobs)
        | st.builds(
            lambda data: ArrayRecord(
                {PACKET: Array(dtype="uint8", shape=(1,), stype=PACKET_STYPE, data=data)}
            ),
            blobs,
        ),
        metric_records(),
    )
    any_record = array_records(blobs) | metric_records() | config_records()
    name = st.sampled_from([ARRAYS, METRICS, CONFIG]) | TEXT
    wrong = st.dictionaries(name, any_record, max_size=4)
    return st.builds(lambda a, b: RecordDict({**a, **b}), right | wrong, wrong)


def answers() -> st.SearchStrategy[RecordDict | Error]:
    error = st.builds(Error, st.integers(-(2**31), 2**31), st.none() | TEXT)
    return contents() | error


def any_reply(make_grid: MakeGrid, answer: RecordDict | Error) -> None:
    codec = make_codec("raw")
    strategy = CompressedStrategy(
        FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1),
        spec=SPEC,
        uplink=codec,
        broadcaster=Broadcaster(SPEC, codec, 0),
        seed=0,
    )
    strategy._broadcaster.advance(AdapterUpdate.zeros(SPEC), 0)
    grid = make_grid([2, 3])
    start = adapter_record(AdapterUpdate.zeros(SPEC))
    messages = list(strategy.configure_train(1, start, ConfigRecord(), grid))
    good = RecordDict(
        {
            ARRAYS: ArrayRecord(
                {PACKET: Array(dtype="uint8", shape=(1,), stype=PACKET_STYPE, data=usable_packet())}
            ),
            METRICS: MetricRecord({NUM_EXAMPLES: 4}),
        }
    )
    replies = [Message(answer, reply_to=messages[0]), Message(good, reply_to=messages[1])]
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    received, failures = strategy.tally.received, strategy.tally.failures
    assert len(received) + len(failures) == 2
    assert received[-1].weight == 4
    for _, reason in failures:
        assert reason
        assert reason.isprintable()
        assert len(reason) <= MOST + 3
    for own in received:
        assert all(0 <= value < 1e61 for value in own.metrics.values())


@SHORT
@given(answers())
def test_any_reply_costs_at_most_its_own_share(make_grid: MakeGrid, answer: Any) -> None:
    any_reply(make_grid, answer)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@LONG
@given(answers())
def test_any_reply_costs_at_most_its_own_share_at_length(make_grid: MakeGrid, answer: Any) -> None:
    any_reply(make_grid, answer)


def any_greeting(answer: RecordDict | Error) -> None:
    directory, said = greeted(about("north"), answer)
    assert "north" in directory.names()
    assert all(is_safe_name(name) for name in directory.names())
    assert all(text.isprintable() and len(text) < 1_200 for text in said)
    assert directory.rows().isprintable()


def greetings() -> st.SearchStrategy[RecordDict | Error]:
    value = st.one_of(
        TEXT, st.sampled_from(["00ff", __version__, "north", "NORTH"]), st.integers(), st.booleans()
    )
    keys = st.sampled_from(["client", "release", "spec", "rows", "rows-cut", "rows-dropped"])
    record = st.dictionaries(keys, value).map(
        lambda changes: RecordDict({CONFIG: ConfigRecord({**dict(about("x")[CONFIG]), **changes})})
    )
    return answers() | record


@SHORT
@given(greetings())
def test_any_greeting_is_taken_or_refused(answer: Any) -> None:
    any_greeting(answer)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@LONG
@given(greetings())
def test_any_greeting_is_taken_or_refused_at_length(answer: Any) -> None:
    any_greeting(answer)


# ---- a whole run --------------------------------------------------------------------------------

HOSTILE: dict[str, dict[str, RecordDict | Error]] = {
    "escapes": {"train": Error(2, "\x1b]0;owned\x07" * 1_000), "evaluate": Error(2, "\x1b[2J[/]")},
    "markup": {"train": Error(2, "[/bold] <script>alert(1)</script>"), "evaluate": Error(1, None)},
    "always missing": {
        kind: RecordDict({CONFIG: ConfigRecord({STATUS: ["reference-missing", "codec-missing"]})})
        for kind in ("train", "evaluate")
    },
    "extreme numbers": {
        "train": RecordDict({METRICS: MetricRecord({NUM_EXAMPLES: 10**400, "x" * 10**6: 1.0})}),
        "evaluate": RecordDict({METRICS: MetricRecord({"nll": 1e308})}),
    },
    "nothing": {"train": RecordDict(), "evaluate": RecordDict()},
}


class OneHostile(InProcessGrid):
    """Real clients, but for one."""

    def __init__(self, contexts: dict[int, Context], answers: dict[str, Any]) -> None:
        super().__init__(make_client_app(), contexts)
        self.hostile, self.answers = max(contexts), answers

    def _deliver(self, message: Message) -> Message:
        kind = message.metadata.message_type
        if message.metadata.dst_node_id == self.hostile and kind in self.answers:
            return Message(self.answers[kind], reply_to=message)
        return super()._deliver(message)


def serve(config: Config, answers: dict[str, Any]) -> list[RoundRecord]:
    run_config = {"config": config.to_toml(), "run-dir": str(config.run_dir)}
    workspace = workspace_for(config.to_toml(), str(config.run_dir))
    contexts = {
        node: Context(
            run_id=1,
            node_id=node,
            node_config={"partition-id": node - 2},
            state=RecordDict(),
            run_config=run_config,
        )
        for node in range(2, 2 + len(workspace.data.clients))
    }
    with RunFolder(config.run_dir) as folder:
        folder.config_path.write_text(config.to_toml())
        Server(OneHostile(contexts, answers), workspace).run()
        return folder.records()


@pytest.mark.parametrize("case", HOSTILE)
def test_a_run_goes_on_beside_a_client_that_means_harm(
    tiny_config: MakeConfig, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config("federation.rounds=1", "uplink.name=int8", "downlink.name=int8")
    run = RunFolder(config.run_dir)
    before = {path for path in tmp_path.rglob("*") if config.run_dir not in path.parents}
    tracker = TensorBoardTracker(config, run)
    with watcher("plain") as console, tracker, events.listening(console, tracker):
        records = serve(config, HOSTILE[case])
    assert [client.client for client in records[1].clients] == ["north", "south"]
    assert records[1].failures
    assert {failure.client for failure in records[1].failures} == {"west"}
    # what is shown and kept can be printed, and is JSON for every reader
    shown = capsys.readouterr()
    for text in (shown.out, run.metrics_path.read_text()):
        assert all(line.isprintable() for line in text.split("\n"))
    for line in run.metrics_path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
    # and nothing was written but in the run's folder
    after = {path for path in tmp_path.rglob("*") if config.run_dir not in path.parents}
    assert after - before <= {config.run_dir, config.run_dir.parent}


def test_a_reply_that_nobody_asked_for_is_not_heard(make_grid: MakeGrid) -> None:
    from cgfedllm.federation.directory import receive

    grid = make_grid([2, 3])
    asked = Message(RecordDict(), 2, "query")

    class Forged(InProcessGrid):
        def pull_messages(self, message_ids: Any) -> list[Message]:
            own = [
                Message(RecordDict({CONFIG: ConfigRecord({"from": node})}), reply_to=asked)
                for node in (3, 2, 2)
            ]
            for reply, node in zip(own, (3, 2, 2), strict=True):
                reply.metadata.__dict__["_src_node_id"] = node
            return own

    grid.__class__ = Forged
    strays: list[Message] = []
    heard = [reply.metadata.src_node_id for reply in receive(grid, [asked], 5.0, strays.append)]
    assert heard == [2]
    assert [reply.metadata.src_node_id for reply in strays] == [3, 2]
