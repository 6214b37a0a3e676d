"""Integers through the range coder and back; what it costs; what damage does; budgets."""

from __future__ import annotations

import contextlib
import random
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from cgfedllm.adapter import AdapterSpec
from cgfedllm.codecs.entropy import (
    MAX_LEVEL,
    SymbolReader,
    SymbolWriter,
    bits_of_levels,
    frequencies,
    frequency_codes,
    levels_bits,
    occurrences,
    symbol_bits,
)
from cgfedllm.codecs.rate import largest_within, payload_bits
from cgfedllm.errors import PacketError

pytestmark = pytest.mark.filterwarnings("error")

LENGTHS = st.integers(0, 300)
LEVELS = npst.arrays(
    np.int32,
    LENGTHS,
    elements=st.integers(-3, 3)
    | st.integers(-70, 70)
    | st.integers(-MAX_LEVEL, MAX_LEVEL)
    | st.sampled_from([63, 64, 65, 127, 128, -MAX_LEVEL, MAX_LEVEL]),
)


def written_levels(values: np.ndarray) -> bytes:
    writer = SymbolWriter()
    writer.levels(values)
    return writer.finish()


# ---- round trips --------------------------------------------------------------------------------


@given(data=st.data(), size=st.integers(1, 2**16))
def test_uniform(data: st.DataObject, size: int) -> None:
    values = data.draw(npst.arrays(np.int32, LENGTHS, elements=st.integers(0, size - 1)))
    writer = SymbolWriter()
    writer.uniform(values, size)
    reader = SymbolReader(writer.finish())
    assert (reader.uniform(size, values.size) == values).all()
    reader.finish()


@given(data=st.data(), width=st.integers(0, 63))
def test_bits(data: st.DataObject, width: int) -> None:
    values = data.draw(npst.arrays(np.int64, LENGTHS, elements=st.integers(0, 2**width - 1)))
    writer = SymbolWriter()
    writer.bits(values, width)
    reader = SymbolReader(writer.finish())
    assert (reader.bits(width, values.size) == values).all()
    reader.finish()


@given(values=npst.arrays(np.float32, LENGTHS, elements=st.floats(width=32)))
def test_float32_keeps_every_bit(values: np.ndarray) -> None:
    writer = SymbolWriter()
    writer.float32(values)
    reader = SymbolReader(writer.finish())
    assert reader.float32(values.size).tobytes() == values.tobytes()
    reader.finish()


@given(data=st.data(), size=st.integers(1, 2000))
def test_symbols(data: st.DataObject, size: int) -> None:
    top = data.draw(st.integers(0, size - 1))
    values = data.draw(npst.arrays(np.int32, LENGTHS, elements=st.integers(0, top)))
    writer = SymbolWriter()
    writer.symbols(values, size)
    reader = SymbolReader(writer.finish())
    assert (reader.symbols(size, values.size) == values).all()
    reader.finish()


@given(values=LEVELS)
def test_levels(values: np.ndarray) -> None:
    reader = SymbolReader(written_levels(values))
    assert (reader.levels(values.size) == values).all()
    reader.finish()


@given(parts=st.lists(LEVELS, max_size=4))
def test_one_after_the_other(parts: list[np.ndarray]) -> None:
    writer = SymbolWriter()
    for part in parts:
        writer.levels(part)
        writer.uniform(part.size, 301)
    reader = SymbolReader(writer.finish())
    for part in parts:
        assert (reader.levels(part.size) == part).all()
        assert reader.uniform(301, 1)[0] == part.size
    reader.finish()


@pytest.mark.parametrize("scale", [0.1, 2.0, 40.0, 1e5])
def test_levels_over_several_blocks(scale: float) -> None:
    values = np.rint(np.random.default_rng(7).laplace(scale=scale, size=150_001))
    values = values.clip(-MAX_LEVEL, MAX_LEVEL).astype(np.int32)
    blob = written_levels(values)
    reader = SymbolReader(blob)
    assert (reader.levels(values.size) == values).all()
    reader.finish()
    if scale < 10:
        assert written_levels(values.astype(np.int8)) == blob


def test_nothing_written_is_nothing_sent() -> None:
    assert SymbolWriter().finish() == b""
    SymbolReader(b"").finish()


def test_many_zeros_cost_little() -> None:
    values = np.zeros(1_000_000, np.int32)
    assert len(written_levels(values)) <= 4
    values[::1000] = 1
    assert len(written_levels(values)) < 1_700  # ideal: 1,426 bytes, and 125 for signs


# ---- tables -------------------------------------------------------------------------------------


@given(
    codes=npst.arrays(np.int32, st.integers(1, 4000), elements=st.integers(0, 63)).filter(
        lambda codes: codes.any()
    )
)
def test_frequencies_are_a_table_whatever_the_codes(codes: np.ndarray) -> None:
    table = frequencies(codes)
    assert table.sum() == 2**16
    assert table.min() >= 1


def test_uneven_tables_of_many_symbols_are_tables() -> None:
    # half of them common, half rare: the ones given to the rare may not exceed what there is
    for size in (1000, 5000, 60_000):
        codes = np.where(np.arange(size) % 2, 63, 1)
        assert frequencies(codes).min() >= 1
        assert frequencies(codes).sum() == 2**16


