"""Flower's strategies from our configuration, and their memory between rounds."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import (
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    Strategy,
)
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec
from cgfedllm.config import FederationConfig
from cgfedllm.federation.messages import ARRAYS, CONFIG, NUM_EXAMPLES
from cgfedllm.federation.private import PrivateAverage
from cgfedllm.federation.product import ProductAverage
from cgfedllm.privacy.ledger import Ledger
from cgfedllm.privacy.plan import PrivacyPlan


def make_strategy(
    config: FederationConfig,
    spec: AdapterSpec,
    private: tuple[PrivacyPlan, Ledger] | None = None,
    *,
    secure: bool = False,
) -> Strategy:
    """The inner strategy: it sees whole decoded adapters and knows nothing of codecs.

    Parameters
    ----------
    private : (PrivacyPlan, Ledger), optional
        For central differential privacy, whose strategy is one of its own.
    secure : bool
        Whether what it is handed is one sum.
    """
    common: dict[str, Any] = {
        "fraction_train": config.fraction_train,
        "fraction_evaluate": 1.0,
        "min_train_nodes": config.min_clients,
        "min_evaluate_nodes": 1,
        "min_available_nodes": config.min_clients,
        "weighted_by_key": NUM_EXAMPLES,
        "arrayrecord_key": ARRAYS,
        "configrecord_key": CONFIG,
    }
    options = config.strategy
    adaptive: dict[str, Any] = {
        "eta": options.lr,
        "beta_1": options.betas[0],
        "beta_2": options.betas[1],
        "tau": options.tau,
    }
    if private is not None:
        return PrivateAverage(spec, *private, summed=secure, **common)
    if config.aggregation == "product":
        return ProductAverage(spec, **common)
    match options.name:
        case "fedavg":
            return FedAvg(**common)
        case "fedavgm":
            return FedAvgM(**common, server_momentum=options.momentum)
        case "fedadam":
            return FedAdam(**common, **adaptive)
        case "fedyogi":
            return FedYogi(**common, **adaptive)
        case "fedprox":
            return FedProx(**common, proximal_mu=options.proximal_mu)
        case "median":
            return FedMedian(**common)
        case "trimmed_mean":
            return FedTrimmedAvg(**common, beta=options.trim)
        case "krum":
            return Krum(**common, num_malicious_nodes=options.malicious)


def averages_first(strategy: Strategy) -> bool:
    """Whether a strategy uses nothing of its replies but their weighted mean.

    For those the mean is formed while replies stream in and handed over as one reply, which gives
    the same result in memory that does not grow with the number of clients.
    """
    return type(strategy) in (FedAvg, FedAvgM, FedAdam, FedYogi, FedProx)


_DICTS = ("m_t", "v_t", "adaptive")
_LISTS = ("momentum_vector",)


def strategy_state(strategy: Strategy) -> dict[str, NDArray[Any]]:
    """A server optimiser's moments, or a clipping norm that adapts, by name, for a checkpoint."""
    state: dict[str, NDArray[Any]] = {}
    for attribute in _DICTS:
        for name, values in (getattr(strategy, attribute, None) or {}).items():
            state[f"{attribute}/{name}"] = np.asarray(values)
    for attribute in _LISTS:
        for index, values in enumerate(getattr(strategy, attribute, None) or []):
            state[f"{attribute}/{index:06d}"] = np.asarray(values)
    return state


def restore_strategy(strategy: Strategy, state: dict[str, NDArray[Any]]) -> None:
    """Inverse of `strategy_state`."""
    for attribute in _DICTS + _LISTS:
        prefix = f"{attribute}/"
        found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if found and attribute in _DICTS:
            setattr(strategy, attribute, found)
        elif found:
            setattr(strategy, attribute, [found[key] for key in sorted(found)])


def rebase(strategy: Strategy) -> None:
    """Make a strategy that remembers the global adapter take the real one next round.

    FedAvgM keeps what it returned last; with a server learning rate of our own on top, that is
    not the global adapter any more.
    """
    if isinstance(getattr(strategy, "current_arrays", None), ArrayRecord):
        strategy.current_arrays = None  # type: ignore[attr-defined]
