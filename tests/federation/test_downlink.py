"""The downlink: both ends hold the same reference, bit for bit, in as few bytes as possible."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import make_codec
from cgfedllm.errors import PacketError, ReferenceMissingError
from cgfedllm.federation.downlink import Broadcast, Broadcaster, receive, whole_codec

SEED = 5
RandomAdapter = Callable[..., AdapterUpdate]


class Client:
    """The receiving end as the client app has it: it keeps what it received, by version."""

    def __init__(self, spec: AdapterSpec, codec: str) -> None:
        self.codec = make_codec(codec)
        self.spec = spec
        self.kept: dict[int, AdapterUpdate] = {}

    def take(self, broadcast: Broadcast) -> AdapterUpdate:
        needs = {"full": None, "increment": broadcast.version - 1, "hold": broadcast.version}
        wanted = needs[broadcast.kind]
        base = None if wanted is None else self.kept.get(wanted)
        adapter = receive(broadcast, self.codec, self.spec, SEED, base)
        self.kept[broadcast.version] = adapter
        return adapter


def same_bits(a: AdapterUpdate, b: AdapterUpdate) -> bool:
    return a.vector.tobytes() == b.vector.tobytes()


@pytest.fixture
def server(spec: AdapterSpec) -> Broadcaster:
    return Broadcaster(spec, make_codec("int8"), SEED)


# ---- what is sent -------------------------------------------------------------------------------


def test_first_broadcast_is_whole_and_exact_with_any_codec(
    spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    for codec in ("raw", "bf16", "int8"):
        server, client = Broadcaster(spec, make_codec(codec), SEED), Client(spec, codec)
        start = random_adapter(0)
        server.advance(start, 0)
        broadcast = server.broadcast("a")
        assert (broadcast.kind, broadcast.version) == ("full", 0)
        assert same_bits(client.take(broadcast), start)


def test_a_current_client_is_sent_nothing(
    server: Broadcaster, random_adapter: RandomAdapter
) -> None:
    server.advance(random_adapter(0), 0)
    server.broadcast("a")
    again = server.broadcast("a")
    assert (again.kind, again.version, again.blob) == ("hold", 0, b"")


def test_a_client_one_version_behind_is_sent_the_increment(
    server: Broadcaster, spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    server.advance(random_adapter(0), 0)
    server.broadcast("a")
    server.advance(random_adapter(1), 1)
    broadcast = server.broadcast("a")
    assert (broadcast.kind, broadcast.version) == ("increment", 1)
    assert len(broadcast.blob) == make_codec("int8").packet_size(spec)


def test_a_client_several_versions_behind_is_sent_the_whole_reference(
    server: Broadcaster, spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    near, away = Client(spec, "int8"), Client(spec, "int8")
    for version in range(4):
        server.advance(random_adapter(version), version)
        near.take(server.broadcast("near"))
        if version == 0:
            away.take(server.broadcast("away"))
    broadcast = server.broadcast("away")
    assert broadcast.kind == "full"
    assert len(broadcast.blob) == make_codec("raw").packet_size(spec)
    assert same_bits(away.take(broadcast), near.kept[3])


def test_a_new_client_is_sent_the_whole_reference_and_then_increments(
    server: Broadcaster, spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    late = Client(spec, "int8")
    kinds = []
    for version in range(5):
        server.advance(random_adapter(version), version)
        server.broadcast("early")
        if version >= 3:
            broadcast = server.broadcast("late")
            kinds.append(broadcast.kind)
            assert same_bits(late.take(broadcast), server.reference)
    assert kinds == ["full", "increment"]


def test_a_forgotten_client_is_sent_the_whole_reference_once(
    server: Broadcaster, random_adapter: RandomAdapter
) -> None:
    server.advance(random_adapter(0), 0)
    server.broadcast("a")
    server.forget("a")
    server.forget("never seen")
    assert [server.broadcast("a").kind for _ in range(2)] == ["full", "hold"]


def test_a_lossless_codec_sends_exactly_the_servers_adapter_each_time(
    spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    server, client = Broadcaster(spec, make_codec("raw"), SEED), Client(spec, "raw")
    for version in range(4):
        adapter = random_adapter(version, scale=10.0**version)
        server.advance(adapter, version)
        broadcast = server.broadcast("a")
        assert broadcast.kind == "full"
        assert same_bits(client.take(broadcast), adapter)
        assert same_bits(server.reference, adapter)


def test_whole_broadcasts_are_exact_whatever_the_codec() -> None:
    assert whole_codec(make_codec("int8")).lossless
    assert whole_codec(make_codec("raw")).name == "raw"


# ---- both ends agree ----------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    codec=st.sampled_from(["raw", "bf16", "int8"]),
    present=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=12),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e3]),
)
def test_references_are_bit_identical_over_many_rounds_whoever_takes_part(
    spec: AdapterSpec, codec: str, present: list[list[bool]], scale: float
) -> None:
    rng = np.random.default_rng(3)
    server = Broadcaster(spec, make_codec(codec), SEED)
    clients = {name: Client(spec, codec) for name in "abc"}
    adapter = AdapterUpdate.zeros(spec)
    for version, takes_part in enumerate(present):
        step = rng.standard_normal(spec.size).astype(np.float32) * np.float32(scale)
        adapter = adapter + AdapterUpdate(spec, step)
        server.advance(adapter, version)
        for (name, client), here in zip(clients.items(), takes_part, strict=True):
            if here:
                held = client.take(server.broadcast(name))
                assert same_bits(held, server.reference)


def test_what_int8_loses_comes_later(server: Broadcaster, random_adapter: RandomAdapter) -> None:
    server.advance(random_adapter(0), 0)
    target = random_adapter(1)
    errors = []
    for version in range(1, 6):
        server.advance(target, version)
        errors.append((target - server.reference).norm())
    assert errors[0] > 0
    # each packet codes what the last one lost: a 127th of a row's largest value at most
    for before, after in pairwise(errors):
        assert after < before / 50 or after < 1e-6


def test_drift_does_not_build_up_while_the_adapter_moves(
    server: Broadcaster, random_adapter: RandomAdapter
) -> None:
    adapter = random_adapter(0)
    server.advance(adapter, 0)
    for version in range(1, 200):
        step = random_adapter(version, scale=0.01)
        adapter = adapter + step
        server.advance(adapter, version)
    # rows' largest steps are about 0.03; half a quantisation step of that each
    assert np.abs((adapter - server.reference).vector).max() < 0.001


def test_resending_an_increment_after_a_restart_gives_the_same_reference(
    server: Broadcaster, spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    client = Client(spec, "int8")
    for version in range(3):
        server.advance(random_adapter(version), version)
        if version < 2:
            client.take(server.broadcast("a"))
    restarted = Broadcaster(spec, make_codec("int8"), SEED)
    restarted.restore(server.reference, server.version, server.held, server.increment)
    original, repeated = server.broadcast("a"), restarted.broadcast("a")
    assert original == repeated
    assert original.kind == "increment"
    assert same_bits(client.take(repeated), server.reference)
    server.advance(random_adapter(9), 3)
    restarted.advance(random_adapter(9), 3)
    assert restarted.broadcast("a") == server.broadcast("a")


# ---- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["increment", "hold"])
def test_a_client_without_the_base_says_so(
    server: Broadcaster, spec: AdapterSpec, random_adapter: RandomAdapter, kind: str
) -> None:
    server.advance(random_adapter(0), 0)
    server.broadcast("a")
    if kind == "increment":
        server.advance(random_adapter(1), 1)
    broadcast = server.broadcast("a")
    assert broadcast.kind == kind
    with pytest.raises(ReferenceMissingError, match="does not hold"):
        receive(broadcast, make_codec("int8"), spec, SEED, None)


def test_a_broadcast_of_another_version_is_refused(
    server: Broadcaster, spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    server.advance(random_adapter(0), 0)
    blob = server.broadcast("a").blob
    with pytest.raises(PacketError, match="round"):
        receive(Broadcast("full", 4, blob), make_codec("int8"), spec, SEED, None)


def test_a_damaged_broadcast_is_refused(
    server: Broadcaster, spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    server.advance(random_adapter(0), 0)
    blob = bytearray(server.broadcast("a").blob)
    blob[-1] ^= 1
    with pytest.raises(PacketError, match="checksum"):
        receive(Broadcast("full", 0, bytes(blob)), make_codec("int8"), spec, SEED, None)
