"""The wrapper that puts codecs around any Flower strategy.

::

    inner.configure_train -> messages with W_t -> downlink packet          (to clients)
    packets (from clients) -> decode -> W_t + delta -> inner.aggregate_train -> W_{t+1}

The inner strategy sees whole adapters, as if nothing had been compressed, so each of Flower's
strategies works as it stands. It is wrapped, not subclassed: Flower's own wrappers (differential
privacy) refuse strategies that override `aggregate_train`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from cgfedllm import events
from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import Codec, CodecContext, CodecState, Start
from cgfedllm.config import ScreeningConfig
from cgfedllm.errors import CgFedLlmError, PacketError
from cgfedllm.federation.codec_state import CodecBroadcaster, UpdateSample
from cgfedllm.federation.downlink import Broadcaster, fingerprint
from cgfedllm.federation.fidelity import told_fidelity
from cgfedllm.federation.messages import (
    ARRAYS,
    CHECK,
    CODEC,
    CODEC_HASH,
    CODEC_KIND,
    CODEC_MISSING,
    CODEC_VERSION,
    CONFIG,
    KIND,
    METRICS,
    MOST_COUNTED,
    NUM_EXAMPLES,
    PREVIOUS,
    REFERENCE_MISSING,
    RUN,
    VERSION,
    WITHIN_CLIP,
    adapter_of,
    adapter_record,
    codec_state_record,
    numbers_of,
    packet_limit,
    packet_of,
    packet_record,
)
from cgfedllm.federation.product import ProductGap
from cgfedllm.federation.screening import Screen, Screened, Sketch
from cgfedllm.federation.strategies import averages_first, rebase
from cgfedllm.metrics import ModuleRecord
from cgfedllm.seeding import derive_seed
from cgfedllm.text import printable


@dataclass
class Received:
    """One usable reply, as it was counted."""

    client: str
    weight: float
    packet_bytes: int
    decode_seconds: float
    metrics: dict[str, float]
    fidelity: dict[str, ModuleRecord] = field(default_factory=dict)


@dataclass(frozen=True)
class _Decoded:
    """One usable reply, opened."""

    reply: Message
    received: Received
    update: AdapterUpdate
    adapter: AdapterUpdate
    """What the update leads to."""


@dataclass
class RoundTally:
    """What went over the wire in one round and what came of it.

    Parameters
    ----------
    received : list of Received
        Usable replies of the last attempt.
    failures : list of (str, str)
        Client and reason, of all attempts.
    uplink_bytes, uplinks : int
        Packets that came in, of all attempts, usable or not: their bytes and their number.
    downlink_bytes : dict of int
        Bytes sent to each client, in all attempts.
    broadcasts : int
        Packets sent.
    codec_bytes : dict of int
        Bytes of codec state sent to each client, in all attempts; not part of `downlink_bytes`.
    secagg_uplink_bytes, secagg_downlink_bytes : int
        Keys and shares of secure aggregation, in all attempts.
    screened : dict of Screened
        What screening found about the updates of the last attempt, those left out included.
    product_gap : float or None
        See `RoundRecord`.
    """

    received: list[Received] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    uplink_bytes: int = 0
    uplinks: int = 0
    downlink_bytes: dict[str, int] = field(default_factory=dict)
    broadcasts: int = 0
    codec_bytes: dict[str, int] = field(default_factory=dict)
    secagg_uplink_bytes: int = 0
    secagg_downlink_bytes: int = 0
    screened: dict[str, Screened] = field(default_factory=dict)
    product_gap: float | None = None

    def fail(self, client: str, reason: str) -> None:
        """Note why a client's reply does not count; the reason may be the client's own words."""
        self.failures.append((client, printable(reason) or "no reason given"))

    def next_attempt(self) -> RoundTally:
        """For another attempt at the round: what was sent stays sent."""
        return replace(self, received=[], screened={}, product_gap=None)


class CompressedStrategy(Strategy):
    """A Flower strategy whose messages are coded both ways.

    Parameters
    ----------
    inner : Strategy
        Aggregates decoded adapters.
    spec : AdapterSpec
        What is sent.
    uplink : Codec
        Decodes what clients send.
    broadcaster : Broadcaster
        Codes what clients are sent.
    codec_states : CodecBroadcaster or None
        Keeps clients' copies of the uplink codec's state current, if it has one.
    seed : int
        For client sampling, and for codecs with common random numbers.
    weighting : str
        "examples" or "uniform".
    summed : bool
        Hand the inner strategy W + the plain sum of the changes instead of their weighted mean
        (CG-FedLLM, arXiv 2405.13746, Algorithm 1 as printed). It must be one that averages first.
    min_replies : int
        With fewer usable replies the inner strategy is not called: a round that is tried again
        must not move its moments twice.
    client_name : callable
        From node id to the name used in logs and records.
    origin : AdapterUpdate, optional
        What the run began with, if clients can draw it too.
    run : str
        By which clients tell this run from others.
    screening : ScreeningConfig, optional
        What is odd about an update, and whether it is left out then. None: nothing is screened.
    max_norm : float, optional
        Updates with a larger Euclidean norm are left out.
    """

    def __init__(
        self,
        inner: Strategy,
        *,
        spec: AdapterSpec,
        uplink: Codec,
        broadcaster: Broadcaster,
        codec_states: CodecBroadcaster | None = None,
        seed: int,
        weighting: str = "examples",
        summed: bool = False,
        min_replies: int = 1,
        client_name: Callable[[int], str] = str,
        origin: AdapterUpdate | None = None,
        run: str = "",
        screening: ScreeningConfig | None = None,
        max_norm: float | None = None,
    ) -> None:
        self.inner = inner
        self.tally = RoundTally()
        self.attempt = 1
        self.sample: UpdateSample | None = None
        """Takes in what is decoded, in rounds that the codec adapts to."""
        self._spec = spec
        self._uplink = uplink
        self._broadcaster = broadcaster
        self._seed = seed
        self._codec_states = codec_states
        self._summed = summed
        self._weighting = "uniform" if summed else weighting
        self._min_replies = self._asked = min_replies
        self._name = client_name
        self._run = run
        self._origin = None if origin is None else origin.vector
        self._max_norm = max_norm
        self._global = AdapterUpdate.zeros(spec)
        screens = screening is not None and screening.mode != "off"
        self._screening = screening if screens else None
        self._sketch = Sketch(spec.size, seed) if screens else None

    def summary(self) -> None:
        """Log the inner strategy's summary."""
        self.inner.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients as the inner strategy does and send each what it lacks."""
        self._global = adapter_of(self._spec, arrays)
        rebase(self.inner)
        previous = self._previous()
        if previous is not None:
            config = ConfigRecord({**config, PREVIOUS: fingerprint(previous)})
        with self._sampling(server_round, "train"):
            messages = list(self.inner.configure_train(server_round, arrays, config, grid))
        messages = self._agreed(server_round, self._by_name(messages))
        self._asked = len(messages)
        return [self.coded(message) for message in messages]

    def _agreed(self, server_round: int, messages: list[Message]) -> list[Message]:
        """Those of the messages whose receivers can take part, after what has to be agreed on."""
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As `configure_train`, for the inner strategy's evaluation."""
        with self._sampling(server_round, "evaluate"):
            messages = list(self.inner.configure_evaluate(server_round, arrays, config, grid))
        return [self.coded(message) for message in self._by_name(messages)]

    def coded(self, message: Message) -> Message:
        """Replace a message's adapter by the broadcast its receiver needs; counts the bytes."""
        client = self._name(message.metadata.dst_node_id)
        broadcast = self._broadcaster.broadcast(client)
        sent = self.tally.downlink_bytes
        sent[client] = sent.get(client, 0) + len(broadcast.blob)
        self.tally.broadcasts += bool(broadcast.blob)
        config = ConfigRecord(dict(message.content.config_records[CONFIG]))
        config[RUN] = self._run
        config[KIND] = broadcast.kind
        config[VERSION] = broadcast.version
        if broadcast.check is not None:
            config[CHECK] = broadcast.check
        arrays = packet_record(broadcast.blob) if broadcast.blob else ArrayRecord()
        content = RecordDict({ARRAYS: arrays, CONFIG: config})
        if self._codec_states is not None and message.metadata.message_type == "train":
            self._add_codec_state(content, client, self._codec_states)
        return Message(content, message.metadata.dst_node_id, message.metadata.message_type)

    def _add_codec_state(self, content: RecordDict, client: str, states: CodecBroadcaster) -> None:
        broadcast, sent = states.broadcast(client), self.tally.codec_bytes
        sent[client] = sent.get(client, 0) + len(broadcast.blob)
        config = content.config_records[CONFIG]
        config[CODEC_KIND] = broadcast.kind
        config[CODEC_VERSION] = broadcast.version
        config[CODEC_HASH] = broadcast.hash
        if broadcast.blob:
            content[CODEC] = codec_state_record(broadcast.blob)

    def resend(self, message: Message, lacking: set[str]) -> Message:
        """The same message again, self-contained in what the client says it lacks."""
        client = self._name(message.metadata.dst_node_id)
        if REFERENCE_MISSING in lacking:
            self._broadcaster.forget(client)
        if CODEC_MISSING in lacking and self._codec_states is not None:
            self._codec_states.forget(client)
        return self.coded(message)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Decode replies as they come and let the inner strategy aggregate them.

        A reply that is an error, cannot be decoded, or is screened out, costs only its own share;
        it is noted in `tally.failures`.
        """
        gap, mean = ProductGap(self._spec), _Mean(self._spec)
        inputs: list[Message] = []
        for one in self._screened(server_round, replies):
            self._accept(server_round, one)
            reply, adapter, weight = one.reply, one.adapter, one.received.weight
            del one  # its update weighs as much as an adapter, and the next is decoded soon
            gap.add(adapter, weight)
            mean.add(adapter, weight)
            if averages_first(self.inner):  # one reply stands for all, whatever their number
                inputs = [reply]
            else:
                inputs.append(plain(reply, adapter, weight))
        # where each client is drawn on its own, a round may ask fewer than that, or nobody
        if len(self.tally.received) < min(self._min_replies, self._asked):
            return None, None
        average = mean.value() if inputs else self._global
        if averages_first(self.inner):
            merged = mean.summed(self._global) if self._summed else average
            inputs = [plain(inputs[0], merged, mean.weight)]
        self.tally.product_gap = gap.value(average)
        return self.inner.aggregate_train(server_round, inputs)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Hand evaluation replies to the inner strategy."""
        return self.inner.aggregate_evaluate(server_round, replies)

    def _screened(self, server_round: int, replies: Iterable[Message]) -> Iterator[_Decoded]:
        """Usable replies as they come; where odd ones are left out, once all are in."""
        context = self._context(server_round)
        decoded = self._decoded(replies, context)
        if self._screening is None or self._sketch is None:
            yield from decoded
            return
        screen = Screen(self._screening, self._sketch)
        # What is odd shows when all are there. Packets wait for that, which are small, and not
        # updates: those that stay are decoded once more.
        waiting: list[Message] = []
        for one in decoded:
            screen.add(one.received.client, one.update)
            if self._screening.mode == "reject":
                waiting.append(one.reply)
            else:
                yield one
            del one
        self.tally.screened = screen.results()
        for reply in waiting:
            client = self._name(reply.metadata.src_node_id)
            found = self.tally.screened.get(client)
            if found is not None and found.suspicion:
                self.tally.fail(client, f"screened out: {found.suspicion}")
            else:
                yield self._open(reply, context)

    def _decoded(self, replies: Iterable[Message], context: CodecContext) -> Iterator[_Decoded]:
        """Usable replies as they come."""
        for reply in replies:
            try:
                if reply.has_error():
                    raise CgFedLlmError(reply.error.reason or f"error code {reply.error.code}")
                self.tally.uplink_bytes += len(self._packet(reply))
                self.tally.uplinks += 1
                one = self._open(reply, context)
            except CgFedLlmError as error:
                client = self._name(reply.metadata.src_node_id)
                self.tally.fail(client, str(error))
                continue
            yield one
            del one

    def _open(self, reply: Message, context: CodecContext) -> _Decoded:
        began = time.perf_counter()
        packet = self._packet(reply)
        update = self._uplink.decode(packet, context)
        adapter = self._added(update)
        metrics = numbers_of(reply.content)
        examples = examples_in(metrics)
        weight = examples if self._weighting == "examples" else 1.0
        client = self._name(reply.metadata.src_node_id)
        seconds = time.perf_counter() - began
        fidelity = told_fidelity(reply.content, update)
        received = Received(client, weight, len(packet), seconds, metrics, fidelity)
        return _Decoded(reply, received, update, adapter)

    def _packet(self, reply: Message) -> bytes:
        return packet_of(reply.content, limit=packet_limit(self._spec))

    def _accept(self, server_round: int, one: _Decoded) -> None:
        """Write down and tell that a reply counts."""
        received = one.received
        self.tally.received.append(received)
        client, weight, metrics = received.client, received.weight, received.metrics
        events.publish(events.UpdateReceived(client, server_round, one.update, weight, metrics))
        if self.sample is not None:
            self.sample.add(client, one.update)

    def _context(self, server_round: int) -> CodecContext:
        """What both ends know when an update of this round is coded."""
        previous = self._previous()
        known = None if previous is None else previous.vector
        state = CodecState() if self._codec_states is None else self._codec_states.state
        # what clients hold, which a downlink that loses something keeps apart from the global one
        start = Start(self._broadcaster.reference.vector, self._origin)
        return CodecContext(self._spec, server_round, self._seed, state, known, start)

    def _added(self, update: AdapterUpdate) -> AdapterUpdate:
        """The adapter that an update leads to."""
        if self._max_norm is not None and not update.norm() <= self._max_norm:
            raise PacketError(
                f"the update's norm is {update.norm():.3g}; federation.max_update_norm is "
                f"{self._max_norm:g}"
            )
        with np.errstate(over="ignore"):
            adapter = self._global + update
        if not adapter.is_finite():
            raise PacketError("the update leads to values beyond float32; it is left out")
        return adapter

    def _previous(self) -> AdapterUpdate | None:
        """What updates may be coded against."""
        return self._broadcaster.previous if self._uplink.uses_previous else None

    def _by_name(self, messages: list[Message]) -> list[Message]:
        return sorted(messages, key=lambda message: self._name(message.metadata.dst_node_id))

    @contextmanager
    def _sampling(self, server_round: int, what: str) -> Iterator[None]:
        """Flower samples from Python's global generator; give it our seed and put it back."""
        before = random.getstate()
        random.seed(derive_seed(self._seed, "sampling", what, server_round, self.attempt))
        try:
            yield
        finally:
            random.setstate(before)


