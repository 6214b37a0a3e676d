"""Codecs with a latent: an array between encoder and decoder, before it becomes bits.

Not part of the contract of codecs, which deals in bytes alone: what is here is used where a codec
happens to offer it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.analysis.coding import CodecCoder, Coder
from cgfedllm.codecs import CodecContext

Change = Callable[[Float32Array], Float32Array]


@runtime_checkable
class CountsLatent(Protocol):
    """Tells how many numbers an update becomes."""

    def latent_elements(self, spec: AdapterSpec) -> int | None:
        """Numbers in the latent of an update; None where its size is not fixed."""


@runtime_checkable
class ShowsLatent(Protocol):
    """Decodes a packet with its latent changed on the way."""

    def decode_changed(self, blob: bytes, context: CodecContext, change: Change) -> AdapterUpdate:
        """As `Codec.decode`, but for what `change` makes of the latent.

        The latent is flat and float32, and what comes back is too, of the same length. All else
        that the packet holds (scales, gains) is used as it is. Packets without a latent are
        decoded as they are.
        """


def latent_elements(coder: Coder, spec: AdapterSpec) -> int | None:
    """Numbers in a codec's latent, where it has one."""
    codec = coder.codec if isinstance(coder, CodecCoder) else coder
    return codec.latent_elements(spec) if isinstance(codec, CountsLatent) else None


def latent_codec(coder: Coder) -> ShowsLatent | None:
    """The codec itself, if it lets its latent be changed."""
    codec = coder.codec if isinstance(coder, CodecCoder) else coder
    return codec if isinstance(codec, ShowsLatent) else None
