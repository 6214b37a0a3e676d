"""Budgets are what Opacus says they are, never less than what is provable, and refused if none."""

from __future__ import annotations

import math

import pytest
from opacus.accountants import RDPAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from cgfedllm.errors import PrivacyError
from cgfedllm.privacy.accountant import default_delta, epsilon_spent, noise_multiplier

DELTA = 1e-5


def exact_epsilon(multiplier: float, rounds: int) -> float:
    """Of composed Gaussians without sampling (Balle and Wang, arXiv 1805.06530, theorem 8)."""
    sigma = multiplier / math.sqrt(rounds)

    def too_much(epsilon: float) -> float:
        a, b = 1 / (2 * sigma), epsilon * sigma
        return float(norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b)) - DELTA

    return float(brentq(too_much, 1e-6, 100))


@pytest.mark.parametrize("sampling", [1.0, 0.25])
def test_epsilon_is_the_librarys(sampling: float) -> None:
    library = RDPAccountant()
    for _ in range(7):
        library.step(noise_multiplier=3.0, sample_rate=sampling)
    ours = epsilon_spent(3.0, DELTA, rounds=7, sampling=sampling)
    # both are the least over some orders, and every order's bound holds
    assert ours == pytest.approx(library.get_epsilon(DELTA), rel=3e-3)


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_no_accountant_claims_less_than_is_spent(accountant: str) -> None:
    for multiplier in (1.5, 5.0):
        claimed = epsilon_spent(multiplier, DELTA, rounds=4, accountant=accountant)
        exact = exact_epsilon(multiplier, 4)
        assert exact <= claimed <= 1.15 * exact
    # and the finer one is the tighter one
    if accountant == "prv":
        assert claimed < epsilon_spent(multiplier, DELTA, rounds=4)


@pytest.mark.parametrize("epsilon", [0.25, 2.0, 8.0])
def test_the_multiplier_spends_the_budget_and_no_more(epsilon: float) -> None:
    multiplier = noise_multiplier(epsilon, DELTA, rounds=20)
    spent = [epsilon_spent(multiplier, DELTA, rounds=rounds) for rounds in range(21)]
    assert spent[0] == 0
    assert spent == sorted(set(spent))
    assert 0.995 * epsilon < spent[20] <= epsilon


def test_more_rounds_or_less_budget_take_more_noise_and_sampling_takes_less() -> None:
    base = noise_multiplier(2.0, DELTA, rounds=5)
    assert noise_multiplier(2.0, DELTA, rounds=10) > base
    assert noise_multiplier(0.25, DELTA, rounds=5) > base
    assert noise_multiplier(2.0, 1e-3, rounds=5) < base
    assert noise_multiplier(2.0, DELTA, rounds=5, sampling=0.25) < base


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_that_is_none(epsilon: float) -> None:
    with pytest.raises(PrivacyError, match="epsilon must be a finite number above 0"):
        noise_multiplier(epsilon, DELTA, rounds=1)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, 2.0])
def test_a_delta_that_is_none(delta: float) -> None:
    with pytest.raises(PrivacyError, match="delta must lie between 0 and 1"):
        noise_multiplier(1.0, delta, rounds=1)
    with pytest.raises(PrivacyError, match="delta must lie between 0 and 1"):
        epsilon_spent(1.0, delta, rounds=1)


def test_other_nonsense() -> None:
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(PrivacyError, match="noise multiplier"):
            epsilon_spent(bad, DELTA, rounds=1)
    with pytest.raises(PrivacyError, match="one round at least"):
        noise_multiplier(1.0, DELTA, rounds=0)
    for share in (0.0, 1.5):
        with pytest.raises(PrivacyError, match="probability"):
            noise_multiplier(1.0, DELTA, rounds=1, sampling=share)


def test_default_delta_needs_company() -> None:
    assert default_delta(100) == pytest.approx(100**-1.1)
    with pytest.raises(PrivacyError, match=r"set privacy\.delta"):
        default_delta(1)
