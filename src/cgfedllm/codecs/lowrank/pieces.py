r"""What `lowrank` sends beside its long vectors: modes and short vectors of the pieces.

::

    modes    (count, depth) a stack; a matrix's pieces come before its absent ones
    levels   (count, depth, rows) integers; scaled and made orthonormal by `orthonormal`

A stack is all matrices of one shape (`matrices.Batch`); pieces of a stack are ordered by matrix,
then by strength.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cgfedllm.codecs.entropy import Float64Array, SymbolReader, SymbolWriter
from cgfedllm.codecs.parts.trellis import read_bits, write_bits

IntArray = NDArray[np.int64]

MOST_LEVEL = 63
"""Largest magnitude of a short vector's entry."""

_LEVEL_BITS = 6


def write_modes(writer: SymbolWriter, modes: list[IntArray], size: int) -> None:
    """Write modes below `size`, 0 for no piece; a table for each depth."""
    for depth in range(max(own.shape[1] for own in modes)):
        values = np.concatenate(
            [own[_open(own, depth), depth] for own in modes if _has(own, depth)]
        )
        writer.symbols(values, size)
        if not values.any():
            break


def read_modes(reader: SymbolReader, shapes: list[tuple[int, int]], size: int) -> list[IntArray]:
    """Inverse of `write_modes`; `shapes` are (count, depth) of the stacks."""
    modes = [np.zeros(shape, np.int64) for shape in shapes]
    for depth in range(max(shape[1] for shape in shapes)):
        own = [m for m in modes if _has(m, depth)]
        at = [_open(m, depth) for m in own]
        values = reader.symbols(size, sum(len(a) for a in at))
        start = 0
        for m, a in zip(own, at, strict=True):
            m[a, depth] = values[start : start + len(a)]
            start += len(a)
        if not values.any():
            break
    return modes


def write_levels(writer: SymbolWriter, levels: list[IntArray]) -> None:
    """Write short vectors, arrays of shape (pieces, rows); none is zero.

    A vector's first entry that is not zero is positive, so its sign is not sent; of a vector with
    one entry nothing is.
    """
    levels = [own for own in levels if own.shape[1] > 1]
    if not sum(own.size for own in levels):
        return
    magnitudes = np.concatenate([np.abs(own).reshape(-1) for own in levels])
    largest = int(magnitudes.max())
    writer.bits(largest, _LEVEL_BITS)
    writer.symbols(magnitudes, largest + 1)
    signs = [own[_signed(own)] < 0 for own in levels]
    write_bits(writer, np.concatenate(signs).astype(np.uint8))


def read_levels(reader: SymbolReader, shapes: list[tuple[int, int]]) -> list[IntArray]:
    """Inverse of `write_levels`."""
    levels = [np.ones(shape, np.int64) for shape in shapes]
    wanted = [own for own in levels if own.shape[1] > 1]
    if not sum(own.size for own in wanted):
        return levels
    largest = int(reader.bits(_LEVEL_BITS, 1)[0])
    magnitudes = reader.symbols(largest + 1, sum(own.size for own in wanted))
    start = 0
    for own in wanted:
        own[...] = magnitudes[start : start + own.size].reshape(own.shape)
        start += own.size
    masks = [_signed(own) for own in wanted]
    counts = [int(np.count_nonzero(mask)) for mask in masks]
    signs = read_bits(reader, 1, sum(counts))[0].astype(np.int64)
    start = 0
    for own, mask, count in zip(wanted, masks, counts, strict=True):
        own[mask] *= 1 - 2 * signs[start : start + count]
        start += count
    return levels


def orthonormal(levels: IntArray) -> Float64Array:
    """Gram-Schmidt over the pieces of each matrix, shape (count, depth, rows) in and out.

    Every operation is element by element in a fixed order, so both ends get the same bits. Absent
    pieces, and pieces that the ones before them span, become zeros.
    """
    basis = levels.astype(np.float64)
    for depth in range(basis.shape[1]):
        vector = basis[:, depth]
        before = _sum_in_order(np.square(vector))
        if depth:
            weights = _sum_in_order(basis[:, :depth] * vector[:, None])
            for earlier in range(depth):
                vector -= weights[:, earlier, None] * basis[:, earlier]
        after = _sum_in_order(np.square(vector))
        sound = after > 1e-6 * before
        vector *= np.where(sound, 1 / np.sqrt(np.where(sound, after, 1.0)), 0.0)[:, None]
    return basis


def _sum_in_order(terms: Float64Array) -> Float64Array:
    """Sum along the last axis, from its first entry to its last."""
    total = terms[..., 0].copy()
    for entry in range(1, terms.shape[-1]):
        total += terms[..., entry]
    return total


def _has(modes: IntArray, depth: int) -> bool:
    return bool(modes.shape[1] > depth)


def _open(modes: IntArray, depth: int) -> IntArray:
    """Matrices that may have a piece at this depth: those with one before it."""
    return np.flatnonzero(modes[:, depth - 1]) if depth else np.arange(len(modes))


def _signed(levels: IntArray) -> NDArray[np.bool_]:
    """Entries whose sign is sent: neither zero nor their vector's first."""
    present: NDArray[np.bool_] = levels != 0
    present[np.arange(len(levels)), present.argmax(axis=1)] = False
    return present
