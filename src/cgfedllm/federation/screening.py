"""Screening: what looks odd about one decoded update among those of its round.

::

    update -- norm -----> over the median norm of the round
           -- sketch ---> cosine to the median direction of the round's other updates

Both references are medians, so that they hold as long as fewer than half of the clients send
nonsense: a mean would be whatever the largest update is. A client is compared with the *others*:
among nine, its own share of a median is as large as what honest clients have in common.

Where means are formed while replies arrive no update is kept, so a few thousand numbers stand for
each: a count sketch (Charikar et al. 2002), that is, values with random signs, added up by bucket.
It keeps inner products up to 1 / sqrt(buckets), 0.016 in a cosine, also of updates that are zero
nearly everywhere, of which a sample of coordinates would miss most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterUpdate, Float32Array
from cgfedllm.config import ScreeningConfig
from cgfedllm.seeding import generator

# every so-many-th value shares a bucket; a prime, so that buckets are not columns of a factor
BUCKETS = 4093
# among three, one that lies is half of what each of the others is compared with
FEWEST = 4


@dataclass(frozen=True)
class Screened:
    """What was found about one update.

    Parameters
    ----------
    norm_ratio : float
        Its norm over the median norm of the round.
    cosine : float or None
        To the median direction of the others; None for one that is zero everywhere.
    suspicion : str
        What is beyond a threshold, in words; empty for an update like the others.
    """

    norm_ratio: float
    cosine: float | None
    suspicion: str


class Sketch:
    """Maps updates to a few thousand numbers that keep their inner products.

    Parameters
    ----------
    size : int
        Values in an update.
    seed : int
        Of the run; a resumed run writes down the same cosines.
    """

    def __init__(self, size: int, seed: int) -> None:
        bits = generator(seed, "screening").integers(0, 2, size, np.int8)
        self._signs = 2 * bits - 1
        self._rows = -(-size // BUCKETS)

    def direction(self, update: AdapterUpdate) -> Float32Array:
        """The sketch, shape (BUCKETS,), of unit norm; zeros for an update of zeros."""
        padded = np.zeros(self._rows * BUCKETS, np.float64)
        np.multiply(update.vector, self._signs, out=padded[: len(self._signs)])
        sums = padded.reshape(self._rows, BUCKETS).sum(axis=0)
        direction: Float32Array = (sums / (np.linalg.norm(sums) or 1.0)).astype(np.float32)
        return direction


class Screen:
    """The updates of one round, as they come in; `results` once all are there.

    Memory: 16 KiB a client, however large the adapter.
    """

    def __init__(self, config: ScreeningConfig, sketch: Sketch) -> None:
        self._config = config
        self._sketch = sketch
        self._norms: dict[str, float] = {}
        self._directions: dict[str, Float32Array] = {}

    def add(self, client: str, update: AdapterUpdate) -> None:
        """Take in a decoded update."""
        self._norms[client] = update.norm()
        self._directions[client] = self._sketch.direction(update)

    def results(self) -> dict[str, Screened]:
        """What was found about each client; nothing where too few are there to compare."""
        median = float(np.median(list(self._norms.values()))) if self._norms else 0.0
        if len(self._norms) < FEWEST or not median:
            return {}
        ordered = np.sort(np.stack(list(self._directions.values())), axis=0)
        return {
            client: self._judge(norm / median, _cosine(direction, ordered))
            for (client, norm), direction in zip(
                self._norms.items(), self._directions.values(), strict=True
            )
        }

    def _judge(self, ratio: float, cosine: float | None) -> Screened:
        limits, found = self._config, []
        if ratio > limits.max_norm_ratio:
            found.append(
                f"its norm is {ratio:.3g} times the round's median "
                f"(max_norm_ratio = {limits.max_norm_ratio:g})"
            )
        if cosine is not None and cosine < limits.min_cosine:
            found.append(
                f"its cosine to the others' median is {cosine:.2f} "
                f"(min_cosine = {limits.min_cosine:g})"
            )
        return Screened(ratio, cosine, "; ".join(found))


def _cosine(direction: Float32Array, ordered: NDArray[np.float32]) -> float | None:
    """Cosine of one direction to the median of the others.

    Parameters
    ----------
    direction : ndarray, shape (BUCKETS,)
        One of those in `ordered`.
    ordered : ndarray, shape (clients, BUCKETS)
        All directions, each bucket sorted by itself.
    """
    others = len(ordered) - 1
    # what is k-th without one's own value: k-th among all if that is smaller, else the next
    middle = [
        np.where(direction > ordered[k], ordered[k], ordered[k + 1])
        for k in ((others - 1) // 2, others // 2)
    ]
    centre = (middle[0].astype(np.float64) + middle[1]) / 2
    length = np.linalg.norm(centre)
    if not direction.any() or not length:
        return None
    return float(direction @ centre / length)
