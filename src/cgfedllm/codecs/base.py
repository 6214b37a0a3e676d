"""The contract every codec keeps, and the registry they are found in.

::

    AdapterUpdate --encode--> [ header | payload | checksum ] --decode--> AdapterUpdate
                    ^                                            ^
                    `---------- the same CodecContext -----------'

Encode and decode see only what both ends hold (the context). Client-only memory, error
feedback, lives in `feedback.py` and goes around any codec.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs.packet import HEADER_SIZE, MAX_UINT32, NAME_SIZE, NO_STATE, Packet
from cgfedllm.errors import CodecError, PacketError


class CodecOptions(BaseModel):
    """Options of one codec; unknown names and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True)
class CodecState:
    """What a learned codec knows beyond its options: versioned, hashed, sent as data.

    Parameters
    ----------
    version : int
        Grows by one with every adaptation (FAF); 0 is the state from pre-training (TGAP).
    hash : bytes, length 8
        Identifies the content; packets carry it so that the two ends cannot disagree unnoticed.
    tensors : dict of ndarray
        The values. Nobody changes them in place.
    """

    version: int = 0
    hash: bytes = NO_STATE
    tensors: dict[str, np.ndarray[Any, np.dtype[Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray[Any, np.dtype[Any]]], version: int = 0) -> Self:
        """A state with the hash that belongs to its content."""
        digest = hashlib.blake2b(version.to_bytes(8, "little"), digest_size=len(NO_STATE))
        arrays = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
        for name, array in arrays.items():
            # byte order spelt out: equal values hash alike on every machine
            plain = array.astype(array.dtype.newbyteorder("<"), copy=False)
            digest.update(f"{name}:{plain.dtype.str}:{plain.shape};".encode())
            digest.update(plain.tobytes())
        return cls(version, digest.digest(), arrays)


@dataclass(frozen=True)
class Start:
    """Where an update starts from.

    Parameters
    ----------
    adapter : ndarray, shape (spec.size,)
        What the update changes: the adapter that was broadcast for the round.
    origin : ndarray or None, shape (spec.size,)
        What the run began with, where both ends can draw it.
    """

    adapter: Float32Array
    origin: Float32Array | None = None


@dataclass(frozen=True)
class CodecContext:
    """Everything both ends know when one update is coded.

    Parameters
    ----------
    spec : AdapterSpec
        The adapter the update belongs to; the decoder allocates from it.
    round : int
        Federated round, from 1; 0 is the start. Fits 32 bits.
    seed : int
        Common seed for codecs that draw numbers both ends must share.
    state : CodecState
        State of a learned codec; empty for the others.
    previous : ndarray or None, shape (spec.size,)
        The last aggregated change of what clients hold, where both ends hold it: for the uplink
        of round t+1, their copy of the global adapter at version t less that at version t-1.
    start : Start or None
        The adapter that the update changes, where both ends hold it.

    Raises
    ------
    CodecError
        If the round does not fit a packet.
    """

    spec: AdapterSpec
    round: int
    seed: int = 0
    state: CodecState = field(default_factory=CodecState)
    previous: Float32Array | None = None
    start: Start | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.round <= MAX_UINT32:
            raise CodecError(f"round {self.round} does not fit a packet (0 to 2^32 - 1)")


class Codec(ABC):
    """Turns an update into bytes and back.

    Subclasses set `name`, `version`, `Options` and what a reader wants to know (`kind`: control,
    element-wise, structured or learned; `rates`, in bits a parameter; `summary`; `paper`), and
    write `_encode` and `_decode`, which deal in payloads only: the packet around them is made and
    checked here, once for all.

    A codec that gains from ``context.previous`` sets `uses_previous` and must do without it too:
    a client that is new, or was away, has none. The two ends agree by a flag in the packet, so
    that in `_encode` and `_decode` it is there for both or for neither.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    # not ClassVars: some codecs' options decide
    lossless: bool = False
    unbiased: bool = False
    """The mean over many packets is the update: error feedback would pile their errors up."""
    uses_previous: ClassVar[bool] = False
    uses_start: ClassVar[bool] = False
    kind: ClassVar[str]
    rates: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    Options: ClassVar[type[CodecOptions]] = CodecOptions

    def __init__(self, options: CodecOptions) -> None:
        self.options = options

    def encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        """Code one update as one self-describing packet.

        Parameters
        ----------
        update : AdapterUpdate
            Finite values on ``context.spec``.
        context : CodecContext
            What the decoder will have too.

        Returns
        -------
        bytes
            The packet, as it goes over the wire. It decodes to the same values on every machine.

        Raises
        ------
        CodecError
            If the update belongs to another adapter, holds NaN or infinity, or needs more than
            a packet holds (4 GiB).
        """
        if update.spec.hash != context.spec.hash:
            raise CodecError(f"{self.name}: the update belongs to another adapter than the context")
        if not update.is_finite():
            raise CodecError(
                f"{self.name}: the update holds NaN or infinity; lower the learning rate or set "
                "training.max_grad_norm"
            )
        if not self.uses_previous:
            context = replace(context, previous=None)
        payload = self._encode(update, context)
        if max(len(payload), context.spec.size) > MAX_UINT32:
            raise CodecError(
                f"{self.name}: {len(payload)} bytes for {context.spec.size} parameters are more "
                "than one packet holds (4 GiB); lower the rank or choose a smaller codec"
            )
        return self._sealed(payload, context)

    def _sealed(self, payload: bytes, context: CodecContext) -> bytes:
        """A packet of this codec around a payload that was made in a context."""
        return Packet(
            codec=self.name,
            codec_version=self.version,
            spec_hash=context.spec.hash,
            state_hash=context.state.hash,
            round=context.round,
            parameters=context.spec.size,
            payload=payload,
            uses_previous=context.previous is not None,
        ).to_bytes()

    def decode(self, blob: bytes, context: CodecContext) -> AdapterUpdate:
        """Rebuild the update from a packet.

        Returns
        -------
        AdapterUpdate
            Finite float32 values on ``context.spec``.

        Raises
        ------
        PacketError
            If the bytes are damaged, of another codec, spec, state or round, coded against a
            previous aggregate that is not there, or decode to something that is not an update.
            Nothing else is raised, nothing else happens.
        """
        packet = self._open(blob, context)
        context = self._as_coded(packet, context)
        size = self.payload_size(context.spec)
        if size is not None and len(packet.payload) != size:
            raise PacketError(
                f"{self.name}: payload is {len(packet.payload)} bytes, this adapter needs {size}"
            )
        vector = self._decode(packet.payload, context)
        if vector.dtype != np.float32 or vector.shape != (context.spec.size,):
            raise PacketError(
                f"{self.name}: payload decodes to {vector.dtype}{vector.shape}, "
                f"not to {context.spec.size} float32 numbers"
            )
        if not np.isfinite(vector).all():
            raise PacketError(f"{self.name}: payload decodes to NaN or infinity")
        return AdapterUpdate(context.spec, vector)

    def initial_state(self, spec: AdapterSpec, seed: int = 0) -> CodecState:
        """What both ends know before anything is learned; empty for codecs that do not learn.

        The same on every machine, so it need not be sent.
        """
        return CodecState()

    def packet_size(self, spec: AdapterSpec) -> int | None:
        """Length of every packet for this adapter in bytes, header included.

        None for codecs whose packets depend on the values.
        """
        payload = self.payload_size(spec)
        return None if payload is None else HEADER_SIZE + payload

    def expected_size(self, spec: AdapterSpec) -> int | None:
        """Bytes to expect of a packet for this adapter, for plans.

        Exact where `packet_size` is; else what the codec's options ask for, if they have a `bpp`
        (bits per parameter); else None.
        """
        exact = self.packet_size(spec)
        bpp: float | None = getattr(self.options, "bpp", None)
        if exact is not None or bpp is None:
            return exact
        return math.ceil(bpp * spec.size / 8)

    def payload_size(self, spec: AdapterSpec) -> int | None:
        """Length of every payload for this adapter in bytes, where the spec alone decides it.

        Codecs that give a number are never handed a payload of another length to decode.
        """
        return None

    def _open(self, blob: bytes, context: CodecContext) -> Packet:
        """The packet in these bytes, if it is this codec's and for this context."""
        packet = Packet.from_bytes(blob)
        packet.check(
            codec=self.name,
            codec_version=self.version,
            spec_hash=context.spec.hash,
            state_hash=context.state.hash,
            round=context.round,
            parameters=context.spec.size,
        )
        return packet

    def _as_coded(self, packet: Packet, context: CodecContext) -> CodecContext:
        """The context the packet was coded in: with the previous aggregate or without."""
        if not packet.uses_previous:
            return replace(context, previous=None)
        if not self.uses_previous:
            raise PacketError(
                f"{self.name}: the packet says it is coded against the previous aggregate, "
                "which this codec does not use"
            )
        if context.previous is None:
            raise PacketError(
                f"{self.name}: the packet is coded against the previous aggregate, "
                "which is not held here"
            )
        return context

    @abstractmethod
    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        """Payload for one update."""

    @abstractmethod
    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        """Flat float32 vector from one payload; raises PacketError if it does not fit.

        The payload may hold anything: the checksum is no proof of who wrote it.
        """


_REGISTRY: dict[str, type[Codec]] = {}
C = TypeVar("C", bound=type[Codec])


def register(codec: C) -> C:
    """Class decorator: make a codec known under its name; a name is taken once."""
    if not codec.name.isascii() or not 1 <= len(codec.name) <= NAME_SIZE:
        raise CodecError(
            f"codec name {codec.name!r} does not fit a packet: 1 to {NAME_SIZE} ASCII characters"
        )
    if codec.name in _REGISTRY:
        raise CodecError(f"a codec named {codec.name!r} is registered already")
    _REGISTRY[codec.name] = codec
    return codec


def codec_names() -> list[str]:
    """Names of all registered codecs, in order of registration."""
    return list(_REGISTRY)


def codec_class(name: str) -> type[Codec]:
    """Look a codec up by name.

    Raises
    ------
    CodecError
        If no codec has that name; the message names the nearest one.
    """
    try:
        return _REGISTRY[name]
    except KeyError:
        near = get_close_matches(name, _REGISTRY, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_REGISTRY)}"
        raise CodecError(f"no codec is named {name!r}; {hint}") from None


def make_codec(name: str, options: dict[str, Any] | None = None) -> Codec:
    """Build a codec from its name and its options.

    Raises
    ------
    CodecError
        If the name is unknown or an option is unknown or out of range.
    """
    cls = codec_class(name)
    try:
        return cls(cls.Options(**(options or {})))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "options"
        known = ", ".join(cls.Options.model_fields) or "none"
        raise CodecError(
            f"codec {name!r}, option {where!r}: {first['msg']} (options it has: {known})"
        ) from None
