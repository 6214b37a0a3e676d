"""How adapters, packets and codec states sit in Flower messages: each is one array."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs.packet import MAX_UINT32
from cgfedllm.errors import AdapterError, CodecStateError, PacketError, SecureAggregationError
from cgfedllm.text import printable

ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"
NUM_EXAMPLES = "num-examples"
SERVER_ROUND = "server-round"

ADAPTER = "adapter"
PACKET = "packet"
PACKET_STYPE = "cgfedllm.packet"

# one blob of a given size crosses TLS several times faster than the same bytes in pieces,
# so a packet is one Array with a serialisation type of our own
KIND, VERSION, CHECK = "broadcast-kind", "broadcast-version", "broadcast-check"
# which run this is, for clients that keep their memory of several in one place
RUN = "run"
# fingerprint of the change that updates may be coded against
PREVIOUS = "previous"
# the client is to send its residual and not to train
FLUSH = "flush"
# the state of a learned uplink codec, beside the adapter, in training messages only
CODEC, CODEC_STATE, CODEC_STATE_STYPE = "codec", "state", "cgfedllm.codec-state"
CODEC_KIND, CODEC_VERSION, CODEC_HASH = "codec-kind", "codec-version", "codec-hash"
# where the clipping norm changes: what it is in a round, and whether an update was within it
CLIP, WITHIN_CLIP = "clip", "within-clip"
# what a node greets with of its base model, see `base_weights`
BASE_MODEL, BASE_VECTORS, BASE_MATRICES = "base-model", "base-vectors", "base-matrices"
# secure aggregation: actions of `query` messages, and what those and training messages carry
ADVERTISE, SHARE, UNMASK = "advertise", "share", "unmask"
SESSION, NAMES, KEYS, SEALED, PLACES, SHARES = (
    "secagg-session",
    "secagg-names",
    "secagg-keys",
    "secagg-sealed",
    "secagg-places",
    "secagg-shares",
)
# what a client says instead of an answer, one or several of these
STATUS = "status"
REFERENCE_MISSING, CODEC_MISSING = "reference-missing", "codec-missing"
NO_RESIDUAL = "no-residual"

MOST_COUNTED = 2**53
"""Largest count that a client can mean: those beyond it are not exact in float64 any more."""
_LARGEST_METRIC = 1e60
"""Norms of float32 values are far below; sums over clients and rounds stay finite."""
_MOST_METRICS = 64
_LONGEST_METRIC = 64


def packet_record(blob: bytes) -> ArrayRecord:
    """An ArrayRecord that carries one packet and nothing else."""
    return blob_record(PACKET, PACKET_STYPE, blob)


def packet_of(content: RecordDict, *, limit: int) -> bytes:
    """The packet in a message.

    Parameters
    ----------
    limit : int
        Longest packet that can make sense, in bytes.

    Raises
    ------
    PacketError
        If there is no packet, it is more than one array, or it is longer than `limit`.
    """
    blob = blob_of(content.array_records.get(ARRAYS), PACKET, PACKET_STYPE)
    if blob is None:
        raise PacketError("the message does not carry one packet; is it from another app?")
    if len(blob) > limit:
        raise PacketError(f"packet of {len(blob)} bytes; more than {limit} cannot be right here")
    return blob


def codec_state_record(blob: bytes) -> ArrayRecord:
    """An ArrayRecord that carries one packed codec state and nothing else."""
    return blob_record(CODEC_STATE, CODEC_STATE_STYPE, blob)


def codec_state_of(content: RecordDict) -> bytes:
    """The packed codec state in a message; whoever opens it bounds its length.

    Raises
    ------
    CodecStateError
        If there is none, or it is more than one array.
    """
    blob = blob_of(content.array_records.get(CODEC), CODEC_STATE, CODEC_STATE_STYPE)
    if blob is None:
        raise CodecStateError("the message does not carry the codec state that it announces")
    return blob


def status_of(content: RecordDict) -> set[str]:
    """What a client says instead of an answer; empty if it answers."""
    said = content.config_records.get(CONFIG, ConfigRecord()).get(STATUS)
    return {str(word) for word in said} if isinstance(said, list) else set()


def blob_in(config: ConfigRecord, key: str) -> bytes:
    """Bytes in a message's configuration.

    Raises
    ------
    SecureAggregationError
        If they are not there.
    """
    value = config.get(key)
    if not isinstance(value, bytes):
        raise SecureAggregationError(f"the message lacks {key}; is it from another app?")
    return value


def places_blob(places: Iterable[int]) -> bytes:
    """Places in a roster, two bytes each."""
    return np.asarray(list(places), "<u2").tobytes()


def places_in(config: ConfigRecord) -> list[int]:
    """Inverse of `places_blob`, from a message.

    Raises
    ------
    SecureAggregationError
        If they are not there.
    """
    blob = blob_in(config, PLACES)
    if len(blob) % 2:
        raise SecureAggregationError(f"{len(blob)} bytes are no list of places")
    return [int(place) for place in np.frombuffer(blob, "<u2")]


def secagg_bytes(config: ConfigRecord) -> int:
    """How much a message's configuration holds of secure aggregation."""
    return sum(
        len(value)
        for key, value in config.items()
        if key.startswith("secagg-") and isinstance(value, bytes)
    )


