"""What a client remembers between rounds, on its own disk.

::

    <folder>/reference-<version>.safetensors   global adapter as last received
    <folder>/memory-<round>.safetensors        error-feedback residual, optimiser moments

Files are kept by version and by round, the last two of each. A server that is killed and goes on
from its last checkpoint repeats at most one round; the client then finds the files from before
that round and repeats it to the same result.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.errors import CheckpointError
from cgfedllm.storage import load_tensors, save_tensors

_KEEP = 2
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
    """

    def __init__(self, folder: Path, spec: AdapterSpec) -> None:
        self._folder = folder
        self._spec = spec

    def reference(self, version: int) -> AdapterUpdate | None:
        """The global adapter of that version, if it was received and is intact."""
        return self._read(self._path("reference", version), "values")

    def save_reference(self, version: int, adapter: AdapterUpdate) -> None:
        """Keep a received global adapter."""
        self._write("reference", version, {"values": adapter.vector})

    def residual(self, before_round: int) -> AdapterUpdate | None:
        """The residual left by the last round this client took part in before `before_round`."""
        path = self._latest("memory", before_round)
        return self._read(path, _RESIDUAL) if path else None

    def optimizer(self, before_round: int) -> dict[str, Float32Array] | None:
        """The optimiser moments left by that round."""
        path = self._latest("memory", before_round)
        if path is None:
            return None
        tensors = load_tensors(path)[0]
        state = {
            name.removeprefix(_OPTIMIZER): np.asarray(values, np.float32)
            for name, values in tensors.items()
            if name.startswith(_OPTIMIZER)
        }
        return state or None

    def save_memory(
        self,
        round: int,
        *,
        residual: AdapterUpdate | None,
        optimizer: dict[str, Float32Array] | None,
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

    def _read(self, path: Path, name: str) -> AdapterUpdate | None:
        if not path.exists():
            return None
        tensors, metadata = load_tensors(path)
        if metadata.get("spec") != self._spec.hash.hex():
            raise CheckpointError(
                f"{path} belongs to another adapter than this run's; "
                "give the run another name or state folder"
            )
        values = tensors.get(name)
        return None if values is None else AdapterUpdate(self._spec, values)

    def _write(self, kind: str, number: int, tensors: dict[str, Float32Array]) -> None:
        save_tensors(self._path(kind, number), tensors, {"spec": self._spec.hash.hex()})
        for _, path in self._files(kind)[:-_KEEP]:
            path.unlink(missing_ok=True)

    def _latest(self, kind: str, before: int) -> Path | None:
        earlier = [path for number, path in self._files(kind) if number < before]
        return earlier[-1] if earlier else None

    def _files(self, kind: str) -> list[tuple[int, Path]]:
        files = self._folder.glob(f"{kind}-*.safetensors")
        return sorted((int(path.stem.rsplit("-", 1)[1]), path) for path in files)

    def _path(self, kind: str, number: int) -> Path:
        return self._folder / f"{kind}-{number:06d}.safetensors"
