"""What the [privacy] table comes to in a run: noise, delta, and epsilon after each round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cgfedllm.config import AdaptiveClipConfig, Config
from cgfedllm.errors import PrivacyError
from cgfedllm.privacy.accountant import (
    AccountantName,
    check_delta,
    check_epsilon,
    default_delta,
    epsilon_spent,
    noise_multiplier,
)
from cgfedllm.privacy.ledger import FILE, Ledger

_WEAK_DELTA = 1e-3


@dataclass(frozen=True)
class AdaptiveClip:
    """A clipping norm that follows a quantile of the updates' norms (central).

    Andrew et al., arXiv 1905.03871, algorithm 1 with geometric updates.

    Parameters
    ----------
    quantile : float
        Share of updates that should be within the norm.
    rate : float
        How fast it follows.
    count_noise : float
        Standard deviation of the noise on the number of those that are.
    """

    quantile: float
    rate: float
    count_noise: float

    def next_clip(self, clip: float, share: float) -> float:
        """The norm after a round in which this noised share was within `clip`."""
        return clip * math.exp(-self.rate * (share - self.quantile))

    def update_multiplier(self, multiplier: float) -> float:
        """Noise multiplier left for the sum, so that sum and count spend what `multiplier` does.

        Theorem 1 of the paper. A client that is worth 1/2 or -1/2 in the count moves it by 1/2.

        Raises
        ------
        PrivacyError
            If the count alone spends it all.
        """
        left = multiplier**-2 - (2 * self.count_noise) ** -2
        if left <= 0:
            raise PrivacyError(
                f"privacy.adaptive_clip.count_noise = {self.count_noise:g} leaves nothing of the "
                f"budget for the updates; it must be above {multiplier / 2:.3g}, half of the noise "
                "multiplier"
            )
        return float(left**-0.5)


@dataclass(frozen=True)
class PrivacyPlan:
    """A mechanism with its numbers; the same on the server and on every client.

    Parameters
    ----------
    mechanism : str
        "local" or "central".
    clip : float
        Longest norm C of a client's update.
    epsilon, delta : float
        Budget of the run.
    multiplier : float
        Noise z in units of the sensitivity.
    rounds, clients : int
        Of the run.
    sampling : float
        Probability with which the server draws a client for a round. Always 1 for "local": who
        sends is seen by whoever the noise is to protect from.
    accountant : str
        "rdp" or "prv".
    seed : int or None
        Where noise is repeatable.
    adaptive : AdaptiveClip or None
        Where the clipping norm adapts; `clip` is then the first round's.
    """

    mechanism: Literal["local", "central"]
    clip: float
    epsilon: float
    delta: float
    multiplier: float
    rounds: int
    clients: int
    sampling: float = 1.0
    accountant: AccountantName = "rdp"
    seed: int | None = None
    adaptive: AdaptiveClip | None = None

    @property
    def sensitivity(self) -> float:
        """How far the noised vector moves at most between neighbours, in Euclidean norm.

        central: the sum with a client and with zeros in its place, C. local: a client's update and
        any other it might have sent in its place, 2 C.
        """
        return self.clip if self.mechanism == "central" else 2 * self.clip

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each number of an update (local) or sum (central)."""
        return self.noise_std_at(self.clip)

    def noise_std_at(self, clip: float) -> float:
        """The same in a round with another clipping norm."""
        multiplier = self.multiplier
        if self.adaptive is not None:
            multiplier = self.adaptive.update_multiplier(multiplier)
        return multiplier * self.sensitivity * clip / self.clip

    @property
    def expected_clients(self) -> float:
        """What the noised sum is divided by (central)."""
        return self.sampling * self.clients

    def spent(self, rounds: int) -> float:
        """Epsilon after so many rounds, of a client that took part in each (local)."""
        return epsilon_spent(
            self.multiplier,
            self.delta,
            rounds=rounds,
            sampling=self.sampling,
            accountant=self.accountant,
        )

    def ledger(self, folder: Path, owner: str) -> Ledger:
        """The ledger of a client or the server, in its own folder."""
        return Ledger(folder / FILE, self.rounds, seed=self.seed, owner=owner)

    def describe(self, parameters: int) -> str:
        """For people: the guarantee, and how loud the noise is.

        Parameters
        ----------
        parameters : int
            Values in an update.
        """
        loudness = self.noise_std * math.sqrt(parameters)
        if self.mechanism == "central":
            loudness /= self.expected_clients
            what = "the mean of the updates"
        else:
            what = "each update"
        text = (
            f"{self.mechanism} differential privacy: epsilon {self.epsilon:g} at delta "
            f"{self.delta:.2g} over {self.rounds} rounds ({self.accountant}), noise multiplier "
            f"{self.multiplier:.4g}; {what}, of norm {self.clip:g} at most, gets noise of norm "
            f"{loudness:.3g}"
        )
        if self.adaptive is not None:
            text += (
                f". The norm follows the {self.adaptive.quantile:g} quantile of the updates' norms;"
                f" their count gets noise of {self.adaptive.count_noise:.3g} clients"
            )
        if self.delta > _WEAK_DELTA:
            text += (
                f". A delta of {self.delta:.2g} promises little: with {self.clients} clients set "
                "privacy.delta yourself, e.g. 1e-5"
            )
        if self.seed is not None:
            text += ". Noise is drawn from the run's seed: it hides nothing from who knows that"
        return text


