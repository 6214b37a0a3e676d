"""A reply that cannot be read costs its sender's share of the round, and nobody else's."""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zstandard
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st

from cgfedllm.errors import PacketError
from cgfedllm.flower import compression
from cgfedllm.flower.arrays import Layout
from cgfedllm.flower.messages import parcel_record
from cgfedllm.flower.parcel import Parcel, pack_exact, unpack_exact

from .apps import (
    Arrays,
    app_of,
    arrays_in,
    fedavg,
    grid_of,
    model,
    plain_app,
    record_of,
    stepped,
    wrapped,
)

NODES = (2, 3, 4)
BAD = 3
HEAD = struct.Struct("<4sIIIII")


def sealed(head: bytes, body: bytes) -> bytes:
    """A parcel with a right checksum, whatever is in it."""
    return head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))) + body


def reheaded(blob: bytes, **fields: Any) -> bytes:
    names = ("magic", "version", "round", "check", "types", "length")
    head = dict(zip(names, HEAD.unpack(blob[: HEAD.size]), strict=True)) | fields
    return sealed(HEAD.pack(*head.values()), blob[HEAD.size + 4 :])


def with_types(blob: bytes, *types: tuple[int, int]) -> bytes:
    table = b"".join(struct.pack("<IB", *pair) for pair in types)
    magic, version, round_, check, _, length = HEAD.unpack(blob[: HEAD.size])
    head = HEAD.pack(magic, version, round_, check, len(types), length)
    return sealed(head, table + blob[HEAD.size + 4 :])


def with_exact(blob: bytes, frame: bytes) -> bytes:
    magic, version, round_, check, types, length = HEAD.unpack(blob[: HEAD.size])
    packet = blob[HEAD.size + 4 + length :]
    head = HEAD.pack(magic, version, round_, check, types, len(frame))
    return sealed(head, frame + packet)


def of_bytes(change: Callable[[bytes], bytes]) -> Callable[[Message], None]:
    def tamper(reply: Message) -> None:
        (array,) = reply.content["arrays"].values()
        reply.content["arrays"] = parcel_record(change(array.data))

    return tamper


def exact_of(value: float) -> bytes:
    """A frame in which the bias is `value`, and the counter as it was sent."""
    start = model()
    own = start | {"dense.bias": np.full(24, value, np.float32)}
    layout = Layout(start, {name: array.dtype for name, array in start.items()})
    layout_bytes = b"".join(
        layout._with_held(name, own[name].reshape(-1).view(np.uint8).reshape(-1, w)).T.tobytes()
        for name, w in (("dense.bias", 4), ("norm.num_batches_tracked", 8))
    )
    return zstandard.ZstdCompressor().compress(layout_bytes)


def foreign_packet(codec: str, arrays: Arrays | None = None) -> bytes:
    """What a client sends that was told another codec, or has other arrays."""
    start = model() if arrays is None else arrays
    grid = grid_of(app_of(codec), [BAD])
    sent = wrapped(codec).configure_train(1, record_of(start), ConfigRecord(), grid)
    (reply,) = grid.send_and_receive(sent)
    (array,) = reply.content["arrays"].values()
    return array.data


def plain(reply: Message) -> None:
    reply.content["arrays"] = record_of(stepped(model(), BAD, 1))


def no_arrays(reply: Message) -> None:
    del reply.content["arrays"]


def two_records(reply: Message) -> None:
    reply.content["more"] = record_of(model())


def two_arrays(reply: Message) -> None:
    (array,) = reply.content["arrays"].values()
    reply.content["arrays"] = ArrayRecord({"parcel": array, "more": Array(np.zeros(1))})


