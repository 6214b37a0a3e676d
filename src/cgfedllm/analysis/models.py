"""Rate-distortion curves of models of an update. References to hold a codec against, no limits.

Each curve is exact for Gaussian components of the variances it is given, and for nothing else:
a code that knows more about updates than the model does may lie above it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.analysis.structure import rank_rows
from cgfedllm.errors import CodecError

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class Components:
    """A variance model: independent Gaussian numbers in groups of one variance each.

    Parameters
    ----------
    variances : ndarray, shape (groups,), float64
        Of one number of the group.
    counts : ndarray, shape (groups,), float64
        Numbers in the group.
    """

    variances: Float64Array
    counts: Float64Array

    def snr_db(self, rates: ArrayLike) -> Float64Array:
        """SNR that this model promises at `rates` bits per parameter, same shape."""
        distortions = reverse_water_filling(self.variances, self.counts, rates)
        power = float(self.variances @ self.counts / self.counts.sum())
        with np.errstate(divide="ignore"):
            return np.asarray(10 * np.log10(power / distortions))


def gaussian_snr_db(rates: ArrayLike) -> Float64Array:
    """SNR of iid Gaussian numbers, ``20 log10(2) = 6.02`` dB a bit, at `rates` bits per number."""
    return np.asarray(20 * np.log10(2.0) * np.asarray(rates, np.float64))


def reverse_water_filling(
    variances: ArrayLike, counts: ArrayLike, rates: ArrayLike
) -> Float64Array:
    """Least distortion of independent Gaussian components at given rates.

    Components above the water level theta get ``log2(variance / theta) / 2`` bits and the
    distortion theta, the others nothing and their variance (Cover and Thomas, Elements of
    Information Theory, section 10.3.3). Solved exactly, level by level.

    Parameters
    ----------
    variances : array_like, shape (groups,)
        Not negative.
    counts : array_like, shape (groups,)
        Components in each group, above 0.
    rates : array_like
        Bits per component, averaged over all of them; not negative.

    Returns
    -------
    ndarray, float64
        Mean squared error per component at each rate, in the shape of `rates`.

    Raises
    ------
    CodecError
        If a variance or rate is negative or not finite, or there is no component.
    """
    variance, count, rate = (np.asarray(v, np.float64) for v in (variances, counts, rates))
    if variance.ndim != 1 or variance.shape != count.shape or not (count > 0).any():
        raise CodecError("reverse water-filling wants one variance and one count a group")
    if not all(np.isfinite(v).all() and (v >= 0).all() for v in (variance, count, rate)):
        raise CodecError("reverse water-filling wants finite variances, counts and rates from 0 up")
    total = count.sum()
    order = np.argsort(-variance)
    variance, count = variance[order], count[order]
    positive = variance > 0
    if not positive.any():
        return np.zeros(rate.shape)
    variance, count = variance[positive], count[positive]

    logs = np.log2(variance)
    active = np.cumsum(count)  # components above the water while the first k groups are
    bits = np.cumsum(count * logs)
    # rate at which the water has sunk to the variance of group k: from there on it gets bits
    starts = np.maximum.accumulate(0.5 * (bits - active * logs) / total)
    k = np.searchsorted(starts, rate, side="right") - 1
    level = np.exp2((bits[k] - 2 * rate * total) / active[k])
    power = np.cumsum(variance * count)
    below = power[-1] - power[k]
    return np.asarray((level * active[k] + below) / total)


def factor_components(updates: Iterable[AdapterUpdate]) -> Components:
    """Model (a): one variance a factor, the mean square of its elements over `updates`."""
    return _mean_components(updates, lambda rows: np.array([np.square(rows).sum()]))


def spectrum_components(updates: Iterable[AdapterUpdate]) -> Components:
    """Model (b): one variance a factor and singular component across the rank axis.

    The r x n factor is r components of n numbers each, with variances ``s_k^2 / n`` from its
    singular values s, averaged over `updates`. Turning the rank axis is taken to be free: the
    r x r rotation that a real code would have to send is not charged.
    """
    return _mean_components(updates, lambda rows: np.square(np.linalg.svd(rows, compute_uv=False)))


def _mean_components(
    updates: Iterable[AdapterUpdate], energies_of: Callable[[Float64Array], Float64Array]
) -> Components:
    """Mean energy of each component of each factor, as variances."""
    sums: list[Float64Array] = []
    sizes: list[float] = []
    n = 0
    for update in updates:
        views = update.views()
        energies = [
            energies_of(rank_rows(views[f.name], f).astype(np.float64)) for f in update.spec
        ]
        if n == 0:
            sums = [np.zeros_like(e) for e in energies]
            sizes = [f.size / len(e) for f, e in zip(update.spec, energies, strict=True)]
        for total, energy in zip(sums, energies, strict=True):
            total += energy
        n += 1
    if n == 0:
        raise CodecError("a variance model needs at least one update")
    counts = np.concatenate([np.full(len(s), size) for s, size in zip(sums, sizes, strict=True)])
    return Components(np.concatenate(sums) / n / counts, counts)
