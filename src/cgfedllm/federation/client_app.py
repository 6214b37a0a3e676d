"""The one ClientApp: train and evaluate on this client's rows, whatever engine calls it.

::

    message --[compression mod]-- adapter --> train  --> adapter, metrics --[mod]-- packet --> reply
                decode broadcast,                           subtract, add residual, encode
                codec state

In the flush after the last round the mod answers alone: residual in, packet out, no training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from cgfedllm import __version__, events
from cgfedllm.adapter import AdapterUpdate, Float32Array
from cgfedllm.codecs import CodecContext, CodecState, Start, codec_class, make_codec
from cgfedllm.codecs.feedback import Encoded, encode_with_feedback
from cgfedllm.codecs.learning import LearnedCodec
from cgfedllm.config import learns
from cgfedllm.data import ClientData
from cgfedllm.errors import (
    CodecStateError,
    CodecStateMissingError,
    DataError,
    PacketError,
    ReferenceMissingError,
)
from cgfedllm.evaluation.nll import evaluate_nll
from cgfedllm.federation.client_state import ClientState
from cgfedllm.federation.codec_state import CodecBroadcast, StatefulCodec, receive_state
from cgfedllm.federation.downlink import Broadcast, fingerprint, receive
from cgfedllm.federation.fidelity import tell_fidelity
from cgfedllm.federation.messages import (
    ARRAYS,
    BASE_MATRICES,
    BASE_MODEL,
    BASE_VECTORS,
    CHECK,
    CLIP,
    CODEC_HASH,
    CODEC_KIND,
    CODEC_MISSING,
    CODEC_VERSION,
    CONFIG,
    FLUSH,
    KIND,
    METRICS,
    NO_RESIDUAL,
    NUM_EXAMPLES,
    PREVIOUS,
    REFERENCE_MISSING,
    RUN,
    SERVER_ROUND,
    SESSION,
    STATUS,
    VERSION,
    WITHIN_CLIP,
    adapter_of,
    adapter_record,
    blob_in,
    codec_state_of,
    packet_limit,
    packet_of,
    packet_record,
    whole_number,
)
from cgfedllm.federation.node import node_data, node_workspace, state_folder
from cgfedllm.federation.secure_client import ACTIONS, WITHHELD, answer, encode_within, masked
from cgfedllm.privacy.mechanism import protect_update, withhold
from cgfedllm.privacy.secagg.member import Member
from cgfedllm.training.optim import OptimizerState
from cgfedllm.workspace import Workspace

# where `train` leaves optimiser moments for `compression`, in Flower's scratchpad for mods
_MOMENTS = "optimizer-moments"
# where `compression` tells `train` along which directions to train, in the same scratchpad
_DIRECTIONS = "directions"

ClientFunction = Callable[[Message, Context], Message]
ClientMod = Callable[[Message, Context, ClientFunction], Message]


@dataclass
class ClientSession:
    """One client's view while it handles one message."""

    workspace: Workspace
    data: ClientData
    state: ClientState

    @property
    def member(self) -> Member:
        """The client in secure aggregation."""
        return Member(self.state.folder, self.data.name)


def open_session(message: Message, context: Context) -> ClientSession:
    """Find out which client this is and what it remembers of the run.

    Raises
    ------
    CgFedLlmError
        As `node_workspace`, `node_data` and `state_folder`.
    """
    workspace = node_workspace(context)
    data = node_data(workspace, context)
    config = message.content.config_records.get(CONFIG, ConfigRecord())
    folder = state_folder(context, data.name, str(config.get(RUN, "")))
    uplink = codec_class(workspace.config.uplink.name)
    changes = uplink.uses_previous or workspace.downlink.uses_previous
    return ClientSession(workspace, data, ClientState(folder, workspace.spec, changes=changes))


