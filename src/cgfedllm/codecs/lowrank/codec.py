r"""`lowrank`: rank-one pieces of every factor, the best ones of the whole update.

::

    factor X (r x n) --eigenvectors of X X^T--> U --quantised, orthonormalised--> U^
    Y = U^^T X : row k is piece k --a mode a piece, one Lagrangian for all--> Y^ --> X^ = U^ Y^

PowerSGD (Vogels et al., arXiv 1905.13727) finds its factors by one warm-started power iteration,
since its matrices are large both ways. Here one side is the LoRA rank, so the singular vectors are
exact, from the r x r Gram matrix, and there is nothing to warm-start. PowerSGD sends them in full
precision; here

- the short vectors are sent with a few levels an entry and made orthonormal again on both ends,
  so that pieces are independent and all r of them are complete: no rate is out of reach;
- a long vector is sent in one of the modes of `parts/vectors.py`: 1/8 to 1/2 bit an entry by a
  convolutional code, its signs, or dead-zone quantised with one step for all such pieces;
- which pieces are sent, and how, minimises ``squared error + lambda * bits`` over the update.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from cgfedllm.adapter import AdapterUpdate, Float32Array
from cgfedllm.codecs.base import Codec, CodecContext, register
from cgfedllm.codecs.entropy import Float64Array, SymbolReader, SymbolWriter
from cgfedllm.codecs.lowrank import pieces
from cgfedllm.codecs.lowrank.choice import Choice, Stack, choose, depth_of, project
from cgfedllm.codecs.lowrank.pieces import IntArray
from cgfedllm.codecs.parts.exponent import (
    EXPONENT_BITS,
    exponent_of,
    read_exponent,
    scaled_back,
    write_exponent,
)
from cgfedllm.codecs.parts.matrices import Batch, batches
from cgfedllm.codecs.parts.vectors import MODES, SCALAR, read_vectors, write_vectors
from cgfedllm.codecs.rate import RateOptions, payload_bits
from cgfedllm.errors import CodecError

# lowest scale, their span, and bits lost to whole bytes
_RANGE_BITS = 26
# expected bits of an entry of a short vector, until some are written, and of a piece's scale
_SHORT_BITS = 2.0
_SCALE_BITS = 3.2
_TRIES = 8
# dead-zone quantised pieces take what is left of the budget; so much over it they still can
_ABSORBED = 1.05
# of an entry of a long vector, with the finest step
_MOST_BITS = 16.0


class LowrankOptions(RateOptions):
    """Rate, and how many pieces a factor may have."""

    max_pieces: int | None = Field(
        default=None,
        ge=1,
        description="Most rank-one pieces of one factor; as many as its rank if not set.",
    )


@register
class Lowrank(Codec):
    """Rank-one pieces, chosen over all factors by energy per bit."""

    name = "lowrank"
    kind = "structured"
    rates = "0.01 to 16 bits"
    summary = "rank-one pieces of each factor, coarse vectors, chosen by energy per bit"
    paper = "PowerSGD, Vogels et al., arXiv 1905.13727"
    Options = LowrankOptions

    options: LowrankOptions

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        budget = payload_bits(context.spec, self.options.bpp)
        groups = batches(context.spec)
        self._check_rate(groups, context)
        if budget < 8 or not update.vector.any():
            return b""
        exponent = exponent_of(update.vector)
        vector = np.ldexp(update.vector, -exponent)
        stacks = [Stack.of(group, vector, self.options.max_pieces) for group in groups]
        del vector
        return _write(stacks, exponent, budget)

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        vector = np.zeros(context.spec.size, np.float32)
        if not payload:
            return vector
        groups = batches(context.spec)
        shapes = [
            (len(group.bands), depth_of(group, self.options.max_pieces), group.rows, group.columns)
            for group in groups
        ]
        for group, matrices in zip(groups, _read(payload, shapes), strict=True):
            group.scatter(matrices, vector)
        return vector

    def _check_rate(self, groups: list[Batch], context: CodecContext) -> None:
        sent = sum(len(g.bands) * g.columns * depth_of(g, self.options.max_pieces) for g in groups)
        most = _MOST_BITS * sent / context.spec.size
        if self.options.bpp > most and context.spec.size > 10_000:
            raise CodecError(
                f"{self.name}: {self.options.bpp:g} bits per parameter are more than it can use; "
                f"the nearest is {most:.3g}"
            )


# ---- encoder --------------------------------------------------------------------------------


def _write(stacks: list[Stack], exponent: int, budget: float) -> bytes:
    modes, levels = _settle(stacks, budget - EXPONENT_BITS - _RANGE_BITS)
    if not any(own.any() for own in modes):
        return b""
    writer = SymbolWriter()
    write_exponent(writer, exponent)
    pieces.write_modes(writer, modes, MODES)
    _write_short(writer, modes, levels)

    rows = [_long_vectors(*own) for own in zip(stacks, modes, levels, strict=True)]
    stacks.clear()  # not needed any more, and as large as the update
    flat = [own[own > 0] for own in modes]
    write_vectors(writer, rows, flat, budget)
    return writer.finish()


def _settle(stacks: list[Stack], budget: float) -> tuple[list[IntArray], list[IntArray]]:
    """Modes and short vectors that fill a budget.

    What goes beside the long vectors is known only once it is written, so modes are chosen again
    until it costs what was expected of it.
    """
    short_bits, target, predicted = _SHORT_BITS, budget, 0.0
    for _ in range(_TRIES):
        choice = choose(stacks, target, short_bits)
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
        if choice.has(SCALAR) and predicted <= _ABSORBED * budget:
            return choice.modes, levels
        target = max(budget - predicted + choice.bits, 0.0)
    if not 0.99 * budget <= predicted <= 1.01 * budget and not choice.has(SCALAR):
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


def _read(payload: bytes, shapes: list[tuple[int, int, int, int]]) -> list[Float32Array]:
    """Matrices of each stack; a stack's shape is (count, depth, rows, columns)."""
    reader = SymbolReader(payload)
    exponent = read_exponent(reader)
    modes = pieces.read_modes(reader, [shape[:2] for shape in shapes], MODES)
    flat = [own[own > 0] for own in modes]
    levels = _read_short(reader, flat, [shape[2] for shape in shapes])
    rows, _ = read_vectors(reader, flat, [shape[3] for shape in shapes])
    reader.finish()
    return [
        _expand(*own, exponent=exponent) for own in zip(modes, levels, rows, shapes, strict=True)
    ]


