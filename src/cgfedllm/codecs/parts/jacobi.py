"""Eigenvectors that are the same to the bit on every machine.

LAPACK's depend on the build and the processor, and where eigenvalues are close they may turn by any
angle. Jacobi's method needs sums, products, quotients and square roots only, which IEEE 754 rounds
the same everywhere, taken element by element in one order. Disjoint pairs of axes are turned
together (a round robin; Brent and Luk, SIAM J. Sci. Stat. Comput. 6(1), 1985), in all matrices of a
stack at once; each is finished when it is, whatever else is in the stack.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]

_SWEEPS = 10
# off-diagonal entries below this share of the diagonal's largest are left
_TINY = 2.0**-40


def eigenvectors(matrices: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Eigenvalues, largest first, and eigenvectors of symmetric matrices.

    Parameters
    ----------
    matrices : ndarray, shape (count, n, n), float64
        Finite and symmetric.

    Returns
    -------
    values : ndarray, shape (count, n)
        In descending order.
    vectors : ndarray, shape (count, n, n)
        Column j belongs to value j. A matrix of zeros has the axes themselves.
    """
    count, n, _ = matrices.shape
    # a matrix and its vectors below it: columns of both are turned alike
    both = np.concatenate([matrices, np.broadcast_to(np.eye(n), matrices.shape)], axis=1)
    rounds = _round_robin(n)
    at = np.arange(count)
    for _ in range(_SWEEPS):
        at = at[_unfinished(both[at, :n])]
        if not at.size:
            break
        own = both[at]
        a = own[:, :n]
        for p, q in rounds:
            c, s = _rotation(a[:, p, p], a[:, q, q], a[:, p, q])
            _turn(own, p, q, c[:, None, :], s[:, None, :])
            _turn(a.swapaxes(1, 2), p, q, c[:, None, :], s[:, None, :])
        both[at] = own
    values = np.diagonal(both[:, :n], axis1=1, axis2=2)
    order = np.argsort(-values, axis=1, kind="stable")
    return (
        np.take_along_axis(values, order, 1),
        np.take_along_axis(both[:, n:], order[:, None, :], 2),
    )


def _unfinished(a: Float64Array) -> NDArray[np.bool_]:
    """Which matrices have entries off their diagonals that count."""
    limit = _TINY * np.abs(np.diagonal(a, axis1=1, axis2=2)).max(axis=1, initial=0.0)
    off = np.abs(a - a * np.eye(a.shape[1])).max(axis=(1, 2), initial=0.0)
    return np.asarray(off > limit)


def _rotation(
    app: Float64Array, aqq: Float64Array, apq: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Cosine and sine that make entry (p, q) zero; none where it is zero already."""
    turned = apq != 0
    theta = (aqq - app) / np.where(turned, 2 * apq, 1.0)
    with np.errstate(over="ignore"):
        t = np.where(theta < 0, -1.0, 1.0) / (np.abs(theta) + np.sqrt(theta * theta + 1))
    t = np.where(turned, t, 0.0)
    c = 1 / np.sqrt(t * t + 1)
    return c, t * c


def _turn(
    a: Float64Array,
    p: NDArray[np.int64],
    q: NDArray[np.int64],
    c: Float64Array,
    s: Float64Array,
) -> None:
    """Turn columns p and q."""
    x, y = a[:, :, p], a[:, :, q]
    a[:, :, p], a[:, :, q] = c * x - s * y, s * x + c * y


def _round_robin(n: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Disjoint pairs of axes, in rounds that together hold every pair once."""
    size = n + n % 2
    ring = list(range(size))
    rounds = []
    for _ in range(size - 1):
        pairs = [(ring[i], ring[size - 1 - i]) for i in range(size // 2)]
        pairs = [(min(pair), max(pair)) for pair in pairs if max(pair) < n]
        if pairs:
            p, q = np.array(pairs, np.int64).T
            rounds.append((p, q))
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return rounds