COUNTER = list(model()).index("norm.num_batches_tracked")
TAMPER: dict[str, tuple[Callable[[Message], None], str]] = {
    "plain arrays": (plain, "not compressed"),
    "no arrays": (no_arrays, "0 ArrayRecords"),
    "two records": (two_records, "2 ArrayRecords"),
    "two arrays": (two_arrays, "not compressed"),
    "empty": (of_bytes(lambda blob: b""), "too short: 0 bytes"),
    "cut off": (of_bytes(lambda blob: blob[:-1]), "checksum does not match"),
    "longer": (of_bytes(lambda blob: blob + b"x"), "checksum does not match"),
    "oversized": (of_bytes(lambda blob: blob + bytes(200_000)), "cannot be right here"),
    "damaged": (of_bytes(lambda blob: blob[:60] + b"\xff\xff" + blob[62:]), "checksum"),
    "foreign": (of_bytes(lambda blob: b"PK\x03\x04" + blob[4:]), "not a parcel"),
    "newer": (of_bytes(lambda blob: reheaded(blob, version=2)), "format version 2"),
    "stale": (of_bytes(lambda blob: reheaded(blob, round=7)), "round 7, expected round 1"),
    "of other arrays": (of_bytes(lambda blob: reheaded(blob, check=1)), "other arrays"),
    "a frame too long": (of_bytes(lambda blob: reheaded(blob, length=2**32 - 1)), "cut off"),
    "types without end": (of_bytes(lambda blob: reheaded(blob, types=2**32 - 1)), "cut off"),
    "a type of no array": (of_bytes(lambda blob: with_types(blob, (99, 0))), "there is none"),
    "no type": (of_bytes(lambda blob: with_types(blob, (0, 99))), "there is none"),
    "integers for floats": (of_bytes(lambda blob: with_types(blob, (0, 3))), "sent as float32"),
    "complex for real": (of_bytes(lambda blob: with_types(blob, (2, 12))), "sent as float32"),
    "a bias in another type": (of_bytes(lambda blob: with_types(blob, (2, 11))), "exact values"),
    "a frame of another size": (
        of_bytes(lambda blob: with_exact(blob, zstandard.ZstdCompressor().compress(b"1234"))),
        "frame of 4 bytes",
    ),
    "a frame that grows": (
        of_bytes(lambda blob: with_exact(blob, zstandard.ZstdCompressor().compress(bytes(10**8)))),
        "frame of 100000000 bytes",
    ),
    "no frame": (of_bytes(lambda blob: with_exact(blob, b"not a frame")), "not a Zstandard frame"),
    "a bias of NaN": (of_bytes(lambda blob: with_exact(blob, exact_of(np.nan))), "NaN or infinity"),
    "no packet": (
        of_bytes(lambda blob: sealed(blob[: HEAD.size], blob[HEAD.size + 4 :][:-900])),
        "",
    ),
    "a packet of another codec": (
        of_bytes(lambda blob: foreign_packet("bf16")),
        "packet codec is 'bf16', expected 'int8'",
    ),
    "a packet of other arrays": (
        of_bytes(lambda blob: foreign_packet("int8", {"other": np.zeros((20, 30))})),
        "other arrays",
    ),
}


