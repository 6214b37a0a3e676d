"""The Gaussian mechanism, on a client's update or on the sum of all.

::

    local     x --clip to C--> + N(0, (2 C z)^2 I) --> codec --> server
    central   x --clip to C--> codec --> server: decode, clip to C again, sum,
              + N(0, (C z)^2 I), divide by the expected number of clients

A decoded update may be longer than what went into the codec, hence the second clipping. All clients
weigh the same. Whatever is done with the outcome (a codec, the server's rate) spends nothing more.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.privacy.ledger import Ledger
from cgfedllm.privacy.plan import PrivacyPlan

PRIVATE_METRICS = ("train-loss", "tokens")
"""What a client reports of its rows without noise, and under local privacy does not."""

_ROUNDING = 1 - 2.0**-23


def clip_update(update: AdapterUpdate, norm: float) -> AdapterUpdate:
    """The update, scaled down to `norm` if it is longer (Euclidean, all factors together).

    The float32 outcome is never longer than `norm`, rounding included.
    """
    length = update.norm()
    if not length > norm:
        return update
    return AdapterUpdate(
        update.spec,
        (update.vector.astype(np.float64) * (norm / length * _ROUNDING)).astype(np.float32),
    )


def protect_update(
    update: AdapterUpdate,
    plan: PrivacyPlan | None,
    folder: Path,
    *,
    client: str,
    round: int,
    clip: float | None = None,
) -> AdapterUpdate:
    """What of a client's update may leave it, before the codec.

    Parameters
    ----------
    plan : PrivacyPlan or None
        None: the update itself. central: clipped. local: clipped and noised.
    folder : Path
        The client's own; its ledger lies there.
    clip : float, optional
        The round's clipping norm, where it adapts (central).

    Raises
    ------
    PrivacyError
        If the client's budget is spent, or its ledger is damaged.
    """
    if plan is None:
        return update
    if plan.mechanism == "central":
        return clip_update(update, plan.clip if clip is None else clip)
    clipped = clip_update(update, plan.clip)
    noise = plan.ledger(folder, client).noise(clipped.vector, round)
    noisy = clipped.vector.astype(np.float64) + plan.noise_std * noise
    return AdapterUpdate(update.spec, noisy.astype(np.float32))


def withhold(metrics: MutableMapping[str, Any], plan: PrivacyPlan | None) -> None:
    """Take out of a client's report what noise on its update would not hide."""
    if plan is not None and plan.mechanism == "local":
        for name in PRIVATE_METRICS:
            metrics.pop(name, None)


def private_mean(
    updates: Iterable[AdapterUpdate],
    spec: AdapterSpec,
    plan: PrivacyPlan,
    ledger: Ledger,
    *,
    round: int,
    clip: float | None = None,
    within: Sequence[bool] = (),
    summed: bool = False,
) -> tuple[AdapterUpdate, float]:
    """Noised sum of clipped updates over the expected number of clients (central).

    Parameters
    ----------
    updates : iterable of AdapterUpdate
        As they were decoded, of the clients that were drawn and answered; may be none.
    ledger : Ledger
        The server's.
    clip : float, optional
        The round's clipping norm; the plan's if not given.
    within : sequence of bool
        Whether each client's update was no longer than that, where the norm adapts.
    summed : bool
        What comes is a sum of updates that their clients clipped.

    Returns
    -------
    mean : AdapterUpdate
        The noised mean.
    clip : float
        The next round's clipping norm.

    Raises
    ------
    PrivacyError
        If the budget is spent.
    """
    clip = plan.clip if clip is None else clip
    total = np.zeros(spec.size, np.float64)
    for update in updates:
        total += (update if summed else clip_update(update, clip)).vector
    if plan.adaptive is None:
        noise = ledger.noise(total, round)
    else:
        # one release: the sum, and a count of clients that are worth 1/2 or -1/2
        count = sum(0.5 if short else -0.5 for short in within)
        noise, of_count = np.split(ledger.noise(np.append(total, count), round), [-1])
        noisy_count = count + plan.adaptive.count_noise * float(of_count[0])
    noisy = total + plan.noise_std_at(clip) * noise
    mean = AdapterUpdate(spec, (noisy / plan.expected_clients).astype(np.float32))
    if plan.adaptive is not None:
        clip = plan.adaptive.next_clip(clip, 0.5 + noisy_count / plan.expected_clients)
    return mean, clip
