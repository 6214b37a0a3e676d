"""What a run will take, before it runs: bytes, transfer time and memory, by arithmetic alone.

::

    config.json --> model on torch's meta device (shapes, no values) --> LoRA --> AdapterSpec
    AdapterSpec + codec --> bytes of a packet --> x clients x rounds --> traffic, time
    shapes + dtype + batch --> memory

Packet sizes are exact for codecs whose size depends on the adapter alone, and what the options
ask for where those hold a number of bits per parameter. Memory is an estimate;
its assumptions are in `MemoryPlan`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from cgfedllm.adapter import AdapterSpec
from cgfedllm.codecs import Codec, make_codec
from cgfedllm.codecs.learning import LearnedCodec
from cgfedllm.codecs.linear import LinearCodec
from cgfedllm.codecs.packet import HEADER_SIZE
from cgfedllm.config import Config, ModelConfig, UplinkConfig
from cgfedllm.errors import ConfigError
from cgfedllm.federation.codec_state import pack_whole
from cgfedllm.privacy.secagg.collector import traffic
from cgfedllm.privacy.secagg.packet import masked_size
from cgfedllm.report.units import human_bytes
from cgfedllm.server_plan import ServerPlan, plan_server
from cgfedllm.workspace import read_codec_file, uplink_codec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ASSUMED_CLIENTS = 10
# bytes of a client's name, which secure aggregation tells the others
_ASSUMED_NAME = 10
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
# quantised weight plus its scales: one byte a weight and a float32 a row; half a byte a weight
# and a float32 per block of 64
_QUANTISED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}


@dataclass(frozen=True)
class Link:
    """A client's connection.

    Parameters
    ----------
    up_mbit, down_mbit : float
        Megabits (10^6 bits) a second from and to the client.

    Raises
    ------
    ConfigError
        If a speed is not a positive number.
    """

    up_mbit: float = 10.0
    down_mbit: float = 50.0

    def __post_init__(self) -> None:
        for name, speed in (("up", self.up_mbit), ("down", self.down_mbit)):
            if not (math.isfinite(speed) and speed > 0):
                raise ConfigError(f"{name}link speed must be a positive number, got {speed}")


@dataclass(frozen=True)
class ModelPlan:
    """The base model and its adapter, in numbers of parameters."""

    id: str
    parameters: int
    linear_parameters: int
    """Those in linear layers, which quantisation shrinks."""
    trained: int
    """Parameters that are trained and sent."""
    adapter: int
    """Parameters of the whole adapter, frozen factors included."""
    tensors: int
    """Arrays that are trained and sent."""


@dataclass(frozen=True)
class DirectionPlan:
    """What crosses in one direction. None where the codec's size depends on the values."""

    codec: str
    packet: int | None
    """Bytes of one packet, header included."""
    exact: bool
    """Whether each packet has that size; otherwise it is what the codec's options ask for."""
    packets: int
    """Packets in the whole run, all clients together."""
    whole_packet: int
    """Bytes of a packet for a client that holds no recent adapter (down, lossy codecs only)."""
    whole_packets: int
    total: int | None
    """Bytes of the whole run, all clients together."""
    total_fp32: int
    """What the same packets weigh as bare float32."""
    seconds: float | None
    """Time one client's link needs for one packet, on average."""
    flush_packet: int | None = None
    """Bytes of a residual in the flush after the last round (up only)."""
    flush_packets: int = 0
    """Clients that have taken part by then, and so hold one."""

    @property
    def ratio(self) -> float | None:
        """How many times fewer bytes than bare float32."""
        return self.total_fp32 / self.total if self.total else None


@dataclass(frozen=True)
class CodecStatePlan:
    """What crosses down of the state of a learned uplink codec, and what it has cost before."""

    state: int
    """Bytes of the whole state."""
    sent: int
    """How often it, or what it learned since the version before, is sent to a client."""
    total: int
    """Bytes of the whole run, if what it learned weighs as much as all of it: at the most."""
    tgap_uplink: int = 0
    """What pre-training cost clients' uplinks, as the codec's file says."""
    tgap_downlink: int = 0


