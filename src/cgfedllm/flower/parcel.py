"""One reply as one blob: a packet for what is coded, and beside it what is sent exactly.

::

    offset size field                   offset size field
    0      4    magic "CGFA"            16     4    number of types that differ
    4      4    format version (1)      20     4    length of the frame
    8      4    round                   24     4    CRC-32 of all but this field
    12     4    checksum of what was    28     5 n  array (uint32) and code of its type (uint8)
                sent to the client             ...  frame: Zstandard, what is sent exactly
                                               ...  packet, if anything is coded

All integers little endian, unsigned. What is allocated follows from the arrays that the receiver
has sent, never from a number in the parcel. See docs/wire-format.md.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

from cgfedllm.codecs.packet import MAX_UINT32
from cgfedllm.codecs.parts.frames import FrameError, open_frame
from cgfedllm.errors import CodecError, PacketError
from cgfedllm.flower.arrays import DTYPES, AnyArray, Layout, may_become

MAGIC = b"CGFA"
FORMAT_VERSION = 1
_HEAD = struct.Struct("<4sIIIII")
_CRC = struct.Struct("<I")
_TYPE = struct.Struct("<IB")
_START = _HEAD.size + _CRC.size
_LEVEL = 9  # of zstd; what is sent exactly is small


@dataclass(frozen=True)
class Parcel:
    """What a reply holds, before anything is decoded.

    Parameters
    ----------
    dtypes : dict of dtype
        Type of each array in the reply.
    exact : bytes
        What is sent exactly, compressed (`pack_exact`); empty if there is nothing.
    packet : bytes
        Empty if nothing is coded.
    """

    dtypes: Mapping[str, np.dtype[Any]]
    exact: bytes
    packet: bytes

    def to_bytes(self, held: Mapping[str, AnyArray], *, round: int, check: int) -> bytes:
        """Serialise.

        Raises
        ------
        CodecError
            If what is sent exactly is more than 4 GiB.
        """
        if len(self.exact) > MAX_UINT32:
            raise CodecError(f"{len(self.exact)} bytes of exact values are more than 4 GiB")
        types = [
            _TYPE.pack(index, DTYPES.index(self.dtypes[name]))
            for index, name in enumerate(held)
            if self.dtypes[name] != held[name].dtype
        ]
        head = _HEAD.pack(MAGIC, FORMAT_VERSION, round, check, len(types), len(self.exact))
        body = b"".join([*types, self.exact, self.packet])
        return head + _CRC.pack(zlib.crc32(body, zlib.crc32(head))) + body

    @classmethod
    def from_bytes(
        cls, blob: bytes, held: Mapping[str, AnyArray], *, round: int, check: int
    ) -> Parcel:
        """Parse and verify that it answers what was sent.

        Parameters
        ----------
        held : mapping of ndarray
            What was sent.
        round, check : int
            Of which round it was, and its `checksum`.

        Raises
        ------
        PacketError
            If the bytes are damaged, of another format, or answer something else.
        """
        if len(blob) < _START:
            raise PacketError(f"parcel too short: {len(blob)} bytes, its head alone is {_START}")
        head, body = blob[: _HEAD.size], blob[_START:]
        magic, version, own_round, own_check, types, length = _HEAD.unpack(head)
        if magic != MAGIC:
            raise PacketError(f"not a parcel: starts with {magic!r}, not {MAGIC!r}")
        if version != FORMAT_VERSION:
            raise PacketError(
                f"parcel format version {version} is not known here (this is {FORMAT_VERSION}); "
                "run the same cgfedllm release on server and clients"
            )
        if _CRC.unpack(blob[_HEAD.size : _START])[0] != zlib.crc32(body, zlib.crc32(head)):
            raise PacketError("parcel checksum does not match: the bytes were damaged on the way")
        if own_round != round:
            raise PacketError(f"parcel is of round {own_round}, expected round {round}")
        if own_check != check:
            raise PacketError(
                "the client coded the change of other arrays than it was sent; put `compression` "
                "first among the mods"
            )
        end = types * _TYPE.size
        if types > len(held) or end + length > len(body):
            raise PacketError(f"parcel is cut off: {len(body)} bytes follow its head")
        dtypes = {name: array.dtype for name, array in held.items()} | _types(body[:end], held)
        return cls(dtypes, body[end : end + length], body[end + length :])


def pack_exact(layout: Layout, trained: Mapping[str, AnyArray]) -> bytes:
    """What is sent exactly of trained arrays, as one Zstandard frame.

    Raises
    ------
    CodecError
        If a value of it is not finite.
    """
    content = layout.exact_bytes(trained)
    return zstandard.ZstdCompressor(level=_LEVEL).compress(content) if content else b""


def unpack_exact(frame: bytes, layout: Layout) -> dict[str, AnyArray]:
    """Inverse of `pack_exact`.

    Raises
    ------
    PacketError
        If the frame is damaged, of another size than the arrays have, or holds what they cannot.
    """
    size = layout.exact_size
    if not size:
        if frame:
            raise PacketError("the parcel holds exact values, and none are due")
        return layout.read_exact(b"")
    try:
        return layout.read_exact(open_frame(frame, least=size, most=size))
    except FrameError as error:
        raise PacketError(f"the parcel's exact values cannot be read: {error}") from None


def _types(table: bytes, held: Mapping[str, AnyArray]) -> dict[str, np.dtype[Any]]:
    names = list(held)
    dtypes = {}
    for index, code in _TYPE.iter_unpack(table):
        if index >= len(names) or code >= len(DTYPES):
            raise PacketError(f"parcel gives array {index} the type {code}; there is none")
        name, dtype = names[index], DTYPES[code]
        if not may_become(held[name].dtype, dtype):
            raise PacketError(f"array {name!r} was sent as {held[name].dtype}, not as {dtype}")
        dtypes[name] = dtype
    return dtypes
