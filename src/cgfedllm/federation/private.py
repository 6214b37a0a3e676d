"""The strategy of central differential privacy: a noised mean of clipped changes (DP-FedAvg).

McMahan et al., arXiv 1710.06963, Algorithm 1, with one clipping norm over all factors. Every client
is drawn on its own with the same probability (Poisson sampling), which is what the accountant's
amplification by sampling is proved for; a fixed number of clients would not be.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.federation.messages import (
    ARRAYS,
    CLIP,
    METRICS,
    WITHIN_CLIP,
    adapter_of,
    adapter_record,
)
from cgfedllm.privacy.ledger import Ledger
from cgfedllm.privacy.mechanism import private_mean
from cgfedllm.privacy.plan import PrivacyPlan


class PrivateAverage(FedAvg):
    """Adds one noised mean of clipped changes to the adapter it sent.

    Needs every reply at once: the noise depends on what it hides (`privacy.ledger`).

    Parameters
    ----------
    spec : AdapterSpec
        What is aggregated.
    plan : PrivacyPlan
        Central.
    ledger : Ledger
        The server's.
    summed : bool
        The one reply is the adapter plus a sum of changes, each clipped by its client: there is
        nothing to clip here, nor any way to.
    **options
        As for Flower's FedAvg; its fraction of clients is not used.
    """

    def __init__(
        self,
        spec: AdapterSpec,
        plan: PrivacyPlan,
        ledger: Ledger,
        *,
        summed: bool = False,
        **options: object,
    ) -> None:
        super().__init__(**{**options, "fraction_train": 1.0})  # type: ignore[arg-type]
        self._spec = spec
        self._plan = plan
        self._ledger = ledger
        self._summed = summed
        self._global = AdapterUpdate.zeros(spec)
        self.adaptive: dict[str, NDArray[np.float64]] = {}
        """The clipping norm where it adapts, as checkpoints keep it."""

    @property
    def clip(self) -> float:
        """Longest norm of a change in the round to come, or going on."""
        return float(self.adaptive["clip"][0]) if self.adaptive else self._plan.clip

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw each client on its own; the draw of a round that is tried again is the same."""
        self._global = adapter_of(self._spec, arrays)
        if self._plan.adaptive is not None:
            config = ConfigRecord({**config, CLIP: self.clip})
        messages = list(super().configure_train(server_round, arrays, config, grid))
        if self._plan.sampling == 1:
            return messages
        nodes = list(grid.get_node_ids())
        draws = self._ledger.uniforms(len(nodes), server_round)
        drawn = {n for n, u in zip(nodes, draws, strict=True) if u < self._plan.sampling}
        return [message for message in messages if message.metadata.dst_node_id in drawn]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate whole adapters; without any reply the noise alone is added.

        Raises
        ------
        PrivacyError
            If the budget is spent.
        """
        # in one order, whatever came first: a sum that is repeated must be the same sum
        answered = sorted(
            (reply for reply in replies if reply.has_content()),
            key=lambda reply: reply.metadata.src_node_id,
        )
        changes = (
            adapter_of(self._spec, reply.content.array_records[ARRAYS]) - self._global
            for reply in answered
        )
        within = [
            bool(reply.content.metric_records[METRICS].get(WITHIN_CLIP, 0)) for reply in answered
        ]
        mean, clip = private_mean(
            changes,
            self._spec,
            self._plan,
            self._ledger,
            round=server_round,
            clip=self.clip,
            within=within,
            summed=self._summed,
        )
        if self._plan.adaptive is not None:
            self.adaptive = {"clip": np.array([clip])}
        return adapter_record(self._global + mean), MetricRecord()
