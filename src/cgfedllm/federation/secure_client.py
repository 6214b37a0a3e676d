"""Secure aggregation in a client's messages: three queries, and masks on what training sends."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from cgfedllm import events
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.codecs import Codec, CodecContext
from cgfedllm.codecs.entropy import Int32Array
from cgfedllm.codecs.feedback import Encoded
from cgfedllm.codecs.linear import LinearCodec
from cgfedllm.config import Config
from cgfedllm.errors import CodecError, SecureAggregationError
from cgfedllm.federation.messages import (
    ADVERTISE,
    CONFIG,
    KEYS,
    NAMES,
    SEALED,
    SERVER_ROUND,
    SESSION,
    SHARE,
    SHARES,
    UNMASK,
    blob_in,
    places_in,
)
from cgfedllm.privacy.secagg.member import Member
from cgfedllm.privacy.secagg.packet import masked_packet
from cgfedllm.privacy.secagg.rules import Roster, threshold_of

ACTIONS = (ADVERTISE, SHARE, UNMASK)

WITHHELD = ("train-loss", "tokens", "update-norm")
"""What a client reports of its own update or rows, and does not where only sums may be seen."""

_STEP_BACK = 0.99
# of the energy; of Gaussian numbers, 5 % are cut off then
_MANY = 0.2


def answer(action: str, content: RecordDict, member: Member, config: Config) -> RecordDict:
    """Answer one of the three queries.

    Raises
    ------
    SecureAggregationError
        If the run has no secure aggregation, or what is asked must not be answered.
    """
    if not config.privacy.secagg.enabled:
        raise SecureAggregationError("this run has no secure aggregation (privacy.secagg.enabled)")
    request = content.config_records.get(CONFIG, ConfigRecord())
    session = blob_in(request, SESSION)
    match action:
        case "advertise":
            round_ = int(request[SERVER_ROUND])  # type: ignore[arg-type]
            reply = {KEYS: member.advertise(session, round_)}
        case "share":
            names = blob_in(request, NAMES).decode(errors="replace").split("\n")
            roster = Roster.of(names, blob_in(request, KEYS))
            reply = {SEALED: member.share(session, roster, threshold(config, len(roster)))}
        case _:
            reply = {SHARES: member.unmask(session, places_in(request))}
    return RecordDict({CONFIG: ConfigRecord(reply)})  # type: ignore[arg-type]


def threshold(config: Config, members: int) -> int:
    """What server and clients each take the threshold to be.

    Raises
    ------
    SecureAggregationError
        As `threshold_of`.
    """
    wanted, least = config.privacy.secagg.threshold, config.federation.min_clients
    return threshold_of(members, wanted=wanted, least=least)


def masked(
    packet: bytes, request: ConfigRecord, member: Member, context: CodecContext, codec: Codec
) -> bytes:
    """A client's packet, masked for the session that the server's message names.

    Parameters
    ----------
    codec : Codec
        That made the packet: with a codec file it has options that the configuration lacks.

    Raises
    ------
    CodecError
        If the codec is not linear.
    SecureAggregationError
        If there is no such session here, or too few peers share it.
    """
    if not isinstance(codec, LinearCodec):
        raise CodecError(f"packets of {codec.name!r} do not add up, so they cannot be masked")
    session, reach = blob_in(request, SESSION), codec.reach
    levels = codec.levels(packet, context)
    _tell_step(levels, reach)
    sealed = blob_in(request, SEALED)
    numbers = member.mask(session, places_in(request), sealed, levels, reach)
    return masked_packet(numbers, session, context)


def _tell_step(levels: Int32Array, reach: int) -> None:
    """Warn where the step that all clients were configured with does not suit this update."""
    energies = np.square(levels, dtype=np.float64)
    cut = float(energies[np.abs(levels) == reach].sum() / (energies.sum() or 1.0))
    text = ""
    if not levels.any():
        text = "all numbers of an update round to zero: nothing is sent; lower"
    elif reach > 1 and cut > _MANY:
        text = f"numbers with {100 * cut:.0f} % of an update's energy are cut off; raise"
    if text:
        text += " the codec's scale_exponent (uplink.options)"
        events.publish(events.Notice(f"secure aggregation: {text}", "warning"))


def encode_within(
    encode: Callable[[AdapterUpdate], Encoded], update: AdapterUpdate, norm: float
) -> Encoded:
    """Encode an update so that what decodes is no longer than a norm.

    Rounding may lengthen an update. Where the server decodes each it clips again; where it sees
    sums only, the client has to see to it.
    """
    encoded = encode(update)
    while (length := encoded.decoded.norm()) > norm:
        # ends at the latest where all numbers round to zero
        update = update.scaled(_STEP_BACK * norm / length)
        encoded = encode(update)
    return encoded