@dataclass(frozen=True)
class SecureAggregationPlan:
    """Keys and shares of a whole run in which nobody falls out; masked packets are the uplink's."""

    uplink: int
    downlink: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on a client while it trains, and of the server's copies of the adapter.

    Estimates. `base`, `adapter`, `gradients`, `optimizer` and `residual` are counts of values times
    their width. `activations` assumes a Llama-like block with fused attention, and that each keeps
    per token 8 vectors of the hidden size (inputs and outputs of both norms, of the attention, and
    residual sums), queries, keys and values, and 4 of the inner size; with gradient checkpointing
    only each block's input and one block in full. `logits` assumes a loss on every token of a full
    micro-batch: float32 logits, their softmax and their gradient. Workspace of the libraries, the
    allocator's slack and Python itself (0.5 GB or so) come on top.
    """

    dtype: str
    """Of the base model's weights and activations."""
    base: int
    adapter: int
    gradients: int
    optimizer: int
    residual: int
    """Error feedback: one float32 vector that a client keeps between rounds."""
    activations: int
    logits: int
    server: int
    """At the most during a round, as measured with made-up clients (benchmarks/scale.py): copies of
    the adapter in messages, sums and the strategy's hands, of which those that need every reply
    hold some for each sampled client, and a packet. No base model."""
    reply: int = 0
    """Bytes of `server` that one more sampled client adds; 0 where means are formed on the way."""

    @property
    def client(self) -> int:
        """Sum of all that a client holds while it trains."""
        return (
            self.base
            + self.adapter
            + self.gradients
            + self.optimizer
            + self.residual
            + self.activations
            + self.logits
        )


@dataclass(frozen=True)
class Plan:
    """What a run will take. `rows` for people, `to_dict` for programs."""

    model: ModelPlan
    clients: int
    clients_assumed: bool
    """Whether the config leaves the number of clients to the data."""
    sampled: int
    """Clients that train in a round."""
    rounds: int
    link: Link
    uplink: DirectionPlan
    downlink: DirectionPlan
    memory: MemoryPlan
    codec_state: CodecStatePlan | None = None
    """None for uplink codecs that do not learn."""
    secagg: SecureAggregationPlan | None = None
    """None without secure aggregation."""
    server: ServerPlan | None = None
    """None unless it was asked for."""

    @property
    def round_seconds(self) -> float | None:
        """Transfer time of one round: a packet down and one up, the clients side by side."""
        if self.uplink.seconds is None or self.downlink.seconds is None:
            return None
        return self.uplink.seconds + self.downlink.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        tree = asdict(self)
        tree["uplink"]["ratio"] = self.uplink.ratio
        tree["downlink"]["ratio"] = self.downlink.ratio
        tree["memory"]["client"] = self.memory.client
        tree["round_seconds"] = self.round_seconds
        if self.server is not None:
            tree["server"] = self.server.to_dict()
        return tree

    def rows(self) -> list[tuple[str, str]]:
        """(label, text) pairs for a table."""
        model, memory = self.model, self.memory
        sent = "" if model.adapter == model.trained else f" of {model.adapter:,}"
        assumed = " (assumed: the data decide)" if self.clients_assumed else ""
        link = f"{self.link.up_mbit:g} Mbit/s up, {self.link.down_mbit:g} Mbit/s down"
        per_round = self.round_seconds
        whole = None if per_round is None else per_round * self.rounds
        return [
            ("model", f"{model.id}, {model.parameters:,} parameters"),
            ("adapter", f"{model.trained:,}{sent} parameters sent, in {model.tensors} arrays"),
            ("clients", f"{self.clients}{assumed}, {self.sampled} a round, {self.rounds} rounds"),
            ("uplink packet", _packet(self.uplink)),
            ("downlink packet", _packet(self.downlink)),
            ("uplink total", _total(self.uplink)),
            ("downlink total", _total(self.downlink)),
            *_codec_rows(self.codec_state),
            *_secagg_rows(self.secagg),
            ("transfer a round", f"{_duration(per_round)} ({link}, clients side by side)"),
            ("transfer in all", _duration(whole)),
            ("client memory", f"about {human_bytes(memory.client)} while it trains"),
            ("  base model", f"{human_bytes(memory.base)} ({memory.dtype})"),
            (
                "  adapter",
                f"{human_bytes(memory.adapter)}, gradients {human_bytes(memory.gradients)}, "
                f"optimizer {human_bytes(memory.optimizer)}, "
                f"residual {human_bytes(memory.residual)}",
            ),
            (
                "  activations",
                f"{human_bytes(memory.activations)}, logits {human_bytes(memory.logits)}",
            ),
            (
                "server memory",
                f"about {human_bytes(memory.server)}, without a base model to evaluate",
            ),
            *([] if self.server is None else self.server.rows()),
        ]


