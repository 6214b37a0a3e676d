"""Budgets are what Opacus says they are, never less than what is provable, and refused if none."""

from __future__ import annotations

import math

import pytest
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from cgfedllm.errors import PrivacyError
from cgfedllm.privacy import accountant as accountant_module
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


@pytest.mark.parametrize("sampling", [1.0, 0.25])
def test_with_the_librarys_own_options_the_numbers_are_the_same(
    monkeypatch: pytest.MonkeyPatch, sampling: float
) -> None:
    """Same noise, rounds, sampling: nothing of ours but orders and precision is in between."""
    for name, library in (("rdp", RDPAccountant()), ("prv", PRVAccountant())):
        library.history = [(2.5, sampling, 9)]
        options = {"alphas": RDPAccountant.DEFAULT_ALPHAS} if name == "rdp" else {}
        monkeypatch.setattr(accountant_module, "_options", lambda _, options=options: options)
        accountant_module._spent.cache_clear()
        ours = epsilon_spent(2.5, DELTA, rounds=9, sampling=sampling, accountant=name)
        assert ours == library.get_epsilon(DELTA)
    accountant_module._spent.cache_clear()


def renyi(order: int, multiplier: float, sampling: float) -> float:
    """Of one round at a whole order (Mironov et al., arXiv 1908.10530, section 3.3)."""
    terms = [
        math.comb(order, k) * (1 - sampling) ** (order - k) * sampling**k
        * math.exp((k * k - k) / (2 * multiplier**2))
        for k in range(order + 1)
    ]  # fmt: skip
    return math.log(math.fsum(terms)) / (order - 1)


def test_against_the_published_value_of_the_moments_accountant() -> None:
    """Abadi et al., arXiv 1607.00133, section 3.2: sampling 0.01, noise 4, delta 1e-5 and 10,000
    steps are epsilon 1.26. A sharper way from Renyi divergence to epsilon has been found since
    (Balle et al., arXiv 1905.09982, theorem 21); the divergence is the same.
    """
    rounds, sampling, multiplier = 10_000, 0.01, 4.0
    spent = {order: rounds * renyi(order, multiplier, sampling) for order in range(2, 64)}
    as_published = min(e + math.log(1 / DELTA) / (order - 1) for order, e in spent.items())
    assert as_published == pytest.approx(1.26, abs=0.005)
    sharper = min(
        e - (math.log(DELTA) + math.log(order)) / (order - 1) + math.log((order - 1) / order)
        for order, e in spent.items()
    )
    ours = epsilon_spent(multiplier, DELTA, rounds=rounds, sampling=sampling)
    # orders between whole ones gain a little
    assert 0.99 * sharper < ours <= sharper * (1 + 1e-9)
    tight = epsilon_spent(multiplier, DELTA, rounds=rounds, sampling=sampling, accountant="prv")
    assert 0.8 * ours < tight < ours


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
