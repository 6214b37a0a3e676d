"""The server's half: a wrapper that opens replies before any Flower strategy sees them.

::

    inner.configure_train -> messages, an announcement added               (to clients)
    blobs (from clients)  -> arrays as sent + change -> inner.aggregate_train

The inner strategy sees the arrays that clients trained, under their names and in their types, so
each of Flower's strategies works as it stands, wrapped ones for differential privacy included.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from cgfedllm.errors import CgFedLlmError, FederationError, PacketError
from cgfedllm.flower.arrays import AnyArray, Layout, checksum, read_arrays
from cgfedllm.flower.choice import Choice, choose
from cgfedllm.flower.messages import RECORD, Announcement, arrays_of, parcel_of, refusal
from cgfedllm.flower.parcel import Parcel, unpack_exact
from cgfedllm.report.units import count_of, human_bytes, human_ratio
from cgfedllm.storage import StrPath

UPLINK_BYTES = "cgfedllm-uplink-bytes"
UPLINK_RATIO = "cgfedllm-uplink-ratio"
UPLINK_REFUSED = "cgfedllm-uplink-refused"

# a value of the widest type there is, and room for heads
_MOST_BYTES_A_VALUE = 16
_HEADROOM = 65536
_log = logging.getLogger("flwr")


@dataclass(frozen=True)
class _Sent:
    """What a client was sent, and what it takes to read its reply."""

    message: Message
    held: dict[str, AnyArray]
    check: int

    @property
    def limit(self) -> int:
        """Longest parcel that can make sense, in bytes."""
        return _HEADROOM + sum(_MOST_BYTES_A_VALUE * (a.size + 1) for a in self.held.values())


@dataclass
class Traffic:
    """What came up in one round.

    Parameters
    ----------
    round : int
        Federated round.
    received : dict of int
        Bytes of each usable reply, by node id.
    plain_bytes : int
        Bytes of the arrays in them, as they would have been sent without compression.
    refused : dict of str
        Why a reply was not usable, by node id. Errors of the app itself are not among them.
    """

    round: int
    received: dict[int, int] = field(default_factory=dict)
    plain_bytes: int = 0
    refused: dict[int, str] = field(default_factory=dict)

    @property
    def uplink_bytes(self) -> int:
        """Of all usable replies."""
        return sum(self.received.values())

    @property
    def ratio(self) -> float | None:
        """How many times fewer they are than plain ones; None without any."""
        return self.plain_bytes / self.uplink_bytes if self.uplink_bytes else None


class CompressedStrategy(Strategy):
    """A Flower strategy whose clients compress their replies with `compression`.

    Put it around all other wrappers: those for differential privacy then clip and aggregate what
    clients have trained. To the aggregated training metrics it adds ``cgfedllm-uplink-bytes``
    (of all usable replies), ``cgfedllm-uplink-ratio`` (how many times fewer than plain ones) and
    ``cgfedllm-uplink-refused`` (replies that were not usable).

    Parameters
    ----------
    strategy : Strategy
        Any of Flower's, or your own.
    codec : str or path
        As in the clients' `compression`.

    Attributes
    ----------
    traffic : list of Traffic
        A round each.

    Raises
    ------
    ConfigError, CodecError, CodecStateError
        If there is no such codec, or not with these options.
    FederationError
        If the strategy has a `start` of its own, which would never be called.
    """

    def __init__(self, strategy: Strategy, codec: StrPath) -> None:
        if type(strategy).start is not Strategy.start:
            raise FederationError(
                f"{type(strategy).__name__} has a `start` of its own, which a wrapper would leave "
                "out; give that `start` to a subclass of CompressedStrategy instead"
            )
        self.strategy = strategy
        self.traffic: list[Traffic] = []
        self._choice: Choice = choose(codec)
        # by node; None: it was sent no arrays, so there is nothing to open
        self._sent: dict[int, _Sent | None] = {}

    def summary(self) -> None:
        """Log the codec and the inner strategy's summary."""
        _log.info("\t├──> Uplink compressed with %s", self._choice.label)
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Tell each client, beside what the inner strategy sends it, how its reply is read.

        Raises
        ------
        AdapterError
            If the strategy sends arrays that cannot be coded.
        CodecStateError
            If the codec file is of other arrays.
        """
        self._sent = {}
        records: dict[int, tuple[dict[str, AnyArray], int]] = {}
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        for message in messages:
            if not message.content.array_records:
                self._sent[message.metadata.dst_node_id] = None
                continue
            _, record = arrays_of(message.content)
            if id(record) not in records:  # most strategies send all clients the very same
                held = read_arrays(record)
                layout = Layout(held, {name: array.dtype for name, array in held.items()})
                if layout.spec is not None:
                    self._choice.context(layout, layout.spec, server_round)  # or it says so now
                records[id(record)] = held, checksum(record)
            held, check = records[id(record)]
            self._sent[message.metadata.dst_node_id] = _Sent(message, held, check)
            told = Announcement(server_round, self._choice.label, check)
            message.content = RecordDict({**message.content, RECORD: told.record()})
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Open replies and let the inner strategy aggregate them.

        A reply that cannot be read becomes an error reply of that client, with the reason in it:
        the inner strategy treats it as it treats any client that failed.
        """
        traffic = Traffic(server_round)
        self.traffic.append(traffic)
        opened = [self._opened(reply, traffic) for reply in replies]
        self._sent = {}
        arrays, metrics = self.strategy.aggregate_train(
            server_round, [reply for reply in opened if reply is not None]
        )
        _log.info(
            "cgfedllm: %s up in %s instead of %s (%s fewer), %d refused",
            count_of(len(traffic.received), "reply", "replies"),
            human_bytes(traffic.uplink_bytes),
            human_bytes(traffic.plain_bytes),
            human_ratio(traffic.ratio),
            len(traffic.refused),
        )
        if arrays is not None:
            metrics = MetricRecord() if metrics is None else metrics
            metrics[UPLINK_BYTES] = traffic.uplink_bytes
            metrics[UPLINK_RATIO] = traffic.ratio or 1.0
            metrics[UPLINK_REFUSED] = len(traffic.refused)
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the inner strategy does."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """As the inner strategy does."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def _opened(self, reply: Message, traffic: Traffic) -> Message | None:
        """A reply as a client without compression would have sent it; None from a stranger."""
        node = reply.metadata.src_node_id
        if reply.has_error():
            return reply
        if node not in self._sent:
            _log.warning("cgfedllm: node %d replied and was not asked; ignored", node)
            return None
        sent = self._sent[node]
        if sent is None:
            return reply
        try:
            name, record = arrays_of(reply.content)
            blob = parcel_of(record, limit=sent.limit)
            arrays = self._decoded(blob, sent, traffic)
        except CgFedLlmError as error:
            traffic.refused[node] = str(error)
            _log.warning("cgfedllm: the reply of node %d is refused: %s", node, error)
            return refusal(sent.message, error)
        traffic.received[node] = len(blob)
        reply.content = RecordDict({**reply.content, name: arrays})
        return reply

    def _decoded(self, blob: bytes, sent: _Sent, traffic: Traffic) -> ArrayRecord:
        """The arrays as they were trained, in the order in which they were sent."""
        parcel = Parcel.from_bytes(blob, sent.held, round=traffic.round, check=sent.check)
        layout = Layout(sent.held, parcel.dtypes)
        arrays = unpack_exact(parcel.exact, layout)
        if layout.spec is not None:
            context = self._choice.context(layout, layout.spec, traffic.round)
            arrays |= layout.changed(self._choice.codec.decode(parcel.packet, context))
        elif parcel.packet:
            raise PacketError("the parcel holds a packet, and nothing is coded")
        traffic.plain_bytes += layout.size
        return ArrayRecord({name: Array(arrays[name]) for name in sent.held})