def make_plan(
    config: Config,
    *,
    link: Link | None = None,
    clients: int | None = None,
    server_mbit: float | None = None,
    training_seconds: float = 0.0,
) -> Plan:
    """Work out what a run will take. No weight is loaded, no data is read.

    Parameters
    ----------
    config : Config
        The run.
    link : Link, optional
        Each client's connection; 10 Mbit/s up and 50 down unless given.
    clients : int, optional
        Number of clients, where the config leaves it to the data (natural partitions, files).
    server_mbit : float, optional
        The server's line, each way; with it, a round of the server is rehearsed here and planned.
    training_seconds : float
        What a client trains in a round, which gives the server time.

    Raises
    ------
    ModelError
        If the model's configuration cannot be found, or LoRA cannot be attached as asked.
    ConfigError
        If `clients` or `server_mbit` is not positive, or `training_seconds` is negative.
    CodecStateError
        If the codec file cannot be used.
    """
    if clients is not None and clients < 1:
        raise ConfigError(f"clients must be at least 1, got {clients}")
    link = link or Link()
    known = clients or config.data.partition.clients
    total = known or _ASSUMED_CLIENTS
    sampled = config.federation.sampled(total)
    model_config = find_model_config(config.model)
    model, spec, full = _measure(config, model_config)
    rounds = config.federation.rounds
    trained_in = _draws(config, total, sampled)
    increments, whole = _broadcasts(config, total, trained_in)
    file = read_codec_file(config, spec)
    codec = uplink_codec(config, file)
    down = make_codec(config.downlink.name, config.downlink.options)
    secagg, packet = None, None
    if config.privacy.secagg.enabled:
        assert isinstance(codec, LinearCodec)  # or the configuration would have been refused
        packet = masked_size(codec, spec, sampled)
        up, across = traffic(sampled, sampled * (_ASSUMED_NAME + 1) - 1)
        secagg = SecureAggregationPlan(rounds * up, rounds * across)
    uplink = _direction(codec, spec, rounds * sampled, 0, link.up_mbit, packet)
    uplink = _with_flush(uplink, config.uplink, spec, len(set().union(*trained_in)))
    downlink = _direction(down, spec, increments, whole, link.down_mbit)
    memory = _memory(config, model_config, model, spec, full, sampled, (codec, down))
    codec_state = None
    if isinstance(codec, LearnedCodec):
        state = codec.initial_state(spec, config.seed) if file is None else file.state
        cost = {} if file is None else file.card.get("cost", {})
        codec_state = _codec_state(config, len(pack_whole(codec, state)), trained_in, cost)
    plan = Plan(
        model=model,
        clients=total,
        clients_assumed=known is None,
        sampled=sampled,
        rounds=rounds,
        link=link,
        uplink=uplink,
        downlink=downlink,
        memory=memory,
        codec_state=codec_state,
        secagg=secagg,
    )
    if server_mbit is None:
        return plan
    per_client = rounds * sampled
    down_total = downlink.total
    if down_total is not None and codec_state is not None:
        down_total += codec_state.total
    server = plan_server(
        config.federation,
        spec,
        (codec, down),
        None if file is None else file.state,
        mbit=server_mbit,
        clients=sampled,
        up=uplink.packet,
        down=None if down_total is None else down_total / per_client,
        memory=memory.server,
        reply_memory=memory.reply,
        transfer_seconds=plan.round_seconds,
        training_seconds=training_seconds,
    )
    return replace(plan, server=server)


def find_model_config(model: ModelConfig) -> PretrainedConfig:
    """A model's configuration: built in, from a local folder, or from the hub.

    Raises
    ------
    ModelError
        If it is in none of these.
    """
    from cgfedllm.architectures import architecture

    built_in = architecture(model.id)
    if built_in is not None:
        return built_in
    from cgfedllm.model import load_model_config

    return load_model_config(model)


