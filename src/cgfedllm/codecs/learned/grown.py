r"""Directions along which an adapter has grown: what both ends know without a byte.

::

    change of a factor since the run began:   W = X_t - X_0
    beside known directions, along the rank:   R = F (W - W V' V)
    directions of the long axis:              U = S^(-1/2) Q' R,    R R' = Q S Q'

The adapter is the sum of all that was decoded, weighted and averaged: what a single client's update
hides is left in it. From round to round it keeps to these few directions, and what clients have in
common does so more than what each has for itself. They move as the adapter does, so whoever holds
the adapter is up to date: FAF (Wu et al., arXiv 2405.13746, section 3) at no cost.
"""

from __future__ import annotations

import math

import numpy as np

from cgfedllm.adapter import Float32Array
from cgfedllm.codecs.entropy import Float64Array
from cgfedllm.codecs.parts.exact import gram, times, transposed
from cgfedllm.codecs.parts.jacobi import eigenvectors

# directions with less than this share of all growth are noise, of roundings for the most part
_LEAST = 2.0**-8


def grown_directions(rows: Float64Array, known: Float64Array) -> tuple[Float32Array, Float64Array]:
    """Directions of the long axis that rows keep to, strongest first.

    Parameters
    ----------
    rows : ndarray, shape (layers, r, n), float64
        Of changes, layer by layer, beside known directions.
    known : ndarray, shape (layers, r, d), float64
        The same along known directions.

    Returns
    -------
    vectors : ndarray, shape (layers, r, n), float32
        Orthonormal; zeros for those that a layer lacks or in which it has hardly grown.
    shares : ndarray, shape (layers, r)
        Of a layer's energy.
    """
    grams = [gram(own) for own in rows]
    strengths, turn = eigenvectors(np.stack(grams))
    # sums that do not depend on the order
    all_ = [
        math.fsum([*np.diagonal(own), *np.square(along).ravel()])
        for own, along in zip(grams, known, strict=True)
    ]
    there = (strengths > 0) & (strengths > _LEAST * np.array(all_)[:, None])
    lengths = np.sqrt(np.where(there, strengths, 1.0))
    vectors = times(transposed(turn), rows) * (there / lengths)[:, :, None]
    total = np.zeros(len(rows))
    for own in (strengths * there).T:  # in order
        total += own
    shares = np.where(there, strengths, 0.0) / np.where(total > 0, total, 1.0)[:, None]
    return vectors.astype(np.float32), shares