def compression(message: Message, context: Context, call_next: ClientFunction) -> Message:
    """Flower mod: broadcast in, packet out. Put it first, so that it is outermost.

    What clipping or noising mods inside it do is coded like any other change.
    """
    action = message.metadata.message_type.split(".")[0]
    if action not in ("train", "evaluate"):
        return call_next(message, context)
    session = open_session(message, context)
    if message.content.config_records.get(CONFIG, ConfigRecord()).get(FLUSH):
        return Message(_flush(session, message.content), reply_to=message)
    began = time.perf_counter()
    secure = action == "train" and session.workspace.config.privacy.secagg.enabled
    if secure:  # before any training: what may not be sent need not be made
        request = message.content.config_records[CONFIG]
        session.member.ready(blob_in(request, SESSION))
    lacking: list[str] = []
    codec: StatefulCodec | None = None
    try:
        adapter = _receive(session, message.content)
    except ReferenceMissingError:
        lacking.append(REFERENCE_MISSING)
    try:
        codec = _receive_codec(session, message.content) if action == "train" else None
    except CodecStateMissingError:
        lacking.append(CODEC_MISSING)
    if lacking:
        status = RecordDict({CONFIG: ConfigRecord({STATUS: lacking})})
        return Message(status, reply_to=message)
    decode_seconds = time.perf_counter() - began
    config = message.content.config_records[CONFIG]
    message.content = RecordDict({ARRAYS: adapter_record(adapter), CONFIG: config})
    if codec is not None and session.workspace.config.training.subspace:
        context.state[_DIRECTIONS] = _directions(codec, session.workspace)
    try:
        reply = call_next(message, context)
    finally:
        context.state.array_records.pop(_DIRECTIONS, None)
    if codec is not None and ARRAYS in reply.content.array_records:
        moments = context.state.array_records.pop(_MOMENTS, None)
        optimizer = None if moments is None else _arrays(moments)
        _send(session, reply.content, codec, adapter, config, decode_seconds, optimizer)
    return reply


def train(message: Message, context: Context) -> Message:
    """Train the received adapter on this client's rows for one round."""
    session = open_session(message, context)
    workspace, name = session.workspace, session.data.name
    config = message.content.config_records[CONFIG]
    round_ = whole_number(config, SERVER_ROUND)
    start = adapter_of(workspace.spec, message.content.array_records[ARRAYS])
    keep = workspace.config.training.keep_optimizer
    directions = context.state.array_records.get(_DIRECTIONS)
    result = workspace.trainer.train(
        start,
        workspace.examples(session.data, "train"),
        client=name,
        round=round_,
        proximal_mu=_proximal_mu(config),
        optimizer_state=session.state.optimizer(round_) if keep else None,
        directions=None if directions is None else _arrays(directions),
    )
    if result.optimizer_state is not None:
        moments = {key: Array(values) for key, values in result.optimizer_state.items()}
        context.state[_MOMENTS] = ArrayRecord(moments)
    metrics = MetricRecord(
        {
            NUM_EXAMPLES: len(workspace.examples(session.data, "train")),
            "steps": result.steps,
            "tokens": result.tokens,
            "train-loss": result.loss,
            "train-seconds": result.seconds,
        }
    )
    trained = adapter_record(result.adapter)
    return Message(RecordDict({ARRAYS: trained, METRICS: metrics}), reply_to=message)


def evaluate(message: Message, context: Context) -> Message:
    """Negative log-likelihood of the received adapter on this client's validation rows."""
    session = open_session(message, context)
    workspace = session.workspace
    examples = workspace.examples(session.data, "validation")
    result = evaluate_nll(
        workspace.model,
        adapter_of(workspace.spec, message.content.array_records[ARRAYS]),
        examples,
        packed=workspace.packed,
        batch_size=workspace.config.evaluation.batch_size,
        what=session.data.name,
    )
    metrics = MetricRecord({NUM_EXAMPLES: len(examples), "label-tokens": result.label_tokens})
    if result.label_tokens:
        metrics["nll"] = result.nll
    return Message(RecordDict({METRICS: metrics}), reply_to=message)


def hello(message: Message, context: Context) -> Message:
    """Tell the server who this is and what it runs, before any training."""
    workspace = node_workspace(context)
    data = node_data(workspace, context)
    rows = workspace.encoded(data, "train")
    if not rows.examples:
        raise DataError(
            f"client {data.name!r} has nothing to train on: all its {rows.dropped} rows "
            "are blank, or cut to data.max_length before the first token of an answer; raise it"
        )
    about = ConfigRecord(
        {
            "client": data.name,
            "rows": len(rows.examples),
            "rows-cut": rows.truncated,
            "rows-dropped": rows.dropped,
            "spec": workspace.spec.hash.hex(),
            "release": __version__,
            BASE_MODEL: workspace.base_weights.model,
            BASE_VECTORS: workspace.base_weights.vectors,
            BASE_MATRICES: workspace.base_weights.matrices,
        }
    )
    return Message(RecordDict({CONFIG: about}), reply_to=message)


def secure_query(action: str) -> ClientFunction:
    """What answers one of the queries of secure aggregation."""

    def respond(message: Message, context: Context) -> Message:
        session = open_session(message, context)
        config = session.workspace.config
        return Message(answer(action, message.content, session.member, config), reply_to=message)

    return respond


