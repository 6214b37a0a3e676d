"""docs/wire-format.md, followed to the letter without any of this package's code."""

import hashlib
import re
import struct
import zlib
from pathlib import Path

import zstandard

from .test_codecs_golden import MODES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "wire-format.md").read_text(encoding="utf-8")
GOLDEN = Path(__file__).parent / "golden"
SHAPES = [("A", 2, 5), ("B", 4, 2), ("A", 2, 5), ("B", 3, 2)]


def golden(name: str) -> bytes:
    return bytes.fromhex((GOLDEN / f"{name}.hex").read_text().split()[0])


def decoded(name: str) -> list[float]:
    """What this package decodes a golden packet to."""
    values = bytes.fromhex((GOLDEN / f"{name}.hex").read_text().split()[1])
    return list(struct.unpack(f"<{len(values) // 4}f", values))


def float32(value: float) -> float:
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def expected_values() -> list[float]:
    return [0.0 if 23 <= i <= 27 else ((37 * i) % 101 - 50) / 64 for i in range(34)]


def block_after(heading: str) -> str:
    match = re.search(re.escape(heading) + r".*?```\n(.*?)```", PAGE, re.S)
    assert match
    return match[1]


def test_the_worked_example_is_the_golden_packet() -> None:
    lines = block_after("Its `int8` packet").splitlines()
    digits = "".join(re.split(r" {2,}", line)[0] for line in lines)
    assert bytes.fromhex(digits) == golden("int8")


def test_headers() -> None:
    text = "".join(line.strip() for line in block_after("no codec state").splitlines())
    spec_hash = hashlib.sha256(text.encode()).digest()[:8]
    for name in ("raw", "bf16", "int8", "int4", "sign", "zero"):
        packet = golden(name)
        fields = struct.unpack("<4sBBH12s8s8sIIII", packet[:52])
        checksum = zlib.crc32(packet[:48] + packet[52:])
        length = len(packet) - 52
        padded = name.encode().ljust(12, b"\0")
        flags = 1 if name == "zero" else 0
        assert fields == (
            *(b"CGFP", 1, flags, 1, padded, spec_hash, bytes(8), 7, 34, length, checksum),
        )


def test_only_one_flag_is_described() -> None:
    (row,) = re.findall(r"\| 5 \| 1 \| flags \|.*", PAGE)
    assert "bit 0: coded against the previous aggregate" in row
    assert "any other bit is refused" in row
    assert "### The previous aggregate" in PAGE


def test_raw() -> None:
    assert list(struct.unpack("<34f", golden("raw")[52:])) == expected_values()


def test_bf16() -> None:
    halves = struct.unpack("<34H", golden("bf16")[52:])
    values = [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]
    assert values == expected_values()  # all of them fit eight bits


def in_vector_order(by_row: list[float]) -> list[float]:
    """Values row after row, B factors column after column, as the update's vector."""
    vector: list[float] = []
    start = 0
    for kind, first, second in SHAPES:
        own = by_row[start : start + first * second]
        start += first * second
        vector += own if kind == "A" else [own[c * first + r] for r in range(first) for c in (0, 1)]
    return vector


def rows() -> list[int]:
    """Lengths of all rows; B factors have two, their columns."""
    return [n for kind, a, b in SHAPES for n in ([b] * a if kind == "A" else [a] * b)]


def test_int8() -> None:
    payload = golden("int8")[52:]
    scales = struct.unpack("<8f", payload[:32])
    values = iter(struct.unpack("<34b", payload[32:]))
    by_row = [
        float32(next(values) * scale)
        for scale, length in zip(scales, rows(), strict=True)
        for _ in range(length)
    ]
    found = in_vector_order(by_row)
    assert found == decoded("int8")
    # half a step of the largest row
    assert max(abs(a - b) for a, b in zip(found, expected_values(), strict=True)) < 0.0031


def test_int4() -> None:
    payload = golden("int4")[52:]
    # no row is longer than a group of 64
    halves = struct.unpack("<8H", payload[:16])
    scales = [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]
    assert len(payload) == 16 + 17
    codes = iter([code for byte in payload[16:] for code in (byte & 15, byte >> 4)])
    by_row = [
        float32((next(codes) - 8) * scale)
        for scale, length in zip(scales, rows(), strict=True)
        for _ in range(length)
    ]
    found = in_vector_order(by_row)
    assert found == decoded("int4")
    # half a step of the largest row, whose scale is rounded up to eight bits
    assert max(abs(a - b) for a, b in zip(found, expected_values(), strict=True)) < 0.0563


def test_sign() -> None:
    payload = golden("sign")[52:]
    assert len(payload) == 8 * 4 + 5
    scales = struct.unpack("<8f", payload[:32])
    by_row = [s for s, length in zip(scales, rows(), strict=True) for _ in range(length)]
    bits = [payload[32 + i // 8] >> (7 - i % 8) & 1 for i in range(40)]
    assert bits[34:] == [0] * 6
    found = [-s if bit else s for s, bit in zip(in_vector_order(by_row), bits, strict=False)]
    assert found == decoded("sign")
    assert all(a * b >= 0 for a, b in zip(found, expected_values(), strict=True))


def test_zero() -> None:
    assert len(golden("zero")) == 52
    assert golden("zero")[5] == 1
    assert [value / 2 for value in reversed(expected_values())] == decoded("zero")


def test_zstd() -> None:
    payload = golden("zstd")[52:]
    frame = zstandard.get_frame_parameters(payload)
    assert (frame.content_size, frame.dict_id) == (4 * 704, 0)
    planes = zstandard.ZstdDecompressor().decompress(payload)
    values = bytes(planes[plane * 704 + i] for i in range(704) for plane in range(4))
    assert list(struct.unpack("<704f", values)) == decoded("zstd")


def test_every_codec_with_a_golden_packet_is_described() -> None:
    for name in sorted(path.stem for path in GOLDEN.glob("*.hex")):
        assert f"### `{MODES.get(name, name)}`, version 1" in PAGE
