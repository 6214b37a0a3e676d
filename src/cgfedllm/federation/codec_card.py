"""The card of the codec that a run leaves behind: where it comes from and what it has cost."""

from __future__ import annotations

from typing import Any

from cgfedllm.codecs import CodecState
from cgfedllm.config import Config
from cgfedllm.metrics import RoundRecord


def card_after_run(
    card: dict[str, Any], config: Config, *, state: CodecState, adapted: bool, last: RoundRecord
) -> dict[str, Any]:
    """The card of a codec after a federated run.

    A codec that adapted has learned from all that clients sent in the run, so whoever begins
    another run with it is charged for that traffic too, as for that of pre-training.

    Parameters
    ----------
    card : dict
        Of the codec file that the run began with; empty where there was none.
    config : Config
        Of the run.
    state : CodecState
        At the end.
    adapted : bool
        Whether it is another one than at the start.
    last : RoundRecord
        Of the last round.
    """
    cost = {"uplink_bytes": 0, "downlink_bytes": 0, **card.get("cost", {})}
    if adapted:
        cost["uplink_bytes"] += last.uplink_bytes_total
        cost["downlink_bytes"] += last.downlink_bytes_total + last.codec_bytes_total
        said = f"{cost['basis']} " if cost.get("basis") else ""
        cost["basis"] = f"{said}Federated run {config.name}: all its traffic, as it adapted there."
    run = {
        "run": config.name,
        "rounds": last.round,
        "adapt_every": config.uplink.adapt_every,
        "state_version": state.version,
    }
    return {**card, "federated": [*card.get("federated", []), run], "cost": cost}
