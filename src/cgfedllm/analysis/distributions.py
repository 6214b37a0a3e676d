"""How the numbers of updates are distributed, by kind of factor, from round to round."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cgfedllm.adapter import Float32Array, factor_kind
from cgfedllm.analysis.samples import Sample
from cgfedllm.analysis.structure import excess_kurtosis

QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
WIDEST = 6.0
"""Histograms reach so many standard deviations to either side."""
BINS = 96

_TO_STD = 1.482602218505602
"""Standard deviation of a Gaussian over its median absolute deviation."""


@dataclass(frozen=True)
class DistributionRow:
    """The numbers of one kind of factor in one round, over layers and measured clients.

    Parameters
    ----------
    recording, module : str
        Names.
    round : int
        Of the recording.
    values : int
        Numbers.
    mean, std : float
        Of them.
    robust_scale : float
        Median absolute deviation from the median, times 1.4826: the standard deviation, if they
        were Gaussian.
    excess_kurtosis : float
        0 for a Gaussian; -1.2 for a uniform density, -2 for values of one magnitude.
    largest : float
        Magnitude.
    q001, q01, q05, q25, q50, q75, q95, q99, q999 : float
        Quantiles: q001 has a thousandth below it, q999 a thousandth above.
    """

    recording: str
    module: str
    round: int
    values: int
    mean: float
    std: float
    robust_scale: float
    excess_kurtosis: float
    largest: float
    q001: float
    q01: float
    q05: float
    q25: float
    q50: float
    q75: float
    q95: float
    q99: float
    q999: float


@dataclass(frozen=True)
class HistogramRow:
    """One bin of the values over their standard deviation; density integrates to 1 over all."""

    recording: str
    module: str
    round: int
    left: float
    right: float
    density: float


def distributions(
    recording: str, number: int, group: Sequence[Sample]
) -> Iterator[tuple[DistributionRow, list[HistogramRow]]]:
    """Measure one round, a pair a kind of factor.

    Parameters
    ----------
    number : int
        Of the round.
    group : sequence of Sample
        Its updates, from one.
    """
    spec = group[0].update.spec
    members: dict[str, list[slice]] = {}
    for factor in spec:
        members.setdefault(factor_kind(factor), []).append(spec.slices[factor.name])
    for module, slices in members.items():
        values = np.concatenate([sample.update.vector[part] for sample in group for part in slices])
        row = _row(recording, module, number, values)
        yield row, _histogram(row, values)


def _row(recording: str, module: str, number: int, values: Float32Array) -> DistributionRow:
    x = values.astype(np.float64)
    quantiles = np.quantile(x, QUANTILES)
    median = quantiles[QUANTILES.index(0.5)]
    names = ("q001", "q01", "q05", "q25", "q50", "q75", "q95", "q99", "q999")
    return DistributionRow(
        recording=recording,
        module=module,
        round=number,
        values=x.size,
        mean=float(x.mean()),
        std=float(x.std()),
        robust_scale=_TO_STD * float(np.median(np.abs(x - median))),
        excess_kurtosis=excess_kurtosis(values),
        largest=float(np.abs(x).max()),
        **dict(zip(names, map(float, quantiles), strict=True)),
    )


def _histogram(row: DistributionRow, values: Float32Array) -> list[HistogramRow]:
    """Empty where all values are equal. What lies outside is in the tails' share, not in a bin."""
    if not row.std > 0 or math.isnan(row.std):
        return []
    edges = np.linspace(-WIDEST, WIDEST, BINS + 1)
    counts, _ = np.histogram(values.astype(np.float64) / row.std, edges)
    densities = counts / (row.values * np.diff(edges))
    return [
        HistogramRow(row.recording, row.module, row.round, float(left), float(right), float(d))
        for left, right, d in zip(edges[:-1], edges[1:], densities, strict=True)
    ]
