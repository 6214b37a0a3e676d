"""The flush: one round after the last, in which clients send what error feedback still holds.

::

    server  -- "send what you hold" -->  client: decay * residual --flush codec--> packet
    W' = W + server_lr * weighted mean   <--  (no broadcast, no training)

All connected clients are asked, whatever `federation.fraction_train` says: a residual waits with
whoever took part at any time. Those that hold none say so and do not count.

A client has the weight it always had, since that is the weight its unsent values would have
come with, and the mean is taken over those that answer. Where all took part in each round this adds
exactly what was missing; where few did, their residuals are of different age and the mean makes of
them a step of a round's size, not of as many rounds as there were.

Robust strategies and the product average judge residuals as they judge updates. A server optimiser
takes no step: residuals are leftovers of updates it has seen, so their plain mean is added.
"""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from cgfedllm.config import FederationConfig
from cgfedllm.federation.messages import ARRAYS, CONFIG, FLUSH, RUN, SERVER_ROUND, adapter_of
from cgfedllm.federation.strategy import CompressedStrategy

_OPTIMISERS = ("fedavgm", "fedadam", "fedyogi")


class FlushStrategy(CompressedStrategy):
    """As `CompressedStrategy`, but asks every client for its residual instead of training some."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One short message to each client: a residual is sent without any adapter."""
        self._global = adapter_of(self._spec, arrays)
        wanted = ConfigRecord({SERVER_ROUND: server_round, FLUSH: True, RUN: self._run})
        content = RecordDict({ARRAYS: ArrayRecord(), CONFIG: wanted})
        return [Message(content, node, "train") for node in grid.get_node_ids()]


def flush_config(federation: FederationConfig) -> FederationConfig:
    """The strategy of the flush: the run's own, or the plain mean in place of an optimiser."""
    if federation.strategy.name not in _OPTIMISERS:
        return federation
    plain = federation.strategy.model_copy(update={"name": "fedavg"})
    return federation.model_copy(update={"strategy": plain})
