"""From what happened in a round to its record: a row a client, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Iterator

from flwr.app import Message

from cgfedllm.federation.strategy import Received, RoundTally
from cgfedllm.metrics import ClientRecord, RoundRecord


class Stopwatch:
    """Passes replies on and adds up the time spent waiting for them."""

    def __init__(self, replies: Iterator[Message]) -> None:
        self._replies = replies
        self.seconds = 0.0

    def __iter__(self) -> Stopwatch:
        return self

    def __next__(self) -> Message:
        began = time.perf_counter()
        try:
            return next(self._replies)
        finally:
            self.seconds += time.perf_counter() - began


def client_record(received: Received, tally: RoundTally) -> ClientRecord:
    """One client's row, from what it reported and what was counted."""
    metrics = received.metrics
    screened = tally.screened.get(received.client)
    return ClientRecord(
        client=received.client,
        examples=int(metrics["num-examples"]),
        steps=int(metrics.get("steps", 0)),
        tokens=int(metrics.get("tokens", 0)),
        train_loss=metrics.get("train-loss", 0.0),
        update_norm=metrics.get("update-norm", 0.0),
        uplink_bytes=received.packet_bytes,
        downlink_bytes=tally.downlink_bytes.get(received.client, 0),
        codec_bytes=tally.codec_bytes.get(received.client, 0),
        train_seconds=metrics.get("train-seconds", 0.0),
        encode_seconds=metrics.get("encode-seconds", 0.0),
        decode_seconds=received.decode_seconds + metrics.get("decode-seconds", 0.0),
        norm_ratio=None if screened is None else screened.norm_ratio,
        cosine=None if screened is None else screened.cosine,
        suspicion="" if screened is None else screened.suspicion,
        fidelity=received.fidelity,
    )


def time_split(
    record: RoundRecord, tally: RoundTally, seconds: dict[str, float], total: float
) -> dict[str, float]:
    """Where the round's time went.

    Client seconds are summed over clients; `transfer` is waiting that no client accounts for
    (copying, transport, idle), `aggregate` what the server did beyond decoding, adapting the codec
    included.
    """
    train = sum(client.train_seconds for client in record.clients)
    encode = sum(client.encode_seconds for client in record.clients)
    decode = sum(client.decode_seconds for client in record.clients)
    server_decode = sum(received.decode_seconds for received in tally.received)
    waiting = seconds.get("waiting", 0.0)
    exchange = seconds.get("exchange", 0.0) - waiting - server_decode
    on_clients = train + encode + decode - server_decode
    return {
        "train": train,
        "encode": encode,
        "transfer": max(0.0, waiting - on_clients),
        "decode": decode,
        "aggregate": max(0.0, exchange) + seconds.get("adapt", 0.0),
        "evaluate": seconds.get("evaluate", 0.0),
        "checkpoint": 0.0,
        "total": total,
    }
