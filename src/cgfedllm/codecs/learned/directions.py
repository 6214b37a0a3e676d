r"""What a state knows: along which directions of the long axis gradients lie, and how strongly.

::

    rows of a factor's gradients:     M = sum_t dX_t' dX_t / ||dX_t||^2
    directions u_i, energies e_i:     the leading eigenvectors of M, and their shares of it
    Sigma of A's inputs:              n e_i along u_i

A gradient of A is a sum of errors times inputs, so its second moments along the long axis are those
of the inputs, which have few strong directions; likewise for B and the errors at the outputs. Steps
of plain gradient descent show them. Those of Adam do not: it divides by their size, entry by entry.

Directions are kept as small integers: unit vectors up to their length, which follows from them to
the last bit. Their step is a quarter of an entry's typical size, also where a few entries are far
larger: one relative to the largest left such directions 15 % off from being orthogonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Factor, Float32Array
from cgfedllm.codecs.base import CodecState
from cgfedllm.codecs.entropy import Float64Array
from cgfedllm.codecs.parts.exact import gram, whole_products
from cgfedllm.codecs.parts.rows import row_count, to_rows

ENERGIES = "energies"
WEIGHTS = "weights"
# steps to an entry of typical size, and the most an int8 holds
_STEPS = 4
_LARGEST = 127
# more directions are followed while learning than are kept
_FOLLOWED = 2
_BATCH = 8
# of the energy; what is below is noise of roundings
_LEAST_SHARE = 1e-6
# those of the last state; clients of a process share one
_bases: dict[bytes, dict[str, Float32Array]] = {}
_lock = Lock()


@dataclass(frozen=True)
class Directions:
    """Known directions of one factor's long axis.

    Parameters
    ----------
    whole : ndarray, shape (directions, n), int8
        Vectors, a multiple of each.
    energies : ndarray, shape (directions + 1,), float64
        Share of a change's energy along each, and in the mean of the other directions.
    weights : ndarray, shape (directions + 1,), float64
        What errors along each, and along all others, count.
    """

    whole: NDArray[np.int8]
    energies: Float64Array
    weights: Float64Array

    @property
    def vectors(self) -> Float32Array:
        """Unit vectors, shape (directions, n)."""
        return np.asarray(self.whole * self._inverse_lengths[:, None], np.float32)

    def along(self, rows: Float32Array | Float64Array) -> Float64Array:
        """Rows times unit vectors, shape (r, n) to (r, directions); exact sums."""
        return np.asarray(whole_products(rows, self.whole.T) * self._inverse_lengths)

    def across(self, along: Float64Array) -> Float64Array:
        """What coefficients of unit vectors stand for, shape (r, directions) to (r, n)."""
        return whole_products(along * self._inverse_lengths, self.whole)

    @cached_property
    def _inverse_lengths(self) -> Float64Array:
        squares = np.square(self.whole.astype(np.int64)).sum(axis=1)
        return np.asarray(1 / np.sqrt(np.maximum(squares, 1)))


def weighted_grams(
    rows: Sequence[Float32Array], known: Sequence[Directions]
) -> NDArray[np.float64]:
    """Rows times rows of factors as weighted, each (r, n), to (count, r, r); exact sums."""
    along = np.stack([each.along(own) for each, own in zip(known, rows, strict=True)])
    weights = np.stack([each.weights for each in known])
    rest = weights[:, -1]
    out = rest[:, None, None] * np.stack([gram(own) for own in rows])
    for i in range(along.shape[2]):  # in order
        more = (weights[:, i] - rest)[:, None, None]
        out += more * (along[:, :, i, None] * along[:, None, :, i])
    return np.asarray(out)


def described(spec: AdapterSpec) -> list[Factor]:
    """Factors that a state has directions of: the A and B of every pair of matrices."""
    pairs = [pair for pair in spec.pairs() if all(len(f.shape) == 2 for f in pair)]
    return [factor for pair in pairs for factor in pair]


def length_of(factor: Factor) -> int:
    """Entries of a row."""
    return factor.size // row_count(factor)


def unknown(spec: AdapterSpec, directions: int) -> dict[str, NDArray[Any]]:
    """A state that knows nothing: no directions, all alike."""
    factors = described(spec)
    tensors: dict[str, NDArray[Any]] = {
        factor.name: np.zeros((directions, length_of(factor)), np.int8) for factor in factors
    }
    tensors[ENERGIES] = np.ones((len(factors), directions + 1), np.float32)
    tensors[WEIGHTS] = np.ones((len(factors), directions + 1), np.float32)
    return tensors


def read_directions(
    spec: AdapterSpec, tensors: Mapping[str, NDArray[Any]]
) -> dict[str, Directions]:
    """What a state knows of each factor, by name."""
    found = {}
    for k, factor in enumerate(described(spec)):
        energies, weights = (tensors[key][k].astype(np.float64) for key in (ENERGIES, WEIGHTS))
        found[factor.name] = Directions(tensors[factor.name], energies, weights)
    return found


def orthonormal(spec: AdapterSpec, state: CodecState) -> dict[str, Float32Array]:
    """Directions of each factor made orthonormal, by name; factors without any are left out."""
    with _lock:
        if state.hash not in _bases:
            _bases.clear()
            _bases[state.hash] = {
                factor.name: _orthonormal(state.tensors[factor.name])
                for factor in described(spec)
                if state.tensors[factor.name].any()
            }
        return _bases[state.hash]


def _orthonormal(whole: NDArray[np.int8]) -> Float32Array:
    there = whole[whole.any(axis=1)].astype(np.float64)
    return np.asarray(np.linalg.qr(there.T)[0].T, np.float32).copy()


def learn(
    spec: AdapterSpec, updates: Iterable[AdapterUpdate], directions: int
) -> dict[str, NDArray[Any]]:
    """A state of recorded updates, each counted alike whatever its norm."""
    followed = {factor.name: _Followed(_FOLLOWED * directions) for factor in described(spec)}
    for update in updates:
        for factor in described(spec):
            rows = to_rows(update.vector[spec.slices[factor.name]], factor)
            norm = np.linalg.norm(rows)
            if norm:
                followed[factor.name].add(rows / norm)
    tensors = unknown(spec, directions)
    for k, factor in enumerate(described(spec)):
        vectors, energies = followed[factor.name].leading(directions)
        found, n = len(vectors), length_of(factor)
        if not found:
            continue
        largest = np.abs(vectors).max(axis=1, keepdims=True)
        tensors[factor.name][:found] = np.rint(
            vectors * np.minimum(_STEPS * np.sqrt(n), _LARGEST / largest)
        )
        shares = tensors[ENERGIES][k]
        shares[:found] = energies
        shares[found:] = (1 - energies.sum()) / max(n - found, 1)
        shares[:] = shares.clip(_LEAST_SHARE)
        if factor.kind == "A":
            mean = (shares[:-1].sum() + (n - directions) * shares[-1]) / n
            tensors[WEIGHTS][k] = shares / mean
    return tensors


def missed(tensors: Mapping[str, NDArray[Any]]) -> float:
    """Mean share of the energy that is along no direction."""
    return float(1 - tensors[ENERGIES][:, :-1].sum(axis=1, dtype=np.float64).mean())


class _Followed:
    """Leading right singular vectors of ever more rows, in little memory.

    What falls below the followed ones is dropped at every merge (Brand, Linear Algebra and its
    Applications 415(1), 2006).
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: Float32Array | None = None
        self._new: list[Float32Array] = []
        self._total = 0.0

    def add(self, rows: Float32Array) -> None:
        """Take in some rows."""
        self._total += float(np.square(rows, dtype=np.float64).sum())
        self._new.append(rows)
        if len(self._new) == _BATCH:
            self._merge()

    def leading(self, count: int) -> tuple[Float32Array, Float64Array]:
        """Unit vectors, shape (at most count, n), and their shares of the energy."""
        self._merge()
        if self._kept is None:
            return np.zeros((0, 0), np.float32), np.zeros(0)
        values = np.linalg.norm(self._kept.astype(np.float64), axis=1)
        there = int(np.count_nonzero(np.square(values[:count]) > _LEAST_SHARE * self._total))
        vectors = self._kept[:there] / values[:there, None].astype(np.float32)
        return vectors, np.square(values[:there]) / self._total

    def _merge(self) -> None:
        if not self._new:
            return
        rows = np.concatenate(([] if self._kept is None else [self._kept]) + self._new)
        # their Gram is far smaller than they are
        wide = rows.astype(np.float64)
        _, turn = np.linalg.eigh(wide @ wide.T)
        self._kept = (turn[:, ::-1].T[: self._count] @ wide).astype(np.float32)
        self._new = []
