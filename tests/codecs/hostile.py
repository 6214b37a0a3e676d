"""What somebody who knows the wire format can send: packets that are valid and mean harm."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from cgfedllm.codecs import Codec, CodecContext
from cgfedllm.codecs.entropy import SymbolReader
from cgfedllm.codecs.packet import HEADER_SIZE, Packet


def resealed(blob: bytes) -> bytes:
    """The same bytes with a payload length and a checksum that fit them."""
    if len(blob) < HEADER_SIZE:
        return blob
    head = blob[:44] + (len(blob) - HEADER_SIZE).to_bytes(4, "little")
    payload = blob[HEADER_SIZE:]
    return head + zlib.crc32(payload, zlib.crc32(head)).to_bytes(4, "little") + payload


def sealed(
    codec: Codec, context: CodecContext, payload: bytes, *, uses_previous: bool = False
) -> bytes:
    """A packet that nothing is wrong with but its payload."""
    return Packet(
        codec=codec.name,
        codec_version=codec.version,
        spec_hash=context.spec.hash,
        state_hash=context.state.hash,
        round=context.round,
        parameters=context.spec.size,
        payload=payload,
        uses_previous=uses_previous,
    ).to_bytes()


class Dictated:
    """What a range coder would read from a payload that somebody wrote to order.

    Random bytes decode to typical symbols and seldom get far. Whoever writes a packet can have any
    symbols at all: all the same, the largest, a few among zeros. Every sequence has a payload, so
    all of this can arrive.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.read = 0
        """Symbols read so far."""

    def numbers(self, size: int, count: int) -> np.ndarray[Any, Any]:
        self.read += count
        if not count or size <= 1:
            return np.zeros(count, np.int32)
        match self.rng.integers(6):
            case 0:
                return np.zeros(count, np.int32)
            case 1:
                return np.full(count, size - 1, np.int32)
            case 2:
                return np.full(count, self.rng.integers(size), np.int32)
            case 3:
                few = self.rng.random(count) < 0.02
                return np.where(few, size - 1, 0).astype(np.int32)
            case 4:
                return np.where(self.rng.random(count) < 0.5, size - 1, 0).astype(np.int32)
        return self.rng.integers(size, size=count).astype(np.int32)


@contextmanager
def dictating(seed: int) -> Iterator[Dictated]:
    """Readers of range-coded payloads get what `Dictated` makes of a seed."""
    dictated = Dictated(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SymbolReader, "__init__", lambda self, payload: None)
        patch.setattr(SymbolReader, "uniform", lambda self, size, n: dictated.numbers(size, n))
        patch.setattr(SymbolReader, "symbols", lambda self, size, n: dictated.numbers(size, n))
        patch.setattr(SymbolReader, "finish", lambda self: None)
        yield dictated


def bare(codec: Codec, size: int | None, seed: int) -> bytes:
    """A payload of numbers as they are: the extremes of all types, a few among many or many."""
    rng = np.random.default_rng(seed)
    length = int(rng.integers(400)) if size is None else size
    words = np.array(
        [0, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 0xFF7FFFFF, 1, 0x00800000],
        "<u4",
    )
    few = rng.choice(words, size=int(rng.integers(1, 4)))
    drawn: bytes = rng.choice(few, size=-(-length // 4) + 1).tobytes()
    start = int(rng.integers(4))
    return drawn[start : start + length]
