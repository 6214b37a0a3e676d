"""How small: in elements (as the paper counts), in bits, and in bytes that are really sent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cgfedllm.adapter import AdapterSpec
from cgfedllm.analysis.coding import CodecCoder, Coder
from cgfedllm.analysis.latents import latent_elements
from cgfedllm.codecs.learning import LearnedCodec


@dataclass(frozen=True)
class RateRow:
    """The size of one codec's packets on one recording.

    Parameters
    ----------
    recording, codec, options : str
        As in `OpenLoopRow`.
    updates, elements : int
        Packets measured, and numbers in an update.
    latent_elements : int or None
        Numbers in the latent, where the codec has one.
    element_share : float or None
        Latent elements over input elements: the paper's compression rate. It says nothing of bits:
        a latent of float32 and one of 2 bits have the same.
    bpp : float
        Bits per parameter of whole packets, mean.
    packet_bytes : float
        Mean length, header included.
    least_bytes, most_bytes : int
        Shortest and longest packet.
    times_fewer_than_fp32, times_fewer_than_bf16 : float
        Bytes of bare values over bytes sent.
    state_bytes : int
        What the state of a codec that learns weighs; it reaches both ends once, on top.
    """

    recording: str
    codec: str
    options: str
    updates: int
    elements: int
    latent_elements: int | None
    element_share: float | None
    bpp: float
    packet_bytes: float
    least_bytes: int
    most_bytes: int
    times_fewer_than_fp32: float
    times_fewer_than_bf16: float
    state_bytes: int


def rate_row(
    recording: str, codec: str, options: str, coder: Coder, spec: AdapterSpec, sizes: Sequence[int]
) -> RateRow:
    """From the packets of one codec.

    Parameters
    ----------
    sizes : sequence of int
        Bytes of each packet, from one packet.
    """
    latent = latent_elements(coder, spec)
    mean = math.fsum(sizes) / len(sizes)
    return RateRow(
        recording=recording,
        codec=codec,
        options=options,
        updates=len(sizes),
        elements=spec.size,
        latent_elements=latent,
        element_share=None if latent is None else latent / spec.size,
        bpp=8 * mean / spec.size,
        packet_bytes=mean,
        least_bytes=min(sizes),
        most_bytes=max(sizes),
        times_fewer_than_fp32=4 * spec.size / mean,
        times_fewer_than_bf16=2 * spec.size / mean,
        state_bytes=_state_bytes(coder),
    )


def _state_bytes(coder: Coder) -> int:
    if isinstance(coder, CodecCoder) and isinstance(coder.codec, LearnedCodec):
        return len(coder.codec.pack_state(coder.state))
    return 0
