"""Rounds in which the server sees one sum: the strategy wrapper with masked packets.

::

    configure_train   query.advertise, query.share, then the training messages with sealed shares
    aggregate_train   masked packets -> one sum -> query.unmask -> decode once -> inner strategy

All the rest is as in `CompressedStrategy`. An attempt that fails for want of clients begins anew
with fresh keys. Once a sum may have been opened, only the very same clients can repeat the round
(`privacy.secagg.opened`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.codecs.linear import LinearCodec
from cgfedllm.errors import CgFedLlmError, SecureAggregationError
from cgfedllm.federation.messages import (
    ADVERTISE,
    CONFIG,
    KEYS,
    NAMES,
    PLACES,
    RUN,
    SEALED,
    SERVER_ROUND,
    SESSION,
    SHARE,
    SHARES,
    UNMASK,
    blob_in,
    numbers_of,
    packet_limit,
    packet_of,
    places_blob,
    secagg_bytes,
)
from cgfedllm.federation.strategies import averages_first
from cgfedllm.federation.strategy import CompressedStrategy, Received, examples_in, plain
from cgfedllm.privacy.secagg.collector import Collector, check_public
from cgfedllm.privacy.secagg.opened import OpenedRounds
from cgfedllm.privacy.secagg.packet import masked_numbers
from cgfedllm.privacy.secagg.rules import SESSION_BYTES

_EVERYBODY = "secure aggregation"
"""Named in records where no client alone failed."""

Exchange = Callable[[list[Message]], Iterator[Message]]


class SecureStrategy(CompressedStrategy):
    """As `CompressedStrategy`, with a linear codec whose packets only their sum is seen of.

    Parameters
    ----------
    exchange : callable
        Sends messages and yields replies until all are in or time is up.
    threshold : callable
        From the number of clients that begin a session to how many must see it through.
    folder : Path
        Where the server notes whose sums it opened.
    **options
        As for `CompressedStrategy`.
    """

    def __init__(
        self,
        *args: Any,
        exchange: Exchange,
        threshold: Callable[[int], int],
        folder: Path,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._exchange = exchange
        self._threshold = threshold
        self._folder = folder
        self._collector: Collector | None = None
        self._nodes: dict[str, int] = {}

    def _agreed(self, server_round: int, messages: list[Message]) -> list[Message]:
        """Keys and shares go round; those who saw both through are asked to train.

        Raises
        ------
        SecureAggregationError
            If so many clients as are asked cannot aggregate securely at all.
        """
        self._collector = None
        nodes = {self._name(m.metadata.dst_node_id): m.metadata.dst_node_id for m in messages}
        # of a round that was opened before, nobody but the same clients may be in the sum
        before = OpenedRounds(self._folder).members(server_round)
        self._nodes = {n: node for n, node in nodes.items() if before is None or n in before}
        if before is not None and len(self._nodes) < len(before):
            missing = ", ".join(sorted(set(before) - self._nodes.keys()))
            self._fail(_EVERYBODY, f"this round was opened before with {missing}; not there now")
            return []
        self._threshold(len(self._nodes))
        try:
            self._collector = collector = self._open_session(server_round)
        except SecureAggregationError as error:
            self._fail(_EVERYBODY, error)
            return []
        present = {collector.roster.names[place] for place in collector.present}
        chosen = []
        for message in messages:
            name = self._name(message.metadata.dst_node_id)
            if name in present:
                # Flower's strategies hand all messages one and the same content
                config = ConfigRecord(dict(message.content.config_records[CONFIG]))
                config[SESSION] = collector.session
                config[PLACES] = places_blob(collector.present)
                config[SEALED] = collector.sealed_for(name)
                message.content = RecordDict({**message.content, CONFIG: config})
                chosen.append(message)
        return chosen

    def coded(self, message: Message) -> Message:
        """As ever; shares that go along are counted."""
        coded = super().coded(message)
        self.tally.secagg_downlink_bytes += secagg_bytes(coded.content.config_records[CONFIG])
        return coded

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add masked packets up as they come, have the sum opened, and aggregate that."""
        kept: Message | None = None
        for reply in replies:
            if self._take(server_round, reply):
                kept = reply
        if self._collector is None or kept is None:
            return None, None
        try:
            total = self._opened(server_round, self._collector)
        except SecureAggregationError as error:
            self._fail(_EVERYBODY, error)
            self.tally.received.clear()
            return None, None
        clients = len(self._collector.survivors)
        # private noise is added to the sum; everything else is handed what it would have made of it
        share = 1 / clients if averages_first(self.inner) and not self._summed else 1.0
        merged = self._global + total.scaled(share)
        return self.inner.aggregate_train(server_round, [plain(kept, merged, clients)])

    def _open_session(self, server_round: int) -> Collector:
        """Phases 0 and 1: keys advertised, shares passed on."""
        assert isinstance(self._uplink, LinearCodec)
        session = secrets.token_bytes(SESSION_BYTES)
        asked = {SESSION: session, SERVER_ROUND: server_round}
        advertised = self._ask(ADVERTISE, self._nodes, asked, KEYS, check_public)
        collector = Collector(
            session,
            advertised,
            threshold=self._threshold,
            count=self._uplink.numbers(self._spec),
            reach=self._uplink.reach,
        )
        names = collector.roster.names
        asked = {
            SESSION: session,
            NAMES: "\n".join(names).encode(),
            KEYS: b"".join(collector.roster.keys),
        }
        for name, blob in self._ask(SHARE, names, asked, SEALED).items():
            try:
                collector.share(name, blob)
            except SecureAggregationError as error:
                self._fail(name, error)
        collector.close_sharing()
        return collector

    def _take(self, server_round: int, reply: Message) -> bool:
        """Add one reply to the sum; whether it was usable."""
        client, collector = self._name(reply.metadata.src_node_id), self._collector
        assert collector is not None
        try:
            if reply.has_error():
                raise CgFedLlmError(reply.error.reason or f"error code {reply.error.code}")
            began = time.perf_counter()
            blob = packet_of(reply.content, limit=packet_limit(self._spec))
            self.tally.uplink_bytes += len(blob)
            self.tally.uplinks += 1
            metrics = numbers_of(reply.content)
            examples_in(metrics)
            numbers = masked_numbers(blob, collector.session, self._context(server_round))
            collector.add(client, numbers)
        except CgFedLlmError as error:
            self._fail(client, error)
            return False
        seconds = time.perf_counter() - began
        self.tally.received.append(Received(client, 1.0, len(blob), seconds, metrics))
        return True

    def _opened(self, server_round: int, collector: Collector) -> AdapterUpdate:
        """Phase 3: the survivors help to remove the masks; what the sum decodes to."""
        assert isinstance(self._uplink, LinearCodec)
        survivors = collector.close_sum()
        OpenedRounds(self._folder).note(server_round, survivors)
        asked = {SESSION: collector.session, PLACES: places_blob(collector.survivors)}
        levels = collector.open(self._ask(UNMASK, survivors, asked, SHARES))
        context = self._context(server_round)
        return self._uplink.decode(self._uplink.packet_of(levels, context), context)

    def _ask(
        self,
        action: str,
        names: Iterable[str],
        request: dict[str, Any],
        key: str,
        check: Callable[[bytes], bytes] = bytes,
    ) -> dict[str, bytes]:
        """Send some clients the same request; the blobs in usable answers, by client."""
        messages, silent = [], set(names)
        for name in sorted(silent):
            config = ConfigRecord({**request, RUN: self._run})
            self.tally.secagg_downlink_bytes += secagg_bytes(config)
            content = RecordDict({CONFIG: config})
            messages.append(Message(content, self._nodes[name], f"query.{action}"))
        answers: dict[str, bytes] = {}
        for reply in self._exchange(messages):
            client = self._name(reply.metadata.src_node_id)
            silent.discard(client)
            try:
                if reply.has_error():
                    raise CgFedLlmError(reply.error.reason or f"error code {reply.error.code}")
                config = reply.content.config_records.get(CONFIG, ConfigRecord())
                self.tally.secagg_uplink_bytes += secagg_bytes(config)
                answers[client] = check(blob_in(config, key))
            except CgFedLlmError as error:
                self._fail(client, error)
        for client in sorted(silent):
            self._fail(client, f"no reply to {action!r} in time")
        return answers

    def _fail(self, client: str, reason: object) -> None:
        self.tally.fail(client, str(reason))
