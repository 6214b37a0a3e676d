r"""Which rank-one pieces are sent, and in which mode: one Lagrangian for the whole update.

::

    for each piece and mode:  worth = energy kept - lambda * bits;   the best mode, if worth > 0
    lambda by bisection, so that all of it fills a budget

Modes are those of `parts/vectors.py`; what they would keep comes from a model of two numbers a
piece, its energy and how sign-like its entries are, so nothing is coded to choose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cgfedllm.adapter import Float32Array
from cgfedllm.codecs.entropy import Float64Array
from cgfedllm.codecs.lowrank.pieces import MOST_LEVEL, IntArray
from cgfedllm.codecs.parts.deadzone import Histogram, bits_at
from cgfedllm.codecs.parts.vectors import lean_of
from cgfedllm.codecs.parts.worth import Modes
from cgfedllm.codecs.rate import largest_within

# bits of a piece beside its vectors: scale and mode
_SCALE_AND_MODE_BITS = 4.5
# steps of short vectors: measured factor on the theory's, and limits
_SHORT_FACTOR = 1.4
_FINEST = 1 / MOST_LEVEL
_COARSEST = 0.4
# energy that a strong row may leak into the weakest one, as a share of the weakest one's, times 12
_LEAK = 12 * 0.05


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape with their singular directions.

    Parameters
    ----------
    matrices : ndarray, shape (count, rows, columns)
    directions : ndarray, shape (count, depth, rows)
        Left singular vectors, strongest first.
    energies : ndarray, shape (count, depth)
        Squared singular values.
    lean : ndarray, shape (count, depth)
        What a piece's entries are like: 0 Gaussian, 1 uniform, more for two-valued ones.
    """

    matrices: Float32Array
    directions: Float64Array
    energies: Float64Array
    lean: Float64Array

    @classmethod
    def of(cls, matrices: Float32Array, depth: int) -> Stack:
        """Find the directions of matrices, at most `depth` of each."""
        # einsum, not a matrix product: its sums have one order however many threads there are
        gram = np.einsum("fin,fjn->fij", matrices, matrices).astype(np.float64)
        energies, vectors = np.linalg.eigh(gram)
        energies = np.maximum(energies[:, ::-1][:, :depth], 0.0)
        directions = np.ascontiguousarray(vectors[:, :, ::-1][:, :, :depth].transpose(0, 2, 1))
        lean = np.empty_like(energies)
        for piece in range(depth):
            lean[:, piece] = lean_of(project(matrices, directions[:, piece]), energies[:, piece])
        return cls(matrices, directions, energies, lean)


@dataclass(frozen=True)
class Choice:
    """Modes of the pieces of each stack, and the steps their short vectors are rounded with."""

    modes: list[IntArray]
    steps: list[Float64Array]
    bits: float
    long_bits: float

    def has(self, mode: int) -> bool:
        """Whether any piece is sent in this mode."""
        return any((own == mode).any() for own in self.modes)


def choose(
    stacks: list[Stack], budget: float, short_bits: float, loose: Histogram | None = None
) -> Choice:
    """The modes with the least ``squared error + lambda * bits`` within a budget.

    Values that are no pieces, if there are any, share it.
    """
    options = [_Options(stack, short_bits) for stack in stacks]

    def plan(quality: float) -> tuple[float, Choice]:
        slope = total * 2.0 ** (-60 * quality)
        chosen = [own.at(slope) for own in options]
        bits, beside = sum(own[2] for own in chosen), sum(own[3] for own in chosen)
        bits += bits_at(loose, slope) if loose else 0.0
        choice = Choice([c[0] for c in chosen], [c[1] for c in chosen], bits, bits - beside)
        return bits, choice

    total = sum(float(stack.energies.sum()) for stack in stacks) + (loose.energy if loose else 0.0)
    return largest_within(budget, plan, 0.0, 1.0, steps=30)


class _Options:
    """What each mode of each piece of a stack would keep, and cost."""

    def __init__(self, stack: Stack, short_bits: float) -> None:
        _, rows, self._columns = stack.matrices.shape
        self._energies = stack.energies
        self._beside = _SCALE_AND_MODE_BITS + (short_bits * rows if rows > 1 else 0)
        self._modes = Modes(stack.energies, stack.lean, self._columns, self._beside)
        self._complete = stack.energies.shape[1] == rows
        self._coarsest = min(_COARSEST, 1 / np.sqrt(rows))

    def at(self, slope: float) -> tuple[IntArray, Float64Array, float, float]:
        """Modes, steps of short vectors and bits where one bit must gain `slope`."""
        gains, costs, ratio = self._modes.at(slope)
        worth = gains - slope * costs
        best = worth.argmax(axis=2)[:, :, None]
        modes = np.where(np.take_along_axis(worth, best, 2) > 0, best + 1, 0)[:, :, 0]
        modes *= np.minimum.accumulate(modes > 0, axis=1)
        cost = np.take_along_axis(costs, best, 2)[:, :, 0]
        kept = np.concatenate(
            [self._modes.keeps, (1 - 1 / np.maximum(ratio, 2))[:, :, None]], axis=2
        )
        kept = np.take_along_axis(kept, best, 2)[:, :, 0]
        # an entry of the short vector and one of the long may cost as much energy a bit
        steps = _SHORT_FACTOR * np.sqrt(12 * (1 - kept) / (kept * self._columns))
        sent = modes > 0
        # where all rows of a matrix are sent, a tilted basis loses nothing; it only leaks energy
        # from strong rows into the weakest, which should stay small against that one's own
        if self._complete:
            weakest = self._energies[:, -1:] / np.maximum(self._energies, 1e-300)
            coarse = np.maximum(steps, np.sqrt(_LEAK * weakest))
            steps = np.where(np.all(sent, axis=1, keepdims=True), coarse, steps)
        beside = self._beside * float(np.count_nonzero(sent))
        return modes, np.clip(steps, _FINEST, self._coarsest), float(cost[sent].sum()), beside


def project(matrices: Float32Array, directions: Float64Array) -> Float32Array:
    """Inner product of each matrix's columns with its direction, shape (count, columns)."""
    rows = np.einsum("fi,fin->fn", directions.astype(np.float32), matrices)
    return np.asarray(rows)
