"""Recordings: the updates of a training run, kept to fit and to measure codecs on.

::

    FOLDER/
        index.json                  what was recorded, one row an update (`index.py`)
        round-000001.safetensors    "updates", float32, shape (updates of the round, spec.size)
        round-000002.safetensors

A round is there completely or not at all: its shard is written first, then the index. Reading
maps the shards into memory and copies single rows, so a recording may be larger than memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.config import Config
from cgfedllm.errors import RecordingError
from cgfedllm.seeding import generator
from cgfedllm.tgap.index import VERSION, Index, RecordedUpdate, read_index
from cgfedllm.tgap.shards import check_shard, checksum, damaged, read_row
from cgfedllm.tgap.writer import RecordingWriter, StrPath

__all__ = ["RecordedUpdate", "Recording", "RecordingWriter"]


class Recording:
    """Updates kept along training; a view of some or all of them.

    `open` makes one; `select` and the splits make smaller ones that read the same files.
    """

    def __init__(
        self, path: Path, index: Index, entries: Sequence[RecordedUpdate], sound: set[str]
    ) -> None:
        self.path = path
        self._index = index
        self._entries = tuple(entries)
        self._sound = sound  # rows whose checksum was found right; shared by all views

    @classmethod
    def open(cls, folder: StrPath) -> Recording:
        """Open a recording; its shards are looked at, not read.

        Raises
        ------
        RecordingError
            If the folder is no recording, holds no complete round, or a shard is missing, cut
            short or of another adapter. Values are checked when they are read.
        """
        path = Path(folder)
        index = read_index(path)
        if not index.entries:
            raise RecordingError(
                f"{path} holds no complete round yet; let `cgfedllm record` go on with it"
            )
        rows: dict[str, int] = {}
        for entry in index.entries:
            rows[entry.shard] = max(rows.get(entry.shard, 0), entry.row + 1)
        for shard, count in rows.items():
            check_shard(path / shard, index.spec, count)
        return cls(path, index, index.entries, set())

    @property
    def spec(self) -> AdapterSpec:
        """Factors of every update."""
        return self._index.spec

    @property
    def entries(self) -> tuple[RecordedUpdate, ...]:
        """What is known of each update, by round, then by client."""
        return self._entries

    @property
    def config(self) -> Config:
        """Configuration of the run that was recorded."""
        return self._index.config

    @property
    def metadata(self) -> dict[str, Any]:
        """Where it comes from: version, kind, model, spec_hash, environment."""
        return {
            "version": VERSION,
            "kind": self.kind,
            "model": self.config.model.id,
            "spec_hash": self.spec.hash.hex(),
            "environment": self._index.environment,
        }

    @property
    def kind(self) -> str:
        """What was recorded: "federated", "centralised" or "local-only" training."""
        return self._index.kind

    @property
    def fingerprint(self) -> str:
        """Hash of what this view holds, wherever it lies: adapter, kind, updates by checksum."""
        digest = hashlib.sha256(f"{self.kind}\x1f{self.spec.to_json()}".encode())
        for entry in self._entries:
            row = (entry.round, entry.client, entry.weight, entry.checksum)
            digest.update("\x1f".join(map(str, row)).encode() + b"\n")
        return digest.hexdigest()[:32]

    @property
    def nbytes(self) -> int:
        """What the updates of this view weigh as bare float32."""
        return 4 * self.spec.size * len(self)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Recording({str(self.path)!r}, {len(self)} updates)"

    def rounds(self) -> list[int]:
        """Rounds with updates, ascending."""
        return sorted({entry.round for entry in self._entries})

    def clients(self) -> list[str]:
        """Clients with updates, by name."""
        return sorted({entry.client for entry in self._entries})

    def update(self, which: int | RecordedUpdate) -> AdapterUpdate:
        """Read one update.

        Parameters
        ----------
        which : int or RecordedUpdate
            Its number in `entries`, or the entry itself.

        Returns
        -------
        AdapterUpdate
            In memory of its own.

        Raises
        ------
        IndexError
            If there are fewer updates.
        RecordingError
            If the file is gone or its values do not match their checksum.
        """
        entry = which if isinstance(which, RecordedUpdate) else self._entries[which]
        shard = self.path / entry.shard
        vector = read_row(shard, entry.row)
        place = f"{entry.shard}:{entry.row}"
        if place not in self._sound:
            if checksum(vector) != entry.checksum:
                raise damaged(
                    shard,
                    f"row {entry.row} (round {entry.round}, client {entry.client!r}) does not "
                    "match its checksum",
                )
            self._sound.add(place)
        return AdapterUpdate(self.spec, vector)

    def aggregate(self, round: int) -> AdapterUpdate:
        """Weighted mean of a round's updates, of those in this view.

        Raises
        ------
        RecordingError
            If the round has no updates here; otherwise as `update`.
        """
        members = [entry for entry in self._entries if entry.round == round]
        if not members:
            raise RecordingError(
                f"{self.path} has no updates of round {round}; its rounds: {_span(self.rounds())}"
            )
        total = np.zeros(self.spec.size, np.float64)
        for entry in members:
            total += entry.weight * self.update(entry).vector.astype(np.float64)
        total /= sum(entry.weight for entry in members)
        return AdapterUpdate(self.spec, total.astype(np.float32))

    def select(
        self, *, rounds: Iterable[int] | None = None, clients: Iterable[str] | None = None
    ) -> Recording:
        """Make a view of some rounds, some clients, or both; None takes all.

        Raises
        ------
        RecordingError
            If nothing is left, or a client is not in the recording.
        """
        kept_rounds = None if rounds is None else set(rounds)
        kept_clients = None if clients is None else set(clients)
        unknown = sorted((kept_clients or set()) - set(self.clients()))
        if unknown:
            raise RecordingError(
                f"{self.path} has no client {unknown[0]!r}; it has {', '.join(self.clients())}"
            )
        entries = [
            entry
            for entry in self._entries
            if (kept_rounds is None or entry.round in kept_rounds)
            and (kept_clients is None or entry.client in kept_clients)
        ]
        if not entries:
            raise RecordingError(
                f"nothing of {self.path} is left after selecting; it has rounds "
                f"{_span(self.rounds())} and {len(self.clients())} clients"
            )
        return Recording(self.path, self._index, entries, self._sound)

    def split_by_round(self, share: float = 0.5) -> tuple[Recording, Recording]:
        """Earlier rounds and later rounds.

        Parameters
        ----------
        share : float
            Of the rounds, that come into the first part; each part gets one at least.

        Raises
        ------
        RecordingError
            If there is only one round, or `share` is not between 0 and 1.
        """
        rounds = self.rounds()
        cut = self._cut(len(rounds), share, "round")
        return self.select(rounds=rounds[:cut]), self.select(rounds=rounds[cut:])

    def split_by_client(self, share: float = 0.5, seed: int = 0) -> tuple[Recording, Recording]:
        """Two disjoint groups of clients, drawn at random.

        Parameters
        ----------
        share : float
            Of the clients, that come into the first part; each part gets one at least.
        seed : int
            Of the draw.

        Raises
        ------
        RecordingError
            If there is only one client, or `share` is not between 0 and 1.
        """
        clients = self.clients()
        cut = self._cut(len(clients), share, "client")
        order = generator(seed, "recording", "clients").permutation(len(clients))
        drawn = [clients[number] for number in order]
        return self.select(clients=drawn[:cut]), self.select(clients=drawn[cut:])

    def _cut(self, count: int, share: float, what: str) -> int:
        if not 0 < share < 1:
            raise RecordingError(f"share is a part between 0 and 1; got {share}")
        if count < 2:
            raise RecordingError(
                f"{self.path} cannot be split by {what}: this part of it has only one"
            )
        return min(max(round(share * count), 1), count - 1)


def _span(rounds: Sequence[int]) -> str:
    if not rounds:
        return "none"
    whole = len(rounds) == rounds[-1] - rounds[0] + 1
    return f"{rounds[0]} to {rounds[-1]}" + ("" if whole else " with gaps")
