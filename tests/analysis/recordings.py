"""Tiny recordings with a known structure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.config import Config
from cgfedllm.tgap.recording import Recording, RecordingWriter

SPEC = AdapterSpec.from_shapes(
    {
        f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{factor}.weight": shape
        for layer in (0, 1)
        for module in ("q_proj", "v_proj")
        for factor, shape in (("A", (4, 40)), ("B", (32, 4)))
    }
)
CLIENTS = ("east", "north", "west")

Make = Callable[[int, int], AdapterUpdate]


def write_recording(
    folder: Path, make: Make | None = None, *, rounds: int = 6, clients: int = 3
) -> Recording:
    """A recording of ``make(round, client number)``, Gaussian noise by default."""
    with RecordingWriter(folder, SPEC, Config(), environment={}) as writer:
        for number in range(1, rounds + 1):
            for index, client in enumerate(CLIENTS[:clients]):
                update = (make or noise)(number, index)
                # unequal weights, so that a plain mean would be found out
                writer.add(update, round=number, client=client, steps=4, weight=1.0 + index)
            writer.finish_round()
    return Recording.open(folder)


def noise(number: int, client: int) -> AdapterUpdate:
    rng = np.random.default_rng([number, client])
    return AdapterUpdate(SPEC, rng.standard_normal(SPEC.size).astype(np.float32))
