"""A learned uplink codec's state in a federated run: kept on both ends, adapted, sent, versioned.

::

    server  S_v --adapt(decoded updates of a round)--> S_{v+1}        (FAF; every so many rounds)
    client  full | increment | hold  -->  S_v, verified by its hash

A state that both ends derive from the run's seed is sent to nobody, nor is one from a codec file
that clients have as they have the base model (`uplink.clients_hold_state`). Otherwise that of a
codec file is sent whole, once to each client, with the options that it is for. A client that holds
the version before is sent the increment, one that holds something else the whole state.
States go with training messages alone; evaluation needs none.

The paper (arXiv 2405.13746) does not say how clients come by a decoder that adapts, nor what that
costs; here it is part of the traffic.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import ValidationError

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import Codec, CodecState, codec_class
from cgfedllm.codecs.learning import LearnedCodec
from cgfedllm.errors import CodecStateError, CodecStateMissingError
from cgfedllm.seeding import derive_seed

MOST_ADAPTED = 64
"""A state adapts to at most so many updates of a round, whatever the number of clients."""
_NUMBER = struct.Struct("<I")
_LONGEST_OPTIONS = 65536

Kind = Literal["full", "increment", "hold"]


@dataclass(frozen=True)
class StatefulCodec:
    """A codec and the state that it codes with."""

    codec: Codec
    state: CodecState


@dataclass(frozen=True)
class CodecBroadcast:
    """What one client is sent of the codec's state.

    Parameters
    ----------
    kind : str
        "full": options and the whole state; "increment": what the version before lacks; "hold":
        nothing, the client is current or has the state by itself.
    version : int
        Version the client holds afterwards.
    hash : bytes, length 8
        Hash of that state.
    blob : bytes
        Empty for "hold".
    """

    kind: Kind
    version: int
    hash: bytes
    blob: bytes


@dataclass(frozen=True)
class CodecSnapshot:
    """The server's side, for a checkpoint.

    Parameters
    ----------
    state : CodecState
        The current state.
    held : mapping
        Version that each client holds, where that is known.
    increment : bytes or None
        What takes clients from the version before to this one.
    """

    state: CodecState
    held: Mapping[str, int] = field(default_factory=dict)
    increment: bytes | None = None


class CodecBroadcaster:
    """Server side: the current state, and what each client lacks of it.

    Parameters
    ----------
    spec : AdapterSpec
        The adapter.
    codec : LearnedCodec
        Of the uplink.
    state : CodecState
        Version 0.
    held : bool
        Whether clients have `state` before the first round: they make it from the seed they share,
        or have the codec file.
    stateless : bool
        Clients keep nothing: a state they do not have by themselves is sent with every message.
    """

    def __init__(
        self,
        spec: AdapterSpec,
        codec: LearnedCodec,
        state: CodecState,
        *,
        held: bool,
        stateless: bool = False,
    ) -> None:
        self.codec = codec
        self.state = state
        self._spec = spec
        self._at_start = state.version if held else _NOTHING
        self._stateless = stateless
        self._held: dict[str, int] = {}
        self._increment: bytes | None = None
        self._whole: bytes | None = None

    def broadcast(self, client: str) -> CodecBroadcast:
        """What `client` needs to hold the current state; assumes it will arrive."""
        version, hash_ = self.state.version, self.state.hash
        held = self._held.get(client, self._at_start)
        if not self._stateless:
            self._held[client] = version
        if held == version:
            return CodecBroadcast("hold", version, hash_, b"")
        if self._increment is not None and held == version - 1 and not self._stateless:
            return CodecBroadcast("increment", version, hash_, self._increment)
        if self._whole is None:
            self._whole = pack_whole(self.codec, self.state)
        return CodecBroadcast("full", version, hash_, self._whole)

    def forget(self, client: str) -> None:
        """The client does not hold what it was taken to; its next broadcast is self-contained."""
        self._held[client] = _NOTHING

    def adapt(self, updates: list[AdapterUpdate], *, round: int, seed: int) -> None:
        """Let the codec learn from decoded updates; clients are sent what it learned.

        Raises
        ------
        CodecStateError
            If what the codec makes of them is not a state. It keeps the one it had.
        """
        before = self.state
        learned = self.codec.adapt(before, updates, round=round, seed=seed)
        if learned is before:
            return
        increment = self.codec.pack_state(learned, before)
        # as clients will read it: whatever packing loses, both ends hold the same
        state = self.codec.unpack_state(increment, self._spec, before)
        self.codec.check_state(state, self._spec)
        if state.version != before.version + 1:
            raise CodecStateError(
                f"codec {self.codec.name!r} adapted version {before.version} of its state to "
                f"version {state.version}, not {before.version + 1}"
            )
        self.state, self._increment, self._whole = state, increment, None

    def snapshot(self) -> CodecSnapshot:
        """What a checkpoint needs of it."""
        return CodecSnapshot(self.state, dict(self._held), self._increment)

    def restore(self, snapshot: CodecSnapshot) -> None:
        """Go on from a checkpoint.

        Raises
        ------
        CodecStateError
            If its state is not one of this codec with these options.
        """
        self.codec.check_state(snapshot.state, self._spec)
        self.state, self._held = snapshot.state, dict(snapshot.held)
        self._increment, self._whole = snapshot.increment, None


class UpdateSample:
    """The decoded updates of a round that a codec adapts to: all of them, or an even sample.

    Clients are drawn by seed, round and name, so the sample does not depend on the order in which
    replies come, and no more than `most` updates are ever held.
    """

    def __init__(self, seed: int, round: int, most: int = MOST_ADAPTED) -> None:
        self._seed, self._round, self._most = seed, round, most
        self._kept: dict[str, tuple[int, AdapterUpdate]] = {}

    def add(self, client: str, update: AdapterUpdate) -> None:
        """Take a client's update in, or let it or another one go."""
        rank = derive_seed(self._seed, "adapt", self._round, client)
        self._kept[client] = (rank, update)
        if len(self._kept) > self._most:
            del self._kept[max(self._kept, key=lambda name: self._kept[name][0])]

    def updates(self) -> list[AdapterUpdate]:
        """What is kept, in the order of client names."""
        return [self._kept[name][1] for name in sorted(self._kept)]


