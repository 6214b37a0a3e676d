"""How much of an update survives a codec: signal-to-noise ratio and cosine, pooled.

::

    SNR    = 10 log10( sum ||x||^2 / sum ||x - x_hat||^2 )        dB
    cosine = sum <x, x_hat> / sqrt( sum ||x||^2  sum ||x_hat||^2 )

Sums run over everything that was added (elements, clients, rounds) before anything is divided:
never a sum over a mean, never a mean of decibels. Everything is summed in float64.

What is measured here is the change of the factors; for that of their product, which depends on
where the adapter stood, see `product.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array, factor_kind


@dataclass
class Fidelity:
    """Running sums; an object that nothing was added to knows no numbers (NaN).

    Parameters
    ----------
    signal, decoded, error, inner : float
        Sums of ``||x||^2``, ``||x_hat||^2``, ``||x - x_hat||^2`` and ``<x, x_hat>``.
    """

    signal: float = 0.0
    decoded: float = 0.0
    error: float = 0.0
    inner: float = 0.0

    def add(self, true: Float32Array, decoded: Float32Array) -> None:
        """Take in one pair of vectors of equal shape."""
        x, y = true.astype(np.float64).reshape(-1), decoded.astype(np.float64).reshape(-1)
        difference = x - y
        self.signal += float(x @ x)
        self.decoded += float(y @ y)
        self.error += float(difference @ difference)
        self.inner += float(x @ y)

    def __add__(self, other: Fidelity) -> Fidelity:
        return Fidelity(
            self.signal + other.signal,
            self.decoded + other.decoded,
            self.error + other.error,
            self.inner + other.inner,
        )

    @property
    def snr_db(self) -> float:
        """Decibels; infinite without an error, 0 for a decoder that says zero."""
        return snr_db(self.signal, self.error)

    @property
    def cosine(self) -> float:
        """Between -1 and 1; 0 for a decoder that says zero."""
        if self.signal == 0:
            return math.nan
        norms = math.sqrt(self.signal * self.decoded)
        return self.inner / norms if norms > 0 else 0.0


def snr_db(signal: float, error: float) -> float:
    """10 log10(signal / error) of two sums of squares; NaN without a signal.

    >>> snr_db(4.0, 1.0)
    6.020599913279624
    """
    if not signal > 0:
        return math.nan
    if not error > 0:
        return math.inf
    ratio = signal / error
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf  # too small for a float


class ModuleFidelity:
    """One `Fidelity` a kind of factor (``q_proj.A``, ``q_proj.B``, ...), pooled over layers.

    Parameters
    ----------
    spec : AdapterSpec
        What the updates are made of.
    """

    def __init__(self, spec: AdapterSpec) -> None:
        self._spec = spec
        self.kinds = {factor_kind(factor): Fidelity() for factor in spec}

    def add(self, true: AdapterUpdate, decoded: AdapterUpdate) -> None:
        """Take in one update and what became of it."""
        for factor in self._spec:
            part = self._spec.slices[factor.name]
            self.kinds[factor_kind(factor)].add(true.vector[part], decoded.vector[part])

    def total(self) -> Fidelity:
        """All kinds together: the fidelity of the whole updates."""
        return sum(self.kinds.values(), Fidelity())
