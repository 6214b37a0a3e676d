"""What a round takes the server, and which of its means ends first as clients become more.

::

    made-up replies --rehearsed here--> seconds a client      x clients   one core
    plan: bytes up and down a client -------------------------x clients   the server's line
    plan: memory -- grows only for strategies that need every reply       memory

A round takes each client the time of its training and of its own line. As long as the server is
done with all of them in that time, clients are the limit; beyond, it is whatever of the server
takes longest.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from cgfedllm.adapter import AdapterSpec
from cgfedllm.codecs import Codec, CodecState
from cgfedllm.config import FederationConfig
from cgfedllm.errors import CodecError, ConfigError
from cgfedllm.report.units import human_bytes

_REHEARSED = 1 << 22
"""Parameters that are rehearsed with; time grows with their number."""
_CLIENTS, _ROUNDS = 4, 3


@dataclass(frozen=True)
class ServerPlan:
    """One round on the server.

    Parameters
    ----------
    mbit : float
        Megabits (10^6 bits) a second of the server's line, each way.
    clients : int
        That take part in the round.
    received, sent : int or None
        Bytes from and to all of them; None where packets depend on the values.
    reply_seconds : float
        Of one core, for one client: broadcast, decoding, aggregation.
    rehearsed : int
        Parameters that `reply_seconds` was measured with; it is scaled to the adapter's number.
    memory, memory_here : int
        Bytes that the server takes (`MemoryPlan.server`), and that this machine has.
    reply_memory : int
        Bytes that one more client adds to it.
    transfer_seconds : float or None
        What a client's own line takes for a round.
    training_seconds : float
        What a client trains in a round.
    """

    mbit: float
    clients: int
    received: int | None
    sent: int | None
    reply_seconds: float
    rehearsed: int
    memory: int
    memory_here: int
    reply_memory: int
    transfer_seconds: float | None
    training_seconds: float = 0.0

    @property
    def client_seconds(self) -> float | None:
        """A round of one client, if it waits for nobody."""
        if self.transfer_seconds is None:
            return None
        return self.transfer_seconds + self.training_seconds

    @property
    def cpu_seconds(self) -> float:
        """Of one core, for all clients."""
        return self.clients * self.reply_seconds

    @property
    def receive_seconds(self) -> float | None:
        """On the server's line."""
        return self._on_the_line(self.received)

    @property
    def send_seconds(self) -> float | None:
        """On the server's line."""
        return self._on_the_line(self.sent)

    @property
    def limits(self) -> dict[str, float]:
        """Clients a round up to which each of the server's means suffices; infinity: any number.

        For times, as long as it takes no longer than a client's own round; for memory, as long as
        it fits this machine.
        """
        limits = {"memory": math.inf}
        if self.reply_memory:
            free = self.memory_here - (self.memory - self.clients * self.reply_memory)
            limits["memory"] = max(0.0, free / self.reply_memory)
        if self.client_seconds is not None:
            for name, seconds in (
                ("sending", self.send_seconds),
                ("receiving", self.receive_seconds),
                ("one core", self.cpu_seconds),
            ):
                if seconds:
                    limits[name] = self.clients * self.client_seconds / seconds
        return limits

    @property
    def first(self) -> str:
        """What limits a round of so many clients: "clients", or what of the server's is short."""
        if self.memory > self.memory_here:
            return "memory"
        name, most = min(self.limits.items(), key=lambda item: item[1])
        return "clients" if most >= self.clients else name

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON; null where there is no limit."""
        limits = {name: None if math.isinf(most) else most for name, most in self.limits.items()}
        return {
            **asdict(self),
            "client_seconds": self.client_seconds,
            "cpu_seconds": self.cpu_seconds,
            "receive_seconds": self.receive_seconds,
            "send_seconds": self.send_seconds,
            "limits": limits,
            "first": self.first,
        }

    def rows(self) -> list[tuple[str, str]]:
        """(label, text) pairs for a table."""
        line = f"{self.mbit:g} Mbit/s"
        part = f", measured here with {self.rehearsed:,} parameters"
        grows = f"{human_bytes(self.reply_memory)} a client" if self.reply_memory else "no more"
        limits = sorted(self.limits.items(), key=lambda item: item[1])
        told = ", ".join(f"{name} {_clients(most)}" for name, most in limits)
        own = "themselves" if self.training_seconds else "their own line"
        first = own if self.first == "clients" else f"the server's {self.first}"
        return [
            ("server, a round", f"{self.clients:,} clients wait for {first}"),
            ("  receives", _moved(self.received, self.receive_seconds, line)),
            ("  sends", _moved(self.sent, self.send_seconds, line)),
            (
                "  one core",
                f"{self.cpu_seconds:.3g} s, {1e3 * self.reply_seconds:.3g} ms a client{part}",
            ),
            (
                "  memory",
                f"about {human_bytes(self.memory)} of {human_bytes(self.memory_here)} here, "
                f"{grows} for more of them",
            ),
            ("  suffices up to", f"{told} (clients a round)"),
        ]

    def _on_the_line(self, count: int | None) -> float | None:
        return None if count is None else 8 * count / (self.mbit * 1e6)


def plan_server(
    federation: FederationConfig,
    spec: AdapterSpec,
    codecs: tuple[Codec, Codec],
    state: CodecState | None,
    *,
    mbit: float,
    clients: int,
    up: float | None,
    down: float | None,
    memory: int,
    reply_memory: int,
    transfer_seconds: float | None,
    training_seconds: float,
) -> ServerPlan:
    """Rehearse a few replies and work out a round of all of them.

    Parameters
    ----------
    codecs : (Codec, Codec)
        Uplink and downlink.
    state : CodecState or None
        Of the uplink codec, if it comes from a file.
    memory, reply_memory, transfer_seconds, training_seconds
        As in `ServerPlan`.
    mbit : float
        The server's line, each way.
    up, down : float or None
        Bytes a round of one client.

    Raises
    ------
    ConfigError
        If the line's speed is not a positive number, or training takes less than no time.
    """
    if not (math.isfinite(mbit) and mbit > 0):
        raise ConfigError(f"the server's line must have a positive speed, got {mbit}")
    if not (math.isfinite(training_seconds) and training_seconds >= 0):
        raise ConfigError(f"training takes 0 seconds or more, got {training_seconds}")
    # a state from a file is of the whole adapter, so that is what has to be rehearsed
    part = _part(spec) if state is None else spec
    known = codecs[0].initial_state(part) if state is None else state
    seconds = _reply_seconds(federation, part, codecs, known) * spec.size / part.size
    return ServerPlan(
        mbit=mbit,
        clients=clients,
        received=None if up is None else round(up * clients),
        sent=None if down is None else round(down * clients),
        reply_seconds=seconds,
        rehearsed=part.size,
        memory=memory,
        memory_here=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        reply_memory=reply_memory,
        transfer_seconds=transfer_seconds,
        training_seconds=training_seconds,
    )


def _part(spec: AdapterSpec) -> AdapterSpec:
    """Whole pairs from the beginning of an adapter, about as many parameters as are rehearsed."""
    size, kept = 0, 0
    for kept, factor in enumerate(spec, 1):
        size += factor.size
        if size >= _REHEARSED and kept % 2 == 0:
            break
    return AdapterSpec(spec.factors[:kept])


def _reply_seconds(
    federation: FederationConfig,
    spec: AdapterSpec,
    codecs: tuple[Codec, Codec],
    state: CodecState,
) -> float:
    """Median of a few rounds, after one that warms up."""
    from cgfedllm.federation.rehearsal import Rehearsal

    logging.getLogger("flwr").setLevel(logging.WARNING)  # it tells of every round
    try:
        rehearsal = Rehearsal(federation, spec, *codecs, state)
    except CodecError as error:
        raise ConfigError(f"the server's part cannot be rehearsed: {error}") from None
    rehearsal.round(_CLIENTS)
    return statistics.median(rehearsal.round(_CLIENTS).reply_seconds for _ in range(_ROUNDS))


def _moved(count: int | None, seconds: float | None, line: str) -> str:
    if count is None or seconds is None:
        return "depends on the values"
    return f"{human_bytes(count)} in {seconds:.3g} s at {line}"


def _clients(most: float) -> str:
    return "any number" if math.isinf(most) else f"{math.floor(most):,}"
