"""Robustness to Gaussian noise, on the update before it is coded or on the latent.

::

    update   x + n --encode, decode--> x_hat        n ~ N(0, sigma^2 I)
    latent   x --encode--> z + n --decode--> x_hat

x_hat is held against x, and on the update also against x + n, which is all a codec can know. Sigma
is in the units of what it is added to, so the norm of the noise over the norm of that goes with it:
where it is far above 1 there is no update left to keep. The draws are the same for every sigma and
every codec. Without noise (sigma 0) is the reference. Wu et al., arXiv 2405.13746, do the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterUpdate, Float32Array
from cgfedllm.analysis.coding import CodecCoder, Coder, code
from cgfedllm.analysis.fidelity import Fidelity
from cgfedllm.analysis.latents import latent_codec
from cgfedllm.analysis.samples import Sample
from cgfedllm.seeding import generator

SIGMAS = (5e-5, 5e-4, 5e-3, 5e-2, 5e-1)
"""The paper's."""
UNCODED = "(uncoded)"
"""Row of the noisy update itself: what the noise alone costs."""

Place = Literal["update", "latent"]


@dataclass(frozen=True)
class NoiseRow:
    """One codec at one sigma.

    Parameters
    ----------
    recording, codec, options : str
        As in `OpenLoopRow`; codec "(uncoded)" is the noisy update itself.
    place : str
        Where the noise was added: "update" or "latent".
    sigma : float
        Standard deviation of the noise on each number; 0 for the reference.
    norm_ratio : float
        Euclidean norm of the noise over that of what it was added to, pooled.
    updates : int
        How many were coded.
    snr_db, cosine : float
        Against the clean update.
    noisy_snr_db, noisy_cosine : float
        Against what went in, noise included; equal to the former on the latent, where the input is
        clean.
    """

    recording: str
    codec: str
    options: str
    place: Place
    sigma: float
    norm_ratio: float
    updates: int
    snr_db: float
    cosine: float
    noisy_snr_db: float
    noisy_cosine: float


@dataclass
class _Sums:
    clean: Fidelity = field(default_factory=Fidelity)
    noisy: Fidelity = field(default_factory=Fidelity)
    noise: float = 0.0
    signal: float = 0.0
    updates: int = 0

    def add(
        self,
        true: AdapterUpdate,
        sent: AdapterUpdate,
        decoded: AdapterUpdate,
        noise: NDArray[Any],
        onto: NDArray[Any],
    ) -> None:
        self.clean.add(true.vector, decoded.vector)
        self.noisy.add(sent.vector, decoded.vector)
        self.noise += float(np.square(noise, dtype=np.float64).sum())
        self.signal += float(np.square(onto, dtype=np.float64).sum())
        self.updates += 1

    def row(self, recording: str, codec: str, options: str, place: Place, sigma: float) -> NoiseRow:
        return NoiseRow(
            recording=recording,
            codec=codec,
            options=options,
            place=place,
            sigma=sigma,
            norm_ratio=math.sqrt(self.noise / self.signal) if self.signal > 0 else math.nan,
            updates=self.updates,
            snr_db=self.clean.snr_db,
            cosine=self.clean.cosine,
            noisy_snr_db=self.noisy.snr_db,
            noisy_cosine=self.noisy.cosine,
        )


def one_a_round(groups: Sequence[Sequence[Sample]]) -> list[Sample]:
    """One update of every round, of another client each time as far as there are."""
    return [group[number % len(group)] for number, group in enumerate(groups)]


def steps(coder: Coder) -> int:
    """Encodings a sample that `noise_rows` makes, for a progress bar."""
    return (len(SIGMAS) + 1) * (1 if latent_codec(coder) is None else 2)


def uncoded_rows(recording: str, samples: Sequence[Sample], seed: int) -> Iterator[NoiseRow]:
    """What the noise alone does."""
    for sigma in (0.0, *SIGMAS):
        sums = _Sums()
        for sample in samples:
            noisy, noise = _noisy_update(sample, sigma, seed)
            sums.add(sample.update, noisy, noisy, noise, sample.update.vector)
        yield sums.row(recording, UNCODED, "{}", "update", sigma)


def noise_rows(
    recording: str,
    codec: str,
    options: str,
    coder: Coder,
    samples: Sequence[Sample],
    seed: int,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[NoiseRow]:
    """Measure one codec.

    Parameters
    ----------
    samples : sequence of Sample
        Updates to add noise to, from one.
    seed : int
        Of the noise.
    tick : callable
        Told after every encoding.

    Raises
    ------
    CodecError
        If the codec refuses an update.
    """
    for sigma in (0.0, *SIGMAS):
        sums = _Sums()
        for sample in samples:
            noisy, noise = _noisy_update(sample, sigma, seed)
            decoded = code(coder, replace(sample, update=noisy)).decoded
            sums.add(sample.update, noisy, decoded, noise, sample.update.vector)
            tick()
        yield sums.row(recording, codec, options, "update", sigma)
    shown = latent_codec(coder)
    if shown is None:
        return
    for sigma in (0.0, *SIGMAS):
        sums = _Sums()
        for sample in samples:
            known = sample.context
            context = coder.context(known) if isinstance(coder, CodecCoder) else known
            change = _LatentNoise(sigma, seed, sample)
            packet = coder.encode(sample.update, sample.context)
            decoded = shown.decode_changed(packet, context, change)
            sums.add(sample.update, sample.update, decoded, change.noise, change.latent)
            tick()
        yield sums.row(recording, codec, options, "latent", sigma)


class _LatentNoise:
    """Adds noise to a latent, and remembers both; empty if there is none in a packet."""

    def __init__(self, sigma: float, seed: int, sample: Sample) -> None:
        self._sigma, self._seed, self._sample = sigma, seed, sample
        self.latent: NDArray[Any] = np.zeros(0)
        self.noise: NDArray[Any] = np.zeros(0)

    def __call__(self, latent: Float32Array) -> Float32Array:
        self.latent = latent
        self.noise = self._sigma * _draw(self._seed, "latent", self._sample, latent.size)
        return (latent + self.noise).astype(np.float32)


def _noisy_update(
    sample: Sample, sigma: float, seed: int
) -> tuple[AdapterUpdate, NDArray[np.float64]]:
    noise = sigma * _draw(seed, "update", sample, sample.update.spec.size)
    values = (sample.update.vector + noise).astype(np.float32)
    return AdapterUpdate(sample.update.spec, values), noise


def _draw(seed: int, place: Place, sample: Sample, count: int) -> NDArray[np.float64]:
    rng = generator(seed, "analysis", "noise", place, sample.round, sample.client)
    return rng.standard_normal(count)
