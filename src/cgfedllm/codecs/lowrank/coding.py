"""Packets of rank-one pieces: the best ones of some stacks of matrices, written and read.

::

    modes of all pieces | short vectors, coarse and fine | long vectors, and loose values with them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cgfedllm.adapter import Float32Array
from cgfedllm.codecs.entropy import Float64Array, SymbolReader, SymbolWriter
from cgfedllm.codecs.lowrank import pieces
from cgfedllm.codecs.lowrank.choice import Choice, Stack, choose, project
from cgfedllm.codecs.lowrank.pieces import IntArray
from cgfedllm.codecs.parts.deadzone import Histogram
from cgfedllm.codecs.parts.fitting import DEAD_ZONES
from cgfedllm.codecs.parts.vectors import MODES, SCALAR, read_vectors, write_vectors

# bits lost to whole bytes, and the range of scales
_RANGE_BITS = 26
# expected bits of an entry of a short vector, until some are written, and of a piece's scale
_SHORT_BITS = 2.0
_SCALE_BITS = 3.2
_TRIES = 8
# dead-zone quantised values take what is left of the budget; so much over it they still can
_ABSORBED = 1.05


@dataclass(frozen=True)
class Shape:
    """Of a stack: how many matrices, most pieces of each, and their shape."""

    count: int
    depth: int
    rows: int
    columns: int


# ---- encoder --------------------------------------------------------------------------------


def write_pieces(
    writer: SymbolWriter,
    stacks: list[Stack],
    budget: float,
    before: float,
    loose: Sequence[Float32Array] = (),
    dead_zones: Sequence[float] = DEAD_ZONES,
) -> bool:
    """Write the pieces of some stacks that are worth their bits.

    Parameters
    ----------
    stacks : list of Stack
        Emptied on the way: they are as large as an update.
    budget : float
        Bits the writer may hold in the end.
    before : float
        Bits it holds already.
    loose, dead_zones
        As for `vectors.write_vectors`: values that are no pieces, and share the budget with them.

    Returns
    -------
    bool
        Whether anything was written that is not zero.
    """
    modes, levels = _settle(stacks, budget - before - _RANGE_BITS, loose)
    pieces.write_modes(writer, modes, MODES)
    _write_short(writer, modes, levels)

    rows = [_long_vectors(*own) for own in zip(stacks, modes, levels, strict=True)]
    stacks.clear()
    flat = [own[own > 0] for own in modes]
    return write_vectors(writer, rows, flat, budget, loose, dead_zones)


def _settle(
    stacks: list[Stack], budget: float, loose: Sequence[Float32Array]
) -> tuple[list[IntArray], list[IntArray]]:
    """Modes and short vectors that fill a budget.

    What goes beside the long vectors is known only once it is written, so modes are chosen again
    until it costs what was expected of it.
    """
    histogram = Histogram(list(loose)) if loose else None
    short_bits, target, predicted = _SHORT_BITS, budget, 0.0
    for _ in range(_TRIES):
        choice = choose(stacks, target, short_bits, histogram)
        levels = _short_vectors(stacks, choice)
        entries = sum(own.size for own in levels if own.shape[1] > 1)
        scratch = SymbolWriter()
        _write_short(scratch, choice.modes, levels)
        if entries:
            short_bits = max(scratch.spent / entries, 0.5)
        pieces.write_modes(scratch, choice.modes, MODES)
        count = sum(len(own) for own in levels)
        predicted = scratch.spent + _SCALE_BITS * count + choice.long_bits
        if 0.99 * budget <= predicted <= budget:
            return choice.modes, levels
        if (choice.has(SCALAR) or loose) and predicted <= _ABSORBED * budget:
            return choice.modes, levels
        target = max(budget - predicted + choice.bits, 0.0)
    if not (0.99 * budget <= predicted <= 1.01 * budget or choice.has(SCALAR) or loose):
        # too few pieces to spend it in steps of one: the last one gets the rest, whatever it is
        _promote(stacks, choice)
        levels = _short_vectors(stacks, choice)
    return choice.modes, levels


def _promote(stacks: list[Stack], choice: Choice) -> None:
    """Make the piece with the finest code a scalar-quantised one; without any, the strongest."""
    best = max(
        (
            (modes.flat[at], stack.energies.flat[at], which, at)
            for which, (stack, modes) in enumerate(zip(stacks, choice.modes, strict=True))
            for at in [np.lexsort((stack.energies.reshape(-1), modes.reshape(-1)))[-1]]
        ),
    )
    choice.modes[best[2]].flat[best[3]] = SCALAR


def _short_vectors(stacks: list[Stack], choice: Choice) -> list[IntArray]:
    """Short vectors of all pieces in levels, shape (pieces, rows) a stack."""
    out = []
    for stack, modes, steps in zip(stacks, choice.modes, choice.steps, strict=True):
        directions, step = stack.directions[modes > 0], steps[modes > 0]
        levels = np.rint(directions / step[:, None]).astype(np.int64)
        assert np.abs(levels).max(initial=0) <= pieces.MOST_LEVEL
        each, peak = np.arange(len(levels)), np.abs(directions).argmax(axis=1)
        empty = levels[each, peak] == 0
        levels[each[empty], peak[empty]] = 1
        first = levels[each, (levels != 0).argmax(axis=1)]
        out.append(levels * np.sign(first)[:, None])
    return out


def _write_short(writer: SymbolWriter, modes: list[IntArray], levels: list[IntArray]) -> None:
    """Short vectors of coded pieces, then those of scalar-quantised ones, which are finer."""
    scalar = [own[own > 0] == SCALAR for own in modes]
    pieces.write_levels(writer, [own[~at] for own, at in zip(levels, scalar, strict=True)])
    pieces.write_levels(writer, [own[at] for own, at in zip(levels, scalar, strict=True)])


def _long_vectors(stack: Stack, modes: IntArray, levels: IntArray) -> Float32Array:
    """Coordinates of the matrices in the basis that the decoder will have, (pieces, columns)."""
    basis = _basis(modes, levels)
    rows = np.empty((len(levels), stack.matrices.shape[2]), np.float32)
    start = np.cumsum(np.count_nonzero(modes, axis=1)) - np.count_nonzero(modes, axis=1)
    for depth in range(modes.shape[1]):
        at = np.flatnonzero(modes[:, depth])
        if at.size:
            matrices = stack.matrices if at.size == len(modes) else stack.matrices[at]
            rows[start[at] + depth] = project(matrices, basis[at, depth])
    return rows


# ---- decoder --------------------------------------------------------------------------------


def read_pieces(
    reader: SymbolReader, shapes: Sequence[Shape], loose: Sequence[int] = ()
) -> tuple[list[Float32Array], list[Float32Array]]:
    """Inverse of `write_pieces`: matrices of each stack, and loose values."""
    modes = pieces.read_modes(reader, [(own.count, own.depth) for own in shapes], MODES)
    flat = [own[own > 0] for own in modes]
    levels = _read_short(reader, flat, [own.rows for own in shapes])
    rows, values = read_vectors(reader, flat, [own.columns for own in shapes], loose)
    return [_expand(*own) for own in zip(modes, levels, rows, shapes, strict=True)], values


def _read_short(reader: SymbolReader, modes: list[IntArray], rows: list[int]) -> list[IntArray]:
    levels = [np.empty((len(m), r), np.int64) for m, r in zip(modes, rows, strict=True)]
    for scalar in (False, True):
        at = [(own == SCALAR) == scalar for own in modes]
        shapes = [(int(np.count_nonzero(a)), r) for a, r in zip(at, rows, strict=True)]
        for own, a, read in zip(levels, at, pieces.read_levels(reader, shapes), strict=True):
            own[a] = read
    return levels


def _expand(modes: IntArray, levels: IntArray, rows: Float32Array, shape: Shape) -> Float32Array:
    """Sum of outer products, strongest first, element by element."""
    out = np.zeros((shape.count, shape.rows, shape.columns), np.float32)
    basis = _basis(modes, levels).astype(np.float32)
    start = np.cumsum(np.count_nonzero(modes, axis=1)) - np.count_nonzero(modes, axis=1)
    for depth in range(modes.shape[1]):
        at = np.flatnonzero(modes[:, depth])
        if not at.size:
            break
        row = rows[start[at] + depth]
        for entry in range(shape.rows):
            out[at, entry] += row * basis[at, depth, entry, None]
    return out


# ---- both -----------------------------------------------------------------------------------


def _basis(modes: IntArray, levels: IntArray) -> Float64Array:
    """Orthonormal short vectors in their places, shape (count, depth, rows)."""
    placed = np.zeros((*modes.shape, levels.shape[1]), np.int64)
    placed[modes > 0] = levels
    return pieces.orthonormal(placed)
