"""Factors as matrices with a short and a long side, equal shapes stacked for array operations.

A LoRA factor is (r, n) as it is (A) or transposed (B). Other arrays become first axis x the rest,
the shorter side as rows; vectors and scalars are one row. Matrices with more than 64 rows are cut
into bands of 64, so that all that is done row against row stays small.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cgfedllm.adapter import AdapterSpec, Factor, Float32Array

MAX_ROWS = 64
"""Most rows of a matrix."""


@dataclass(frozen=True)
class _Band:
    where: slice
    shape: tuple[int, int]
    transposed: bool
    rows: slice

    def of(self, vector: Float32Array) -> Float32Array:
        matrix = vector[self.where].reshape(self.shape)
        return (matrix.T if self.transposed else matrix)[self.rows]


@dataclass(frozen=True)
class Batch:
    """All matrices of one shape, in the order of the spec.

    Parameters
    ----------
    rows, columns : int
        Shape of each.
    bands : tuple
        Where they lie in the vector of an update.
    """

    rows: int
    columns: int
    bands: tuple[_Band, ...]

    def gather(self, vector: Float32Array) -> Float32Array:
        """Copies out of an update's vector, shape (matrices, rows, columns)."""
        return np.stack([band.of(vector) for band in self.bands])

    def scatter(self, matrices: Float32Array, vector: Float32Array) -> None:
        """Inverse of `gather`, into an update's vector."""
        for band, matrix in zip(self.bands, matrices, strict=True):
            band.of(vector)[...] = matrix


def batches(spec: AdapterSpec) -> list[Batch]:
    """Every element of the spec in exactly one matrix, matrices of equal shape together."""
    found: dict[tuple[int, int], list[_Band]] = {}
    for factor in spec:
        shape = _matrix_shape(factor)
        transposed = shape[0] > shape[1] or (shape[0] == shape[1] and factor.kind == "B")
        height, width = min(shape), max(shape)
        for start in range(0, height, MAX_ROWS):
            rows = slice(start, min(start + MAX_ROWS, height))
            band = _Band(spec.slices[factor.name], shape, transposed, rows)
            found.setdefault((rows.stop - start, width), []).append(band)
    return [Batch(rows, columns, tuple(own)) for (rows, columns), own in found.items()]


def _matrix_shape(factor: Factor) -> tuple[int, int]:
    if len(factor.shape) < 2:
        return 1, factor.size
    return factor.shape[0], factor.size // factor.shape[0]
