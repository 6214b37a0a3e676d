"""Tell what a file or folder of this program is and what it holds, without loading a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, Factor
from cgfedllm.codecs.packet import HEADER_SIZE, MAGIC, NO_STATE, Packet
from cgfedllm.errors import (
    AdapterError,
    CheckpointError,
    CodecError,
    CodecStateError,
    PacketError,
)
from cgfedllm.metrics import RoundRecord
from cgfedllm.report.model_card import POOLS, cost_text, fidelity_text, options_text
from cgfedllm.report.summary import Summary, Traffic, summarise
from cgfedllm.report.units import count_of, human_bytes, human_ratio, human_seconds
from cgfedllm.report.weight_change import weight_changes
from cgfedllm.runs import RunFolder
from cgfedllm.storage import load_tensors, parse_json, read_json
from cgfedllm.text import printable
from cgfedllm.tgap.codec_file import is_codec_file, load_codec_file
from cgfedllm.tgap.index import INDEX, is_recording
from cgfedllm.tgap.recording import Recording

_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Parameters
    ----------
    kind : str
        "run", "recording", "adapter", "packet", "codec", "checkpoint" or "tensors".
    path : Path
        Where.
    facts : dict of str
        Label to text, in reading order.
    """

    kind: str
    path: Path
    facts: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str]]:
        """Label and text, in reading order; the first row says what it is."""
        return [("kind", self.kind), ("path", str(self.path)), *self.facts.items()]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return {"kind": self.kind, "path": str(self.path), **self.facts}


def inspect(path: str | Path) -> Inspection:
    """Look into a folder (run, recording, PEFT adapter) or a file (packet, codec, checkpoint).

    Raises
    ------
    CheckpointError
        If there is nothing at `path`, or it is none of these, or it is damaged.
    PacketError
        If a packet is damaged.
    RecordingError
        If a recording is damaged.
    CodecStateError
        If a codec file is damaged.
    """
    found = _found(Path(path))
    # most of it was written by others, and goes to a terminal
    return replace(found, facts={printable(k, 80): printable(v) for k, v in found.facts.items()})


def _found(path: Path) -> Inspection:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_dir():
        run = RunFolder(path)
        if run.exists():
            return _run(run)
        if (path / _ADAPTER_CONFIG).is_file():
            return _adapter(path)
        if is_recording(path):
            return _recording(path)
        raise CheckpointError(
            f"{path} is neither a run folder (config.toml) nor an adapter folder "
            f"({_ADAPTER_CONFIG}) nor a recording ({INDEX})"
        )
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if start == MAGIC:
        return _packet(path)
    if path.name == _ADAPTER_CONFIG or path.name == _ADAPTER_WEIGHTS:
        return _found(path.parent)
    if path.name == INDEX and is_recording(path.parent):
        return _recording(path.parent)
    if is_codec_file(path):
        return _codec(path)
    return _tensors(path)


def _packet(path: Path) -> Inspection:
    try:
        packet = Packet.from_bytes(path.read_bytes())
    except PacketError as error:
        raise PacketError(f"{path}: {error}") from None
    total = HEADER_SIZE + len(packet.payload)
    bits = 8 * total / packet.parameters if packet.parameters else math.nan
    learned = packet.state_hash != NO_STATE
    return Inspection(
        "packet",
        path,
        {
            "codec": _named(packet.codec, packet.codec_version),
            "round": str(packet.round),
            "parameters": f"{packet.parameters:,}",
            "adapter spec hash": packet.spec_hash.hex(),
            "codec state hash": packet.state_hash.hex() if learned else "none",
            "previous aggregate": "needed to decode it" if packet.uses_previous else "not used",
            "payload": f"{len(packet.payload):,} bytes",
            "header": f"{HEADER_SIZE} bytes",
            "bits per parameter": f"{bits:.4f} (header included)",
            "times fewer than fp32": human_ratio(32 / bits),
            "checksum": "matches",
        },
    )


def _named(codec: str, version: int) -> str:
    """A codec's name and version, and whether this installation has it."""
    from cgfedllm.codecs import codec_class

    try:
        here = codec_class(codec).version
    except CodecError:
        return f"{codec}, version {version} (not known to this installation)"
    other = "" if here == version else f" (this installation has {here})"
    return f"{codec}, version {version}{other}"


