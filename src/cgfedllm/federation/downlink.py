"""The downlink: keeping every client's copy of the global adapter current in few bytes.

::

    server  W_t  (exact)                       client
            R_t = R_{t-1} + decode(packet_t)   R_t = R_{t-1} + decode(packet_t)
            packet_t = encode(W_t - R_{t-1})

R is the reference: what clients hold, bit for bit the same on both ends. What the codec loses
stays in W - R and goes into the next packet, so the downlink has error feedback by construction.
A client that holds another version than the last is sent the whole reference, self-contained,
and it is charged. One that is current is sent nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import Codec, CodecContext, make_codec
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
    """

    kind: Kind
    version: int
    blob: bytes


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
    """

    def __init__(self, spec: AdapterSpec, codec: Codec, seed: int) -> None:
        self._spec = spec
        self._codec = codec
        self._whole = whole_codec(codec)
        self._seed = seed
        self._full: bytes | None = None
        self.increment: bytes | None = None
        self.version = -1
        self.reference = AdapterUpdate.zeros(spec)
        self.held: dict[str, int] = {}

    def advance(self, adapter: AdapterUpdate, version: int) -> None:
        """Make `adapter` the state clients are to hold, as `version` (rounds aggregated)."""
        self._full = None
        self.increment = None
        if self.version < 0 or self._codec.lossless:
            self.reference = adapter
        else:
            context = CodecContext(self._spec, version, self._seed)
            self.increment = self._codec.encode(adapter - self.reference, context)
            self.reference = self.reference + self._codec.decode(self.increment, context)
        self.version = version

    def broadcast(self, client: str) -> Broadcast:
        """What `client` needs to hold the current version; assumes it will arrive."""
        held = self.held.get(client)
        self.held[client] = self.version
        if held == self.version:
            return Broadcast("hold", self.version, b"")
        if self.increment is not None and held == self.version - 1:
            return Broadcast("increment", self.version, self.increment)
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
    ) -> None:
        """Go on from a checkpoint."""
        self.reference, self.version, self.held = reference, version, dict(held)
        self.increment, self._full = increment, None


def receive(
    broadcast: Broadcast,
    codec: Codec,
    spec: AdapterSpec,
    seed: int,
    base: AdapterUpdate | None,
) -> AdapterUpdate:
    """Client side: the reference after a broadcast.

    Parameters
    ----------
    base : AdapterUpdate or None
        What the client holds: the current version for "hold", the one before for "increment".

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
    return base + codec.decode(broadcast.blob, context)


def whole_codec(codec: Codec) -> Codec:
    """The codec for self-contained broadcasts: it must be exact."""
    return codec if codec.lossless else make_codec("raw")
