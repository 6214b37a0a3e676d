"""A learned codec's state on its way: who is sent what, and that both ends hold the same."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecState, make_codec
from cgfedllm.codecs.learning import LearnedCodec
from cgfedllm.errors import CodecStateError, CodecStateMissingError
from cgfedllm.federation.codec_state import (
    CodecBroadcast,
    CodecBroadcaster,
    StatefulCodec,
    UpdateSample,
    pack_whole,
    receive_state,
)

RandomAdapter = Callable[..., AdapterUpdate]
MakeServer = Callable[..., CodecBroadcaster]
SEED = 5


class Client:
    """The receiving end as the client app has it: it keeps what it received, by version."""

    def __init__(self, spec: AdapterSpec, name: str, derived: StatefulCodec | None = None) -> None:
        self.spec, self.name = spec, name
        self.kept = {} if derived is None else {0: derived}

    def take(self, broadcast: CodecBroadcast) -> CodecState:
        needs = {"full": -1, "increment": broadcast.version - 1, "hold": broadcast.version}
        base = self.kept.get(needs[broadcast.kind])
        self.kept[broadcast.version] = receive_state(broadcast, self.name, self.spec, base)
        return self.kept[broadcast.version].state


@pytest.fixture
def codec(learned: ModuleType) -> LearnedCodec:
    made = make_codec(learned.MEAN, {"levels": 31})
    assert isinstance(made, LearnedCodec)
    return made


@pytest.fixture
def make_server(spec: AdapterSpec, codec: LearnedCodec) -> MakeServer:
    def make(held: bool, stateless: bool = False) -> CodecBroadcaster:
        state = codec.initial_state(spec, SEED)
        return CodecBroadcaster(spec, codec, state, held=held, stateless=stateless)

    return make


@pytest.fixture
def start(spec: AdapterSpec, codec: LearnedCodec) -> StatefulCodec:
    """What a client derives from the seed."""
    return StatefulCodec(codec, codec.initial_state(spec, SEED))


def learn(server: CodecBroadcaster, updates: list[AdapterUpdate], round_: int = 1) -> None:
    server.adapt(updates, round=round_, seed=SEED)


# ---- what is sent -------------------------------------------------------------------------------


def test_a_state_that_clients_have_by_themselves_is_sent_to_nobody(make_server: MakeServer) -> None:
    server = make_server(held=True)
    for _ in range(2):
        broadcast = server.broadcast("a")
        assert (broadcast.kind, broadcast.version, broadcast.blob) == ("hold", 0, b"")


def test_a_state_from_a_file_is_sent_whole_once_with_its_options(
    make_server: MakeServer, codec: LearnedCodec, spec: AdapterSpec
) -> None:
    server, client = make_server(held=False), Client(spec, codec.name)
    first, second = server.broadcast("a"), server.broadcast("a")
    assert [first.kind, second.kind, second.blob] == ["full", "hold", b""]
    assert first.blob == pack_whole(codec, server.state)
    assert client.take(first).hash == server.state.hash
    assert client.kept[0].codec.options == codec.options
    assert client.take(second).hash == server.state.hash


def test_what_is_learned_goes_as_an_increment_to_those_one_version_behind(
    make_server: MakeServer,
    learned: ModuleType,
    start: StatefulCodec,
    spec: AdapterSpec,
    random_adapter: RandomAdapter,
) -> None:
    server = make_server(held=True)
    near, away = Client(spec, learned.MEAN, start), Client(spec, learned.MEAN, start)
    for version in range(1, 4):
        learn(server, [random_adapter(version)], version)
        broadcast = server.broadcast("near")
        assert (broadcast.kind, broadcast.version) == ("increment", version)
        assert len(broadcast.blob) == learned.increment_size(spec)
        assert near.take(broadcast).hash == server.state.hash
    late = server.broadcast("away")
    assert (late.kind, late.version) == ("full", 3)
    assert away.take(late).hash == near.kept[3].state.hash


def test_a_forgotten_client_is_sent_the_whole_once_though_it_should_have_it(
    make_server: MakeServer,
) -> None:
    server = make_server(held=True)
    server.forget("a")
    assert [server.broadcast("a").kind for _ in range(2)] == ["full", "hold"]


def test_stateless_clients_are_sent_the_whole_with_each_message(
    make_server: MakeServer, random_adapter: RandomAdapter
) -> None:
    pretrained, cold = (make_server(held=held, stateless=True) for held in (False, True))
    assert [pretrained.broadcast("a").kind for _ in range(2)] == ["full", "full"]
    assert [cold.broadcast("a").kind for _ in range(2)] == ["hold", "hold"]
    learn(cold, [random_adapter(1)])
    assert [cold.broadcast("a").kind for _ in range(2)] == ["full", "full"]


def test_a_restored_server_sends_the_same(
    make_server: MakeServer, random_adapter: RandomAdapter
) -> None:
    server, restored = make_server(held=True), make_server(held=True)
    learn(server, [random_adapter(1)])
    server.broadcast("a")
    learn(server, [random_adapter(2)], 2)
    restored.restore(server.snapshot())
    for client in ("a", "b"):
        assert restored.broadcast(client) == server.broadcast(client)


def test_a_server_is_not_restored_to_a_state_of_other_options(
    make_server: MakeServer, spec: AdapterSpec, codec: LearnedCodec
) -> None:
    server = make_server(held=True)
    snapshot = server.snapshot()
    other = CodecState.of({"table": snapshot.state.tensors["table"]})
    with pytest.raises(CodecStateError, match="'mean' is missing"):
        server.restore(replace(snapshot, state=other))


# ---- learning -----------------------------------------------------------------------------------


def test_learning_nothing_makes_no_version(
    make_server: MakeServer, codec: LearnedCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(codec), "adapt", lambda self, state, updates, **kwargs: state)
    server = make_server(held=True)
    before = server.state
    learn(server, [])
    assert server.state is before
    assert server.broadcast("a").kind == "hold"


@pytest.mark.parametrize("fault", ["not finite", "too long", "two versions on"])
def test_what_is_no_state_is_refused_and_the_old_one_stays(
    make_server: MakeServer,
    codec: LearnedCodec,
    monkeypatch: pytest.MonkeyPatch,
    random_adapter: RandomAdapter,
    fault: str,
) -> None:
    adapt = type(codec).adapt

    def wrong(self: LearnedCodec, state: CodecState, *args: object, **kwargs: object) -> CodecState:
        made = adapt(self, state, *args, **kwargs)
        mean = made.tensors["mean"]
        changed = {
            "not finite": (mean * np.float32(np.inf), made.version),
            "too long": (np.concatenate([mean, mean]), made.version),
            "two versions on": (mean, made.version + 1),
        }[fault]
        return CodecState.of({**made.tensors, "mean": changed[0]}, changed[1])

    server = make_server(held=True)
    before = server.state
    monkeypatch.setattr(type(codec), "adapt", wrong)
    with pytest.raises(CodecStateError):
        learn(server, [random_adapter(1)])
    assert server.state is before
    assert server.broadcast("a").kind == "hold"


def test_a_sample_does_not_depend_on_the_order_of_replies(
    spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    updates = {f"client-{number:02d}": random_adapter(number) for number in range(30)}
    orders = [list(updates), sorted(updates, reverse=True)]
    chosen = []
    for order in orders:
        sample = UpdateSample(SEED, 1, most=8)
        for name in order:
            sample.add(name, updates[name])
        chosen.append([next(n for n, u in updates.items() if u is got) for got in sample.updates()])
    assert chosen[0] == chosen[1] == sorted(chosen[0])
    assert len(chosen[0]) == 8
    other = UpdateSample(SEED, 2, most=8)
    for name, update in updates.items():
        other.add(name, update)
    assert [u.vector.tobytes() for u in other.updates()] != [
        updates[name].vector.tobytes() for name in chosen[0]
    ]


def test_a_sample_of_few_clients_is_all_of_them(random_adapter: RandomAdapter) -> None:
    sample = UpdateSample(SEED, 1)
    for name in "cab":
        sample.add(name, random_adapter(ord(name)))
    norms = [random_adapter(ord(name)).norm() for name in "abc"]
    assert [update.norm() for update in sample.updates()] == norms


# ---- what goes wrong ----------------------------------------------------------------------------


def refused(broadcast: CodecBroadcast, client: Client) -> str:
    """Why a client refuses it for good, rather than asking for the whole."""
    with pytest.raises(CodecStateError) as caught:
        client.take(broadcast)
    assert not isinstance(caught.value, CodecStateMissingError)
    return str(caught.value)


def checked(content: bytes) -> bytes:
    """With the checksum that belongs to it."""
    return struct.pack("<I", zlib.crc32(content)) + content


def test_a_damaged_state_is_refused(
    make_server: MakeServer, learned: ModuleType, spec: AdapterSpec
) -> None:
    whole, client = make_server(held=False).broadcast("a"), Client(spec, learned.MEAN)
    for length in (0, 3, 8, 10, 40, len(whole.blob) - 1):
        assert "damaged" in refused(replace(whole, blob=whole.blob[:length]), client)
    for position in range(len(whole.blob)):
        blob = bytearray(whole.blob)
        blob[position] ^= 255
        assert "damaged" in refused(replace(whole, blob=bytes(blob)), client)
    assert client.kept == {}


def test_a_state_too_long_to_be_right_is_refused_unread(
    make_server: MakeServer, learned: ModuleType, codec: LearnedCodec, spec: AdapterSpec
) -> None:
    whole, client = make_server(held=False).broadcast("a"), Client(spec, learned.MEAN)
    limit = codec.state_limit(spec)
    blob = checked(whole.blob[4:] + bytes(limit))
    assert f"at most {limit} here" in refused(replace(whole, blob=blob), client)
    blob = checked(b"\xff" * 100_000)
    assert "options are too long" in refused(replace(whole, blob=blob), client)
    client.take(whole)
    longer = replace(whole, kind="increment", version=1, blob=bytes(limit + 1))
    assert f"at most {limit} here" in refused(longer, client)


@pytest.mark.parametrize("announced", [{"hash": bytes(8)}, {"version": 3}])
def test_a_state_other_than_announced_is_refused(
    make_server: MakeServer, learned: ModuleType, spec: AdapterSpec, announced: dict[str, object]
) -> None:
    whole = make_server(held=False).broadcast("a")
    message = refused(replace(whole, **announced), Client(spec, learned.MEAN))
    assert "which the server announced" in message


def test_options_that_the_codec_does_not_take_are_refused(
    make_server: MakeServer, learned: ModuleType, spec: AdapterSpec
) -> None:
    whole = make_server(held=False).broadcast("a")
    client, content = Client(spec, learned.MEAN), whole.blob[8:]
    assert content.startswith(b'{"levels":31}')
    for other in (b'{"levelz":31}', b'{"levels":"1"', b'["levels",31]'):
        changed = content.replace(b'{"levels":31}', other)
        blob = checked(struct.pack("<I", len(other)) + changed)
        message = refused(replace(whole, blob=blob), client)
        assert "options that codec 'test-mean' does not take" in message


def test_a_client_that_does_not_hold_what_it_takes_asks_for_the_whole(
    make_server: MakeServer,
    codec: LearnedCodec,
    start: StatefulCodec,
    spec: AdapterSpec,
    random_adapter: RandomAdapter,
) -> None:
    server = make_server(held=True)
    held = server.broadcast("a")
    learn(server, [random_adapter(1)])
    increment = server.broadcast("a")
    elsewhere = StatefulCodec(codec, codec.initial_state(spec, SEED + 1))
    for broadcast in (held, increment):
        for base in (None, elsewhere):
            with pytest.raises(CodecStateMissingError):
                receive_state(broadcast, codec.name, spec, base)
        assert receive_state(broadcast, codec.name, spec, start).state.hash == broadcast.hash
    # damaged, or packed against another base: who can tell
    with pytest.raises(CodecStateMissingError, match="no increment"):
        receive_state(replace(increment, blob=b"12345"), codec.name, spec, start)
