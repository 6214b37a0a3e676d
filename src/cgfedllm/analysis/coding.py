"""Updates through a codec, and what one round's decoded updates are compared with."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from cgfedllm.adapter import AdapterUpdate, Float32Array
from cgfedllm.analysis.samples import Sample
from cgfedllm.codecs import Codec, CodecContext, CodecState


class Coder(Protocol):
    """What measuring needs of a codec; other projects' compressors have it too."""

    def encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        """As `Codec.encode`."""

    def decode(self, blob: bytes, context: CodecContext) -> AdapterUpdate:
        """As `Codec.decode`."""


@dataclass(frozen=True)
class CodecCoder:
    """A codec with the state it codes in, whatever state the context names."""

    codec: Codec
    state: CodecState

    def encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        """See `Codec.encode`."""
        return self.codec.encode(update, self.context(context))

    def decode(self, blob: bytes, context: CodecContext) -> AdapterUpdate:
        """See `Codec.decode`."""
        return self.codec.decode(blob, self.context(context))

    def context(self, context: CodecContext) -> CodecContext:
        """The same with this coder's state."""
        return replace(context, state=self.state)


@dataclass(frozen=True)
class Coded:
    """One update's way through a codec.

    Parameters
    ----------
    sample : Sample
        What went in.
    size : int
        Bytes of the packet, header included.
    decoded : AdapterUpdate
        What came out.
    encode_ms, decode_ms : float
        Wall time, milliseconds.
    """

    sample: Sample
    size: int
    decoded: AdapterUpdate
    encode_ms: float
    decode_ms: float


def code(coder: Coder, sample: Sample) -> Coded:
    """Encode and decode one update.

    Raises
    ------
    CodecError
        If the codec refuses it.
    """
    start = time.perf_counter()
    packet = coder.encode(sample.update, sample.context)
    middle = time.perf_counter()
    decoded = coder.decode(packet, sample.context)
    end = time.perf_counter()
    return Coded(sample, len(packet), decoded, 1000 * (middle - start), 1000 * (end - middle))


def swapped(
    true: Sequence[AdapterUpdate], decoded: Sequence[AdapterUpdate]
) -> Iterator[tuple[AdapterUpdate, AdapterUpdate]]:
    """Pairs of the swap test: each client's packet for its neighbour, round the circle.

    Nothing for a client that is alone.
    """
    if len(true) > 1:
        yield from zip([*true[1:], true[0]], decoded, strict=True)


def weighted_mean(updates: Sequence[AdapterUpdate], weights: Sequence[float]) -> AdapterUpdate:
    """Mean in float64, as float32; equal weights where all are zero."""
    total = math.fsum(weights)
    shares = [w / total for w in weights] if total > 0 else [1 / len(updates)] * len(updates)
    mean = np.zeros(updates[0].spec.size, np.float64)
    for share, update in zip(shares, updates, strict=True):
        mean += share * update.vector.astype(np.float64)
    return AdapterUpdate(updates[0].spec, mean.astype(np.float32))


def aggregates(coded: Sequence[Coded]) -> tuple[AdapterUpdate, AdapterUpdate]:
    """Weighted mean of a round's updates, and of what was decoded of them."""
    weights = [one.sample.weight for one in coded]
    return (
        weighted_mean([one.sample.update for one in coded], weights),
        weighted_mean([one.decoded for one in coded], weights),
    )


def previous(sample: Sample) -> Float32Array:
    """The aggregate of the round before; zeros, as codec `zero` has it, where there is none."""
    known = sample.context.previous
    return np.zeros(sample.update.spec.size, np.float32) if known is None else known