def _measure(
    config: Config, model_config: PretrainedConfig
) -> tuple[ModelPlan, AdapterSpec, AdapterSpec]:
    """Count parameters on the meta device, where tensors have shapes but no memory."""
    import torch

    from cgfedllm.lora import attach_lora, full_spec, meta_model, trainable_spec

    base = meta_model(model_config)
    parameters = sum(p.numel() for p in base.parameters())
    linear = sum(
        module.weight.numel()
        for name, module in base.named_modules()
        # quantisation leaves the output layer alone
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    )
    with torch.device("meta"):
        adapted = attach_lora(base, config.lora)
    spec, full = trainable_spec(adapted), full_spec(adapted)
    model = ModelPlan(config.model.id, parameters, linear, spec.size, full.size, len(spec))
    return model, spec, full


def _draws(config: Config, clients: int, sampled: int) -> list[list[int]]:
    """Clients that train in each round, drawn at random; the run draws others."""
    rng = random.Random(config.seed)
    return [rng.sample(range(clients), sampled) for _ in range(config.federation.rounds)]


def _broadcasts(config: Config, clients: int, trained_in: list[list[int]]) -> tuple[int, int]:
    """Count (increments, whole adapters) sent down, as `federation.downlink` sends them.

    Played through with clients drawn at random: exact where all take part or all evaluate after
    every round, an estimate elsewhere.
    """
    held: dict[int, int] = {}
    increments = whole = 0
    rounds, evaluation = config.federation.rounds, config.evaluation
    stateless = config.federation.stateless

    def send(version: int, receivers: Iterable[int]) -> None:
        nonlocal increments, whole
        for client in receivers:
            before = held.get(client)
            if not stateless:
                held[client] = version
            if before == version:
                continue  # is current, nothing is sent
            if before is not None and before == version - 1:
                increments += 1
            else:
                whole += 1

    for version in range(config.last_round + 1):
        if evaluation.clients and evaluation.due(version, (0, rounds, config.last_round)):
            send(version, range(clients))
        if version < rounds:
            send(version, trained_in[version])
    return increments, whole


def _codec_state(
    config: Config,
    size: int,
    trained_in: list[list[int]],
    cost: Mapping[str, Any],
) -> CodecStatePlan:
    """Play through what `federation.codec_state` sends, the whole state being so long."""
    every = config.uplink.adapt_every
    at_start = 0 if config.uplink.state_is_at_clients else -1
    held: dict[int, int] = {}
    sent = 0
    for done, clients in enumerate(trained_in):
        version = done // every if every else 0
        for client in clients:
            sent += held.get(client, at_start) != version
            if not config.federation.stateless:
                held[client] = version
    return CodecStatePlan(
        state=size,
        sent=sent,
        total=sent * size,
        tgap_uplink=int(cost.get("uplink_bytes", 0)),
        tgap_downlink=int(cost.get("downlink_bytes", 0)),
    )


def _direction(
    codec: Codec,
    spec: AdapterSpec,
    packets: int,
    whole: int,
    mbit: float,
    masked: int | None = None,
) -> DirectionPlan:
    if codec.lossless:  # codes the whole adapter every time
        packets, whole = packets + whole, 0
    size, raw = masked or codec.expected_size(spec), HEADER_SIZE + 4 * spec.size
    total = None if size is None else size * packets + raw * whole
    count = packets + whole
    return DirectionPlan(
        codec=codec.name,
        packet=size,
        exact=masked is not None or codec.packet_size(spec) is not None,
        packets=packets,
        whole_packet=raw,
        whole_packets=whole,
        total=total,
        total_fp32=4 * spec.size * count,
        seconds=None if total is None else 8 * total / count / (mbit * 1e6),
    )


def _with_flush(
    uplink: DirectionPlan, config: UplinkConfig, spec: AdapterSpec, residuals: int
) -> DirectionPlan:
    """Add the flush to an uplink's totals; the time of an ordinary round stays what it is."""
    if not config.flush:
        return uplink
    size = make_codec(config.flush, config.flush_options).expected_size(spec)
    known = uplink.total is not None and size is not None
    return replace(
        uplink,
        flush_packet=size,
        flush_packets=residuals,
        total=uplink.total + size * residuals if known else None,  # type: ignore[operator]
        total_fp32=uplink.total_fp32 + 4 * spec.size * residuals,
    )


