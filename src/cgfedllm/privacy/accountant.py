"""From a budget to noise, and from rounds to the budget they spent. Opacus does the accounting.

One round is a Gaussian mechanism whose noise is `multiplier` times the sensitivity; with a sampling
share below 1 every client takes part independently with that probability (Poisson sampling) and
nobody learns who did. Rounds compose adaptively.

``rdp``: Renyi differential privacy (Mironov, arXiv 1702.07476; Mironov et al., arXiv 1908.10530).
``prv``: numerical composition of privacy loss random variables (Gopi et al., arXiv 2106.02848),
tighter and slower.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import Any, Literal

from cgfedllm.errors import PrivacyError

AccountantName = Literal["rdp", "prv"]

_ORDERS = [
    # fractions are slow where clients are sampled, and the bound is flat about its best order
    *(1 + x / 4 for x in range(1, 36)),
    *range(10, 64),
    # small budgets have their best order far out
    *(64, 80, 96, 128, 192, 256, 384, 512, 1024),
]
_PRV_ERROR = 0.005
_TOLERANCE = 1e-3
"""Of a budget, left unspent by the search for the multiplier."""


def check_epsilon(epsilon: float) -> None:
    """Refuse a budget that is none.

    Raises
    ------
    PrivacyError
        If epsilon is not a finite number above 0.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise PrivacyError(
            f"epsilon must be a finite number above 0 (the paper runs 0.25, 2 and 8); got {epsilon}"
        )


def check_delta(delta: float) -> None:
    """Refuse a delta that is no probability of failure.

    Raises
    ------
    PrivacyError
        If delta is not between 0 and 1, both excluded.
    """
    if not 0 < delta < 1:  # NaN is not, either
        raise PrivacyError(f"delta must lie between 0 and 1, well below 1/clients; got {delta}")


def default_delta(clients: int) -> float:
    """1 / clients^1.1 (McMahan et al., arXiv 1710.06963, section 4).

    Raises
    ------
    PrivacyError
        If that is no delta: one client alone.
    """
    if clients < 2:
        raise PrivacyError(
            f"there is no default delta for {clients} client: 1/clients^1.1 is 1; "
            "set privacy.delta, e.g. 1e-5"
        )
    return float(clients**-1.1)


def noise_multiplier(
    epsilon: float,
    delta: float,
    *,
    rounds: int,
    sampling: float = 1.0,
    accountant: AccountantName = "rdp",
) -> float:
    """Least noise, in units of the sensitivity, that keeps `rounds` rounds within a budget.

    Parameters
    ----------
    epsilon, delta : float
        Budget of all rounds together.
    rounds : int
        From 1.
    sampling : float
        Probability with which a client takes part in a round, above 0 and at most 1.
    accountant : str
        "rdp" or "prv".

    Raises
    ------
    PrivacyError
        If the budget, the rounds or the sampling share make no sense, or no noise keeps it.
    """
    check_epsilon(epsilon)
    check_delta(delta)
    _check_rounds(rounds, sampling)
    return _search(epsilon, delta, rounds, sampling, accountant)


def epsilon_spent(
    multiplier: float,
    delta: float,
    *,
    rounds: int,
    sampling: float = 1.0,
    accountant: AccountantName = "rdp",
) -> float:
    """Epsilon after `rounds` rounds; 0 after none.

    Raises
    ------
    PrivacyError
        If the multiplier is not above 0, or as `noise_multiplier`.
    """
    check_delta(delta)
    if not (math.isfinite(multiplier) and multiplier > 0):
        raise PrivacyError(f"a noise multiplier is a finite number above 0; got {multiplier}")
    if rounds == 0:
        return 0.0
    _check_rounds(rounds, sampling)
    return _spent(multiplier, delta, rounds, sampling, accountant)


@lru_cache(maxsize=64)
def _search(
    epsilon: float, delta: float, rounds: int, sampling: float, accountant: AccountantName
) -> float:
    from opacus.accountants.utils import get_noise_multiplier

    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")  # orders that do not suit a trial of the search
            return float(
                get_noise_multiplier(
                    target_epsilon=epsilon,
                    target_delta=delta,
                    sample_rate=sampling,
                    steps=rounds,
                    accountant=accountant,
                    epsilon_tolerance=_TOLERANCE * epsilon,
                    **_options(accountant),
                )
            )
    except (ValueError, RuntimeError) as error:
        raise PrivacyError(
            f"no noise keeps epsilon {epsilon:g} at delta {delta:g} over {rounds} rounds "
            f"({accountant}: {error}); raise epsilon or lower federation.rounds"
        ) from None


@lru_cache(maxsize=1024)
def _spent(
    multiplier: float, delta: float, rounds: int, sampling: float, accountant: AccountantName
) -> float:
    from opacus.accountants import create_accountant

    ledger = create_accountant(mechanism=accountant)
    ledger.history = [(multiplier, sampling, rounds)]
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            return float(ledger.get_epsilon(delta, **_options(accountant)))
    except (ValueError, RuntimeError) as error:
        raise PrivacyError(
            f"accountant {accountant!r} cannot tell what {rounds} rounds at noise multiplier "
            f"{multiplier:g} spend: {error}"
        ) from None


def _options(accountant: AccountantName) -> dict[str, Any]:
    return {"alphas": _ORDERS} if accountant == "rdp" else {"eps_error": _PRV_ERROR}


def _quiet() -> Any:
    """The prv accountant divides by zero where its densities end, and means to."""
    import numpy as np

    return np.errstate(all="ignore")


def _check_rounds(rounds: int, sampling: float) -> None:
    if rounds < 1:
        raise PrivacyError(f"a budget is for one round at least; got {rounds}")
    if not 0 < sampling <= 1:
        raise PrivacyError(f"a client takes part with a probability above 0, at most 1: {sampling}")