def plan_privacy(config: Config, clients: int) -> PrivacyPlan | None:
    """Work out the mechanism of a run; None without one.

    Parameters
    ----------
    config : Config
        With the [privacy] table and the rounds.
    clients : int
        All there are, whether they take part in a round or not.

    Raises
    ------
    PrivacyError
        If the budget makes no sense, or the given noise multiplier would spend more than it.
    """
    privacy, federation = config.privacy, config.federation
    if privacy.mechanism == "none":
        return None
    check_epsilon(privacy.epsilon)
    delta = default_delta(clients) if privacy.delta is None else privacy.delta
    check_delta(delta)
    sampling = 1.0
    if privacy.mechanism == "central":
        sampling = federation.sampled(clients) / clients
    multiplier = privacy.noise_multiplier or noise_multiplier(
        privacy.epsilon,
        delta,
        rounds=federation.rounds,
        sampling=sampling,
        accountant=privacy.accountant,
    )
    plan = PrivacyPlan(
        mechanism=privacy.mechanism,
        clip=privacy.clip,
        epsilon=privacy.epsilon,
        delta=delta,
        multiplier=multiplier,
        rounds=federation.rounds,
        clients=clients,
        sampling=sampling,
        accountant=privacy.accountant,
        seed=config.seed if privacy.repeatable else None,
        adaptive=_adaptive(privacy.adaptive_clip, multiplier, sampling * clients),
    )
    if plan.adaptive is not None:
        plan.adaptive.update_multiplier(multiplier)
    spent = plan.spent(federation.rounds)
    if spent > privacy.epsilon:
        raise PrivacyError(
            f"{federation.rounds} rounds at privacy.noise_multiplier = {multiplier:g} would spend "
            f"epsilon {spent:.3g} at delta {delta:.2g}, more than privacy.epsilon = "
            f"{privacy.epsilon:g}; nothing was started. Leave noise_multiplier out, or lower "
            "federation.rounds"
        )
    return plan


def _adaptive(
    config: AdaptiveClipConfig, multiplier: float, expected: float
) -> AdaptiveClip | None:
    if not config.enabled:
        return None
    # a 20th of the clients costs thousands of them nothing (section 3.1 of the paper); with fewer
    # the multiplier itself, which makes the noise on the sum 15 % louder
    count_noise = config.count_noise or max(expected / 20, multiplier)
    return AdaptiveClip(config.quantile, config.rate, count_noise)