def _memory(
    config: Config,
    model_config: PretrainedConfig,
    model: ModelPlan,
    spec: AdapterSpec,
    full: AdapterSpec,
    sampled: int,
    codecs: tuple[Codec, Codec],
) -> MemoryPlan:
    training = config.training
    dtype = _dtype(config.model)
    width = _BYTES[dtype]
    base = model.parameters * width
    if config.model.quantization != "none":
        base -= model.linear_parameters * (width - _QUANTISED[config.model.quantization])
        dtype = f"{config.model.quantization}, rest {dtype}"
    adamw = training.optimizer == "adamw"
    moments = 2 if adamw else int(training.momentum > 0)
    codec, downlink = codecs
    known = not config.federation.stateless and (codec.uses_previous or downlink.uses_previous)
    tokens = (training.micro_batch_size or training.batch_size) * config.data.max_length
    packet = codec.expected_size(spec)
    federation = config.federation
    rule = (
        federation.strategy.name if federation.aggregation == "factors" else federation.aggregation
    )
    reply = int(4 * spec.size * _ADAPTERS_A_REPLY.get(rule, 0.0))
    return MemoryPlan(
        dtype=dtype,
        base=int(base),
        adapter=4 * full.size,
        gradients=4 * spec.size,
        optimizer=4 * spec.size * moments,
        residual=4 * spec.size * config.keeps_residual,
        activations=_activations(config, model_config, tokens, int(width)),
        logits=3 * 4 * tokens * int(model_config.vocab_size),
        server=4 * (full.size - spec.size)
        + 4 * spec.size * (_ADAPTERS.get(rule, _ADAPTERS_USUALLY) + known)
        + reply * sampled
        + (4 * spec.size if packet is None else packet),
        reply=reply,
    )


# adapters in float32 that a server's round takes by its strategy or aggregation, and those that it
# takes for each reply where it needs them all (others are handed a mean, formed as replies arrive):
# measured, benchmarks/results/scale.json
_ADAPTERS_USUALLY = 13
_ADAPTERS = {"sum": 14, "fedavgm": 16, "fedadam": 22, "fedyogi": 19}
_ADAPTERS_A_REPLY = {"median": 3.0, "trimmed_mean": 3.0, "krum": 3.0, "product": 2.1}


def _dtype(model: ModelConfig) -> str:
    if model.dtype != "auto":
        return model.dtype
    if model.device == "auto":
        import torch

        return "bfloat16" if torch.cuda.is_available() else "float32"
    return "bfloat16" if model.device.startswith("cuda") else "float32"


def _activations(config: Config, model: PretrainedConfig, tokens: int, width: int) -> int:
    hidden, layers = int(model.hidden_size), int(model.num_hidden_layers)
    heads = int(model.num_attention_heads)
    kv_heads = int(getattr(model, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(model, "head_dim", None) or hidden // heads)
    inner = int(getattr(model, "intermediate_size", None) or 4 * hidden)
    block = 8 * hidden + (heads + 2 * kv_heads) * head_dim + 4 * inner
    kept = layers * hidden + block if config.model.gradient_checkpointing else layers * block
    return tokens * kept * width


def _packet(direction: DirectionPlan) -> str:
    if direction.packet is None:
        return f"{direction.codec}: depends on the values"
    about = "" if direction.exact else "about "
    return f"{direction.codec}: {about}{direction.packet:,} bytes"


def _total(direction: DirectionPlan) -> str:
    packets = f"{direction.packets:,} packets"
    if direction.whole_packets:
        packets += f" and {direction.whole_packets:,} whole adapters"
    if direction.flush_packets:
        packets += f" and {direction.flush_packets:,} residuals"
    fp32 = f"{human_bytes(direction.total_fp32)} as float32"
    if direction.total is None or direction.ratio is None:
        return f"{packets}; {fp32}"
    return f"{human_bytes(direction.total)} in {packets}; {fp32} ({direction.ratio:.2f}x)"


def _secagg_rows(plan: SecureAggregationPlan | None) -> list[tuple[str, str]]:
    if plan is None:
        return []
    up, down = human_bytes(plan.uplink), human_bytes(plan.downlink)
    return [("secure aggregation", f"about {up} up and {down} down, of keys and shares")]


def _codec_rows(plan: CodecStatePlan | None) -> list[tuple[str, str]]:
    if plan is None:
        return []
    times = f"{plan.sent:,} times {human_bytes(plan.state)}"
    rows = [("codec state, down", f"at most {human_bytes(plan.total)}: {times}")]
    if plan.tgap_uplink or plan.tgap_downlink:
        up, down = human_bytes(plan.tgap_uplink), human_bytes(plan.tgap_downlink)
        rows.append(("pre-training", f"{up} up and {down} down, before this run"))
    return rows


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "depends on the values"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