def _read_short(reader: SymbolReader, modes: list[IntArray], rows: list[int]) -> list[IntArray]:
    levels = [np.empty((len(m), r), np.int64) for m, r in zip(modes, rows, strict=True)]
    for scalar in (False, True):
        at = [(own == SCALAR) == scalar for own in modes]
        shapes = [(int(np.count_nonzero(a)), r) for a, r in zip(at, rows, strict=True)]
        for own, a, read in zip(levels, at, pieces.read_levels(reader, shapes), strict=True):
            own[a] = read
    return levels


def _expand(
    modes: IntArray,
    levels: IntArray,
    rows: Float32Array,
    shape: tuple[int, int, int, int],
    exponent: int,
) -> Float32Array:
    """Sum of outer products, strongest first, element by element."""
    count, _, height, width = shape
    out = np.zeros((count, height, width), np.float32)
    basis = _basis(modes, levels).astype(np.float32)
    start = np.cumsum(np.count_nonzero(modes, axis=1)) - np.count_nonzero(modes, axis=1)
    for depth in range(modes.shape[1]):
        at = np.flatnonzero(modes[:, depth])
        if not at.size:
            break
        row = rows[start[at] + depth]
        for entry in range(height):
            out[at, entry] += row * basis[at, depth, entry, None]
    return scaled_back(out, exponent)


# ---- both -----------------------------------------------------------------------------------


def _basis(modes: IntArray, levels: IntArray) -> Float64Array:
    """Orthonormal short vectors in their places, shape (count, depth, rows)."""
    placed = np.zeros((*modes.shape, levels.shape[1]), np.int64)
    placed[modes > 0] = levels
    return pieces.orthonormal(placed)
