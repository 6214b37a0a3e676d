"""The index of a recording: what was recorded, under which configuration, and where it lies.

::

    index.json   format, version     this is a recording, and which kind of one
                 kind, model         federated, centralised or local-only; of which base model
                 spec, spec_hash     the adapter's factors
                 config              resolved configuration, TOML
                 environment         versions, hardware, seed, command line
                 updates             one row an update
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter

from cgfedllm import storage
from cgfedllm.adapter import AdapterSpec
from cgfedllm.config import Config, parse_config
from cgfedllm.data.names import is_safe_name
from cgfedllm.errors import CheckpointError, ConfigError, RecordingError
from cgfedllm.text import printable
from cgfedllm.tgap.shards import SHARD_NAME

FORMAT = "cgfedllm-recording"
VERSION = 1
INDEX = "index.json"

RecordingKind = Literal["federated", "centralised", "local-only"]
KINDS: tuple[RecordingKind, ...] = get_args(RecordingKind)


@dataclass(frozen=True)
class RecordedUpdate:
    """What is known of one recorded update without reading it.

    Parameters
    ----------
    round : int
        From 1.
    client : str
        "centralised" where all rows were trained on together.
    steps, tokens : int
        Optimiser steps it took; tokens that went through the model.
    examples : int
        Rows the client has.
    loss : float
        Mean over the round's label tokens, nats.
    weight : float
        In the average of the round.
    shard : str
        File that holds it.
    row : int
        Which of the shard's rows it is.
    checksum : int
        CRC-32 of the row's bytes.
    """

    round: int
    client: str
    steps: int
    examples: int
    tokens: int
    loss: float
    weight: float
    shard: str
    row: int
    checksum: int = 0


_ENTRIES = TypeAdapter(tuple[RecordedUpdate, ...])


@dataclass(frozen=True)
class Index:
    """Content of index.json.

    Parameters
    ----------
    spec : AdapterSpec
        Factors of every update.
    config : Config
        Of the run that was recorded.
    kind : str
        "federated", "centralised" or "local-only".
    environment : dict
        Versions, hardware, seed, command line.
    entries : tuple of RecordedUpdate
        By round, then by client.
    """

    spec: AdapterSpec
    config: Config
    kind: str
    environment: dict[str, Any] = field(default_factory=dict)
    entries: tuple[RecordedUpdate, ...] = ()

    def save(self, folder: Path) -> None:
        """Write index.json at once.

        Raises
        ------
        StorageError
            If it cannot be written; the old one is untouched.
        """
        tree = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "model": self.config.model.id,
            "spec": self.spec.to_json(),
            "spec_hash": self.spec.hash.hex(),
            "config": self.config.to_toml(),
            "environment": self.environment,
            "updates": [asdict(entry) for entry in self.entries],
        }
        storage.write_json(folder / INDEX, tree)


def is_recording(folder: Path) -> bool:
    """Whether a folder says of itself that it is a recording, whole or not."""
    try:
        tree = storage.read_json(folder / INDEX)
    except CheckpointError:
        return False
    return isinstance(tree, dict) and tree.get("format") == FORMAT


def read_index(folder: Path) -> Index:
    """Read index.json.

    Raises
    ------
    RecordingError
        If it is missing, damaged, of another program or of another version.
    """
    path = folder / INDEX
    if not path.is_file():
        raise RecordingError(
            f"{folder} is not a recording: it has no {INDEX}. `cgfedllm record` makes one"
        )
    try:
        tree = storage.read_json(path)
    except CheckpointError as error:
        raise RecordingError(f"{error}; record again with --overwrite") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise RecordingError(f"{folder} is not a recording: {path} is of another program")
    if tree.get("version") != VERSION:
        raise RecordingError(
            f"{folder} is a recording of version {tree.get('version')!r}; this release reads "
            f"{VERSION}. Use the release that wrote it, or record again"
        )
    try:
        spec = AdapterSpec.from_json(tree["spec"])
        index = Index(
            spec=spec,
            config=parse_config(tomllib.loads(tree["config"])),
            kind=str(tree["kind"]),
            environment=dict(tree["environment"]),
            # by way of text: only there does strict take lists and objects for tuples and rows
            entries=_ENTRIES.validate_json(json.dumps(tree["updates"]), strict=True),
        )
    except ConfigError as error:
        raise RecordingError(
            f"{path}: this release does not accept the configuration in it: {error}"
        ) from None
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise RecordingError(f"{path} is damaged: {error!r}; record again") from None
    if spec.hash.hex() != tree.get("spec_hash"):
        raise RecordingError(f"{path} is damaged: its spec does not match its hash; record again")
    _check_places(path, index.entries)
    _check_claims(path, index.entries)
    return index


def _check_claims(path: Path, entries: Sequence[RecordedUpdate]) -> None:
    """What is computed with, or shown, is what a writer can have written."""
    for entry in entries:
        sound = entry.round > 0 and 0 < entry.weight < inf and is_safe_name(entry.client)
        if not sound:
            raise RecordingError(
                f"{path} is damaged: an update of round {entry.round}, client "
                f"{printable(entry.client, 40)!r}, weight {entry.weight} cannot be"
            )


def _check_places(path: Path, entries: Sequence[RecordedUpdate]) -> None:
    """Each update has a place of its own, inside the folder."""
    bad = next((e.shard for e in entries if not SHARD_NAME.fullmatch(e.shard) or e.row < 0), None)
    if bad is not None:
        raise RecordingError(f"{path} is damaged: {json.dumps(bad)} cannot hold an update")
    if len({(entry.shard, entry.row) for entry in entries}) < len(entries):
        raise RecordingError(f"{path} is damaged: two updates in one place; record again")