def receive_state(
    broadcast: CodecBroadcast, name: str, spec: AdapterSpec, base: StatefulCodec | None
) -> StatefulCodec:
    """Client side: the codec and its state after a broadcast.

    Parameters
    ----------
    broadcast : CodecBroadcast
        As received.
    name : str
        The uplink codec.
    spec : AdapterSpec
        The adapter.
    base : StatefulCodec or None
        What the client holds: the same version for "hold", the one before for "increment".

    Raises
    ------
    CodecStateMissingError
        If the client does not hold what the broadcast builds on; the server sends the whole then.
    CodecStateError
        If what was sent is too long, damaged, or not what was announced.
    """
    if broadcast.kind == "full":
        received = _open_whole(name, broadcast.blob, spec)
        _check_announced(broadcast, received.state)
        return received
    if base is None or not isinstance(base.codec, LearnedCodec):
        raise CodecStateMissingError(
            f"version {broadcast.version} of the codec state ({broadcast.kind}) builds on one that "
            "this client does not hold"
        )
    state = base.state
    if broadcast.kind == "increment":
        _check_length(base.codec, broadcast.blob, spec)
        try:
            state = base.codec.unpack_state(broadcast.blob, spec, base.state)
        except CodecStateError as error:  # the base may be what is wrong
            raise CodecStateMissingError(str(error)) from None
    try:
        _check_announced(broadcast, state)
    except CodecStateError as error:
        raise CodecStateMissingError(str(error)) from None
    return StatefulCodec(base.codec, state)


def pack_whole(codec: LearnedCodec, state: CodecState) -> bytes:
    """Options and state, for a client that has neither.

    ::

        CRC-32 of the rest | length of options | options (JSON) | packed state

    Both numbers are uint32, little endian.
    """
    options = options_text(codec).encode()
    content = _NUMBER.pack(len(options)) + options + codec.pack_state(state)
    return _NUMBER.pack(zlib.crc32(content)) + content


def options_text(codec: Codec) -> str:
    """A codec's options, for `codec_with`."""
    return codec.options.model_dump_json()


def codec_with(name: str, options: str | bytes) -> LearnedCodec:
    """A learned codec with options that were sent or kept as text.

    Raises
    ------
    CodecStateError
        If the text is no options of this codec.
    """
    cls = codec_class(name)
    try:
        codec = cls(cls.Options.model_validate_json(options))
    except ValidationError as error:
        first = error.errors()[0]
        raise CodecStateError(
            f"the state comes with options that codec {name!r} does not take: {first['msg']}"
        ) from None
    if not isinstance(codec, LearnedCodec):
        raise CodecStateError(f"codec {name!r} does not learn, so it has no state")
    return codec


_NOTHING = -1


def _open_whole(name: str, blob: bytes, spec: AdapterSpec) -> StatefulCodec:
    view = memoryview(blob)
    if len(view) < 2 * _NUMBER.size:
        raise CodecStateError("the codec state is damaged: it is cut off")
    if _NUMBER.unpack_from(view)[0] != zlib.crc32(view[_NUMBER.size :]):
        raise CodecStateError("the codec state is damaged: it does not match its checksum")
    length, content = _NUMBER.unpack_from(view, _NUMBER.size)[0], view[2 * _NUMBER.size :]
    if length > min(len(content), _LONGEST_OPTIONS):
        raise CodecStateError("the codec state is damaged: its options are too long")
    codec, packed = codec_with(name, bytes(content[:length])), bytes(content[length:])
    _check_length(codec, packed, spec)
    return StatefulCodec(codec, codec.unpack_state(packed, spec))


def _check_length(codec: LearnedCodec, packed: bytes, spec: AdapterSpec) -> None:
    limit = codec.state_limit(spec)
    if len(packed) > limit:
        raise CodecStateError(
            f"a codec state of {len(packed)} bytes; codec {codec.name!r} has at most {limit} here"
        )


def _check_announced(broadcast: CodecBroadcast, state: CodecState) -> None:
    if (state.version, state.hash) != (broadcast.version, broadcast.hash):
        raise CodecStateError(
            f"version {state.version} of the codec state ({state.hash.hex()}) is not version "
            f"{broadcast.version} ({broadcast.hash.hex()}), which the server announced"
        )
