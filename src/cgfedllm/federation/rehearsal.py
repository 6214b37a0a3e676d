"""One round of a server with made-up clients: what it costs, without a model or a network.

::

    one packet of a made-up update --as often as there are clients--> CompressedStrategy --> adapter

Messages, decoding and aggregation are those of a run. What a transport does with the bytes, and
evaluation, are not in it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import Codec, CodecContext, CodecState, Start
from cgfedllm.codecs.learning import LearnedCodec
from cgfedllm.config import FederationConfig
from cgfedllm.errors import FederationError
from cgfedllm.federation.codec_state import CodecBroadcaster
from cgfedllm.federation.downlink import Broadcaster
from cgfedllm.federation.inprocess import InProcessGrid
from cgfedllm.federation.messages import (
    ARRAYS,
    METRICS,
    NUM_EXAMPLES,
    adapter_record,
    packet_record,
)
from cgfedllm.federation.strategies import make_strategy
from cgfedllm.federation.strategy import CompressedStrategy
from cgfedllm.seeding import generator

_SEED = 0
_ROUND = 1


@dataclass(frozen=True)
class Rehearsed:
    """What one round took, in seconds of processor time.

    Parameters
    ----------
    clients : int
        Replies that were decoded and aggregated.
    packet : int
        Bytes of each.
    broadcast_seconds : float
        Making all clients' messages.
    decode_seconds : float
        Opening, decoding and checking all replies.
    aggregate_seconds : float
        The rest of the round.
    """

    clients: int
    packet: int
    broadcast_seconds: float
    decode_seconds: float
    aggregate_seconds: float

    @property
    def reply_seconds(self) -> float:
        """Of one client."""
        total = self.broadcast_seconds + self.decode_seconds + self.aggregate_seconds
        return total / self.clients


class Rehearsal:
    """A server and the packet that all of its made-up clients send.

    Parameters
    ----------
    federation : FederationConfig
        Strategy, aggregation and weighting; all clients take part.
    spec : AdapterSpec
        The adapter.
    uplink, downlink : Codec
        Both ways.
    state : CodecState
        Of the uplink codec; empty for those that do not learn.
    """

    def __init__(
        self,
        federation: FederationConfig,
        spec: AdapterSpec,
        uplink: Codec,
        downlink: Codec,
        state: CodecState,
    ) -> None:
        self._federation = federation.model_copy(update={"fraction_train": 1.0, "min_clients": 1})
        self._spec, self._uplink, self._downlink, self._state = spec, uplink, downlink, state
        self._origin = made_up_update(spec, 1)
        self._adapter = self._origin + made_up_update(spec, 2)
        start = Start(self._adapter.vector, self._origin.vector) if uplink.uses_start else None
        context = CodecContext(spec, _ROUND, _SEED, state, start=start)
        self._packet = uplink.encode(made_up_update(spec, 3), context)

    def round(self, clients: int) -> Rehearsed:
        """Broadcast to so many clients and aggregate as many replies, made as they are taken.

        Raises
        ------
        FederationError
            If a reply could not be used.
        """
        strategy, grid = self._strategy(), _grid(clients)
        began = time.process_time()
        start = adapter_record(self._adapter)
        messages = list(strategy.configure_train(_ROUND, start, ConfigRecord(), grid))
        broadcast = time.process_time() - began
        began, wall = time.process_time(), time.perf_counter()
        strategy.aggregate_train(_ROUND, self._replies(messages))
        took, wall = time.process_time() - began, time.perf_counter() - wall
        if strategy.tally.failures:
            raise FederationError(f"a rehearsed reply failed: {strategy.tally.failures[0][1]}")
        # the tally has the time on the clock; on a busy machine a part of it was others'
        decode = took / wall * sum(received.decode_seconds for received in strategy.tally.received)
        return Rehearsed(clients, len(self._packet), broadcast, decode, took - decode)

    def _strategy(self) -> CompressedStrategy:
        federation, spec = self._federation, self._spec
        broadcaster = Broadcaster(spec, self._downlink, _SEED, stateless=federation.stateless)
        broadcaster.advance(self._adapter, _ROUND - 1)
        states = None
        if isinstance(self._uplink, LearnedCodec):
            states = CodecBroadcaster(spec, self._uplink, self._state, held=True)
        return CompressedStrategy(
            make_strategy(federation, spec),
            spec=spec,
            uplink=self._uplink,
            broadcaster=broadcaster,
            codec_states=states,
            seed=_SEED,
            weighting=federation.weighting,
            summed=federation.aggregation == "sum",
            origin=self._origin,
        )

    def _replies(self, messages: list[Message]) -> Iterator[Message]:
        for message in messages:
            content = RecordDict(
                {
                    # copied, as what a transport delivers is in memory of its own
                    ARRAYS: packet_record(bytes(bytearray(self._packet))),
                    METRICS: MetricRecord({NUM_EXAMPLES: 8}),
                }
            )
            yield Message(content, reply_to=message)


def made_up_update(spec: AdapterSpec, seed: int) -> AdapterUpdate:
    """What AdamW makes of a factor in few steps: one strong direction, noise, saturation."""
    rng = generator(seed, "rehearsal")
    update = AdapterUpdate.zeros(spec)
    for view in update.views().values():
        rows = view.reshape(view.shape[0] if view.ndim else 1, -1)
        strong = rng.standard_normal((len(rows), 1)) * rng.standard_normal((1, rows.shape[1]))
        rows[...] = 1e-3 * np.tanh(strong + 0.7 * rng.standard_normal(rows.shape))
    return update


def _grid(clients: int) -> InProcessGrid:
    """Nodes that are never asked anything."""
    contexts = {
        node: Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
        for node in range(2, 2 + clients)
    }
    return InProcessGrid(ClientApp(), contexts)
