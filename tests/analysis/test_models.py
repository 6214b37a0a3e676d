"""Reverse water-filling against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.analysis.models import (
    Components,
    factor_components,
    gaussian_snr_db,
    reverse_water_filling,
    spectrum_components,
)
from cgfedllm.errors import CodecError

RATES = np.array([0.0, 0.05, 0.3, 1.0, 4.0])
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def test_a_bit_is_six_decibels() -> None:
    assert gaussian_snr_db([0.0, 1.0, 2.0]) == pytest.approx([0, 6.0206, 12.0412], abs=1e-4)


@pytest.mark.parametrize("groups", [1, 3])
def test_equal_variances_are_the_gaussian_line(groups: int) -> None:
    model = Components(np.full(groups, 0.25), np.arange(1, groups + 1, dtype=float))
    assert model.snr_db(RATES) == pytest.approx(gaussian_snr_db(RATES))


def test_two_variances_by_hand() -> None:
    # variances 4 and 1, one component each. Up to log2(4)/2 / 2 = 0.5 bits a component only the
    # first is coded: D = (4 * 2^-2r + 1) / 2 with r = 2 R bits for it; then both, to one level
    low, border, high = reverse_water_filling([4.0, 1.0], [1, 1], [0.25, 0.5, 1.5])
    assert low == pytest.approx((4 * 2 ** (-2 * 0.5) + 1) / 2)
    assert border == pytest.approx(1.0)
    assert high == pytest.approx(2 ** (1 - 2 * 1.5))  # sqrt(4 * 1) * 2^-2R


def test_order_and_grouping_do_not_matter() -> None:
    split = reverse_water_filling([1.0, 9.0, 1.0, 0.0], [2, 3, 4, 5], RATES)
    joined = reverse_water_filling([9.0, 0.0, 1.0], [3, 5, 6], RATES)
    assert split == pytest.approx(joined)


def test_rate_zero_costs_the_variance_and_all_rates_lie_below_it() -> None:
    rng = np.random.default_rng(0)
    variances, counts = rng.exponential(size=50), rng.integers(1, 9, 50)
    mean = variances @ counts / counts.sum()
    distortions = reverse_water_filling(variances, counts, np.linspace(0, 6, 40))
    assert distortions[0] == pytest.approx(mean)
    assert (np.diff(distortions) < 0).all()
    # no better than what the rates given to each component say
    assert (
        10 * np.log10(mean / distortions) >= gaussian_snr_db(np.linspace(0, 6, 40)) - 1e-9
    ).all()


def test_the_solution_spends_exactly_its_rate() -> None:
    variances, counts = np.array([5.0, 2.0, 0.5, 0.1]), np.array([1, 4, 2, 8])
    for rate in (0.02, 0.3, 1.0, 3.0):
        distortion = float(reverse_water_filling(variances, counts, rate))
        lo, hi = 1e-12, 5.0  # find the water level of this distortion, count its bits
        for _ in range(200):
            level = (lo + hi) / 2
            if np.minimum(level, variances) @ counts / counts.sum() > distortion:
                hi = level
            else:
                lo = level
        bits = 0.5 * np.log2(np.maximum(variances / level, 1)) @ counts / counts.sum()
        assert bits == pytest.approx(rate, rel=1e-6)


def test_nothing_but_zeros_needs_no_bits() -> None:
    assert reverse_water_filling([0.0, 0.0], [1, 2], RATES) == pytest.approx(np.zeros(5))


@pytest.mark.parametrize(
    ("variances", "counts", "rates"),
    [([-1.0], [1], [1.0]), ([1.0], [1, 2], [1.0]), ([1.0], [1], [-1.0]), ([], [], [1.0]),
     ([np.nan], [1], [1.0])],
)  # fmt: skip
def test_nonsense_is_refused(variances: list[float], counts: list[int], rates: list[float]) -> None:
    with pytest.raises(CodecError, match="reverse water-filling wants"):
        reverse_water_filling(variances, counts, rates)


def test_variance_models_of_updates() -> None:
    spec = AdapterSpec.from_shapes({A: (2, 4), B: (3, 2)})
    update = AdapterUpdate.zeros(spec)
    update.views()[A][0] = 2.0  # rank one: all energy, 16, in the first component
    update.views()[B][...] = np.array([[1, 0], [0, 2], [0, 0]])
    twice = [update, update.scaled(0)]
    by_factor, by_spectrum = factor_components(twice), spectrum_components(twice)
    assert by_factor.variances == pytest.approx([16 / 8 / 2, 5 / 6 / 2])
    assert by_factor.counts.tolist() == [8, 6]
    assert by_spectrum.variances == pytest.approx([16 / 4 / 2, 0, 4 / 3 / 2, 1 / 3 / 2], abs=1e-12)
    assert by_spectrum.counts.tolist() == [4, 4, 3, 3]
    # what the finer model knows can only help
    assert (by_spectrum.snr_db([0.1, 1.0]) > by_factor.snr_db([0.1, 1.0])).all()


def test_a_model_needs_updates() -> None:
    with pytest.raises(CodecError, match="at least one update"):
        factor_components([])
