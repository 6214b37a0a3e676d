"""Shards of a recording: one safetensors file a round, one row an update.

Reading maps a file into memory and copies one row of it, whatever the file's size.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from cgfedllm import storage
from cgfedllm.adapter import AdapterSpec, Float32Array
from cgfedllm.errors import RecordingError

SHARDS = "round-*.safetensors"
SHARD_NAME = re.compile(r"round-\d{6,}\.safetensors")

_TENSOR = "updates"
_SPEC = "spec"


def shard_name(round: int) -> str:
    """File of one round's updates."""
    return f"round-{round:06d}.safetensors"


def save_shard(path: Path, spec: AdapterSpec, round: int, rows: Sequence[Float32Array]) -> None:
    """Write the updates of one round, all or none.

    Raises
    ------
    StorageError
        If the disk refuses.
    """
    metadata = {_SPEC: spec.hash.hex(), "round": str(round)}
    storage.save_tensors(path, {_TENSOR: np.stack(rows)}, metadata)


def check_shard(path: Path, spec: AdapterSpec, rows: int) -> None:
    """Look at a shard's header.

    Raises
    ------
    RecordingError
        If it is missing, cut short, of another adapter, or has fewer rows.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            found = file.get_slice(_TENSOR)
            shape, dtype = list(found.get_shape()), found.get_dtype()
    except FileNotFoundError:
        raise RecordingError(
            f"{path} is missing; bring it back, or record again with --overwrite"
        ) from None
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(path, str(error)) from None
    if metadata.get(_SPEC) != spec.hash.hex() or dtype != "F32" or shape[1:] != [spec.size]:
        raise damaged(path, "it holds updates of another adapter than the index says")
    if shape[0] < rows:
        raise damaged(path, f"it has {shape[0]} updates, the index says {rows}")


def read_row(path: Path, row: int) -> Float32Array:
    """One update, in memory of its own.

    Raises
    ------
    RecordingError
        If the file or the row is not there.
    """
    try:
        # opened anew every time: no handles to keep, none to carry into worker processes
        with safe_open(str(path), framework="numpy") as file:
            return np.asarray(file.get_slice(_TENSOR)[row])
    except (OSError, SafetensorError, ValueError, IndexError) as error:
        raise damaged(path, str(error)) from None


def checksum(row: Float32Array) -> int:
    """CRC-32 of one update's bytes."""
    return zlib.crc32(np.ascontiguousarray(row).view(np.uint8).data)


def damaged(path: Path, what: str) -> RecordingError:
    """Error that names a shard, what is wrong with it, and what to do."""
    return RecordingError(
        f"{path} is damaged: {what}. Copy it again from where it came, leave its round out "
        "(Recording.select), or record again with --overwrite"
    )
