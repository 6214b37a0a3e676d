"""The downlink: keeping every client's copy of the global adapter current in few bytes.

::

    server  W_t  (exact)                       client
            R_t = R_{t-1} + decode(packet_t)   R_t = R_{t-1} + decode(packet_t)
            packet_t = encode(W_t - R_{t-1})

R is the reference: what clients hold, bit for bit the same on both ends. What the codec loses
stays in W - R and goes into the next packet, so the downlink has error feedback by construction.
A client that holds another version than the last is sent the whole reference, self-contained,
and it is charged. One that is current is sent nothing. Stateless clients hold nothing, so they are
sent W itself, whole, with every message.

The last change of the reference, R_t - R_{t-1}, is what both ends know of the aggregate before;
codecs may code against it (`CodecContext.previous`).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import Codec, CodecContext, make_codec
from cgfedllm.codecs.packet import Packet
from cgfedllm.errors import ReferenceMissingError

Kind = Literal["full", "increment", "hold"]


@dataclass(frozen=True)
class Broadcast:
    """What one client is sent.

    Parameters
    ----------
    kind : str
        "full": the reference itself; "increment": the change since the version before;
        "hold": nothing, the client is current.
    version : int
        Version of the reference the client holds afterwards.
    blob : bytes
        Packet; empty for "hold".
    check : int or None
        `fingerprint` of the reference afterwards, for an increment: whatever the client took for
        its base, it finds out whether that was the server's.
    """

    kind: Kind
    version: int
    blob: bytes
    check: int | None = None


class Broadcaster:
    """Server side of the downlink.

    Parameters
    ----------
    spec : AdapterSpec
        The adapter.
    codec : Codec
        Codes increments. A lossless codec needs none: it codes the whole adapter each time, so
        that clients hold exactly what the server holds.
    seed : int
        For codecs that draw common random numbers.
    keep_previous : bool
        Keep `previous` for an uplink codec that uses it; for a downlink codec it is kept anyway.
    stateless : bool
        Clients keep nothing: each broadcast is whole, and the reference is the adapter itself.
    """

    def __init__(
        self,
        spec: AdapterSpec,
        codec: Codec,
        seed: int,
        *,
        keep_previous: bool = False,
        stateless: bool = False,
    ) -> None:
        self._spec = spec
        self._codec = codec
        self._whole = whole_codec(codec)
        self._seed = seed
        self._stateless = stateless
        self._always_whole = stateless or codec.lossless
        self._keep_previous = not stateless and (
            keep_previous or (codec.uses_previous and not codec.lossless)
        )
        self._full: bytes | None = None
        self._check: int | None = None
        self.increment: bytes | None = None
        self.version = -1
        self.reference = AdapterUpdate.zeros(spec)
        self.previous: AdapterUpdate | None = None
        """The reference less the version before, if that is kept and there was one."""
        self.held: dict[str, int] = {}

    def advance(self, adapter: AdapterUpdate, version: int) -> None:
        """Make `adapter` the state clients are to hold, as `version` (rounds aggregated)."""
        self._full = self._check = None
        self.increment = None
        before = self.reference
        if self.version < 0 or self._always_whole:
            self.reference = adapter
        else:
            known = None if self.previous is None else self.previous.vector
            context = CodecContext(self._spec, version, self._seed, previous=known)
            self.increment = self._codec.encode(adapter - before, context)
            self.reference = before + self._codec.decode(self.increment, context)
        if self._keep_previous and self.version >= 0:
            self.previous = self.reference - before
        self.version = version

    def broadcast(self, client: str) -> Broadcast:
        """What `client` needs to hold the current version; assumes it will arrive."""
        held = self.held.get(client)
        if not self._stateless:
            self.held[client] = self.version
        if held == self.version:
            return Broadcast("hold", self.version, b"")
        if self.increment is not None and held == self.version - 1:
            if self._check is None:
                self._check = fingerprint(self.reference)
            return Broadcast("increment", self.version, self.increment, self._check)
        if self._full is None:
            context = CodecContext(self._spec, self.version, self._seed)
            self._full = self._whole.encode(self.reference, context)
        return Broadcast("full", self.version, self._full)

    def forget(self, client: str) -> None:
        """The client no longer has what it was sent; its next broadcast is self-contained."""
        self.held.pop(client, None)

    def restore(
        self,
        reference: AdapterUpdate,
        version: int,
        held: dict[str, int],
        increment: bytes | None,
        previous: AdapterUpdate | None = None,
    ) -> None:
        """Go on from a checkpoint."""
        self.reference, self.version, self.held = reference, version, dict(held)
        self.increment, self.previous = increment, previous
        self._full = self._check = None


def receive(
    broadcast: Broadcast,
    codec: Codec,
    spec: AdapterSpec,
    seed: int,
    base: AdapterUpdate | None,
    previous: AdapterUpdate | None = None,
) -> AdapterUpdate:
    """Client side: the reference after a broadcast.

    Parameters
    ----------
    base : AdapterUpdate or None
        What the client holds: the current version for "hold", the one before for "increment".
    previous : AdapterUpdate or None
        `base` less the version before it, if the client holds that too and the codec uses it.

    Raises
    ------
    ReferenceMissingError
        If the client does not hold what the broadcast builds on.
    PacketError
        If the packet is not valid.
    """
    context = CodecContext(spec, broadcast.version, seed)
    if broadcast.kind == "full":
        return whole_codec(codec).decode(broadcast.blob, context)
    if base is None:
        raise ReferenceMissingError(
            f"broadcast {broadcast.version} ({broadcast.kind}) builds on a global adapter this "
            "client does not hold"
        )
    if broadcast.kind == "hold":
        return base
    missing = codec.uses_previous and previous is None
    if missing and Packet.from_bytes(broadcast.blob).uses_previous:
        raise ReferenceMissingError(
            f"broadcast {broadcast.version} builds on two versions of the global adapter and this "
            "client holds one"
        )
    known = None if previous is None else previous.vector
    context = CodecContext(spec, broadcast.version, seed, previous=known)
    reference = base + codec.decode(broadcast.blob, context)
    if broadcast.check is not None and fingerprint(reference) != broadcast.check:
        raise ReferenceMissingError(
            f"broadcast {broadcast.version} builds on another global adapter than this client holds"
        )
    return reference


def fingerprint(values: AdapterUpdate) -> int:
    """Checksum of exact values, by which two ends find out whether they hold the same."""
    return zlib.crc32(np.ascontiguousarray(values.vector, "<f4").data)


def whole_codec(codec: Codec) -> Codec:
    """The codec for self-contained broadcasts: it must be exact."""
    return codec if codec.lossless else make_codec("raw")
