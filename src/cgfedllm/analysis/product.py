r"""The effective change: what a change of the factors does to the product B A that the model sees.

::

    dB, dA, from an adapter at B, A:   (B + dB)(A + dA) - B A  =  [dB | B] [A + dA ; dA]

Rank 2 r at most, so norms and inner products need no (out, in) matrix. Without the factor
alpha / r, which is the same for all modules unless a configuration has patterns for it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, factor_kind
from cgfedllm.analysis.fidelity import Fidelity

Float64Array = NDArray[np.float64]
LowRank = tuple[Float64Array, Float64Array]


class ProductFidelity:
    """One `Fidelity` of the effective change a kind of module (``q_proj``), pooled over layers.

    Parameters
    ----------
    spec : AdapterSpec
        What the updates are made of; needs A and B factors.
    """

    def __init__(self, spec: AdapterSpec) -> None:
        self._pairs = spec.pairs()
        self.kinds = {factor_kind(a).removesuffix(".A"): Fidelity() for a, _ in self._pairs}

    def add(self, start: AdapterUpdate, true: AdapterUpdate, decoded: AdapterUpdate) -> None:
        """Take in one change of the adapter at `start`, and what became of it."""
        views = [update.views() for update in (start, true, decoded)]
        for a, b in self._pairs:
            (A, dA, dA_), (B, dB, dB_) = (
                [part[factor.name].astype(np.float64) for part in views] for factor in (a, b)
            )
            x = np.hstack([dB, B]), np.vstack([A + dA, dA])
            y = np.hstack([dB_, B]), np.vstack([A + dA_, dA_])
            # of the differences, and not a difference of norms: exactly zero where nothing is lost
            error = np.hstack([dB - dB_, B + dB_]), np.vstack([A + dA, dA - dA_])
            kind = factor_kind(a).removesuffix(".A")
            self.kinds[kind] += Fidelity(
                signal=_inner(x, x), decoded=_inner(y, y), error=_inner(error, error),
                inner=_inner(x, y),
            )  # fmt: skip

    def total(self) -> Fidelity:
        """All kinds together."""
        return sum(self.kinds.values(), Fidelity())


def _inner(x: LowRank, y: LowRank) -> float:
    """<X, Y> of X = L R and Y = M S: sum of (L' M) * (R S')."""
    (L, R), (M, S) = x, y
    return float(np.sum((L.T @ M) * (R @ S.T)))
