"""What recorded updates look like: the facts a codec may build on, measured on any recording."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterUpdate, Factor, Float32Array, factor_kind

if TYPE_CHECKING:
    from cgfedllm.tgap.recording import Recording

LEARNED_FROM = 4
"""Rounds the directions along the long axis are learned from."""
DIRECTIONS = 8
"""Leading directions kept a factor."""

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class Structure:
    """Facts about one recording; NaN where it is too short to know one.

    Parameters
    ----------
    updates, parameters : int
        Recorded updates, and numbers in each.
    excess_kurtosis : float
        Of the elements of one factor about their mean, averaged over factors and updates; 0 for
        a Gaussian, -1.2 for a uniform density, -2 for values of one magnitude.
    excess_kurtosis_whole : float
        Of all elements of one update, averaged over updates: unequal scales of the factors raise
        it.
    first_pair : dict of str to float
        Share of a factor's energy in its first singular pair, by kind of factor: mean over
        layers and updates.
    subspace : dict of str to float
        Share of a later round's energy in the `DIRECTIONS` leading directions along the factor's
        long axis learned from the first `LEARNED_FROM` rounds, by kind of factor: mean over
        layers, clients and rounds.
    subspace_by_chance : dict of str to float
        What directions drawn at random would hold.
    client_cosine : float
        Between two clients' updates of one round, averaged over pairs and rounds.
    mean_cosine : float
        Between the aggregates of consecutive rounds, averaged.
    """

    updates: int
    parameters: int
    excess_kurtosis: float
    excess_kurtosis_whole: float
    first_pair: dict[str, float]
    subspace: dict[str, float]
    subspace_by_chance: dict[str, float]
    client_cosine: float
    mean_cosine: float

    def rows(self) -> list[tuple[str, str, float]]:
        """Fact, kind of factor ("" where it is about whole updates), value; for tables."""
        rows = [
            ("excess kurtosis within factors", "", self.excess_kurtosis),
            ("excess kurtosis of whole updates", "", self.excess_kurtosis_whole),
            ("cosine between clients in a round", "", self.client_cosine),
            ("cosine between consecutive aggregates", "", self.mean_cosine),
        ]
        rows += [("energy in the first singular pair", k, v) for k, v in self.first_pair.items()]
        learned = f"later energy in {DIRECTIONS} learned directions"
        rows += [(learned, k, v) for k, v in self.subspace.items()]
        rows += [
            (f"the same, {DIRECTIONS} random directions", k, v)
            for k, v in self.subspace_by_chance.items()
        ]
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return asdict(self)


def rank_rows(array: Float32Array, factor: Factor) -> Float32Array:
    """One factor as (short axis, long axis): r x n for both A (r, in) and B (out, r).

    A LoRA factor's rank axis comes first whatever the lengths; other matrices are turned so that
    their first axis is the shorter, and whatever is not a matrix is one row.
    """
    if array.ndim != 2:
        return array.reshape(1, -1)
    by_column = factor.kind == "B" or (not factor.kind and array.shape[0] > array.shape[1])
    return array.T if by_column else array


def measure_structure(recording: Recording) -> Structure:
    """Measure all facts on one recording; every update of it is read."""
    n = len(recording)
    within: list[float] = []
    whole: list[float] = []
    first: dict[str, list[float]] = {}
    for index in range(n):
        update = recording.update(index)
        whole.append(excess_kurtosis(update.vector))
        for factor, rows in _factors(update):
            within.append(excess_kurtosis(rows))
            first.setdefault(factor_kind(factor), []).append(first_pair_share(rows))
    held, chance = subspace_shares(recording)
    return Structure(
        updates=n,
        parameters=recording.spec.size,
        excess_kurtosis=_mean(within),
        excess_kurtosis_whole=_mean(whole),
        first_pair={kind: _mean(shares) for kind, shares in first.items()},
        subspace=held,
        subspace_by_chance=chance,
        client_cosine=client_cosine(recording),
        mean_cosine=_mean(
            cosine(recording.aggregate(a).vector, recording.aggregate(b).vector)
            for a, b in pairwise(recording.rounds())
        ),
    )


def excess_kurtosis(values: Float32Array) -> float:
    """Fourth central moment over the squared variance, less 3; NaN for constant values."""
    x = values.astype(np.float64).reshape(-1)
    squares = np.square(x - x.mean())
    variance = float(squares.mean())
    return float(np.square(squares).mean()) / variance**2 - 3 if variance > 0 else math.nan


def first_pair_share(rows: Float32Array) -> float:
    """Share of a matrix's energy in its first singular pair; NaN for zeros."""
    squares = np.square(np.linalg.svd(rows.astype(np.float64), compute_uv=False))
    total = float(squares.sum())
    return float(squares[0]) / total if total > 0 else math.nan


