"""Error feedback: what a codec lost this round is added to the next one's update.

::

    update + decay * residual --encode--> packet --decode--> sent
    residual = update + decay * residual - sent

Seide et al., INTERSPEECH 2014; Karimireddy et al., arXiv 1901.09847. Works with any codec,
since it needs only encode and decode. The residual never leaves its owner.
"""

from __future__ import annotations

from dataclasses import dataclass

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.codecs.base import Codec, CodecContext


@dataclass(frozen=True)
class Encoded:
    """Outcome of one encoding.

    Parameters
    ----------
    packet : bytes
        What goes over the wire.
    wanted : AdapterUpdate
        What went into the codec: the update and what was added of the residual.
    decoded : AdapterUpdate
        What the other end will see.
    residual : AdapterUpdate or None
        What it will not see, to be kept for the next round; None without error feedback.
    """

    packet: bytes
    wanted: AdapterUpdate
    decoded: AdapterUpdate
    residual: AdapterUpdate | None


def encode_with_feedback(
    codec: Codec,
    update: AdapterUpdate,
    context: CodecContext,
    *,
    residual: AdapterUpdate | None = None,
    decay: float = 1.0,
    enabled: bool = True,
) -> Encoded:
    """Encode an update together with the residual of earlier ones.

    Parameters
    ----------
    codec : Codec
        Any codec.
    update : AdapterUpdate
        This round's change.
    context : CodecContext
        As for `Codec.encode`.
    residual : AdapterUpdate, optional
        What earlier rounds left unsent.
    decay : float
        Factor on the residual, in [0, 1].
    enabled : bool
        False: plain encoding, no residual is kept.

    Raises
    ------
    CodecError
        As `Codec.encode`.
    """
    wanted = update
    if enabled and residual is not None:
        wanted = update + residual.scaled(decay)
    packet = codec.encode(wanted, context)
    decoded = wanted if codec.lossless else codec.decode(packet, context)
    return Encoded(packet, wanted, decoded, wanted - decoded if enabled else None)
