"""Where a client keeps what the codec lost: in Flower's context, or on its own disk."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, Context

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.federation.client_state import ClientState

_RESIDUALS = "cgfedllm.residuals"
# this round's and the one before: a round that is asked for again starts from the latter
_KEEP = 2


class Memory(Protocol):
    """A client's residuals, by round."""

    def residual(self, before_round: int) -> AdapterUpdate | None:
        """What the last round before this one left; None if there is nothing."""

    def save_memory(self, round: int, *, residual: AdapterUpdate | None) -> None:
        """Keep what a round left."""


class ContextMemory:
    """Residuals in ``context.state``: as long as the SuperNode runs, and no longer.

    Parameters
    ----------
    context : Context
        The client's.
    spec : AdapterSpec
        The coded arrays; residuals of others are not found.
    """

    def __init__(self, context: Context, spec: AdapterSpec) -> None:
        self._state = context.state
        self._spec = spec
        self._prefix = f"{spec.hash.hex()}."

    def residual(self, before_round: int) -> AdapterUpdate | None:
        """See `Memory.residual`."""
        kept = self._kept()
        earlier = [round for round in kept if round < before_round]
        if not earlier:
            return None
        return AdapterUpdate(self._spec, np.asarray(kept[max(earlier)].numpy(), np.float32))

    def save_memory(self, round: int, *, residual: AdapterUpdate | None) -> None:
        """See `Memory.save_memory`; what is newer than the round is forgotten, as on disk."""
        if residual is None:
            return
        kept = {own: array for own, array in self._kept().items() if own < round}
        kept[round] = Array(residual.vector)
        self._state[_RESIDUALS] = ArrayRecord(
            {f"{self._prefix}{own}": kept[own] for own in sorted(kept)[-_KEEP:]}
        )

    def _kept(self) -> dict[int, Array]:
        record = self._state.array_records.get(_RESIDUALS, ArrayRecord())
        return {
            int(key.removeprefix(self._prefix)): array
            for key, array in record.items()
            if key.startswith(self._prefix)
        }


def open_memory(context: Context, spec: AdapterSpec, state_dir: Path | None) -> Memory:
    """The memory of the client whose context this is.

    Parameters
    ----------
    state_dir : Path or None
        Keep it on disk, in a folder of its own below this one. The folder's name is the run's id
        and the partition's, which outlives a SuperNode, or else the node's.
    """
    if state_dir is None:
        return ContextMemory(context, spec)
    partition = context.node_config.get("partition-id")
    name = f"node-{context.node_id}" if partition is None else f"partition-{int(partition)}"
    return ClientState(state_dir / f"run-{context.run_id}" / name, spec)