@given(counts=npst.arrays(np.int64, st.integers(1, 200), elements=st.integers(0, 10**7)))
def test_codes_say_who_is_there(counts: np.ndarray) -> None:
    if not counts.any():
        return
    codes = frequency_codes(counts)
    assert ((codes > 0) == (counts > 0)).all()
    assert codes[np.argmax(counts)] == codes.max() == 63
    assert np.isfinite(symbol_bits(counts)).all()


def test_occurrences_over_several_pieces() -> None:
    values = np.random.default_rng(0).integers(0, 9, 600_000).astype(np.int32)
    values[-1] = 11
    assert (occurrences(values) == np.bincount(values)).all()
    assert (occurrences(values, 20) == np.bincount(values, minlength=20)).all()
    assert occurrences(np.zeros(0, np.int32), 3).tolist() == [0, 0, 0]


# ---- cost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.05, 0.3, 1.0, 10.0, 60.0, 3_000.0, 1e6])
@pytest.mark.parametrize("size", [1, 30, 3_000, 400_000])
def test_estimates_are_right(scale: float, size: int) -> None:
    values = np.rint(np.random.default_rng(3).laplace(scale=scale, size=size)).astype(np.int32)
    values = values.clip(-MAX_LEVEL, MAX_LEVEL)
    real = 8 * len(written_levels(values))
    assert bits_of_levels(values) == pytest.approx(real, rel=0.01, abs=64)
    counts = np.bincount(np.abs(values))
    assert levels_bits(counts) == pytest.approx(bits_of_levels(values), rel=1e-9)


def test_coding_is_close_to_the_entropy() -> None:
    values = np.rint(np.random.default_rng(4).normal(scale=2, size=200_000)).astype(np.int32)
    counts = np.unique(values, return_counts=True)[1]
    entropy = float((counts * np.log2(values.size / counts)).sum())
    assert entropy < 8 * len(written_levels(values)) < 1.005 * entropy


# ---- damage -------------------------------------------------------------------------------------


def damaged(blob: bytes, rng: random.Random) -> bytes:
    copy = bytearray(blob)
    match rng.randrange(4):
        case 0:
            del copy[rng.randrange(len(copy)) :]
        case 1:
            copy += rng.randbytes(rng.randrange(1, 9))
        case 2:
            copy[rng.randrange(len(copy))] ^= 1 << rng.randrange(8)
        case 3:
            for _ in range(5):
                copy[rng.randrange(len(copy))] = rng.randrange(256)
    return bytes(copy)


@pytest.mark.parametrize("scale", [0.3, 3.0, 300.0])
def test_damage_gives_an_error_or_levels_in_range(scale: float) -> None:
    values = np.rint(np.random.default_rng(5).laplace(scale=scale, size=500)).astype(np.int32)
    blob = written_levels(values)
    rng = random.Random(6)
    start = time.perf_counter()
    for _ in range(500):
        with contextlib.suppress(PacketError):
            reader = SymbolReader(damaged(blob, rng))
            levels = reader.levels(values.size)
            reader.finish()
            assert levels.shape == values.shape
            # 25 bits below the escape at most
            assert np.abs(levels.astype(np.int64)).max() <= 2**25 + 63
    assert time.perf_counter() - start < 10


@given(blob=st.binary(max_size=200), count=st.integers(0, 1000))
def test_any_bytes(blob: bytes, count: int) -> None:
    with contextlib.suppress(PacketError):
        reader = SymbolReader(blob)
        assert reader.levels(count).shape == (count,)
        symbols = reader.symbols(30, count)
        assert ((symbols >= 0) & (symbols < 30)).all()
        assert reader.bits(20, count).max(initial=0) < 2**20
        assert reader.float32(count).shape == (count,)
        reader.finish()


@pytest.mark.parametrize(
    "extra", [b"\0", b"\1\0", b"\1\2\3\4\5", b"\0\0\0\0\0\1", bytes(range(1, 99))]
)
def test_longer_is_refused(extra: bytes) -> None:
    # up to four bytes more may pass: the coder leaves the end of its last word open
    values = np.arange(-20, 20)

    def read() -> None:
        reader = SymbolReader(written_levels(values) + extra)
        reader.levels(values.size)
        reader.finish()

    with pytest.raises(PacketError):
        read()


def test_an_empty_table_is_refused() -> None:
    writer = SymbolWriter()
    writer.uniform(np.zeros(9, np.int32), 64)
    with pytest.raises(PacketError, match="empty table"):
        SymbolReader(writer.finish()).symbols(9, 4)


# ---- rates --------------------------------------------------------------------------------------


def test_the_header_comes_out_of_the_budget() -> None:
    spec = AdapterSpec.from_shapes({"x": (10_000,)})
    assert payload_bits(spec, 0.1) == pytest.approx(1000 - 8 * 52)
    assert payload_bits(spec, 0.001) == 0


@given(budget=st.floats(-10, 1200), high=st.floats(0.5, 1))
def test_largest_within_is_within(budget: float, high: float) -> None:
    def plan(quality: float) -> tuple[float, float]:
        return np.floor(1000 * quality**2), quality

    spent = plan(largest_within(budget, plan, 0.0, high))[0]
    # the plan of the lowest quality is taken if nothing fits
    assert spent <= max(budget, 0)
    assert spent >= min(0.99 * budget - 2, plan(high)[0])
