"""A client before a server that means harm: what it cannot understand ends in a named error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.codecs import CodecContext, make_codec
from cgfedllm.config import Config
from cgfedllm.errors import CgFedLlmError, PacketError
from cgfedllm.federation.client_app import compression, train
from cgfedllm.federation.inprocess import InProcessGrid
from cgfedllm.federation.messages import (
    ADAPTER,
    ARRAYS,
    CHECK,
    CODEC,
    CODEC_HASH,
    CODEC_KIND,
    CODEC_STATE,
    CODEC_STATE_STYPE,
    CODEC_VERSION,
    CONFIG,
    FLUSH,
    KIND,
    PACKET,
    PACKET_STYPE,
    PREVIOUS,
    SERVER_ROUND,
    STATUS,
    VERSION,
    adapter_record,
)
from cgfedllm.workspace import workspace_for

MakeConfig = Callable[..., Config]

SHORT = settings(max_examples=75, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=10_000, suppress_health_check=list(HealthCheck))


class Node:
    """One client with a codec that has a state, and what reaches its training."""

    def __init__(self, config: Config) -> None:
        self.run_dir = config.run_dir
        run_config = {"config": config.to_toml(), "run-dir": str(config.run_dir)}
        self.context = Context(
            run_id=1,
            node_id=2,
            node_config={"partition-id": 0},
            state=RecordDict(),
            run_config=run_config,
        )
        self.workspace = workspace_for(config.to_toml(), str(config.run_dir))
        InProcessGrid(lambda message, context: message, {})  # so that messages can be made

    def hear(self, content: RecordDict, kind: str = "train") -> RecordDict:
        """What the node says to a message; training is left out."""
        message = Message(content, 2, kind)

        def trained(message: Message, context: Context) -> Message:
            assert message.content[ARRAYS][ADAPTER].numpy().size == self.workspace.spec.size
            return Message(RecordDict(), reply_to=message)

        return compression(message, self.context, trained).content

    def broadcast(self) -> dict[str, Any]:
        """What an honest server sends first."""
        spec = self.workspace.spec
        update = AdapterUpdate.zeros(spec)
        blob = make_codec("raw").encode(update, CodecContext(spec, 0, self.workspace.config.seed))
        return {
            "packet": blob,
            KIND: "full",
            VERSION: 0,
            SERVER_ROUND: 1,
            CODEC_KIND: "hold",
            CODEC_VERSION: 0,
            CODEC_HASH: self.workspace.codec_state.hash,
        }


@pytest.fixture
def node(tiny_config: MakeConfig) -> Node:
    return Node(tiny_config("uplink.name=learned", "uplink.options.bpp=1.0", "downlink.name=int8"))


def content_of(fields: dict[str, Any]) -> RecordDict:
    """A message of some fields, in the records where they belong."""
    fields = dict(fields)
    records: dict[str, Any] = {}
    for record, name, stype in (
        (ARRAYS, PACKET, PACKET_STYPE),
        (CODEC, CODEC_STATE, CODEC_STATE_STYPE),
    ):
        blob = fields.pop(name, None)
        if blob is not None:
            array = Array(dtype="uint8", shape=(len(blob),), stype=stype, data=blob)
            records[record] = ArrayRecord({name: array})
    return RecordDict({**records, CONFIG: ConfigRecord(fields)})


def test_an_honest_message_is_understood(node: Node) -> None:
    """What the tests below change."""
    assert node.hear(content_of(node.broadcast())) == RecordDict()


WRONG: list[Any] = [
    "",
    "full ",
    "../../x",
    "\x1b[2J",
    -1,
    2**32,
    2**70,
    True,
    1.0,
    float("nan"),
    float("inf"),
    b"full",
    b"",
    ["full"],
    [0],
    [b"x"],
]
FIELDS = [KIND, VERSION, CODEC_KIND, CODEC_VERSION, CODEC_HASH]


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_another_type_is_refused_by_name(node: Node, field: str, value: Any) -> None:
    try:
        said = node.hear(content_of({**node.broadcast(), field: value}))
    except CgFedLlmError:
        return
    # a codec state that is not held is asked for; nothing is taken for what it is not
    assert said[CONFIG][STATUS] == ["codec-missing"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_missing_is_refused_by_name(node: Node, field: str) -> None:
    fields = node.broadcast()
    del fields[field]
    with pytest.raises(CgFedLlmError):
        node.hear(content_of(fields))


POSSIBLE: list[Any] = [True, 1.0, 2**32, 2**70, None]
"""What proximal-mu can be; none is 0."""
NO_TRAINING = [(SERVER_ROUND, value) for value in (*WRONG, None)]
NO_TRAINING += [("proximal-mu", value) for value in WRONG if value not in POSSIBLE]


@pytest.mark.parametrize(("field", "value"), NO_TRAINING, ids=repr)
def test_training_does_not_begin_on_a_field_of_another_type(
    node: Node, field: str, value: Any
) -> None:
    config = {SERVER_ROUND: 1, "proximal-mu": 0.0, field: value}
    record = ConfigRecord({key: own for key, own in config.items() if own is not None})
    arrays = adapter_record(AdapterUpdate.zeros(node.workspace.spec))
    message = Message(RecordDict({ARRAYS: arrays, CONFIG: record}), 2, "train")
    with pytest.raises(PacketError):
        train(message, node.context)


def test_a_flush_that_the_configuration_does_not_have_is_refused(node: Node) -> None:
    """A residual is what this client has not sent; nobody gets it by asking."""
    with pytest.raises(PacketError, match=r"uplink\.flush"):
        node.hear(RecordDict({CONFIG: ConfigRecord({FLUSH: True, SERVER_ROUND: 2})}))


def test_what_is_kept_of_versions_is_bounded_and_in_the_clients_folder(
    node: Node, tmp_path: Path
) -> None:
    """A server can send versions for ever; the client's disk does not fill."""
    spec = node.workspace.spec
    for version in (*range(30), 2**32 - 1, 7, 2**31):
        context = CodecContext(spec, version, node.workspace.config.seed)
        blob = make_codec("raw").encode(AdapterUpdate.zeros(spec), context)
        node.hear(content_of({**node.broadcast(), VERSION: version, "packet": blob}))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent for path in files} == {node.run_dir / "clients" / "north"}
    assert 0 < len(files) <= 5


