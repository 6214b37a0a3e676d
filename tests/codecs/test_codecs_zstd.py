"""Frames that claim too much are refused before anything is allocated for them."""

import tracemalloc

import numpy as np
import pytest
import zstandard

from cgfedllm.adapter import AdapterSpec
from cgfedllm.codecs import CodecContext, make_codec
from cgfedllm.codecs.packet import Packet
from cgfedllm.errors import PacketError

SPEC = AdapterSpec.from_shapes({"x": (250,)})
ZEROS = bytes(1000)


def frame(content: bytes = ZEROS, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(content)


def decode(payload: bytes) -> np.ndarray:
    packet = Packet("zstd", 1, SPEC.hash, bytes(8), 1, SPEC.size, payload)
    context = CodecContext(SPEC, round=1)
    return make_codec("zstd").decode(packet.to_bytes(), context).vector


def streamed(content: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return compressor.compress(content) + compressor.flush()


def with_dictionary() -> bytes:
    dictionary = zstandard.ZstdCompressionDict(
        zstandard.train_dictionary(
            512, [bytes([i, i + 1, 7, 7]) * 9 for i in range(200)]
        ).as_bytes()
    )
    return zstandard.ZstdCompressor(dict_data=dictionary).compress(ZEROS)


SKIPPABLE = bytes.fromhex("502a4d18") + (1000).to_bytes(4, "little") + ZEROS
# a frame header with a window of 64 MiB and the right content size, then an empty last block
WIDE = bytes.fromhex("28b52ffd 40 80") + (1000 - 256).to_bytes(2, "little") + b"\1\0\0"


def test_the_right_frame_is_read() -> None:
    assert not decode(frame()).any()
    assert not decode(frame(write_checksum=True)).any()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0" * 40,
        frame()[:-1],
        frame() + b"\0",
        frame() + frame(),
        frame() + SKIPPABLE,
        SKIPPABLE,
        SKIPPABLE + frame(),
        frame(ZEROS[:-1]),
        frame(ZEROS + b"\0"),
        frame(bytes(2**24)),
        streamed(ZEROS),
        streamed(bytes(2**24)),
        with_dictionary(),
        WIDE,
    ],
    ids=[
        *("empty", "zeros", "cut", "longer", "two frames", "then a skippable one", "skippable"),
        *("after a skippable one", "too little", "too much", "bomb", "no size"),
        *("bomb of no size", "dictionary", "window"),
    ],
)
def test_other_frames_are_refused(payload: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(PacketError):
            decode(payload)
        assert tracemalloc.get_traced_memory()[1] < 2**18
    finally:
        tracemalloc.stop()