def blob_record(name: str, stype: str, blob: bytes) -> ArrayRecord:
    """An ArrayRecord that carries bytes of ours under one name, and nothing else."""
    return ArrayRecord({name: Array(dtype="uint8", shape=(len(blob),), stype=stype, data=blob)})


def blob_of(record: ArrayRecord | None, name: str, stype: str) -> bytes | None:
    """The bytes in a record that `blob_record` made; None if it is another record, or none."""
    if record is None or set(record) != {name} or record[name].stype != stype:
        return None
    return record[name].data


def numbers_of(content: RecordDict) -> dict[str, float]:
    """The metrics in a reply that are single numbers: counts, seconds, losses and norms.

    Raises
    ------
    PacketError
        If there are no metrics, more than make sense, or one of them is not a number from 0 to
        1e60.
    """
    record = content.metric_records.get(METRICS)
    if record is None:
        raise PacketError("the reply carries no metrics; is it from another app?")
    if len(record) > _MOST_METRICS or any(len(name) > _LONGEST_METRIC for name in record):
        raise PacketError(
            f"the reply's metrics are {len(record)}, or have names that are too long; at most "
            f"{_MOST_METRICS} with names of {_LONGEST_METRIC} characters make sense"
        )
    numbers = {name: v for name, v in record.items() if isinstance(v, int | float)}
    # as they are: an integer may be beyond all floats
    bad = sorted(name for name, value in numbers.items() if not 0 <= value <= _LARGEST_METRIC)
    if bad:
        names = printable(", ".join(bad))
        raise PacketError(f"the reply's metrics are not numbers from 0 to 1e60: {names}")
    return {name: float(value) for name, value in numbers.items()}


def whole_number(config: ConfigRecord, key: str) -> int:
    """A round or a version in a message.

    Raises
    ------
    PacketError
        If it is not there, or not a whole number from 0 to 2^32 - 1.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_UINT32:
        raise PacketError(
            f"the message has no {key!r} that is a whole number from 0 to 2^32 - 1; "
            "is the server another app?"
        )
    return value


def packet_limit(spec: AdapterSpec) -> int:
    """Longest packet worth reading: twice the float32 values, and room for headers."""
    return 8 * spec.size + 65536


def adapter_record(adapter: AdapterUpdate) -> ArrayRecord:
    """The whole adapter as one flat array: all that Flower's strategies and mods need.

    They work element by element or on norms of the whole, so names and shapes change nothing;
    a few hundred arrays would cost as much as several codecs.
    """
    return ArrayRecord({ADAPTER: Array(adapter.vector)})


def adapter_of(spec: AdapterSpec, record: ArrayRecord) -> AdapterUpdate:
    """Inverse of `adapter_record`.

    Raises
    ------
    AdapterError
        If the array is not an adapter of this spec.
    """
    if set(record) != {ADAPTER}:
        raise AdapterError(f"expected one array named {ADAPTER!r}, got {sorted(record)[:3]}")
    return AdapterUpdate(spec, np.asarray(record[ADAPTER].numpy(), np.float32))
