"""Clients and a network that fail as planned: which client, in which round, how.

::

    plan(client, round) -> kind or None
    spoil               makes a client's good reply into another
    FaultyGrid          runs each client as the in-process engine does, and spoils what is planned
    Clock               time that passes only while the server waits, so that nobody sleeps

`faulty_node.py` does the same on a SuperNode.

The message never arrives: "lost". The client runs, and what it sent never arrives ("silent"), comes
a round later ("late"), comes twice ("twice"), or is an error ("crash"), or arrives as something
else: "corrupt", "cut", "oversized", "stale", "foreign state", "not finite", "nan metrics", "mute".
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import ArrayRecord, Context, Error, Message
from flwr.clientapp import ClientApp

from cgfedllm.adapter import AdapterSpec
from cgfedllm.codecs.packet import Packet
from cgfedllm.federation import directory, engine, server_app
from cgfedllm.federation.client_app import open_session
from cgfedllm.federation.inprocess import InProcessGrid
from cgfedllm.federation.messages import (
    ARRAYS,
    CONFIG,
    METRICS,
    PACKET,
    SERVER_ROUND,
    packet_limit,
    packet_record,
)

if TYPE_CHECKING:  # a node has no tests to run
    import pytest

Plan = Callable[[str, int], str | None]

DIED = "the process died"
NO_REPLY = ("lost", "silent", "late")
PACKETS = ("corrupt", "cut", "oversized", "stale", "foreign state", "not finite")
SPOILT = (*PACKETS, "nan metrics", "mute")
KINDS = (*NO_REPLY, "crash", *SPOILT, "twice")
# what the server says of each, as part of its reason
REASONS = {
    **dict.fromkeys(NO_REPLY, "no reply within"),
    "crash": DIED,
    "corrupt": "checksum does not match",
    "cut": "truncated",
    "oversized": "cannot be right here",
    "stale": "packet round is",
    "foreign state": "packet codec state hash",
    "not finite": "NaN or infinity",
    "nan metrics": "not numbers from 0 to 1e60: train-loss",
    "mute": "does not carry one packet",
    "twice": directory.STRAY,
}


def planned(faults: Mapping[tuple[str, int], str]) -> Plan:
    """Faults by client and round."""
    return lambda client, round_: faults.get((client, round_))


def at_random(seed: int, share: float, kinds: Iterable[str] = KINDS) -> Plan:
    """Each client fails in each round with the same probability, in a way drawn from `kinds`."""
    kinds = tuple(kinds)

    def plan(client: str, round_: int) -> str | None:
        rng = random.Random(f"{seed} {client} {round_}")
        return rng.choice(kinds) if rng.random() < share else None

    return plan


def spoil(kind: str, reply: Message, spec: AdapterSpec, earlier: bytes | None = None) -> None:
    """Make a reply that carries a packet into one of another kind.

    Parameters
    ----------
    earlier : bytes, optional
        A packet that the client sent in a round before; a stale one is that.
    """
    if kind == "mute":
        reply.content[ARRAYS] = ArrayRecord()
    elif kind == "nan metrics":
        reply.content[METRICS]["train-loss"] = float("nan")
    else:
        blob = reply.content[ARRAYS][PACKET].data
        reply.content[ARRAYS] = packet_record(_spoilt(kind, blob, packet_limit(spec), earlier))


def _spoilt(kind: str, blob: bytes, limit: int, earlier: bytes | None) -> bytes:
    packet = Packet.from_bytes(blob)
    match kind:
        case "corrupt":
            return blob[:-1] + bytes([blob[-1] ^ 1])
        case "cut":
            return blob[: len(blob) // 2]
        case "oversized":
            return bytes(limit + 1)
        case "stale" if earlier is not None:
            return earlier
        case "foreign state":
            return replace(packet, state_hash=b"another!").to_bytes()
        case "not finite":
            # every codec's floats, whatever else they are: all bits set is NaN
            payload = np.full(len(packet.payload), 0xFF, np.uint8).tobytes()
            return replace(packet, payload=payload).to_bytes()
    raise ValueError(f"no fault {kind!r} here; there are {', '.join(SPOILT)}")


class Clock:
    """Stands in for the module `time`: goes on only when somebody sleeps."""

    perf_counter = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FaultyGrid(InProcessGrid):
    """The in-process engine behind a network, with faults in what trains.

    What was done is in `happened`: client, round and kind.
    """

    complete = False

    def __init__(self, client_app: ClientApp, contexts: Mapping[int, Context], plan: Plan) -> None:
        super().__init__(client_app, contexts)
        self.happened: list[tuple[str, int, str]] = []
        self._plan = plan
        # replies that wait for a later round, and replies that are there without being asked for
        self._late: list[tuple[int, Message]] = []
        self._unasked: list[Message] = []
        self._earlier: dict[str, bytes] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        if self._unasked:
            return [self._unasked.pop()]
        for message_id in message_ids:
            message = self._pending.pop(message_id, None)
            reply = None if message is None else self._deliver(message)
            if reply is not None:
                return [reply]
        return []

    def _deliver(self, message: Message) -> Message | None:  # type: ignore[override]
        node = message.metadata.dst_node_id
        if message.metadata.message_type != "train" or node not in self._contexts:
            return super()._deliver(message)
        session = open_session(message, self._contexts[node])
        client, spec = session.data.name, session.workspace.spec
        round_ = int(message.content[CONFIG][SERVER_ROUND])
        self._unasked += [reply for due, reply in self._late if due < round_]
        self._late = [(due, reply) for due, reply in self._late if due >= round_]
        kind = self._plan(client, round_)
        if kind is None or (kind == "stale" and client not in self._earlier):
            return self._remembered(client, super()._deliver(message))
        self.happened.append((client, round_, kind))
        if kind == "lost":
            return None
        reply = super()._deliver(message)
        if kind == "silent":
            return None
        if kind == "late":
            self._late.append((round_, reply))
            return None
        if kind == "twice":
            self._unasked.append(copy.deepcopy(reply))
            return self._remembered(client, reply)
        if kind == "crash":
            return Message(Error(2, DIED), reply_to=message)
        if reply.has_error() or ARRAYS not in reply.content:
            self.happened.pop()  # it asks for what it lacks; what it sends then is spoilt
            return reply
        spoil(kind, reply, spec, self._earlier.get(client))
        return reply

    def _remembered(self, client: str, reply: Message) -> Message:
        """What a stale reply is made of."""
        if reply.has_content() and ARRAYS in reply.content:
            self._earlier[client] = reply.content[ARRAYS][PACKET].data
        return reply


def install(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> list[FaultyGrid]:
    """Have the embedded engine use a faulty grid and a clock of the test's; returns its grids."""
    grids: list[FaultyGrid] = []

    def make(client_app: ClientApp, contexts: Mapping[int, Context]) -> FaultyGrid:
        grids.append(FaultyGrid(client_app, contexts, plan))
        return grids[-1]

    clock = Clock()
    monkeypatch.setattr(engine, "InProcessGrid", make)
    monkeypatch.setattr(directory, "time", clock)
    monkeypatch.setattr(server_app, "time", clock)
    return grids