def make_client_app(*mods: ClientMod) -> ClientApp:
    """The ClientApp, with compression outermost.

    Parameters
    ----------
    *mods : Flower mods
        Around training, inside compression: what they make of the trained adapter is coded.
    """
    app = ClientApp()
    app.train(mods=[compression, *mods])(train)
    app.evaluate(mods=[compression])(evaluate)
    app.query()(hello)
    for action in ACTIONS:
        app.query(action)(secure_query(action))
    return app


def _receive(session: ClientSession, content: RecordDict) -> AdapterUpdate:
    workspace, spec = session.workspace, session.workspace.spec
    config = content.config_records.get(CONFIG)
    if config is None or KIND not in config:
        raise PacketError("the message carries no broadcast; is the server another app?")
    kind, version = _kind(config, KIND), whole_number(config, VERSION)
    blob = b"" if kind == "hold" else packet_of(content, limit=packet_limit(spec))
    base_version = {"full": None, "increment": version - 1, "hold": version}[kind]
    base = None if base_version is None else session.state.reference(base_version)
    builds_on_change = kind == "increment" and workspace.downlink.uses_previous
    broadcast = Broadcast(kind, version, blob, config.get(CHECK))  # type: ignore[arg-type]
    adapter = receive(
        broadcast,
        workspace.downlink,
        spec,
        workspace.config.seed,
        base,
        session.state.change(version - 1) if builds_on_change else None,
    )
    if kind != "hold" and not workspace.config.federation.stateless:
        session.state.save_reference(version, adapter)
    return adapter


def _receive_codec(session: ClientSession, content: RecordDict) -> StatefulCodec:
    """The uplink codec with the state that the server decodes with."""
    workspace, name = session.workspace, session.workspace.config.uplink.name
    if not learns(name):
        return StatefulCodec(workspace.uplink, CodecState())
    config = content.config_records[CONFIG]
    if not {CODEC_KIND, CODEC_VERSION, CODEC_HASH} <= set(config):
        raise CodecStateError(
            f"the message says nothing of the state of codec {name!r}; is the server another app?"
        )
    kind, version = _kind(config, CODEC_KIND), whole_number(config, CODEC_VERSION)
    announced = config[CODEC_HASH]
    if not isinstance(announced, bytes):
        raise CodecStateError(
            "the hash of the codec state is not bytes; is the server another app?"
        )
    blob = b"" if kind == "hold" else codec_state_of(content)
    base_version = {"full": None, "increment": version - 1, "hold": version}[kind]
    base = None if base_version is None else _held_codec(session, base_version)
    broadcast = CodecBroadcast(kind, version, announced, blob)
    received = receive_state(broadcast, name, workspace.spec, base)
    if kind != "hold" and not workspace.config.federation.stateless:
        session.state.save_codec(received)
    return received


def _held_codec(session: ClientSession, version: int) -> StatefulCodec | None:
    """The codec with a version of its state that this client received, or has by itself."""
    held = session.state.codec(version)
    return _own_codec(session.workspace, version) if held is None else held


def _own_codec(workspace: Workspace, version: int) -> StatefulCodec | None:
    """What a client makes from the run's seed, or has the codec file of."""
    if not workspace.config.uplink.state_is_at_clients:
        return None
    try:
        own = StatefulCodec(workspace.uplink, workspace.codec_state)
    except CodecStateError as error:
        text = f"{error}. The server is asked for the codec state instead"
        events.publish(events.Notice(text, level="warning"))
        return None
    return own if own.state.version == version else None


def _previous(session: ClientSession, config: ConfigRecord) -> AdapterUpdate | None:
    """What the update may be coded against: the server's, if this client holds the very same."""
    if PREVIOUS not in config:
        return None
    change = session.state.change(whole_number(config, VERSION))
    if change is None or fingerprint(change) != config[PREVIOUS]:
        return None  # new here, or away for a while: the update is coded on its own
    return change


def _flush(session: ClientSession, content: RecordDict) -> RecordDict:
    """Answer to a flush: what the last round this client took part in left unsent.

    Nothing is written, so that a flush that is asked for again is answered again.
    """
    workspace, uplink = session.workspace, session.workspace.config.uplink
    round_ = whole_number(content.config_records[CONFIG], SERVER_ROUND)
    if not uplink.flush:
        raise PacketError("the server asks for a flush, and uplink.flush names no codec for one")
    residual = session.state.residual(round_)
    if residual is None:
        return RecordDict({CONFIG: ConfigRecord({STATUS: [NO_RESIDUAL]})})
    began = time.perf_counter()
    # as it would have been added to the next update
    unsent = residual.scaled(uplink.error_feedback_decay)
    context = CodecContext(workspace.spec, round_, workspace.config.seed)
    packet = make_codec(uplink.flush, uplink.flush_options).encode(unsent, context)
    metrics = MetricRecord(
        {
            NUM_EXAMPLES: len(workspace.examples(session.data, "train")),
            "update-norm": unsent.norm(),
            "encode-seconds": time.perf_counter() - began,
        }
    )
    events.publish(events.ClientFinished(session.data.name, round_, 0.0, len(packet)))
    return RecordDict({ARRAYS: packet_record(packet), METRICS: metrics})


