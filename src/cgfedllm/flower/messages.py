"""What the server's wrapper and a client's mod say to each other, beside what the app sends."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict

from cgfedllm.codecs.packet import MAX_UINT32
from cgfedllm.errors import AdapterError, CgFedLlmError, FederationError, PacketError
from cgfedllm.federation.messages import blob_of, blob_record

RECORD = "cgfedllm"
_BLOB, _STYPE = "parcel", "cgfedllm.parcel"
_MOD_FAILED = 6  # flwr.common.constant.ErrorCode.MOD_FAILED_PRECONDITION
_ROUND, _CODEC, _CHECK = "round", "codec", "check"


@dataclass(frozen=True)
class Announcement:
    """How the server will read the reply.

    Parameters
    ----------
    round : int
        Federated round.
    codec : str
        Label of the codec it decodes with.
    check : int
        Checksum of the arrays that it sends.
    """

    round: int
    codec: str
    check: int

    def record(self) -> ConfigRecord:
        """For the message."""
        return ConfigRecord({_ROUND: self.round, _CODEC: self.codec, _CHECK: self.check})

    @classmethod
    def take(cls, content: RecordDict) -> Announcement:
        """Take the announcement out of a message, so that the app sees its own records only.

        Raises
        ------
        FederationError
            If there is none, or it is not one of this release.
        """
        record = content.config_records.get(RECORD)
        if record is None:
            raise FederationError(
                "this client compresses its replies, and the server does not expect that: wrap "
                "its strategy, cgfedllm.flower.CompressedStrategy(strategy, codec=...), or remove "
                "`compression` from the client's mods"
            )
        del content[RECORD]
        match record.get(_ROUND), record.get(_CODEC), record.get(_CHECK):
            case int(round), str(codec), int(check) if 0 <= round <= MAX_UINT32:
                return cls(round, codec, check)
        raise FederationError(
            "the server's announcement cannot be read; run the same cgfedllm release on both ends"
        )


def arrays_of(content: RecordDict) -> tuple[str, ArrayRecord]:
    """Name and content of the one ArrayRecord in a message.

    Raises
    ------
    AdapterError
        If there is not exactly one.
    """
    records = list(content.array_records.items())
    if len(records) != 1:
        raise AdapterError(
            f"the message holds {len(records)} ArrayRecords; cgfedllm.flower codes messages with "
            "exactly one"
        )
    return records[0]


def parcel_record(blob: bytes) -> ArrayRecord:
    """An ArrayRecord that carries one parcel and nothing else."""
    return blob_record(_BLOB, _STYPE, blob)


def parcel_of(record: ArrayRecord, *, limit: int) -> bytes:
    """The parcel in a record.

    Parameters
    ----------
    limit : int
        Longest parcel that can make sense, in bytes.

    Raises
    ------
    PacketError
        If there is none, or it is longer than `limit`.
    """
    blob = blob_of(record, _BLOB, _STYPE)
    if blob is None:
        raise PacketError(
            "the reply is not compressed; give this client `cgfedllm.flower.compression`, first "
            "among its mods"
        )
    if len(blob) > limit:
        raise PacketError(f"parcel of {len(blob)} bytes; more than {limit} cannot be right here")
    return blob


def refusal(message: Message, error: CgFedLlmError) -> Message:
    """A reply that says what was wrong, as Flower's own mods answer."""
    return Message(Error(_MOD_FAILED, str(error)), reply_to=message)
