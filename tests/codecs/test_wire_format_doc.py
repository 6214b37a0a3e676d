"""docs/wire-format.md, followed to the letter without any of this package's code."""

import hashlib
import re
import struct
import zlib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "wire-format.md").read_text(encoding="utf-8")
GOLDEN = Path(__file__).parent / "golden"
SHAPES = [("A", 2, 5), ("B", 4, 2), ("A", 2, 5), ("B", 3, 2)]


def golden(name: str) -> bytes:
    return bytes.fromhex((GOLDEN / f"{name}.hex").read_text().split()[0])


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
    for name in ("raw", "bf16", "int8"):
        packet = golden(name)
        fields = struct.unpack("<4sBBH12s8s8sIIII", packet[:52])
        checksum = zlib.crc32(packet[:48] + packet[52:])
        length = len(packet) - 52
        padded = name.encode().ljust(12, b"\0")
        assert fields == (
            *(b"CGFP", 1, 0, 1, padded, spec_hash, bytes(8), 7, 34, length, checksum),
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


def test_int8() -> None:
    payload = golden("int8")[52:]
    scales = struct.unpack("<8f", payload[:32])
    values = iter(struct.unpack("<34b", payload[32:]))
    decoded: list[float] = []
    wanted_scale = iter(scales)
    for kind, rows, columns in SHAPES:
        if kind == "A":
            for _ in range(rows):
                scale = next(wanted_scale)
                decoded += [next(values) * scale for _ in range(columns)]
        else:
            by_column = []
            for _ in range(columns):
                scale = next(wanted_scale)
                by_column.append([next(values) * scale for _ in range(rows)])
            decoded += [by_column[c][r] for r in range(rows) for c in range(columns)]
    # half a step of the largest row
    assert max(abs(a - b) for a, b in zip(decoded, expected_values(), strict=True)) < 0.0031
