"""Vectors in modes, from an eighth of a bit an entry up."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgfedllm.codecs.entropy import SymbolReader, SymbolWriter
from cgfedllm.codecs.parts.vectors import (
    CODES,
    GAUSSIAN,
    MODES,
    SCALAR,
    UNIFORM,
    lean_of,
    read_vectors,
    write_vectors,
)
from cgfedllm.errors import PacketError

PLENTY = 1e6


def normal(seed: int, count: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, length)).astype(np.float32) / 4


@given(st.integers(0, 1000), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 70)), min_size=1))
def test_what_is_written_is_read(seed: int, groups: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(seed)
    rows = [normal(seed + at, *shape) for at, shape in enumerate(groups)]
    modes = [rng.integers(1, MODES, len(own)) for own in rows]
    if not sum(map(len, rows)):
        return
    writer = SymbolWriter()
    write_vectors(writer, rows, modes, PLENTY)
    reader = SymbolReader(writer.finish())
    found, loose = read_vectors(reader, modes, [length for _, length in groups])
    assert not loose
    reader.finish()
    for own, wanted, mode in zip(found, rows, modes, strict=True):
        assert own.shape == wanted.shape
        at = mode == SCALAR  # with bits in plenty these are nearly exact
        np.testing.assert_allclose(own[at], wanted[at], atol=1e-3)


@pytest.mark.parametrize("mode", range(1, SCALAR))
def test_codes_keep_the_share_they_are_chosen_by(mode: int) -> None:
    uniform = np.random.default_rng(1).uniform(-1, 1, (20, 600)).astype(np.float32)
    for rows, share in ((normal(0, 20, 600), GAUSSIAN), (uniform, UNIFORM)):
        writer = SymbolWriter()
        modes = [np.full(len(rows), mode)]
        write_vectors(writer, [rows], modes, PLENTY)
        assert writer.spent / rows.size < 1 / CODES[mode - 1] + 0.02
        ((found,), _) = read_vectors(SymbolReader(writer.finish()), modes, [600])
        kept = 1 - np.square(rows - found).sum() / np.square(rows).sum()
        assert kept == pytest.approx(share[mode - 1], abs=0.02)


def test_entries_lean_from_gaussian_to_signs() -> None:
    rng = np.random.default_rng(0)
    kinds = [
        rng.standard_normal((1, 100_000)),
        rng.uniform(-1, 1, (1, 100_000)),
        rng.choice([-1.0, 1.0], (1, 100_000)),
    ]
    lean = [float(lean_of(own.astype(np.float32), np.square(own).sum(axis=1))[0]) for own in kinds]
    assert lean == pytest.approx([0, 1, 2], abs=0.05)


def test_scales_out_of_range_are_refused() -> None:
    writer = SymbolWriter()
    writer.bits(np.array([100, 100]), 7)
    with pytest.raises(PacketError, match="out of range"):
        read_vectors(SymbolReader(writer.finish()), [np.array([1])], [3])


@pytest.mark.parametrize("step", [-1.0, np.nan, np.inf])
def test_steps_out_of_range_are_refused(step: float) -> None:
    writer = SymbolWriter()
    writer.bits(np.array([10, 0]), 7)
    writer.float32(step)
    with pytest.raises(PacketError, match="step"):
        read_vectors(SymbolReader(writer.finish()), [np.array([SCALAR])], [3])
