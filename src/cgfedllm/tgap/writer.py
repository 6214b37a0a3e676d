"""Writing a recording, round by round, so that a killed one keeps its complete rounds."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cgfedllm import storage
from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.config import Config
from cgfedllm.errors import RecordingError, StorageError
from cgfedllm.runs import environment as current_environment
from cgfedllm.tgap.index import (
    INDEX,
    Index,
    RecordedUpdate,
    RecordingKind,
    is_recording,
    read_index,
)
from cgfedllm.tgap.shards import SHARDS, checksum, save_shard, shard_name

StrPath = str | os.PathLike[str]


class RecordingWriter:
    """Writes a recording, round by round.

    Leaving the block finishes the round at hand; if an error leaves it, that round is dropped.

    Parameters
    ----------
    folder : path-like
        New or empty; made where missing. `resume` goes on with one that is there.
    spec : AdapterSpec
        Factors of every update.
    config : Config
        Of the run that is recorded.
    kind : str
        "federated", "centralised" or "local-only".
    environment : dict, optional
        Versions, hardware, seed, command line; by default those of this process.

    Raises
    ------
    RecordingError
        If something is in the folder.
    StorageError
        If it cannot be written.
    """

    def __init__(
        self,
        folder: StrPath,
        spec: AdapterSpec,
        config: Config,
        *,
        kind: RecordingKind = "federated",
        environment: dict[str, Any] | None = None,
    ) -> None:
        path = Path(folder)
        check_vacant(path)
        known = current_environment(config) if environment is None else environment
        self._begin(path, Index(spec, config, kind, known))
        # first, so that whatever lies here lies in a folder that says what it is
        self._index.save(path)

    @classmethod
    def resume(cls, folder: StrPath) -> RecordingWriter:
        """Go on with a recording after its last complete round.

        Raises
        ------
        RecordingError
            If the folder is no recording, or it is damaged.
        """
        path = Path(folder)
        index = read_index(path)
        storage.remove_leftovers(path)
        writer = cls.__new__(cls)
        writer._begin(path, index)
        return writer

    def _begin(self, path: Path, index: Index) -> None:
        self.path = path
        self._index = index
        self._pending: list[tuple[RecordedUpdate, Float32Array]] = []

    @property
    def config(self) -> Config:
        """Configuration of the run that is recorded."""
        return self._index.config

    @property
    def kind(self) -> str:
        """What kind of training is recorded."""
        return self._index.kind

    def rounds(self) -> list[int]:
        """Rounds that are complete on the disk, ascending."""
        return sorted({entry.round for entry in self._index.entries})

    def add(
        self,
        update: AdapterUpdate,
        *,
        round: int,
        client: str,
        steps: int = 0,
        examples: int = 0,
        tokens: int = 0,
        loss: float = 0.0,
        weight: float | None = None,
    ) -> None:
        """Take one update; it is on the disk after `finish_round`.

        Parameters
        ----------
        weight : float, optional
            In the average of the round; by default the number of rows, or 1 where that is 0.

        Raises
        ------
        RecordingError
            If the update is of another adapter or not finite, or the round is over already, or
            another one is not.
        """
        if update.spec.hash != self._index.spec.hash:
            raise RecordingError(
                f"round {round}, {client}: update of another adapter than the rest"
            )
        if not update.is_finite():
            raise RecordingError(f"round {round}, {client}: the update holds NaN or infinity")
        at_hand = {entry.round for entry, _ in self._pending} - {round}
        if at_hand:
            raise RecordingError(f"round {round} begins before round {at_hand.pop()} is finished")
        if round < 1 or round <= max(self.rounds(), default=0):
            raise RecordingError(f"round {round} is written already (or below 1)")
        weight = float(examples or 1) if weight is None else weight
        if not 0 < weight < np.inf:
            raise RecordingError(f"round {round}, {client}: weight {weight} is not positive")
        entry = RecordedUpdate(
            round, client, steps, examples, tokens, loss, weight, shard_name(round), 0
        )
        self._pending.append((entry, update.vector.copy()))

    def drop_round(self) -> None:
        """Forget the updates of the round at hand: it is tried again."""
        self._pending = []

    def finish_round(self) -> None:
        """Write the updates of the round at hand; nothing happens where there are none.

        Raises
        ------
        StorageError
            If the disk refuses; complete rounds are untouched.
        """
        if not self._pending:
            return
        # by name: replies come in whatever order the engine has
        pending = sorted(self._pending, key=lambda item: item[0].client)
        entries = tuple(
            replace(entry, row=row, checksum=checksum(vector))
            for row, (entry, vector) in enumerate(pending)
        )
        self._pending = []
        save_shard(
            self.path / entries[0].shard,
            self._index.spec,
            entries[0].round,
            [vector for _, vector in pending],
        )
        self._update(self._index.entries + entries)

    def keep_through(self, round: int) -> None:
        """Remove the rounds after `round`: a resumed run does them again."""
        self._pending = []
        kept = tuple(entry for entry in self._index.entries if entry.round <= round)
        self._update(kept)
        names = {entry.shard for entry in kept}
        for shard in self.path.glob(SHARDS):
            if shard.name not in names:
                shard.unlink(missing_ok=True)

    def _update(self, entries: tuple[RecordedUpdate, ...]) -> None:
        self._index = replace(self._index, entries=entries)
        self._index.save(self.path)

    def __enter__(self) -> RecordingWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish_round()
        else:
            self.drop_round()


def check_vacant(folder: Path) -> None:
    """Refuse a folder that a new recording would get mixed up with.

    Raises
    ------
    RecordingError
        If there is anything in it.
    """
    if is_recording(folder):
        raise RecordingError(
            f"{folder} holds a recording already; record elsewhere (--to), or replace it with "
            "--overwrite"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecordingError(
            f"{folder} holds other things than a recording; choose a new or empty folder"
        )


def discard_recording(folder: StrPath) -> None:
    """Remove a recording's files, and nothing else; nothing happens where there is none.

    Raises
    ------
    RecordingError
        If the folder holds other things and no recording.
    StorageError
        If the files cannot be removed.
    """
    path = Path(folder)
    if not is_recording(path):
        check_vacant(path)
        return
    storage.remove_leftovers(path)
    try:
        # the index goes last: until then the folder says what the shards are
        for file in (*path.glob(SHARDS), path / INDEX):
            file.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot remove the recording {path}: {error}") from error
