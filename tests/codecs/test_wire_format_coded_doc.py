"""docs/wire-format.md from "Common random numbers" on, followed with the standard library alone.

Golden packets are of four arrays (8 x 24, 24 x 8, 8 x 24, 16 x 8) at 2 bits a parameter, round 7,
seed 5.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "wire-format.md").read_text(encoding="utf-8")
GOLDEN = Path(__file__).parent / "golden"
SHAPES = [(8, 24), (24, 8), (8, 24), (16, 8)]
SIZES = [a * b for a, b in SHAPES]
N = sum(SIZES)
BUDGET = 2.0 * N - 416
SEED, ROUND = 5, 7
WORD = 2**32
STATE = 2**64

Matrix = list[list[float]]
Places = list[list[int]]
"""Where the entries of a matrix lie in the vector."""


def golden(name: str) -> tuple[bytes, list[float]]:
    """Payload of a golden packet, and what this package decodes it to."""
    packet, values = map(bytes.fromhex, (GOLDEN / f"{name}.hex").read_text().split())
    return packet[52:], list(struct.unpack(f"<{N}f", values))


def f32(value: float) -> float:
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def page_table(head: str) -> dict[str, str]:
    """A table of the page with two columns, by the first."""
    rows = PAGE.partition(head)[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| (\d) \| ([0-9 ]+) \|$", rows, re.M))


# ---- common random numbers ----------------------------------------------------------------------


def numbers(*labels: str | int) -> Iterator[int]:
    """32-bit numbers drawn under a name."""
    text = "\x1f".join(map(str, (SEED, *labels)))
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    key = philox_key(seed)
    counter = 0
    while True:
        counter += 1
        for number in philox_block(counter, key):
            yield number % WORD
            yield number >> 32


def philox_key(seed: int) -> list[int]:
    h = 0x43B0D7E5

    def hashmix(v: int) -> int:
        nonlocal h
        v ^= h
        h = h * 0x931E8875 % WORD
        v = v * h % WORD
        return v ^ (v >> 16)

    pool = [hashmix(w) for w in (seed % WORD, seed >> 32, 0, 0)]
    for i in range(4):
        for j in range(4):
            if i != j:
                x = (0xCA01F9DD * pool[j] - 0x4973F715 * hashmix(pool[i])) % WORD
                pool[j] = x ^ (x >> 16)
    g = 0x8B51F9DD
    k = []
    for i in range(4):
        v = pool[i] ^ g
        g = g * 0x58F38DED % WORD
        v = v * g % WORD
        k.append(v ^ (v >> 16))
    return [k[0] | k[1] << 32, k[2] | k[3] << 32]


def philox_block(counter: int, key: list[int]) -> list[int]:
    """Philox4x64-10 (Salmon et al., SC 2011)."""
    c = [counter >> 64 * i & (STATE - 1) for i in range(4)]
    k = list(key)
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(b >> 64) ^ c[1] ^ k[0], b % STATE, (a >> 64) ^ c[3] ^ k[1], a % STATE]
        k = [(k[0] + 0x9E3779B97F4A7C15) % STATE, (k[1] + 0xBB67AE8584CAA73B) % STATE]
    return c


def order(m: int, drawn: Iterator[int]) -> list[int]:
    keys = [next(drawn) | next(drawn) << 32 for _ in range(m)]
    return sorted(range(m), key=lambda i: (keys[i], i))


def signs(count: int, drawn: Iterator[int]) -> list[int]:
    words = b"".join(struct.pack("<I", next(drawn)) for _ in range(-(-count // 32)))
    return [1 - 2 * (words[i // 8] >> (7 - i % 8) & 1) for i in range(count)]


# ---- the range coder ----------------------------------------------------------------------------


class Reader:
    """Fields of a range-coded payload."""

    def __init__(self, payload: bytes) -> None:
        assert payload[-1] != 0
        payload += bytes(-len(payload) % 4)
        self.words = list(struct.unpack(f"<{len(payload) // 4}I", payload))
        self.low, self.range = 0, STATE - 1
        self.point = self.word() << 32
        self.point |= self.word()

    def word(self) -> int:
        return self.words.pop(0) if self.words else 0

    def quantile(self) -> int:
        q = (self.point - self.low) % STATE // (self.range >> 24)
        assert q < 1 << 24
        return q

    def take(self, a: int, b: int) -> None:
        scale = self.range >> 24
        self.low = (self.low + scale * a) % STATE
        self.range = scale * (b - a)
        if self.range < WORD:
            self.low = (self.low << 32) % STATE
            self.range <<= 32
            self.point = (self.point << 32) % STATE | self.word()

    def uniform(self, size: int) -> int:
        if size == 1:
            return 0
        each = (1 << 24) // size
        i = min(self.quantile() // each, size - 1)
        self.take(i * each, 1 << 24 if i == size - 1 else (i + 1) * each)
        return i

    def bits(self, width: int, count: int = 1) -> list[int]:
        values = [0] * count
        for shift in range(0, width, 16):
            part = min(16, width - shift)
            for at in range(count):
                values[at] |= self.uniform(1 << part) << shift
        return values

    def packed(self, count: int) -> list[int]:
        """Bits, eight at a time."""
        data = [self.uniform(256) for _ in range(-(-count // 8))]
        return [data[i // 8] >> (7 - i % 8) & 1 for i in range(count)]

    def float32(self) -> float:
        value: float = struct.unpack("<f", struct.pack("<I", self.bits(32)[0]))[0]
        return value

    def symbols(self, size: int, count: int) -> list[int]:
        if not count:
            return []
        codes = [self.uniform(64) for _ in range(size)]
        present = [i for i, code in enumerate(codes) if code]
        assert present
        if len(present) == 1:
            return present * count
        weights = [math.isqrt(math.isqrt(1 << (c + 39))) if c else 0 for c in codes]
        f = [1 + w * (65536 - size) // sum(weights) for w in weights]
        f[f.index(max(f))] += 65536 - sum(f)
        starts = [i + sum(f[:i]) * ((1 << 24) - size) // 65536 for i in range(size)] + [1 << 24]
        found = []
        for _ in range(count):
            q = self.quantile()
            i = next(i for i in range(size) if q < starts[i + 1])
            self.take(starts[i], starts[i + 1])
            found.append(i)
        return found

    def levels(self, count: int) -> list[int]:
        largest = self.uniform(65) if count else 0
        if not largest:
            return [0] * count
        magnitudes = self.symbols(largest + 1, count)
        if largest == 64:
            escaped = [i for i, m in enumerate(magnitudes) if m == 64]
            widths = self.symbols(25, len(escaped))
            for width in sorted(set(widths)):
                own = [i for i, w in zip(escaped, widths, strict=True) if w == width]
                for i, rest in zip(own, self.bits(width, len(own)), strict=True):
                    magnitudes[i] = 63 + (1 << width) + rest
        return [-m if m and self.uniform(2) else m for m in magnitudes]

    def points(self, count: int, step: float) -> list[float]:
        levels = self.levels(count)
        groups = {min(abs(m), 3) for m in levels} - {0}
        shifts = {group: (self.bits(5)[0] - 16) / 32 for group in sorted(groups)}
        return [
            f32(math.copysign(abs(m) - shifts[min(abs(m), 3)], m) * step) if m else 0.0
            for m in levels
        ]

    def finish(self) -> None:
        assert not self.words
        assert (self.point - self.low) % STATE < 2**33 - 1


def stacks() -> list[list[Places]]:
    """Matrices as `lowrank` and `dct` see them; none here has more than 64 rows."""
    found: dict[tuple[int, int], list[Places]] = {}
    start = 0
    for first, second in SHAPES:
        places = [[start + r * second + c for c in range(second)] for r in range(first)]
        if first > second:
            places = [list(column) for column in zip(*places, strict=True)]
        found.setdefault((len(places), len(places[0])), []).append(places)
        start += first * second
    return list(found.values())


# ---- range-coded payloads -----------------------------------------------------------------------


def ecsq(payload: bytes) -> list[float]:
    reader = Reader(payload)
    step, share, draw = reader.float32(), reader.uniform(65536), reader.uniform(65536)
    classes = reader.symbols(8, len(SHAPES))
    arrays: dict[int, list[float]] = {}
    for which, label in enumerate(sorted(set(classes))):
        own = [i for i, c in enumerate(classes) if c == label]
        places = list(range(sum(SIZES[i] for i in own)))
        values = [0.0] * len(places)
        if share < 65535:
            runs = -(-len(places) // 32)
            drawn = order(runs, numbers("ecsq", ROUND, draw, which))
            kept = set(drawn[: round(runs * share / 65535)])
            places = [at for at in places if at // 32 in kept]
        for at, value in zip(places, reader.points(len(places), step), strict=True):
            values[at] = value
        for i in own:
            arrays[i], values = values[: SIZES[i]], values[SIZES[i] :]
    reader.finish()
    return [value for i in range(len(SHAPES)) for value in arrays[i]]


def topk(payload: bytes) -> list[float]:
    chunk = 4096
    chunks = -(-N // chunk)
    reader = Reader(payload)
    total = reader.bits(32)[0]
    largest = reader.float32()
    scales = []
    for code in [reader.uniform(256) for _ in range(chunks)]:
        octaves, eighths = divmod(code - 1, 8)
        root = math.isqrt(math.isqrt(math.isqrt(1 << (160 - eighths))))
        scales.append(f32(largest * (root / 2 ** (20 + octaves))) if code else 0.0)
    kept = [i for i, hit in enumerate(reader.symbols(2, N)) if hit]
    assert len(kept) == total
    negative = [reader.uniform(2) for _ in kept]
    magnitudes = [reader.uniform(512) / 64 for _ in range(2)]
    vector = [0.0] * N
    for at, minus in zip(kept, negative, strict=True):
        value = f32(scales[at // chunk] * magnitudes[reader.uniform(2)])
        vector[at] = -value if minus else value
    reader.finish()
    return vector


def qsgd(payload: bytes) -> list[float]:
    reader = Reader(payload)
    step = reader.float32()
    vector = [f32(level * step) for level in reader.levels(N)]
    reader.finish()
    return vector


def lowrank(payload: bytes) -> list[float]:
    reader = Reader(payload)
    found = stacks()
    exponent = reader.bits(9)[0] - 160
    modes = lowrank_modes(reader, found)
    short = lowrank_short(reader, found, modes)
    low, span = reader.bits(7, 2)
    if len(modes) > 16 * (span + 1):
        codes = reader.symbols(span + 1, len(modes))
    else:
        codes = [reader.uniform(span + 1) for _ in modes]
    scale_codes = {at: low + code for at, code in zip(modes, codes, strict=True)}
    long = lowrank_coded(reader, found, modes, scale_codes)
    long |= lowrank_scalar(reader, found, modes, scale_codes)
    reader.finish()
    vector = [0.0] * N
    for s, stack in enumerate(found):
        for m, places in enumerate(stack):
            own = [at for at in modes if at[:2] == (s, m)]
            rows: Matrix = [[0.0] * len(places[0]) for _ in places]
            basis = orthonormal([short[at] for at in own])
            for q, y in zip(basis, [long[at] for at in own], strict=True):
                for r, entry in enumerate(map(f32, q)):
                    rows[r] = [f32(x + f32(v * entry)) for x, v in zip(rows[r], y, strict=True)]
            for row, values in zip(places, rows, strict=True):
                for place, value in zip(row, values, strict=True):
                    vector[place] = math.ldexp(value, exponent)
    return vector


Piece = tuple[int, int, int]
"""Stack, matrix and place."""


def lowrank_modes(reader: Reader, found: list[list[Places]]) -> dict[Piece, int]:
    modes: dict[Piece, int] = {}
    for place in range(max(len(stack[0]) for stack in found)):
        wanted = [
            (s, m, place)
            for s, stack in enumerate(found)
            for m, matrix in enumerate(stack)
            if place < len(matrix) and (place == 0 or (s, m, place - 1) in modes)
        ]
        new = {a: v for a, v in zip(wanted, reader.symbols(8, len(wanted)), strict=True) if v}
        if not new:
            break
        modes |= new
    return dict(sorted(modes.items()))


def lowrank_short(
    reader: Reader, found: list[list[Places]], modes: dict[Piece, int]
) -> dict[Piece, list[int]]:
    short: dict[Piece, list[int]] = {}
    for scalar in (False, True):
        own = [at for at, mode in modes.items() if (mode == 7) == scalar]
        if not own:
            continue
        largest = reader.bits(6)[0]
        lengths = [len(found[at[0]][0]) for at in own]
        entries = iter(reader.symbols(largest + 1, sum(lengths)))
        for at, length in zip(own, lengths, strict=True):
            short[at] = [next(entries) for _ in range(length)]
        signed = [(at, i) for at in own for i in [i for i, v in enumerate(short[at]) if v][1:]]
        for (at, i), negative in zip(signed, reader.packed(len(signed)), strict=True):
            short[at][i] *= -1 if negative else 1
    return short


def lowrank_coded(
    reader: Reader, found: list[list[Places]], modes: dict[Piece, int], codes: dict[Piece, int]
) -> dict[Piece, list[float]]:
    table = page_table("| k | taps |")
    quarters = (1.0, 0.8408964152537145, 0.7071067811865476, 0.5946035575013605)
    long: dict[Piece, list[float]] = {}
    for s, stack in enumerate(found):
        width = len(stack[0][0])
        for mode, k in enumerate((8, 6, 4, 3, 2, 1), 1):
            own = [at for at, chosen in modes.items() if at[0] == s and chosen == mode]
            steps = -(-width // k)
            bits = iter(reader.packed(len(own) * steps))
            taps = [int(tap, 8) for tap in table[str(k)].split()]
            assert len(taps) == k
            for at in own:
                octaves, quarter = divmod(codes[at] - 12, 4)
                scale = f32(math.ldexp(quarters[quarter], -octaves))
                register, word = 0, []
                for _ in range(steps):
                    register = (register << 1 | next(bits)) % 128
                    word += [1 - 2 * ((register & tap).bit_count() % 2) for tap in taps]
                long[at] = [sign * scale for sign in word[:width]]
    return long


def lowrank_scalar(
    reader: Reader,
    found: list[list[Places]],
    modes: dict[Piece, int],
    codes: dict[Piece, int],
    step: float | None = None,
) -> dict[Piece, list[float]]:
    pieces = [at for at, mode in modes.items() if mode == 7]
    if not pieces:
        return {}
    if step is None:
        step = reader.float32()
    if not step:
        return {at: [0.0] * len(found[at[0]][0][0]) for at in pieces}
    lowest = min(codes[at] for at in pieces)
    classes = {at: min((codes[at] - lowest) // 3, 5) for at in pieces}
    long: dict[Piece, list[float]] = {}
    for which in sorted(set(classes.values())):
        own = [at for at in pieces if classes[at] == which]
        widths = [len(found[at[0]][0][0]) for at in own]
        values = iter(reader.points(sum(widths), step))
        long |= {at: [next(values) for _ in range(w)] for at, w in zip(own, widths, strict=True)}
    return long


def orthonormal(vectors: list[list[int]]) -> Matrix:
    basis: Matrix = []
    for u in vectors:
        v = [float(entry) for entry in u]
        before = inner(v, v)
        for q, t in [(q, inner(q, v)) for q in basis]:
            v = [x - t * y for x, y in zip(v, q, strict=True)]
        after = inner(v, v)
        factor = 1 / math.sqrt(after) if after > 1e-6 * before else 0.0
        basis.append([x * factor for x in v])
    return basis


def inner(a: list[float], b: list[float]) -> float:
    # not sum(), which is compensated from Python 3.12 on
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total += x * y
    return total


def dct(payload: bytes) -> list[float]:
    reader = Reader(payload)
    exponent = reader.bits(9)[0] - 160
    step = reader.float32()
    matrices = [places for stack in stacks() for places in stack]
    classes = reader.symbols(8, len(matrices))
    vector = [0.0] * N
    for which in sorted(set(classes)):
        own = [places for places, c in zip(matrices, classes, strict=True) if c == which]
        points = iter(reader.points(sum(len(m) * len(m[0]) for m in own), 32.0))
        for places in own:
            x = [[int(next(points)) for _ in row] for row in places]
            columns = [inverse_dct(list(column), 2) for column in zip(*x, strict=True)]
            x = [inverse_dct(list(row), 0) for row in zip(*columns, strict=True)]
            for row, values in zip(places, x, strict=True):
                for place, value in zip(row, values, strict=True):
                    vector[place] = f32(math.ldexp(value * (step / 32 * 2**-20 / 4), exponent))
    reader.finish()
    return vector


def inverse_dct(x: list[int], spare: int) -> list[int]:
    """Of one chunk; none here is longer than 64."""
    m = len(x)
    assert m <= 64

    def d(k: int, j: int) -> int:
        return round(math.sqrt((2 if k else 1) / m) * math.cos(math.pi / m * k * (j + 0.5)) * 2**18)

    # exact in float64: the sums have fewer than 53 bits. round() takes ties to even
    return [round(sum(x[k] * d(k, j) for k in range(m)) / 2 ** (18 - spare)) for j in range(m)]


# ---- rotated payloads ---------------------------------------------------------------------------


def transformed(numbers: list[float]) -> list[float]:
    """Entries of all blocks, dealt out and dealt back."""
    b = len(numbers) // 4096
    values = list(numbers)
    for block in range(b):
        own = values[block::b]
        h = 1
        while h < 4096:
            for j in range(4096):
                if not j & h:
                    own[j], own[j + h] = f32(own[j] + own[j + h]), f32(own[j] - own[j + h])
            h *= 2
        values[block::b] = own
    return values


def eden(payload: bytes) -> list[float]:
    halves = page_table("| t | points |")
    size = 4096 * -(-N // 4096)
    left = int(BUDGET) // 8 - 8
    seed, scale = struct.unpack("<If", payload[:8])
    at = 8
    levels, planes = [0] * size, [0] * size
    for plane in range(4):
        count = min(size, 8 * left)
        for i in range(count):
            levels[i] |= (payload[at + i // 8] >> (7 - i % 8) & 1) << plane
            planes[i] += 1
        at += -(-count // 8)
        left -= -(-count // 8)
    assert at == len(payload)
    coordinates = [0.0] * size
    for i, (level, t) in enumerate(zip(levels, planes, strict=True)):
        if t:
            half = [float(c) for c in halves[str(t)].split()]
            coordinates[i] = ([-c for c in reversed(half)] + half)[level]
    turned = signs(size, numbers("eden", ROUND, seed))
    values = transformed(coordinates)
    return [f32(v * sign * scale) for v, sign in zip(values, turned, strict=True)][:N]


def sketch(payload: bytes) -> list[float]:
    b = -(-N // 4096)
    exponent, width = struct.unpack("<hB", payload[:3])
    m = int((BUDGET - 24) / 8)
    assert len(payload) == 3 + -(-m * width // 8)
    body = int.from_bytes(payload[3:], "little")
    drawn = numbers("sketch", ROUND)
    turned = signs(N, drawn)
    rows = order(4096, drawn)
    entries = [0.0] * (4096 * b)
    for j in range(m):
        raised = body >> (width * j) & ((1 << width) - 1)
        entries[rows[j // b] * b + j % b] = float(raised - (1 << (width - 1)))
    values = transformed(entries)[:N]
    return [math.ldexp(f32(v * s / 64), exponent) for v, s in zip(values, turned, strict=True)]


@pytest.mark.parametrize("decode", [ecsq, topk, qsgd, lowrank, dct, eden, sketch])
def test_the_page_decodes_the_golden_packet(decode: Callable[[bytes], list[float]]) -> None:
    payload, wanted = golden(decode.__name__)
    assert decode(payload) == wanted


def test_every_coded_payload_is_tried() -> None:
    coded = PAGE.partition("## Common random numbers")[2].partition("## Auto-encoders")[0]
    # `learned` is in test_wire_format_learned_doc.py
    assert set(re.findall(r"### `(\w+)`, version 1", coded)) == {
        *("ecsq", "topk", "qsgd", "lowrank", "dct", "eden", "sketch", "learned")
    }


def test_common_random_numbers_are_numpys() -> None:
    from cgfedllm.seeding import generator

    drawn = numbers("eden", ROUND, 3)
    own = b"".join(struct.pack("<I", next(drawn)) for _ in range(25))
    assert own == generator(SEED, "eden", ROUND, 3).bytes(100)
