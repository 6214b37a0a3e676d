"""The contract every codec keeps, and the registry they are found in.

::

    AdapterUpdate --encode--> [ header | payload | checksum ] --decode--> AdapterUpdate
                    ^                                            ^
                    `---------- the same CodecContext -----------'

Encode and decode see only what both ends hold (the context). Client-only memory, error
feedback, lives in `feedback.py` and goes around any codec.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs.packet import NO_STATE, Packet
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
        The values.
    """

    version: int = 0
    hash: bytes = NO_STATE
    tensors: dict[str, np.ndarray[Any, np.dtype[Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class CodecContext:
    """Everything both ends know when one update is coded.

    Parameters
    ----------
    spec : AdapterSpec
        The adapter the update belongs to; the decoder allocates from it.
    round : int
        Federated round, from 1.
    seed : int
        Common seed for codecs that draw numbers both ends must share.
    state : CodecState
        State of a learned codec; empty for the others.
    previous : ndarray or None, shape (spec.size,)
        The previous aggregated update, where both ends hold it.
    """

    spec: AdapterSpec
    round: int
    seed: int = 0
    state: CodecState = field(default_factory=CodecState)
    previous: Float32Array | None = None


class Codec(ABC):
    """Turns an update into bytes and back.

    Subclasses set `name`, `version` and `Options`, and write `_encode` and `_decode`, which deal
    in payloads only: the packet around them is made and checked here, once for all.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    lossless: ClassVar[bool] = False
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
            The packet, as it goes over the wire. Same input, same bytes, on every machine.

        Raises
        ------
        CodecError
            If the update belongs to another adapter or holds NaN or infinity.
        """
        if update.spec.hash != context.spec.hash:
            raise CodecError(f"{self.name}: the update belongs to another adapter than the context")
        if not update.is_finite():
            raise CodecError(
                f"{self.name}: the update holds NaN or infinity; lower the learning rate or set "
                "training.max_grad_norm"
            )
        return Packet(
            codec=self.name,
            codec_version=self.version,
            spec_hash=context.spec.hash,
            state_hash=context.state.hash,
            round=context.round,
            parameters=context.spec.size,
            payload=self._encode(update, context),
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
            If the bytes are damaged, of another codec, spec, state or round, or decode to
            something that is not an update. Nothing else is raised, nothing else happens.
        """
        packet = Packet.from_bytes(blob)
        packet.check(
            codec=self.name,
            codec_version=self.version,
            spec_hash=context.spec.hash,
            state_hash=context.state.hash,
            round=context.round,
            parameters=context.spec.size,
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

    @abstractmethod
    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        """Payload for one update."""

    @abstractmethod
    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        """Flat float32 vector from one payload; raises PacketError if it does not fit."""


_REGISTRY: dict[str, type[Codec]] = {}
C = TypeVar("C", bound=type[Codec])


def register(codec: C) -> C:
    """Class decorator: make a codec known under its name; a name is taken once."""
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


