"""The client's half: a Flower mod that turns trained arrays into one blob.

::

    message --[mod]-- arrays as sent --> app trains --> arrays --[mod]-- one blob --> reply
                keep a reference                 change + residual -> Codec.encode
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message

from cgfedllm.codecs.feedback import encode_with_feedback
from cgfedllm.errors import CgFedLlmError, CodecError, FederationError
from cgfedllm.flower.arrays import Layout, check_alike, checksum, read_arrays
from cgfedllm.flower.choice import Choice, choose
from cgfedllm.flower.memory import open_memory
from cgfedllm.flower.messages import Announcement, arrays_of, parcel_record, refusal
from cgfedllm.flower.parcel import Parcel, pack_exact
from cgfedllm.storage import StrPath

ClientFunction = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, ClientFunction], Message]
_log = logging.getLogger("flwr")


def compression(
    codec: StrPath,
    *,
    stateless: bool = False,
    decay: float = 1.0,
    state_dir: StrPath | None = None,
) -> Mod:
    """Make the mod that compresses a client's replies to training messages.

    Put it first among the mods, so that it is outermost: what clipping or noising mods inside it
    do is coded like any other change. Other messages pass unchanged.

    Parameters
    ----------
    codec : str or path
        ``NAME`` or ``NAME:key=value,key=value`` (`cgfedllm codecs` lists them), or a codec file of
        a pre-trained codec. As in the server's `CompressedStrategy`.
    stateless : bool
        Keep nothing between rounds: what a packet loses is lost. Otherwise it is added to the
        client's next reply (error feedback), unless the codec loses nothing or is unbiased.
    decay : float
        What is kept is multiplied by this before it is added, in [0, 1].
    state_dir : str or path, optional
        Keep it on disk below this folder, where it outlives a SuperNode that is restarted.
        Otherwise it is in ``context.state``, which is the memory of one SuperNode.

    Returns
    -------
    callable
        For ``ClientApp(mods=[...])`` or ``@app.train(mods=[...])``. Where a reply cannot be
        compressed, it answers with an error that says why, and the server goes on without.

    Raises
    ------
    ConfigError, CodecError, CodecStateError
        If there is no such codec, or not with these options.
    CodecError
        If `decay` is not from 0 to 1.
    """
    choice = choose(codec)
    if not 0 <= decay <= 1:
        raise CodecError(f"decay is {decay}; it is a factor from 0 to 1")
    feedback = not (stateless or choice.codec.lossless or choice.codec.unbiased)
    folder = None if state_dir is None else Path(state_dir)

    def mod(message: Message, context: Context, call_next: ClientFunction) -> Message:
        if message.metadata.message_type.split(".")[0] != "train":
            return call_next(message, context)
        if not message.content.array_records:
            return call_next(message, context)  # nothing is sent that a change could refer to
        try:
            told, sent = _open(message, choice)
            reply = call_next(message, context)
            if reply.has_content():
                _compress(reply, context, choice, told, sent, decay if feedback else None, folder)
        except CgFedLlmError as error:
            _log.error("cgfedllm: %s", error)
            return refusal(message, error)
        return reply

    return mod


def _open(message: Message, choice: Choice) -> tuple[Announcement, ArrayRecord]:
    """What the server announces, and a copy of the record that the app may change."""
    told = Announcement.take(message.content)
    if told.codec != choice.label:
        raise FederationError(
            f"the server decodes with {told.codec}, this client codes with {choice.label}; give "
            "both the same codec and options"
        )
    _, record = arrays_of(message.content)
    if checksum(record) != told.check:
        raise FederationError(
            "the arrays are not those that the server sent; put `compression` first among the "
            "client's mods, and CompressedStrategy around all other strategies"
        )
    return told, ArrayRecord(dict(record))


def _compress(
    reply: Message,
    context: Context,
    choice: Choice,
    told: Announcement,
    sent: ArrayRecord,
    decay: float | None,
    state_dir: Path | None,
) -> None:
    """Replace the trained arrays in a reply by one blob.

    Parameters
    ----------
    decay : float or None
        Of the residual; None: there is none.
    """
    name, record = arrays_of(reply.content)
    held, trained = read_arrays(sent), read_arrays(record)
    check_alike(held, trained)
    layout = Layout(held, {name: array.dtype for name, array in trained.items()})
    exact, packet = pack_exact(layout, trained), b""
    if layout.spec is not None:
        memory = open_memory(context, layout.spec, state_dir)
        encoded = encode_with_feedback(
            choice.codec,
            layout.change(layout.spec, trained),
            choice.context(layout, layout.spec, told.round),
            residual=None if decay is None else memory.residual(told.round),
            decay=1.0 if decay is None else decay,
            enabled=decay is not None,
        )
        memory.save_memory(told.round, residual=encoded.residual)
        packet = encoded.packet
    parcel = Parcel(layout.dtypes, exact, packet)
    blob = parcel.to_bytes(held, round=told.round, check=told.check)
    reply.content[name] = parcel_record(blob)
