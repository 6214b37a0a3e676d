"""The last change of the reference as shared history: who has it, who does without, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cgfedllm
from cgfedllm import events
from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import codec_class, make_codec
from cgfedllm.codecs.packet import HEADER_SIZE, Packet
from cgfedllm.config import Config
from cgfedllm.errors import ReferenceMissingError
from cgfedllm.federation import client_app
from cgfedllm.federation.checkpoint import latest_checkpoint
from cgfedllm.federation.client_state import ClientState
from cgfedllm.federation.downlink import Broadcaster, fingerprint, receive
from cgfedllm.runs import RunFolder
from cgfedllm.storage import load_tensors, save_tensors
from cgfedllm.workspace import Workspace

MakeConfig = Callable[..., Config]
RandomAdapter = Callable[..., AdapterUpdate]
SEED = 5


@pytest.fixture
def flagged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Round, and whether it was coded against the previous aggregate, of each uplink packet."""
    seen: list[tuple[int, bool]] = []
    original = client_app.packet_record

    def noting(blob: bytes) -> Any:
        packet = Packet.from_bytes(blob)
        seen.append((packet.round, packet.uses_previous))
        return original(blob)

    monkeypatch.setattr(client_app, "packet_record", noting)
    return seen


# ---- the server's side --------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_the_broadcaster_keeps_the_last_change_of_what_clients_hold(
    codec: str, spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    server = Broadcaster(spec, make_codec(codec), SEED, keep_previous=True)
    server.advance(random_adapter(0), 0)
    assert server.previous is None
    for version in (1, 2, 3):
        before = server.reference
        server.advance(random_adapter(version), version)
        assert server.previous is not None
        assert np.array_equal(server.previous.vector, (server.reference - before).vector)


@pytest.mark.parametrize("stateless", [False, True])
def test_it_is_kept_only_where_it_is_of_use(
    spec: AdapterSpec, random_adapter: RandomAdapter, stateless: bool
) -> None:
    server = Broadcaster(
        spec, make_codec("int8"), SEED, keep_previous=stateless, stateless=stateless
    )
    for version in range(3):
        server.advance(random_adapter(version), version)
    assert server.previous is None


def test_increments_use_it_and_whole_broadcasts_do_not(
    spec: AdapterSpec, random_adapter: RandomAdapter, delta_codec: str
) -> None:
    codec = make_codec(delta_codec)
    server = Broadcaster(spec, codec, SEED)
    references: list[AdapterUpdate] = []
    for version in range(4):
        server.advance(random_adapter(version), version)
        broadcast = server.broadcast("always")
        used = bool(Packet.from_bytes(broadcast.blob).uses_previous)
        assert (broadcast.kind, used) == ("full" if version == 0 else "increment", version > 1)
        base = references[-1] if references else None
        previous = references[-1] - references[-2] if version > 1 else None
        references.append(receive(broadcast, codec, spec, SEED, base, previous))
        assert references[-1].vector.tobytes() == server.reference.vector.tobytes()
        if used:
            with pytest.raises(ReferenceMissingError, match="this client holds one"):
                receive(broadcast, codec, spec, SEED, base, None)
    late = server.broadcast("late")
    assert late.kind == "full"
    whole = receive(late, codec, spec, SEED, None)
    assert whole.vector.tobytes() == server.reference.vector.tobytes()


