"""What each mode of a vector would keep of it, and cost: nothing is coded to choose."""

from __future__ import annotations

import numpy as np

from cgfedllm.codecs.entropy import Float64Array
from cgfedllm.codecs.parts.vectors import CODES, GAUSSIAN, UNIFORM

# a dead-zone quantiser is worth it from about this many bits an entry
_SCALAR_FROM = 1.1


class Modes:
    """The modes of `parts/vectors.py` for vectors of one length.

    Parameters
    ----------
    energies : ndarray
        Squared norms, in any shape.
    lean : ndarray
        What entries are like (`vectors.lean_of`), in the same shape.
    length : int
        Entries of a vector.
    beside : float
        Bits of a vector beside its entries.
    """

    def __init__(
        self, energies: Float64Array, lean: Float64Array, length: int, beside: float
    ) -> None:
        self._energies, self._length, self._beside = energies, length, beside
        self.keeps = np.clip(GAUSSIAN + lean[..., None] * (UNIFORM - GAUSSIAN), 0.0, 0.999)
        """Share of the energy that modes 1 to 6 keep, in a last axis."""
        self._gains = energies[..., None] * self.keeps
        self._costs = np.broadcast_to(beside + length / np.array(CODES), self._gains.shape)
        # entries spread evenly have less entropy than Gaussian ones of the same variance
        self._above = 0.25 * (1 - np.clip(lean, 0.0, 1.5))

    def at(self, slope: float) -> tuple[Float64Array, Float64Array, Float64Array]:
        """Energy kept and bits of modes 1 to 7, in a last axis, where a bit must gain `slope`.

        Also the ratio of energies to what mode 7 leaves of them.
        """
        noise = slope / (2 * np.log(2))  # squared error an entry, at high rate
        ratio = np.maximum(self._energies, 1e-300) / (self._length * noise)
        rate = 0.5 * np.log2(ratio) + self._above
        cost = self._beside + self._length * np.maximum(rate, _SCALAR_FROM)
        gain = self._energies - self._length * noise
        gain[rate < _SCALAR_FROM] = -np.inf
        return (
            np.concatenate([self._gains, gain[..., None]], axis=-1),
            np.concatenate([self._costs, cost[..., None]], axis=-1),
            ratio,
        )
