r"""How directions are learned from recorded updates (TGAP).

::

    rows of each factor, updates alike --followed--> leading directions
    A of one module that read the same input --pooled--> the same directions for all of them

Steps of plain gradient descent show the inputs' and the errors' directions. Those of Adam do not:
it divides by their size, entry by entry.

The A of query, key and value read one input. What they show of it is pooled: better known than from
each alone, and sent once, since equal arrays cost next to nothing when a state is packed. Who reads
what is not in an adapter's names, so it is seen from the directions: those of one input overlap by
0.3 to 0.7, those of another module's input by no more than chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Factor, Float32Array
from cgfedllm.codecs.entropy import Float64Array
from cgfedllm.codecs.learned.directions import (
    ENERGIES,
    WEIGHTS,
    described,
    length_of,
    unknown,
)
from cgfedllm.codecs.parts.rows import to_rows

# Steps to an entry of typical size, also where a few entries are far larger: a step relative to
# the largest left such directions 15 % off from being orthogonal. And the most an int8 holds.
_STEPS = 4
_LARGEST = 127
# more directions are followed while learning than are kept
_FOLLOWED = 2
_BATCH = 8
# of the energy; what is below is noise of roundings
_LEAST_SHARE = 1e-6
# how many directions tell whether two inputs are one, and from which overlap on beyond chance
_COMPARED = 8
_ALIKE = 0.15


def learn(
    spec: AdapterSpec, updates: Iterable[AdapterUpdate], directions: int
) -> dict[str, NDArray[Any]]:
    """A state of recorded updates, each counted alike whatever its norm."""
    factors = described(spec)
    followed = {factor.name: _Followed(_FOLLOWED * directions) for factor in factors}
    for update in updates:
        for factor in factors:
            rows = to_rows(update.vector[spec.slices[factor.name]], factor)
            norm = np.linalg.norm(rows)
            if norm:
                followed[factor.name].add(rows / norm)
    tensors = unknown(spec, directions)
    at = {factor.name: k for k, factor in enumerate(factors)}
    for group in _reading_alike(factors, followed):
        pool = _Followed.pooled([followed[factor.name] for factor in group])
        vectors = pool.leading(directions)
        if not len(vectors):
            continue
        n = length_of(group[0])
        largest = np.abs(vectors).max(axis=1, keepdims=True)
        whole = np.rint(vectors * np.minimum(_STEPS * np.sqrt(n), _LARGEST / largest))
        inputs = _spread_of(pool.shares(vectors), directions, n)
        for factor in group:
            k = at[factor.name]
            tensors[factor.name][: len(vectors)] = whole
            own = followed[factor.name].shares(vectors)
            tensors[ENERGIES][k] = _spread_of(own, directions, n)
            if factor.kind == "A":
                mean = (inputs[:-1].sum() + (n - directions) * inputs[-1]) / n
                tensors[WEIGHTS][k] = inputs / mean
    return tensors


def _spread_of(found: Float64Array, directions: int, n: int) -> Float64Array:
    """Shares of the energy along directions, and in the mean of the others."""
    shares = np.full(directions + 1, (1 - found.sum()) / max(n - len(found), 1))
    shares[: len(found)] = found
    return shares.clip(_LEAST_SHARE)


def _reading_alike(
    factors: Sequence[Factor], followed: Mapping[str, _Followed]
) -> list[list[Factor]]:
    """Factors by what their rows lie along: each B alone, A of one module by their input."""
    groups: list[list[Factor]] = []
    for factor in factors:
        for group in groups:
            first = group[0]
            if _could_be_alike(first, factor) and _are_alike(
                *(followed[each.name].leading(_COMPARED) for each in (first, factor))
            ):
                group.append(factor)
                break
        else:
            groups.append([factor])
    return groups


def _could_be_alike(one: Factor, other: Factor) -> bool:
    def place(factor: Factor) -> tuple[int | None, str, int]:
        return factor.layer, factor.module.rpartition(".")[0], length_of(factor)

    return one.kind == other.kind == "A" and place(one) == place(other)


def _are_alike(one: Float32Array, other: Float32Array) -> bool:
    fewer = min(len(one), len(other))
    if not fewer:
        return False
    overlap = float(np.square(one.astype(np.float64) @ other.T).sum()) / fewer
    chance = max(len(one), len(other)) / one.shape[1]
    return bool(overlap - chance > _ALIKE * (1 - chance))


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

    @classmethod
    def pooled(cls, parts: Sequence[_Followed]) -> _Followed:
        """What several have seen, as far as each has kept it."""
        if len(parts) == 1:
            return parts[0]
        pool = cls(parts[0]._count)
        for part in parts:
            part._merge()
            if part._kept is not None:
                pool._new.append(part._kept)
            pool._total += part._total
        return pool

    def leading(self, count: int) -> Float32Array:
        """Unit vectors, shape (at most count, n)."""
        self._merge()
        if self._kept is None:
            return np.zeros((0, 0), np.float32)
        values = np.linalg.norm(self._kept.astype(np.float64), axis=1)
        there = int(np.count_nonzero(np.square(values[:count]) > _LEAST_SHARE * self._total))
        return np.asarray(self._kept[:there] / values[:there, None].astype(np.float32))

    def shares(self, vectors: Float32Array) -> Float64Array:
        """Shares of the energy along unit vectors."""
        self._merge()
        if self._kept is None:
            return np.zeros(len(vectors))
        along = self._kept.astype(np.float64) @ vectors.T
        return np.asarray(np.square(along).sum(axis=0) / self._total)

    def _merge(self) -> None:
        if not self._new:
            return
        rows = np.concatenate(([] if self._kept is None else [self._kept]) + self._new)
        # their Gram is far smaller than they are
        wide = rows.astype(np.float64)
        _, turn = np.linalg.eigh(wide @ wide.T)
        self._kept = (turn[:, ::-1].T[: self._count] @ wide).astype(np.float32)
        self._new = []
