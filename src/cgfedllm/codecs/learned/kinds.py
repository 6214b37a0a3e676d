r"""What an update looks like along axes that both ends know, and back.

::

    factor X (r x n) of every layer --F, along the rank-->            rows 1 ... r of each layer
    a row --known directions of the long axis-->                      coefficients, and what is left
    what is left of row j of all layers --E', over the layers-->      rows

The way back is taken element by element in one order, so that it ends at the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, Factor, Float32Array
from cgfedllm.codecs.entropy import Float64Array
from cgfedllm.codecs.parts.rows import from_rows, row_count, to_rows

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Known:
    """Known directions of the long axis of a kind.

    Parameters
    ----------
    vectors : ndarray, shape (layers, directions, n), float32
        Unit vectors, nearly orthogonal.
    weights : ndarray, shape (layers, directions), float32
        What a coefficient is multiplied by, so that all errors count alike.
    rest : ndarray, shape (layers,), float32
        The same, of what is left.
    foretold : ndarray, shape (r, layers, directions), float64
        Energy of coefficients, as a share of the largest of the kind: the state's and those where
        the adapter has grown have their own.
    classes : ndarray, shape (r, layers, directions)
        Of the energy foretold.
    """

    vectors: Float32Array
    weights: Float32Array
    rest: Float32Array
    foretold: Float64Array
    classes: IntArray


@dataclass(frozen=True)
class Kind:
    """The factors of one module, A or B, and one shape in all layers, with their axes.

    Parameters
    ----------
    factors : tuple of Factor
        One a layer.
    classes : ndarray, shape (r * layers,)
        Of the energy foretold of each row.
    forward, backward : ndarray, shape (layers, r, r), float32, or None
        Along the rank; one undoes the other. None leaves it as it is.
    known : Known or None
        Along the long axis.
    layers : ndarray, shape (r, layers, layers), float32, or None
        Directions over the layers in its columns, for each row.
    """

    factors: tuple[Factor, ...]
    classes: IntArray
    forward: Float32Array | None = None
    backward: Float32Array | None = None
    known: Known | None = None
    layers: Float32Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of all layers, and their length."""
        rows = row_count(self.factors[0])
        return rows * len(self.factors), self.factors[0].size // rows

    @property
    def loose(self) -> IntArray:
        """Classes of all coefficients of known directions."""
        return np.zeros(0, np.int64) if self.known is None else self.known.classes.reshape(-1)

    @property
    def foretold(self) -> Float64Array:
        """Energies foretold of all coefficients of known directions, of the largest."""
        return np.zeros(0) if self.known is None else self.known.foretold.reshape(-1)

    def into(self, vector: Float32Array, spec: AdapterSpec) -> tuple[Float32Array, Float32Array]:
        """Rows of an update, shape `shape`, and coefficients of known directions, flat."""
        x = np.stack([to_rows(vector[spec.slices[f.name]], f) for f in self.factors])
        if self.forward is not None:
            x = np.matmul(self.forward, x)
        loose = np.zeros(0, np.float32)
        if self.known is not None:
            vectors = self.known.vectors
            along = np.matmul(x, vectors.swapaxes(1, 2))
            left = x - np.matmul(along, vectors)
            # directions are not quite orthogonal: once more, for what was counted twice
            again = np.matmul(left, vectors.swapaxes(1, 2))
            along += again
            x = (left - np.matmul(again, vectors)) * self.known.rest[:, None, None]
            along *= self.known.weights[:, None]
            loose = along.swapaxes(0, 1).reshape(-1)
        x = x.swapaxes(0, 1)
        if self.layers is not None:
            x = np.matmul(self.layers.swapaxes(1, 2), x)
        return np.ascontiguousarray(x.reshape(self.shape)), loose

    def back(
        self, rows: Float32Array, loose: Float32Array, vector: Float32Array, spec: AdapterSpec
    ) -> None:
        """Inverse of `into`, into an update's vector."""
        count = len(self.factors)
        x = rows.reshape(-1, count, self.shape[1])
        if self.layers is not None:
            x = _times(self.layers, x)
        x = x.swapaxes(0, 1)
        if self.known is not None:
            x = x / self.known.rest[:, None, None]
            along = loose.reshape(self.known.classes.shape).swapaxes(0, 1)
            along = along / self.known.weights[:, None]
            for i in np.flatnonzero(along.any(axis=(0, 1))):
                x += along[:, :, i, None] * self.known.vectors[:, None, i]
        if self.backward is not None:
            x = _times(self.backward, x)
        for factor, own in zip(self.factors, x, strict=True):
            vector[spec.slices[factor.name]] = from_rows(own, factor)


@dataclass(frozen=True)
class Axes:
    """The axes of all kinds.

    Parameters
    ----------
    spec : AdapterSpec
        The adapter.
    kinds : tuple of Kind
        Every factor is in one.
    """

    spec: AdapterSpec
    kinds: tuple[Kind, ...]

    @property
    def loose(self) -> IntArray:
        """Classes of all coefficients of known directions, kind by kind."""
        return np.concatenate([kind.loose for kind in self.kinds])

    @property
    def foretold(self) -> Float64Array:
        """Energies foretold of all coefficients of known directions, kind by kind."""
        return np.concatenate([kind.foretold for kind in self.kinds])

    def into(self, vector: Float32Array) -> tuple[list[Float32Array], Float32Array]:
        """Rows of an update, kind by kind, and all coefficients of known directions."""
        both = [kind.into(vector, self.spec) for kind in self.kinds]
        return [rows for rows, _ in both], np.concatenate([loose for _, loose in both])

    def no_rows(self) -> list[Float32Array]:
        """Rows of zeros, kind by kind."""
        return [np.zeros(kind.shape, np.float32) for kind in self.kinds]

    def back(self, rows: Sequence[Float32Array], loose: Float32Array) -> Float32Array:
        """The update that these stand for, to the bit the same everywhere."""
        vector = np.empty(self.spec.size, np.float32)
        parts = np.split(loose, np.cumsum([kind.loose.size for kind in self.kinds])[:-1])
        for kind, own, along in zip(self.kinds, rows, parts, strict=True):
            kind.back(own, along, vector, self.spec)
        return vector


def _times(matrices: Float32Array, x: Float32Array) -> Float32Array:
    """Products, shape (count, i, k) and (count, k, n), summed in order; rows of zeros left out."""
    out = np.zeros((len(x), matrices.shape[1], x.shape[2]), np.float32)
    sent = np.asarray(x.any(axis=2))
    for k in range(x.shape[1]):
        at = np.flatnonzero(sent[:, k])
        if at.size:
            out[at] += matrices[at, :, k, None] * x[at, k, None]
    return out
