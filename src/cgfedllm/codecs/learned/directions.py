r"""What a state knows: along which directions of the long axis gradients lie, and how strongly.

::

    rows of a factor's gradients:     M = sum_t dX_t' dX_t / ||dX_t||^2
    directions u_i, energies e_i:     the leading eigenvectors of M, and their shares of it
    Sigma of A's inputs:              n e_i along u_i

A gradient of A is a sum of errors times inputs, so its second moments along the long axis are those
of the inputs, which have few strong directions; likewise for B and the errors at the outputs.
`fitting` finds them.

Directions are kept as small integers: unit vectors up to their length, which follows from them to
the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, Factor, Float32Array
from cgfedllm.codecs.base import CodecState
from cgfedllm.codecs.entropy import Float64Array
from cgfedllm.codecs.parts.exact import gram, whole_products
from cgfedllm.codecs.parts.rows import row_count, to_rows

ENERGIES = "energies"
WEIGHTS = "weights"
# of the energy: what float32 leaves of a small change of a large adapter
_ROUNDINGS = 2.0**-12
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


def lies_along(
    vector: Float32Array, spec: AdapterSpec, directions: Mapping[str, Float32Array]
) -> bool:
    """Whether a vector has nothing beside orthonormal directions, but for roundings.

    Parameters
    ----------
    vector : ndarray, shape (spec.size,), float32
        No larger than 1, or sums overflow.
    directions : mapping
        As `orthonormal` gives them.
    """
    allowed = _ROUNDINGS * float(np.square(vector).sum(dtype=np.float64))
    for factor in spec:
        rows = to_rows(vector[spec.slices[factor.name]], factor)
        if factor.name in directions:
            own = directions[factor.name]
            rows = np.asarray(rows - (rows @ own.T) @ own, np.float32)
        allowed -= float(np.square(rows).sum(dtype=np.float64))
        if allowed < 0:
            return False
    return True


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


def missed(tensors: Mapping[str, NDArray[Any]]) -> float:
    """Mean share of the energy that is along no direction."""
    return float(1 - tensors[ENERGIES][:, :-1].sum(axis=1, dtype=np.float64).mean())
