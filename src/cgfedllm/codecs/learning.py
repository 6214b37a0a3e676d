"""The second face of the contract: codecs that learn.

::

    recording --fit (TGAP)--> state 0 --adapt (FAF)--> state 1 --adapt--> ...
    encode and decode take the state from the context and change nothing

A state is data (named arrays), the same on both ends. Who keeps it, sends it and counts its bytes
is not a codec's business: see `tgap/` for the first arrow and `federation/` for the others.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs.base import Codec, CodecState, Start
from cgfedllm.errors import CodecStateError

Array = NDArray[Any]
StateShapes = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""Shape and type of each array of a state."""


class Updates(Protocol):
    """Updates to learn from, read one at a time; a recording's samples, or a list in tests."""

    spec: AdapterSpec

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> AdapterUpdate: ...

    def __iter__(self) -> Iterator[AdapterUpdate]: ...

    def start(self, index: int, /) -> Start | None:
        """Where an update started from, where that is known."""
        ...


@dataclass(frozen=True)
class FitSettings:
    """How long and on what `LearnedCodec.fit` learns.

    Parameters
    ----------
    epochs : int
        Most passes over the training updates.
    patience : int
        Stop after so many epochs in a row without a better fidelity on the validation updates.
    seed : int
        Of everything random in it.
    """

    epochs: int = 100
    patience: int = 20
    seed: int = 0


@dataclass(frozen=True)
class FitProgress:
    """Where a fit stands after an epoch; enough to go on from.

    Parameters
    ----------
    curve : tuple of dict
        One row an epoch so far: "epoch" from 1, "train_loss", "validation_snr_db",
        "validation_cosine", "validation_bpp", "seconds" since the fit began (resumed time
        included).
    best : int
        Epoch whose state is the best so far on the validation updates.
    tensors : dict of ndarray
        Everything needed to go on: current values, best values, optimiser moments.
    """

    curve: tuple[Mapping[str, float], ...]
    best: int
    tensors: Mapping[str, Array] = field(default_factory=dict)


OnEpoch = Callable[[FitProgress], None]


class LearnedCodec(Codec):
    """A codec with a state that is fitted on recorded updates and kept current by decoded ones."""

    kind = "learned"
    learns_gradients: ClassVar[bool] = False
    """Whether steps of plain gradient descent teach it more than the run's own updates."""

    @property
    def needs_state(self) -> bool:
        """Whether packets say nothing as long as nothing has been learned."""
        return False

    @abstractmethod
    def initial_state(self, spec: AdapterSpec, seed: int = 0) -> CodecState:
        """The state before anything is learned, version 0."""

    @abstractmethod
    def fit(
        self,
        train: Updates,
        validation: Updates,
        settings: FitSettings,
        *,
        resume: FitProgress | None = None,
        on_epoch: OnEpoch = lambda progress: None,
    ) -> CodecState:
        """Learn from recorded updates (TGAP).

        Parameters
        ----------
        train, validation : Updates
            Of one adapter spec; the state that does best on `validation` is returned.
        settings : FitSettings
            Length and seed.
        resume : FitProgress, optional
            Go on from here, with the same updates and settings: the result is that of an unbroken
            fit.
        on_epoch : callable
            Told after every epoch; what it raises stops the fit.

        Returns
        -------
        CodecState
            Version 0.

        Raises
        ------
        CodecStateError
            If there is nothing to learn from, or `resume` is of another fit.
        """

    @abstractmethod
    def adapt(
        self, state: CodecState, updates: Sequence[AdapterUpdate], *, round: int, seed: int
    ) -> CodecState:
        """Learn from what the server decoded in a round (FAF).

        Returns
        -------
        CodecState
            Version `state.version` + 1; the same object if there was nothing to learn.
        """

    def directions(self, state: CodecState, spec: AdapterSpec) -> dict[str, Float32Array]:
        """Directions that a state knows, for clients to train along (`training.subspace`).

        Returns
        -------
        dict of ndarray, shape (d, n)
            Orthonormal directions of the long axis, by factor; empty for a codec or a state that
            knows none.
        """
        return {}

    def state_shapes(self, spec: AdapterSpec) -> StateShapes:
        """Shape and type of each array of a state, by name.

        Options may come from elsewhere, with a state: a codec whose options decide how large its
        states are says so here without making one.
        """
        tensors = self.initial_state(spec).tensors
        return {name: (array.shape, array.dtype) for name, array in tensors.items()}

    def check_state(self, state: CodecState, spec: AdapterSpec) -> None:
        """Verify that a state fits this codec, its options and an adapter.

        Raises
        ------
        CodecStateError
            If an array is missing, too many, of another shape or type, or not finite.
        """
        wanted = self.state_shapes(spec)
        if set(wanted) != set(state.tensors):
            odd = sorted(set(wanted) ^ set(state.tensors))
            raise CodecStateError(
                f"the state is not one of codec {self.name!r} with these options: "
                f"{odd[0]!r} is {'missing' if odd[0] in wanted else 'unknown'}"
            )
        for name, (shape, dtype) in wanted.items():
            found = state.tensors[name]
            if (found.shape, found.dtype) != (shape, dtype):
                raise CodecStateError(
                    f"the state is not one of codec {self.name!r} with these options and this "
                    f"adapter: {name!r} is {found.dtype}{found.shape}, not {dtype}{shape}"
                )
            if found.dtype.kind == "f" and not np.isfinite(found).all():
                raise CodecStateError(f"the state is damaged: {name!r} holds NaN or infinity")

    def pack_state(self, state: CodecState, base: CodecState | None = None) -> bytes:
        """A state as bytes for the wire.

        Parameters
        ----------
        base : CodecState, optional
            What the receiver holds, one version before; codecs may send the difference only.
        """
        from safetensors.numpy import save

        return bytes(save(dict(state.tensors), {"version": str(state.version)}))

    def unpack_state(
        self, blob: bytes, spec: AdapterSpec, base: CodecState | None = None
    ) -> CodecState:
        """Inverse of `pack_state`.

        Raises
        ------
        CodecStateError
            If the bytes are not a state of this codec for this adapter.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        limit = self.state_limit(spec)
        if len(blob) > limit:
            raise CodecStateError(
                f"a state of {len(blob)} bytes; codec {self.name!r} has at most {limit} here"
            )
        try:
            # before the header is parsed again: this checks it, how deep it goes included
            tensors = load(blob)
            version = int(_metadata(blob)["version"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CodecStateError(f"the state is damaged: {error!r}") from None
        if not 0 <= version < 2**32:
            raise CodecStateError("the state is damaged: its version is not from 0 to 2^32 - 1")
        state = CodecState.of(tensors, version)
        self.check_state(state, spec)
        return state

    def state_limit(self, spec: AdapterSpec) -> int:
        """Longest packed state that can make sense, in bytes."""
        return 4096 + sum(
            math.prod(shape) * dtype.itemsize + 256 + 4 * len(name)
            for name, (shape, dtype) in self.state_shapes(spec).items()
        )


def _metadata(blob: bytes) -> dict[str, str]:
    header = int.from_bytes(blob[:8], "little")
    found = json.loads(blob[8 : 8 + header])
    if not isinstance(found, dict) or not isinstance(found.get("__metadata__"), dict):
        raise ValueError("no metadata")
    return dict(found["__metadata__"])