# ---- anything at all ----------------------------------------------------------------------------


def values() -> st.SearchStrategy[Any]:
    return st.one_of(
        st.sampled_from(WRONG),
        st.sampled_from(["full", "increment", "hold"]),
        st.integers(0, 5),
        st.binary(max_size=12),
        st.text(max_size=12),
        st.lists(st.integers(), max_size=2),
    )


def any_message(node: Node, data: st.DataObject) -> None:
    fields = node.broadcast()
    names = (*FIELDS, CHECK, PREVIOUS, FLUSH, SERVER_ROUND)
    for name in data.draw(st.lists(st.sampled_from(names), max_size=4)):
        fields[name] = data.draw(values())
    for name in (PACKET, CODEC_STATE):
        what = data.draw(st.sampled_from(["as it is", "as it is", "none", "other"]))
        if what == "none":
            fields.pop(name, None)
        elif what == "other":
            blob = fields.get(name, b"")
            at = data.draw(st.integers(0, len(blob)))
            fields[name] = blob[:at] + data.draw(st.binary(max_size=40)) + blob[at + 1 :]
    content = content_of(fields)
    if data.draw(st.booleans()):
        extra = Array(np.zeros(3, np.float32))
        content[data.draw(st.sampled_from([ARRAYS, CODEC, "x"]))] = ArrayRecord({"x": extra})
    if data.draw(st.integers(0, 9)) == 0:
        del content[data.draw(st.sampled_from(sorted(content)))]
    try:
        said = node.hear(content, data.draw(st.sampled_from(["train", "evaluate"])))
    except CgFedLlmError:
        return
    assert not said.array_records
    assert set(said) <= {CONFIG}


@SHORT
@given(st.data())
def test_any_message_is_understood_or_refused(node: Node, data: st.DataObject) -> None:
    any_message(node, data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@LONG
@given(st.data())
def test_any_message_is_understood_or_refused_at_length(node: Node, data: st.DataObject) -> None:
    any_message(node, data)
