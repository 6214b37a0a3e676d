"""The server's memory between rounds, one file a round, written whole or not at all.

A checkpoint holds the global adapter, what clients hold of it, the server optimiser, the state of a
learned codec with what clients hold of that, and the record of the round. Everything random is
derived from the seed and the round, so no generator state is needed. Clients keep their own memory
(`client_state.py`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecState
from cgfedllm.config import Config
from cgfedllm.errors import CheckpointError
from cgfedllm.federation.codec_state import CodecSnapshot
from cgfedllm.metrics import RoundRecord
from cgfedllm.storage import load_tensors, parse_json, save_tensors

FORMAT = "1"
_KEEP = 2
_STRATEGY, _CODEC = "strategy/", "codec/"


@dataclass(frozen=True)
class _AboutCodec:
    version: Annotated[int, Field(ge=0, lt=2**32)]
    held: dict[str, int]


_ABOUT_CODEC = TypeAdapter(_AboutCodec)
_HELD = TypeAdapter(dict[str, int])


@dataclass(frozen=True)
class Checkpoint:
    """State after a round.

    Parameters
    ----------
    round : int
        Rounds aggregated; 0 before any.
    adapter : AdapterUpdate
        Global adapter.
    reference : AdapterUpdate
        What clients hold of it.
    held : dict
        Which version of the reference each client holds.
    increment : bytes or None
        Packet that takes clients from the version before to this one, if there is one.
    strategy : dict of ndarray
        The server optimiser's moments.
    record : RoundRecord
        What was written down about the round.
    previous : AdapterUpdate or None
        The last change of the reference, where a codec uses it.
    codec : CodecSnapshot or None
        Where the uplink codec learns.
    """

    round: int
    adapter: AdapterUpdate
    reference: AdapterUpdate
    held: dict[str, int]
    increment: bytes | None
    strategy: dict[str, NDArray[Any]]
    record: RoundRecord
    previous: AdapterUpdate | None = None
    codec: CodecSnapshot | None = None


def save_checkpoint(folder: Path, checkpoint: Checkpoint, config: Config) -> Path:
    """Write a checkpoint; the last two are kept.

    Raises
    ------
    StorageError
        If the disk refuses; earlier checkpoints are untouched.
    """
    tensors: dict[str, NDArray[Any]] = {
        "adapter": checkpoint.adapter.vector,
        "reference": checkpoint.reference.vector,
        **{f"{_STRATEGY}{name}": values for name, values in checkpoint.strategy.items()},
    }
    if checkpoint.increment is not None:
        tensors["increment"] = np.frombuffer(checkpoint.increment, np.uint8)
    if checkpoint.previous is not None:
        tensors["previous"] = checkpoint.previous.vector
    codec = checkpoint.codec
    if codec is not None:
        tensors |= {f"{_CODEC}{name}": values for name, values in codec.state.tensors.items()}
        if codec.increment is not None:
            tensors["codec-increment"] = np.frombuffer(codec.increment, np.uint8)
    metadata = {
        "format": FORMAT,
        "round": str(checkpoint.round),
        "spec": checkpoint.adapter.spec.to_json(),
        "config": config_fingerprint(config),
        "held": json.dumps(checkpoint.held),
        "record": json.dumps(checkpoint.record.to_dict()),
    }
    if codec is not None:
        about = {"version": codec.state.version, "held": dict(codec.held)}
        metadata["codec"] = json.dumps(about)
    path = folder / f"round-{checkpoint.round:06d}.safetensors"
    save_tensors(path, tensors, metadata)
    for old in sorted(folder.glob("round-*.safetensors"))[:-_KEEP]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path, spec: AdapterSpec, config: Config) -> Checkpoint:
    """Read one checkpoint and verify that it belongs to this run.

    Raises
    ------
    CheckpointError
        If it is damaged, of another format, or of another adapter or configuration.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {metadata.get('format')!r}; this release reads "
            f"{FORMAT!r}. Resume with the release that wrote it, or start a new run"
        )
    if metadata.get("spec") != spec.to_json():
        raise CheckpointError(
            f"{path} belongs to an adapter of another shape (model, lora.rank or "
            "lora.target_modules differ); start a new run under another name"
        )
    if metadata.get("config") != config_fingerprint(config):
        raise CheckpointError(
            f"{path} was written under another configuration than config.toml beside it holds "
            "now; restore config.toml, or start a new run under another name"
        )
    try:
        return Checkpoint(
            round=int(metadata["round"]),
            adapter=AdapterUpdate(spec, tensors["adapter"]),
            reference=AdapterUpdate(spec, tensors["reference"]),
            held=_HELD.validate_json(metadata["held"]),
            increment=tensors["increment"].tobytes() if "increment" in tensors else None,
            strategy=_moments(tensors, spec),
            record=RoundRecord.from_dict(parse_json(metadata["record"])),
            previous=AdapterUpdate(spec, tensors["previous"]) if "previous" in tensors else None,
            codec=_codec(tensors, metadata["codec"]) if "codec" in metadata else None,
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is incomplete: {error!r}; use an earlier one") from error


def latest_checkpoint(folder: Path, spec: AdapterSpec, config: Config) -> Checkpoint | None:
    """The newest checkpoint that is whole; None if the folder has none.

    A damaged newest file is passed over for the one before it.

    Raises
    ------
    CheckpointError
        If there are checkpoints and none can be used; the newest one's error.
    """
    newest: CheckpointError | None = None
    for path in sorted(folder.glob("round-*.safetensors"), reverse=True):
        try:
            return load_checkpoint(path, spec, config)
        except CheckpointError as error:
            newest = newest or error
    if newest is not None:
        raise newest
    return None


def config_fingerprint(config: Config) -> str:
    """Hash of every setting that bears on results; name, folder, trackers and TGAP do not."""
    tree = config.model_dump(exclude={"name", "output", "tracking", "tgap"})
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _moments(tensors: dict[str, NDArray[Any]], spec: AdapterSpec) -> dict[str, NDArray[Any]]:
    """The server optimiser's, each as long as the adapter, and single numbers."""
    moments = _below(_STRATEGY, tensors)
    for name, values in moments.items():
        if values.shape not in ((spec.size,), (1,)) or values.dtype.kind != "f":
            raise ValueError(f"{name!r} is {values.dtype}{values.shape}")
    return moments


def _codec(tensors: dict[str, NDArray[Any]], about: str) -> CodecSnapshot:
    increment = tensors.get("codec-increment")
    known = _ABOUT_CODEC.validate_json(about)
    return CodecSnapshot(
        state=CodecState.of(_below(_CODEC, tensors), known.version),
        held=known.held,
        increment=None if increment is None else increment.tobytes(),
    )


def _below(prefix: str, tensors: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {
        name.removeprefix(prefix): values
        for name, values in tensors.items()
        if name.startswith(prefix)
    }