def cosine(x: Float32Array, y: Float32Array) -> float:
    """Of two vectors, in float64; NaN if one is zero."""
    a, b = x.astype(np.float64), y.astype(np.float64)
    norms = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norms if norms > 0 else math.nan


def client_cosine(recording: Recording) -> float:
    """Mean cosine over all pairs of clients that sent in the same round."""
    values = []
    for members in _by_round(recording).values():
        vectors = np.stack([recording.update(index).vector for index in members])
        norms = np.sqrt(np.square(vectors, dtype=np.float64).sum(axis=1))
        unit = vectors[norms > 0] / norms[norms > 0, None]
        values += (unit @ unit.T)[np.triu_indices(len(unit), 1)].tolist()
    return _mean(values)


def subspace_shares(recording: Recording) -> tuple[dict[str, float], dict[str, float]]:
    """Share of later rounds' energy in directions learned from the first rounds.

    Returns
    -------
    held, chance : dict of str to float
        By kind of factor: what the learned directions hold, and what random ones would
        (their number over the length of the long axis). Empty if there is no later round.
    """
    rounds = _by_round(recording)
    earlier = [i for r in list(rounds)[:LEARNED_FROM] for i in rounds[r]]
    later = [i for r in list(rounds)[LEARNED_FROM:] for i in rounds[r]]
    if not later:
        return {}, {}
    bases = _leading_directions([recording.update(index) for index in earlier])
    inside: dict[str, float] = {}
    energy: dict[str, float] = {}
    chance: dict[str, float] = {}
    for index in later:
        for factor, rows in _factors(recording.update(index)):
            kind, basis = factor_kind(factor), bases[factor.name]
            # the basis was learned from normalised updates, so the shares are of them as well:
            # no client counts for more because it moves further
            total = float(np.square(rows, dtype=np.float64).sum())
            if total > 0:
                inside[kind] = inside.get(kind, 0.0) + float(np.square(rows @ basis).sum()) / total
                energy[kind] = energy.get(kind, 0.0) + 1.0
            chance[kind] = basis.shape[1] / basis.shape[0]
    return {kind: inside[kind] / energy[kind] for kind in inside}, chance


def _leading_directions(updates: Sequence[AdapterUpdate]) -> dict[str, Float64Array]:
    """Orthonormal (n, DIRECTIONS) basis a factor, from updates of equal weight."""
    bases = {}
    for factor in updates[0].spec:
        rows = [
            rank_rows(update.views()[factor.name], factor).astype(np.float64) for update in updates
        ]
        stacked = np.concatenate([r / (np.linalg.norm(r) or 1.0) for r in rows])
        if len(stacked) < stacked.shape[1]:
            _, _, vt = np.linalg.svd(stacked, full_matrices=False)
            bases[factor.name] = vt[:DIRECTIONS].T
        else:  # the same directions, sooner where many updates are stacked
            _, vectors = np.linalg.eigh(stacked.T @ stacked)
            bases[factor.name] = vectors[:, ::-1][:, :DIRECTIONS]
    return bases


def _factors(update: AdapterUpdate) -> Iterable[tuple[Factor, Float32Array]]:
    views = update.views()
    return ((factor, rank_rows(views[factor.name], factor)) for factor in update.spec)


def _by_round(recording: Recording) -> dict[int, list[int]]:
    """Indices of the entries of each round, in order."""
    members: dict[int, list[int]] = {}
    for index, entry in sorted(enumerate(recording.entries), key=lambda item: item[1].round):
        members.setdefault(entry.round, []).append(index)
    return members


def _mean(values: Iterable[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return math.fsum(known) / len(known) if known else math.nan