def _adapter(path: Path) -> Inspection:
    config = read_json(path / _ADAPTER_CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / _ADAPTER_CONFIG} is not a PEFT configuration")
    tensors, _ = load_tensors(path / _ADAPTER_WEIGHTS)
    try:
        spec = AdapterSpec.from_shapes({name: a.shape for name, a in tensors.items()})
    except AdapterError as error:
        raise CheckpointError(f"{path / _ADAPTER_WEIGHTS}: {error}") from None
    if any(values.dtype.kind != "f" for values in tensors.values()):
        raise CheckpointError(f"{path / _ADAPTER_WEIGHTS} holds values that are not floats")
    targets = config.get("target_modules")
    layers = {factor.layer for factor in spec if factor.layer is not None}
    finite = all(np.isfinite(a).all() for a in tensors.values())
    rank, alpha = config.get("r"), config.get("lora_alpha")
    facts = {
        "base model": str(config.get("base_model_name_or_path")),
        "method": f"{config.get('peft_type', '?')}, rank {rank}, alpha {alpha}",
        "target modules": ", ".join(sorted(map(str, targets)))
        if isinstance(targets, list)
        else str(targets),
        "factors": f"{len(spec)} in {count_of(len(layers), 'layer')}",
        "parameters": f"{spec.size:,} ({human_bytes(4 * spec.size)} as fp32)",
        "values": "all finite" if finite else "NaN or infinity among them: do not use this adapter",
    }
    for module, text in _norms(spec, tensors, config).items():
        facts[f"norms {module}"] = text
    return Inspection("adapter", path, facts)


def _norms(
    spec: AdapterSpec, tensors: Mapping[str, NDArray[Any]], config: Mapping[str, Any]
) -> dict[str, str]:
    """Frobenius norms over all layers, one row a kind of module."""
    squares: dict[str, dict[str, float]] = {}

    def add(factor: Factor, what: str, value: float) -> None:
        of_module = squares.setdefault(factor.module.rsplit(".", 1)[-1], {})
        of_module[what] = of_module.get(what, 0.0) + value

    for factor in spec:
        array = tensors[factor.name].astype(np.float64)
        add(factor, factor.kind or "value", float(np.square(array).sum()))
    for factor, change in weight_changes(spec, tensors, config):
        add(factor, "BA", change**2)
    texts = {}
    for module, parts in squares.items():
        change_text = ""
        if "BA" in parts:
            change_text = f", weight change {math.sqrt(parts['BA']):.4g}"
        own = ", ".join(f"{k} {math.sqrt(v):.4g}" for k, v in parts.items() if k != "BA")
        texts[module] = own + change_text
    return texts


def _run(run: RunFolder) -> Inspection:
    config = run.config()
    records = run.records()
    summary = summarise(records)
    rounds = config.last_round
    checkpoints = any(run.checkpoints_dir.glob("[!.]*"))
    if summary.rounds >= rounds and records:
        state = "finished"
    elif checkpoints:
        state = f"unfinished; `cgfedllm resume {run.path}` goes on"
    else:
        state = "unfinished, without a checkpoint; it must start again"
    facts = {
        "state": state,
        "rounds": f"{summary.rounds} of {rounds}",
        "model": config.model.id,
        "data": f"{config.data.source}, {config.data.partition.kind} partition",
        "lora": f"rank {config.lora.rank} on {', '.join(config.lora.target_modules)}",
        "seed": str(config.seed),
        "strategy": f"{config.federation.strategy.name}, {config.federation.aggregation}",
        "uplink": _traffic(summary.uplink, config.uplink.name),
        "downlink": _traffic(summary.downlink, config.downlink.name),
        **_codec_charges(summary),
    }
    if summary.heldout:
        change = summary.heldout
        facts["held-out NLL"] = (
            f"{change.before:.4f} -> {change.after:.4f} ({change.difference:+.4f})"
        )
    if summary.clients:
        better = sum(c.difference < 0 for c in summary.clients.values())
        facts["clients"] = f"{len(summary.clients)} evaluated, {better} better than before"
    if summary.failures:
        facts["failures"] = count_of(summary.failures, "reply", "replies") + " not used"
    facts["time"] = human_seconds(summary.seconds["total"])
    facts["adapter"] = str(run.adapter_dir) if run.adapter_dir.is_dir() else "not written yet"
    return Inspection("run", run.path, facts)


def _recording(path: Path) -> Inspection:
    recording = Recording.open(path)
    config, environment = recording.config, recording.metadata["environment"]
    rounds, clients = recording.rounds(), recording.clients()
    entries = recording.entries
    versions = environment.get("versions")
    release = versions.get("cgfedllm", "?") if isinstance(versions, dict) else "?"
    losses = [
        sum(e.loss for e in members) / len(members)
        for members in ([e for e in entries if e.round == r] for r in (rounds[0], rounds[-1]))
    ]
    facts = {
        "recorded": f"{recording.metadata['kind']} training, by cgfedllm {release}",
        "updates": f"{len(recording):,} of {count_of(len(clients), 'client')}",
        "rounds": f"{len(rounds)} of {config.federation.rounds}",
        "steps": f"{sum(e.steps for e in entries) / len(entries):.4g} an update",
        "training loss": f"{losses[0]:.4f} in round {rounds[0]}, {losses[1]:.4f} in {rounds[-1]}",
        "model": config.model.id,
        "data": f"{config.data.source}, {config.data.partition.kind} partition",
        "lora": f"rank {config.lora.rank} on {', '.join(config.lora.target_modules)}",
        "seed": str(config.seed),
        "adapter": f"{recording.spec.size:,} parameters in "
        f"{count_of(len(recording.spec), 'factor')}",
        "adapter spec hash": recording.spec.hash.hex(),
        "size": human_bytes(recording.nbytes),
    }
    return Inspection("recording", path, facts)


