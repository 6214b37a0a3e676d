"""The wire format: one packet, one update. Described for other languages in docs/wire-format.md.

::

    offset size field                offset size field
    0      4    magic "CGFP"         28     8    state hash
    4      1    format version (1)   36     4    round
    5      1    flags                40     4    number of parameters
    6      2    codec version        44     4    payload length
    8      12   codec name, NUL pad  48     4    CRC-32 of bytes 0..47 and the payload
    20     8    spec hash            52     ...  payload

Flag bit 0: coded against the previous aggregate. All others are 0.
All integers little endian, unsigned. No field is ever used as a size to allocate: the payload
length must equal what is there, the parameter count must equal what the receiver's spec says.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from cgfedllm.errors import PacketError

MAGIC = b"CGFP"
FORMAT_VERSION = 1
HEADER_SIZE = 52
NAME_SIZE = 12
MAX_UINT32 = 2**32 - 1
NO_STATE = bytes(8)
USES_PREVIOUS = 1

_FIELDS = struct.Struct("<4sBBH12s8s8sIII")
_CRC = struct.Struct("<I")


@dataclass(frozen=True)
class Packet:
    """Header and payload of one coded update.

    Parameters
    ----------
    codec, codec_version : str, int
        Who wrote the payload; the name is at most 12 ASCII characters.
    spec_hash, state_hash : bytes, length 8
        `AdapterSpec.hash` and the hash of the learned codec's state (`NO_STATE` without one).
    round : int
        Federated round the update belongs to.
    parameters : int
        Number of values in the update, a check against the spec.
    payload : bytes
        The codec's own bytes.
    uses_previous : bool
        Coded against the previous aggregate; who does not hold that cannot decode it.
    """

    codec: str
    codec_version: int
    spec_hash: bytes
    state_hash: bytes
    round: int
    parameters: int
    payload: bytes
    uses_previous: bool = False

    def to_bytes(self) -> bytes:
        """Serialise; the result is ``52 + len(payload)`` bytes long."""
        head = _FIELDS.pack(
            MAGIC,
            FORMAT_VERSION,
            USES_PREVIOUS if self.uses_previous else 0,
            self.codec_version,
            self.codec.encode("ascii"),
            self.spec_hash,
            self.state_hash,
            self.round,
            self.parameters,
            len(self.payload),
        )
        return head + _CRC.pack(zlib.crc32(self.payload, zlib.crc32(head))) + self.payload

    @classmethod
    def from_bytes(cls, blob: bytes) -> Packet:
        """Parse and verify the checksum.

        Raises
        ------
        PacketError
            If the bytes are not an intact packet of this format version.
        """
        if len(blob) < HEADER_SIZE:
            raise PacketError(
                f"packet too short: {len(blob)} bytes, the header alone is {HEADER_SIZE}"
            )
        head, payload = blob[: _FIELDS.size], blob[HEADER_SIZE:]
        (magic, version, flags, codec_version, name, spec, state, round_, parameters, length) = (
            _FIELDS.unpack(head)
        )
        if magic != MAGIC:
            raise PacketError(f"not a packet: starts with {magic!r}, not {MAGIC!r}")
        if version != FORMAT_VERSION:
            raise PacketError(
                f"packet format version {version} is not known here (this is {FORMAT_VERSION}); "
                "run the same cgfedllm release on server and clients"
            )
        if flags & ~USES_PREVIOUS:
            raise PacketError(f"packet flags {flags:#04x} are not known here; expected 0 or 1")
        if length != len(payload):
            raise PacketError(
                f"packet payload is {len(payload)} bytes, its header says {length}: "
                "truncated or extended on the way"
            )
        (crc,) = _CRC.unpack(blob[_FIELDS.size : HEADER_SIZE])
        if crc != zlib.crc32(payload, zlib.crc32(head)):
            raise PacketError("packet checksum does not match: the bytes were damaged on the way")
        try:
            codec = name.rstrip(b"\0").decode("ascii")
        except UnicodeDecodeError:
            raise PacketError(f"packet codec name {name!r} is not ASCII") from None
        uses_previous = bool(flags & USES_PREVIOUS)
        return cls(codec, codec_version, spec, state, round_, parameters, payload, uses_previous)

    def check(
        self,
        *,
        codec: str,
        codec_version: int,
        spec_hash: bytes,
        state_hash: bytes,
        round: int,
        parameters: int,
    ) -> None:
        """Verify that this packet is the one the receiver waits for.

        Raises
        ------
        PacketError
            On the first field that differs; the message names it and both values.
        """
        expected: list[tuple[str, object, object]] = [
            ("codec", self.codec, codec),
            ("codec version", self.codec_version, codec_version),
            ("adapter spec hash", self.spec_hash.hex(), spec_hash.hex()),
            ("codec state hash", self.state_hash.hex(), state_hash.hex()),
            ("parameter count", self.parameters, parameters),
            ("round", self.round, round),
        ]
        for field, got, wanted in expected:
            if got != wanted:
                raise PacketError(f"packet {field} is {got!r}, expected {wanted!r}")
