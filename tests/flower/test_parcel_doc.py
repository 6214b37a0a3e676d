"""A parcel read as docs/wire-format.md describes it, without the code that writes it."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import zstandard
from flwr.app import ConfigRecord

from cgfedllm.adapter import AdapterSpec
from cgfedllm.codecs import CodecContext, make_codec

from .apps import Arrays, app_of, grid_of, record_of, wrapped

TYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)


def test_a_parcel_is_what_the_page_says() -> None:
    rng = np.random.default_rng(3)
    sent: Arrays = {
        "b": rng.standard_normal(5).astype(np.float32),
        "w": rng.standard_normal((16, 20)).astype(np.float32),
        "n": np.array(2.5),
    }
    trained: Arrays = {"n": np.array(4), "b": sent["b"] + 1, "w": sent["w"] * 2}

    record, grid = record_of(sent), grid_of(app_of("raw", lambda *_: trained), [2])
    messages = wrapped("raw").configure_train(9, record, ConfigRecord(), grid)
    (reply,) = grid.send_and_receive(messages)
    assert list(reply.content["arrays"]) == ["parcel"]
    parcel = reply.content["arrays"]["parcel"]
    assert parcel.stype == "cgfedllm.parcel"
    blob = parcel.data

    magic, version, round_, check, types, length, checksum = struct.unpack_from("<4s6I", blob)
    assert (magic, version, round_, types) == (b"CGFA", 1, 9, 1)
    crc = 0
    for name in sorted(record):
        crc = zlib.crc32(name.encode() + record[name].data, crc)
    assert check == crc
    assert checksum == zlib.crc32(blob[:24] + blob[28:])
    number, code = struct.unpack_from("<IB", blob, 28)
    assert (list(sent)[number], TYPES[code]) == ("n", "int64")

    exact = zstandard.ZstdDecompressor().decompress(blob[33 : 33 + length])
    bias = np.frombuffer(exact[:20], np.uint8).reshape(4, 5).T.copy()
    bias ^= sent["b"].view(np.uint8).reshape(5, 4)
    np.testing.assert_array_equal(bias.reshape(-1).view("<f4"), trained["b"])
    # of another type than was sent, so as it is
    assert np.frombuffer(exact[20:], np.uint8).view("<i8").tolist() == [4]

    spec = AdapterSpec.from_shapes({"w": (16, 20)})
    update = make_codec("raw").decode(blob[33 + length :], CodecContext(spec, 9))
    np.testing.assert_array_equal(update.views()["w"], trained["w"] - sent["w"])
