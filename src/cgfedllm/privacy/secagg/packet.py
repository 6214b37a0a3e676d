"""Masked numbers as a packet: the header every packet has, the session, the numbers."""

from __future__ import annotations

from cgfedllm.adapter import AdapterSpec
from cgfedllm.codecs import CodecContext
from cgfedllm.codecs.linear import LinearCodec
from cgfedllm.codecs.packet import HEADER_SIZE, Packet
from cgfedllm.codecs.parts.bitpack import packed_size
from cgfedllm.errors import PacketError
from cgfedllm.privacy.secagg.rules import SESSION_BYTES, width_of

NAME = "masked"
"""In place of a codec's name: no codec decodes one of these."""
_VERSION = 1


def masked_packet(numbers: bytes, session: bytes, context: CodecContext) -> bytes:
    """A packet of what `Member.mask` gave."""
    return Packet(
        codec=NAME,
        codec_version=_VERSION,
        spec_hash=context.spec.hash,
        state_hash=context.state.hash,
        round=context.round,
        parameters=context.spec.size,
        payload=session + numbers,
    ).to_bytes()


def masked_size(codec: LinearCodec, spec: AdapterSpec, members: int) -> int:
    """Length of a masked packet in a round that so many clients begin.

    Raises
    ------
    SecureAggregationError
        If their sum fits no ring (`width_of`).
    CodecError
        If the codec is not linear as its options stand.
    """
    width = width_of(members, codec.reach)
    return HEADER_SIZE + SESSION_BYTES + packed_size(codec.numbers(spec), width)


def masked_numbers(blob: bytes, session: bytes, context: CodecContext) -> bytes:
    """Inverse of `masked_packet`.

    Raises
    ------
    PacketError
        If it is damaged, not masked, or of another round, adapter or session.
    """
    packet = Packet.from_bytes(blob)
    packet.check(
        codec=NAME,
        codec_version=_VERSION,
        spec_hash=context.spec.hash,
        state_hash=context.state.hash,
        round=context.round,
        parameters=context.spec.size,
    )
    if packet.payload[:SESSION_BYTES] != session:
        raise PacketError("the masked packet is of another session, so its masks would stay")
    return packet.payload[SESSION_BYTES:]