def _send(
    session: ClientSession,
    content: RecordDict,
    codec: StatefulCodec,
    start: AdapterUpdate,
    config: ConfigRecord,
    decode_seconds: float,
    optimizer: OptimizerState | None,
) -> None:
    """Replace the trained adapter in a reply by the packet of its change."""
    workspace, name = session.workspace, session.data.name
    spec, uplink = workspace.spec, workspace.config.uplink
    trained = adapter_of(spec, content.array_records[ARRAYS])
    round_ = whole_number(config, SERVER_ROUND)
    began = time.perf_counter()
    feedback = workspace.config.keeps_residual
    update, previous = trained - start, _previous(session, config)
    privacy, secure = workspace.privacy, workspace.config.privacy.secagg.enabled
    clip = None if privacy is None else float(config.get(CLIP, privacy.clip))  # type: ignore[arg-type]
    within = clip is not None and update.norm() <= clip
    update = protect_update(
        update, privacy, session.state.folder, client=name, round=round_, clip=clip
    )
    known = None if previous is None else previous.vector
    uses_start = codec.codec.uses_start
    begun = Start(start.vector, workspace.start.vector) if uses_start else None
    coding = CodecContext(spec, round_, workspace.config.seed, codec.state, known, begun)

    def encode(wanted: AdapterUpdate) -> Encoded:
        return encode_with_feedback(
            codec.codec,
            wanted,
            coding,
            residual=session.state.residual(round_) if feedback else None,
            decay=uplink.error_feedback_decay,
            enabled=feedback,
        )

    central = privacy is not None and privacy.mechanism == "central"
    # the server clips what it decodes, unless it decodes sums only
    longest = clip if central and secure else None
    encoded = encode(update) if longest is None else encode_within(encode, update, longest)
    packet = encoded.packet
    if secure:
        packet = masked(packet, config, session.member, coding, codec.codec)
    encode_seconds = time.perf_counter() - began
    # residual and moments go into one file: a round's memory is complete or absent
    session.state.save_memory(round_, residual=encoded.residual, optimizer=optimizer)
    metrics = content.metric_records[METRICS]
    metrics["update-norm"] = update.norm()
    metrics["encode-seconds"] = encode_seconds
    metrics["decode-seconds"] = decode_seconds
    content[ARRAYS] = packet_record(packet)
    events.publish(
        events.ClientFinished(
            name,
            round_,
            float(metrics["train-loss"]),  # type: ignore[arg-type]
            len(packet),
        )
    )
    if central and workspace.config.privacy.adaptive_clip.enabled:
        metrics[WITHIN_CLIP] = int(within)
    withhold(metrics, privacy)
    # of one update, exactly: no privacy budget covers that, and sums are to hide it
    if privacy is None and not secure:
        tell_fidelity(metrics, encoded)
    if secure:
        for key in WITHHELD:
            metrics.pop(key, None)


def _directions(codec: StatefulCodec, workspace: Workspace) -> ArrayRecord:
    """Along which to train, by factor."""
    assert isinstance(codec.codec, LearnedCodec)
    known = codec.codec.directions(codec.state, workspace.spec)
    kinds = workspace.config.training.subspace or ""
    along = [f.name for f in workspace.spec if f.kind in kinds and f.name in known]
    if not along:
        raise CodecStateError(
            f"training.subspace = {kinds!r}, and the state of codec {codec.codec.name!r} knows no "
            "directions to train along; use `learned`, pre-trained, or set it to false"
        )
    return ArrayRecord({name: Array(known[name]) for name in along})


def _arrays(record: ArrayRecord) -> dict[str, Float32Array]:
    return {key: np.asarray(array.numpy(), np.float32) for key, array in record.items()}


def _kind(config: ConfigRecord, key: str) -> Literal["full", "increment", "hold"]:
    match config[key]:
        case "full" | "increment" | "hold" as kind:
            return kind
    raise PacketError(f"a {key} that is not full, increment or hold is not known here")


def _proximal_mu(config: ConfigRecord) -> float:
    mu = config.get("proximal-mu", 0.0)
    if not isinstance(mu, int | float) or not 0 <= mu < math.inf:
        raise PacketError("the message's proximal-mu is not a finite number from 0")
    return float(mu)