def _codec(path: Path) -> Inspection:
    file = load_codec_file(path)
    values = sum(array.size for array in file.state.tensors.values())
    facts = {
        "codec": _named(file.name, file.codec_version),
        "options": options_text(file.options),
        "adapter": f"{file.spec.size:,} parameters in {count_of(len(file.spec), 'factor')}",
        "adapter spec hash": file.spec.hash.hex(),
        "state": f"version {file.state.version}, {count_of(values, 'value')} in "
        f"{count_of(len(file.state.tensors), 'tensor')}",
        "codec state hash": file.state.hash.hex(),
        "size": human_bytes(path.stat().st_size),
    }
    try:
        facts |= _codec_card(file.card)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise CodecStateError(f"{path}: its card is damaged ({error!r})") from None
    return Inspection("codec", path, facts)


def _codec_card(card: Mapping[str, Any]) -> dict[str, str]:
    """What a codec file tells of itself; one that no pre-training wrote tells less."""
    facts = {"made by": str(card["made_by"])} if "made_by" in card else {}
    for number, recorded in enumerate(card.get("recordings", []), start=1):
        facts[f"recording {number}"] = (
            f"{recorded['kind']}, {count_of(recorded['updates'], 'update')} of "
            f"{count_of(recorded['clients'], 'client')}, {recorded['model']} on "
            f"{recorded['data']['source']} ({recorded['data']['part']})"
        )
    for name, found in card.get("fidelity", {}).items():
        facts[POOLS.get(name, name)] = fidelity_text(found)
    if "cost" in card:
        facts["cost"] = cost_text(card["cost"])
    return facts


def _codec_charges(summary: Summary) -> dict[str, str]:
    """What a learned codec or secure aggregation cost beside packets."""
    charges = {}
    if summary.codec_bytes:
        charges["codec state"] = f"{human_bytes(summary.codec_bytes)} down"
    if summary.secagg_uplink_bytes:
        up = human_bytes(summary.secagg_uplink_bytes)
        down = human_bytes(summary.secagg_downlink_bytes)
        charges["secure aggregation"] = f"{up} up, {down} down"
    if summary.tgap_uplink_bytes or summary.tgap_downlink_bytes:
        up, down = human_bytes(summary.tgap_uplink_bytes), human_bytes(summary.tgap_downlink_bytes)
        charges["pre-training"] = f"{up} up, {down} down"
    return charges


def _traffic(traffic: Traffic, codec: str) -> str:
    bits = traffic.bits_per_parameter
    if bits is None:
        return f"{codec}, nothing sent"
    return (
        f"{codec}, {human_bytes(traffic.sent)}, {human_ratio(traffic.times_fewer)} fewer than "
        f"fp32, {bits:.2f} bits per parameter"
    )


def _tensors(path: Path) -> Inspection:
    tensors, metadata = load_tensors(path)
    values = sum(a.size for a in tensors.values())
    contents = {
        "tensors": f"{count_of(len(tensors), 'tensor')} with {values:,} values",
        "size": human_bytes(path.stat().st_size),
    }
    if "round" in metadata and "spec" in metadata:
        return Inspection("checkpoint", path, {**_checkpoint(path, metadata), **contents})
    facts = {
        key: value if len(value) <= 60 else f"{value[:57]}..."
        for key, value in sorted(metadata.items())
    }
    return Inspection("tensors", path, {**facts, **contents})


def _checkpoint(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    try:
        spec = AdapterSpec.from_json(metadata["spec"])
        record = RoundRecord.from_dict(parse_json(metadata["record"]))
    except (AdapterError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is incomplete: {error!r}") from None
    nll = record.heldout_nll
    return {
        "format": metadata.get("format", "?"),
        "round": metadata["round"],
        "adapter": f"{spec.size:,} parameters in {count_of(len(spec), 'factor')}",
        "adapter spec hash": spec.hash.hex(),
        "configuration hash": metadata.get("config", "?")[:16],
        "held-out NLL": f"{nll:.4f}" if nll is not None else "not evaluated in this round",
        "uplink so far": human_bytes(record.uplink_bytes_total),
    }