@pytest.mark.parametrize("what", TAMPER)
def test_the_others_are_aggregated_and_the_sender_is_named(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    tamper, reason = TAMPER[what]
    strategy, grid = wrapped("int8"), grid_of(app_of("int8"), NODES)
    sent = strategy.configure_train(1, record_of(model()), ConfigRecord(), grid)
    replies = list(grid.send_and_receive(sent))
    for reply in replies:
        if reply.metadata.src_node_id == BAD:
            tamper(reply)
    with caplog.at_level(logging.INFO, "flwr"):
        arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert metrics is not None
    expected = np.average(
        [stepped(model(), node, 1)["dense.weight"] for node in (2, 4)], axis=0, weights=[2, 4]
    )
    np.testing.assert_allclose(arrays_in(arrays)["dense.weight"], expected, atol=0.01)
    assert metrics["cgfedllm-uplink-refused"] == 1
    (traffic,) = strategy.traffic
    assert set(traffic.received) == {2, 4}
    assert set(traffic.refused) == {BAD}
    assert reason in traffic.refused[BAD]
    assert any(f"node {BAD} is refused" in text and reason in text for text in caplog.messages)
    # Flower's own strategy counts and logs it as it does any client that failed
    assert any("2 results and 1 failures" in text for text in caplog.messages)


def test_a_round_without_any_usable_reply_changes_nothing() -> None:
    strategy, grid = wrapped("int8"), grid_of(plain_app(), NODES)
    result = strategy.start(grid, record_of(model()), num_rounds=2)
    assert not result.arrays
    assert not result.train_metrics_clientapp
    assert [len(traffic.refused) for traffic in strategy.traffic] == [3, 3]
    assert strategy.traffic[0].ratio is None


def test_a_node_that_was_not_asked_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    strategy, grid = wrapped("int8"), grid_of(app_of("int8"), NODES)
    sent = list(strategy.configure_train(1, record_of(model()), ConfigRecord(), grid))
    replies = list(grid.send_and_receive(sent))
    stranger = Message(RecordDict(), dst_node_id=99, message_type="train")
    replies.append(Message(replies[0].content, reply_to=stranger))
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert set(strategy.traffic[0].received) == set(NODES)
    assert "node 99 replied and was not asked" in caplog.text


def test_a_reply_to_an_earlier_round_is_refused() -> None:
    strategy, grid = wrapped("int8"), grid_of(app_of("int8"), NODES)
    late = list(
        grid.send_and_receive(strategy.configure_train(1, record_of(model()), ConfigRecord(), grid))
    )
    strategy.configure_train(2, record_of(model()), ConfigRecord(), grid)
    strategy.aggregate_train(2, late)
    assert set(strategy.traffic[0].refused) == set(NODES)


def test_errors_of_the_app_stay_its_own() -> None:
    def fail(arrays: Arrays, node: int, round_: int) -> Arrays:
        if node == BAD:
            raise ZeroDivisionError("the app's own")
        return stepped(arrays, node, round_)

    strategy = wrapped("int8")
    result = strategy.start(grid_of(app_of("int8", fail), NODES), record_of(model()), num_rounds=1)
    assert result.train_metrics_clientapp[1]["cgfedllm-uplink-refused"] == 0
    assert set(strategy.traffic[0].received) == {2, 4}


@pytest.mark.parametrize("where", ["dense.weight", "dense.bias"])
def test_an_update_that_is_not_finite_is_never_sent(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    def diverge(arrays: Arrays, node: int, round_: int) -> Arrays:
        trained = stepped(arrays, node, round_)
        if node == BAD:
            trained[where] = np.full_like(trained[where], np.nan)
        return trained

    strategy = wrapped("int8")
    grid = grid_of(app_of("int8", diverge), NODES)
    result = strategy.start(grid, record_of(model()), num_rounds=1)
    assert np.isfinite(arrays_in(result.arrays)[where]).all()
    assert set(strategy.traffic[0].received) == {2, 4}
    assert "NaN or infinity" in caplog.text


def test_a_value_beyond_its_type_is_refused() -> None:
    held = {"w": np.full((32, 32), 60000, np.float16)}

    def grow(arrays: Arrays, node: int, round_: int) -> Arrays:
        # float32 comes back and holds more than float16 does; then it says it is float16
        return {"w": np.full((32, 32), 90000, np.float32)}

    strategy, grid = wrapped("raw"), grid_of(app_of("raw", grow), [2])
    sent = strategy.configure_train(1, record_of(held), ConfigRecord(), grid)
    (reply,) = grid.send_and_receive(sent)
    (array,) = reply.content["arrays"].values()
    magic, version, round_, check, types, length = HEAD.unpack(array.data[: HEAD.size])
    assert types == 1
    head = HEAD.pack(magic, version, round_, check, 0, length)
    reply.content["arrays"] = parcel_record(sealed(head, array.data[HEAD.size + 4 + 5 :]))
    strategy.aggregate_train(1, [reply])
    assert "more than float16 holds" in strategy.traffic[0].refused[2]


def test_truth_values_are_0_or_1() -> None:
    held = {"mask": np.zeros(8, np.bool_)}
    layout = Layout(held, {"mask": held["mask"].dtype})
    frame = zstandard.ZstdCompressor().compress(bytes([2] * 8))
    with pytest.raises(PacketError, match="truth values other than 0 and 1"):
        unpack_exact(frame, layout)


@settings(max_examples=200)
@given(data=st.data())
def test_any_damage_is_a_packet_error_and_nothing_else(data: st.DataObject) -> None:
    held = {"bias": np.zeros(5, np.float32), "count": np.array(3)}
    layout = Layout(held, {name: array.dtype for name, array in held.items()})
    parcel = Parcel(layout.dtypes, pack_exact(layout, held), b"")
    blob = bytearray(parcel.to_bytes(held, round=1, check=5))
    kind = data.draw(st.sampled_from(["flip", "cut", "random"]))
    if kind == "flip":
        at = data.draw(st.integers(0, len(blob) - 1))
        blob[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del blob[data.draw(st.integers(0, len(blob) - 1)) :]
    else:
        body = data.draw(st.binary(max_size=80))
        fields = [data.draw(st.integers(0, 2**32 - 1)) for _ in range(2)]
        blob = bytearray(sealed(HEAD.pack(b"CGFA", 1, 1, 5, *fields), body))
    with pytest.raises(PacketError):  # noqa: PT012
        opened = Parcel.from_bytes(bytes(blob), held, round=1, check=5)
        unpack_exact(opened.exact, Layout(held, opened.dtypes))


# ---- two ends that do not fit -------------------------------------------------------------------


def reasons(app: ClientApp, strategy: Any) -> set[str]:
    grid = grid_of(app, NODES)
    replies = grid.send_and_receive(
        strategy.configure_train(1, record_of(model()), ConfigRecord(), grid)
    )
    return {reply.error.reason for reply in replies}


def test_a_server_without_the_wrapper_is_told_so() -> None:
    (reason,) = reasons(app_of("int8"), fedavg())
    assert "wrap its strategy, cgfedllm.flower.CompressedStrategy" in reason


def test_two_codecs_are_found_out_before_training() -> None:
    def never(arrays: Arrays, node: int, round_: int) -> Arrays:
        raise AssertionError

    (reason,) = reasons(app_of("lowrank:bpp=0.2", never), wrapped("lowrank:bpp=0.1"))
    assert "decodes with lowrank" in reason
    assert '"bpp":0.1' in reason
    assert '"bpp":0.2' in reason


def test_a_mod_outside_that_changes_arrays_is_found_out() -> None:
    def halve(message: Message, context: Context, call_next: Any) -> Message:
        halved = {name: array * 0 for name, array in arrays_in(message.content["arrays"]).items()}
        message.content["arrays"] = record_of(halved)
        return call_next(message, context)

    (reason,) = reasons(plain_app(mods=[halve, compression("int8")]), wrapped("int8"))
    assert "put `compression` first among the client's mods" in reason


def test_an_announcement_that_cannot_be_read_is_refused() -> None:
    app = app_of("int8")
    content = RecordDict(
        {
            "arrays": record_of(model()),
            "config": ConfigRecord({"server-round": 1}),
            "cgfedllm": ConfigRecord({"round": -1, "codec": "int8", "check": 0}),
        }
    )
    (reply,) = grid_of(app, [2]).send_and_receive([Message(content, 2, "train")])
    assert "announcement cannot be read" in reply.error.reason


def test_other_arrays_than_were_sent_are_refused_by_the_client() -> None:
    app = app_of("int8", lambda arrays, node, round_: {"new": np.zeros(3)})
    (reason,) = reasons(app, wrapped("int8"))
    assert "array 'conv.weight'" in reason


def test_a_reply_that_carries_metrics_only_is_refused_by_the_client() -> None:
    app = ClientApp(mods=[compression("int8")])

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"x": 1})}), reply_to=message)

    (reason,) = reasons(app, wrapped("int8"))
    assert "0 ArrayRecords" in reason