class _Mean:
    """Weighted mean of adapters that come one by one."""

    def __init__(self, spec: AdapterSpec) -> None:
        self.weight = 0.0
        self._spec = spec
        self._total = np.zeros(spec.size, np.float64)

    def add(self, adapter: AdapterUpdate, weight: float) -> None:
        self._total += weight * adapter.vector.astype(np.float64)
        self.weight += weight

    def value(self) -> AdapterUpdate:
        return AdapterUpdate(self._spec, (self._total / self.weight).astype(np.float32))

    def summed(self, start: AdapterUpdate) -> AdapterUpdate:
        """`start` plus every adapter's difference to it, where each has weight one."""
        others = (self.weight - 1) * start.vector.astype(np.float64)
        return AdapterUpdate(self._spec, (self._total - others).astype(np.float32))


def plain(reply: Message, adapter: AdapterUpdate, weight: float) -> Message:
    """A reply as a client without compression would have sent it.

    Parameters
    ----------
    adapter, weight : AdapterUpdate, float
        What it has come to.
    """
    metrics = MetricRecord({NUM_EXAMPLES: weight})
    said = reply.content.metric_records[METRICS]
    if WITHIN_CLIP in said:
        metrics[WITHIN_CLIP] = said[WITHIN_CLIP]
    reply.content = RecordDict({ARRAYS: adapter_record(adapter), METRICS: metrics})
    return reply


def examples_in(metrics: dict[str, float]) -> float:
    """How many rows a client says it trained on.

    Raises
    ------
    PacketError
        If it does not say, or it is no count.
    """
    weight = metrics.get(NUM_EXAMPLES, 0.0)
    if not 1 <= weight <= MOST_COUNTED:
        raise PacketError(f"the reply's {NUM_EXAMPLES} is {weight}; it must be a positive count")
    return weight