def test_a_client_that_took_something_else_for_its_base_finds_out(
    spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    server = Broadcaster(spec, make_codec("int8"), SEED)
    server.advance(random_adapter(0), 0)
    server.broadcast("a")
    server.advance(random_adapter(1), 1)
    broadcast = server.broadcast("a")
    with pytest.raises(ReferenceMissingError, match="another global adapter"):
        receive(broadcast, make_codec("int8"), spec, SEED, random_adapter(7))


# ---- the client's side --------------------------------------------------------------------------


def test_a_client_knows_the_change_if_it_holds_both_versions(
    tmp_path: Path, spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    state = ClientState(tmp_path, spec, changes=True)
    for version in (0, 1, 3):
        state.save_reference(version, random_adapter(version))
    change = state.change(1)
    assert change is not None
    assert fingerprint(change) == fingerprint(random_adapter(1) - random_adapter(0))
    assert [state.change(version) for version in (0, 2, 3, 4)] == [None] * 4


def test_one_more_reference_is_kept_for_it(
    tmp_path: Path, spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    state = ClientState(tmp_path, spec, changes=True)
    for version in range(6):
        state.save_reference(version, random_adapter(version))
    assert [v for v in range(6) if state.change(v) is not None] == [3, 4, 5]


# ---- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("downlink", ["raw", "int8", "test-delta"])
def test_clients_that_stay_code_against_it_from_the_second_round(
    tiny_config: MakeConfig,
    delta_codec: str,
    flagged: list[tuple[int, bool]],
    downlink: str,
) -> None:
    config = tiny_config(f"uplink.name={delta_codec}", f"downlink.name={downlink}")
    result = cgfedllm.run(config)
    assert flagged == [(1, False)] * 3 + [(2, True)] * 3 + [(3, True)] * 3
    assert not any(record.failures for record in result.records)
    assert result.records[-1].heldout_nll < result.records[0].heldout_nll


def test_clients_that_were_away_code_on_their_own(
    tiny_config: MakeConfig, delta_codec: str, flagged: list[tuple[int, bool]]
) -> None:
    config = tiny_config(
        f"uplink.name={delta_codec}",
        f"downlink.name={delta_codec}",
        "federation.fraction_train=0.7",
        "federation.rounds=6",
        "evaluation.every=0",
    )
    result = cgfedllm.run(config)
    assert not any(record.failures for record in result.records)
    held: dict[str, int] = {}
    expected = []
    for record in result.records[1:]:
        for client in record.clients:
            version = record.round - 1
            # version 0 came with the evaluation at the start
            both = held.get(client.client, 0) == version - 1 and version > 0
            expected.append((record.round, both))
            held[client.client] = version
    assert flagged == expected
    assert {used for _, used in flagged} == {False, True}


@pytest.mark.parametrize("harm", ["lost", "another"])
def test_a_client_without_the_very_same_history_codes_on_its_own(
    tiny_config: MakeConfig, delta_codec: str, flagged: list[tuple[int, bool]], harm: str
) -> None:
    config = tiny_config(f"uplink.name={delta_codec}")

    def listen(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished) and event.record.round == 2:
            path = config.run_dir / "clients" / "south" / "reference-000001.safetensors"
            if harm == "lost":
                path.unlink()
            else:  # of an earlier run, say
                tensors, metadata = load_tensors(path)
                save_tensors(path, {"values": tensors["values"] * 2}, metadata)

    result = cgfedllm.run(config, listeners=[listen])
    assert [used for round_, used in flagged if round_ == 3] == [True, False, True]
    assert not any(record.failures for record in result.records)


def test_packets_of_a_codec_that_does_not_use_it_never_say_so(
    tiny_config: MakeConfig, flagged: list[tuple[int, bool]]
) -> None:
    config = tiny_config("uplink.name=int8", "downlink.name=int8")
    cgfedllm.run(config)
    assert not any(used for _, used in flagged)
    checkpoint = latest_checkpoint(
        RunFolder(config.run_dir).checkpoints_dir, Workspace(config, Path()).spec, config
    )
    assert checkpoint.previous is None


def test_a_run_goes_on_without_it_where_a_checkpoint_has_none(
    tiny_config: MakeConfig, delta_codec: str, flagged: list[tuple[int, bool]]
) -> None:
    config = tiny_config(f"uplink.name={delta_codec}", "federation.rounds=4")

    class Stop(Exception):
        pass

    def stop(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished) and event.record.round == 2:
            raise Stop

    with pytest.raises(Stop):
        cgfedllm.run(config, listeners=[stop])
    spec = Workspace(config, Path()).spec
    for path in (config.run_dir / "checkpoints").iterdir():
        tensors, metadata = load_tensors(path)
        assert ("previous" in tensors) == (metadata["round"] != "0")
        tensors.pop("previous")
        save_tensors(path, tensors, metadata)
    flagged.clear()
    result = cgfedllm.resume(config.run_dir)
    assert flagged == [(3, False)] * 3 + [(4, True)] * 3
    sizes = {c.uplink_bytes for record in result.records for c in record.clients}
    assert sizes == {HEADER_SIZE + 4 + spec.size}
    assert codec_class(delta_codec).uses_previous
