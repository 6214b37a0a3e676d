"""What a client remembers between rounds, on its own disk.

::

    <folder>/reference-<version>.safetensors   global adapter as last received
    <folder>/memory-<round>.safetensors        error-feedback residual, optimiser moments
    <folder>/codec-<version>.safetensors       state of a learned codec as last received

Files are kept by version and by round, the last three of each. A server that is killed goes on
from one of its last two checkpoints and repeats the rounds after it; the client then finds the
files from before those rounds and repeats them to the same result. Where codecs use the last change
of the global adapter, one more reference is kept, for what the oldest of the three changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs import CodecState
from cgfedllm.errors import CheckpointError, CodecError, CodecStateError
from cgfedllm.federation.codec_state import StatefulCodec, codec_with, options_text
from cgfedllm.storage import load_tensors, save_tensors

# one more than the server's checkpoints: a round may have begun after the newest of those
_KEEP = 3
_RESIDUAL = "residual"
_OPTIMIZER = "optimizer."


class ClientState:
    """One client's memory.

    Parameters
    ----------
    folder : Path
        Belongs to this client and this run alone.
    spec : AdapterSpec
        The adapter everything is about.
    changes : bool
        Whether `change` will be asked for, which takes one more reference.
    """

    def __init__(self, folder: Path, spec: AdapterSpec, *, changes: bool = False) -> None:
        self._folder = folder
        self._spec = spec
        self._keep = {"reference": _KEEP + changes, "memory": _KEEP, "codec": _KEEP}

    @property
    def folder(self) -> Path:
        """Where it all lies."""
        return self._folder

    def reference(self, version: int) -> AdapterUpdate | None:
        """The global adapter of that version, if it was received and is intact.

        Raises
        ------
        CheckpointError
            If it belongs to another adapter.
        """
        found = self._received("reference", version)
        values = None if found is None else found[0].get("values")
        return None if values is None else AdapterUpdate(self._spec, values)

    def save_reference(self, version: int, adapter: AdapterUpdate) -> None:
        """Keep a received global adapter."""
        self._write("reference", version, {"values": adapter.vector})

    def change(self, version: int) -> AdapterUpdate | None:
        """What that version of the global adapter changed, if it and the one before are here.

        Raises
        ------
        CheckpointError
            As `reference`.
        """
        now, before = self.reference(version), self.reference(version - 1)
        return None if now is None or before is None else now - before

    def codec(self, version: int) -> StatefulCodec | None:
        """The codec with that version of its state, if it was received and is intact.

        Raises
        ------
        CheckpointError
            If it belongs to another adapter.
        """
        found = self._received("codec", version)
        if found is None:
            return None
        tensors, metadata = found
        try:
            codec = codec_with(metadata.get("codec", ""), metadata.get("options", ""))
        except (CodecError, CodecStateError):  # of an earlier run
            return None
        return StatefulCodec(codec, CodecState.of(tensors, version))

    def save_codec(self, received: StatefulCodec) -> None:
        """Keep a received codec state."""
        about = {"codec": received.codec.name, "options": options_text(received.codec)}
        self._write("codec", received.state.version, received.state.tensors, about)

    def residual(self, before_round: int) -> AdapterUpdate | None:
        """The residual left by the last round this client took part in before `before_round`.

        Raises
        ------
        CheckpointError
            If the file is damaged or belongs to another adapter.
        """
        values = self._memory(before_round).get(_RESIDUAL)
        return None if values is None else AdapterUpdate(self._spec, values)

    def optimizer(self, before_round: int) -> dict[str, Float32Array] | None:
        """The optimiser moments left by that round.

        Raises
        ------
        CheckpointError
            As `residual`.
        """
        state = {
            name.removeprefix(_OPTIMIZER): np.asarray(values, np.float32)
            for name, values in self._memory(before_round).items()
            if name.startswith(_OPTIMIZER)
        }
        return state or None

    def save_memory(
        self,
        round: int,
        *,
        residual: AdapterUpdate | None,
        optimizer: dict[str, Float32Array] | None = None,
    ) -> None:
        """Keep what this round left behind; nothing to keep writes nothing.

        Raises
        ------
        StorageError
            If the disk refuses; earlier files are untouched.
        """
        tensors = {} if residual is None else {_RESIDUAL: residual.vector}
        tensors |= {f"{_OPTIMIZER}{name}": values for name, values in (optimizer or {}).items()}
        if tensors:
            self._write("memory", round, tensors)

    def _memory(self, before_round: int) -> dict[str, Float32Array]:
        earlier = [path for number, path in self._files("memory") if number < before_round]
        if not earlier:
            return {}
        path = earlier[-1]
        try:
            tensors, metadata = load_tensors(path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; or remove it to go on without what it held") from None
        self._check(path, metadata)
        return tensors

    def _received(
        self, kind: str, version: int
    ) -> tuple[dict[str, NDArray[Any]], dict[str, str]] | None:
        """What the server sent, if it is here and intact; otherwise it sends it again."""
        path = self._path(kind, version)
        try:
            tensors, metadata = load_tensors(path)
        except CheckpointError:
            return None
        self._check(path, metadata)
        return tensors, metadata

    def _check(self, path: Path, metadata: dict[str, str]) -> None:
        if metadata.get("spec") != self._spec.hash.hex():
            raise CheckpointError(
                f"{path} belongs to another adapter than this run's; "
                "give the run another name or state folder"
            )

    def _write(
        self,
        kind: str,
        number: int,
        tensors: Mapping[str, NDArray[Any]],
        about: Mapping[str, str] | None = None,
    ) -> None:
        metadata = {"spec": self._spec.hash.hex(), **(about or {})}
        save_tensors(self._path(kind, number), tensors, metadata)
        # what is newer comes from a time the run has gone back before; it will not come again
        files = self._files(kind)
        current = [path for found, path in files if found <= number]
        newer = [path for found, path in files if found > number]
        for path in current[: -self._keep[kind]] + newer:
            path.unlink(missing_ok=True)

    def _files(self, kind: str) -> list[tuple[int, Path]]:
        files = self._folder.glob(f"{kind}-*.safetensors")
        return sorted((int(path.stem.rsplit("-", 1)[1]), path) for path in files)

    def _path(self, kind: str, number: int) -> Path:
        return self._folder / f"{kind}-{number:06d}.safetensors"
