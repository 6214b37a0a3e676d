"""A federated run from end to end, on a tiny model: what is learned, sent and written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cgfedllm
from cgfedllm import events
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.codecs import make_codec
from cgfedllm.config import Config
from cgfedllm.errors import FederationError, TrainingError
from cgfedllm.federation.checkpoint import latest_checkpoint
from cgfedllm.metrics import RoundRecord
from cgfedllm.peft_format import load_adapter
from cgfedllm.runs import RunFolder
from cgfedllm.training.local import LocalTrainer, TrainResult
from cgfedllm.workspace import Workspace

MakeConfig = Callable[..., Config]
Outcome = Callable[[Path], dict[str, Any]]
Trainer = Callable[..., TrainResult]

FAST = ("evaluation.clients=false", "federation.rounds=2")
FP32_TOTALS = ("uplink_bytes", "downlink_bytes", "uplink_bytes_fp32", "downlink_bytes_fp32")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str, int], None]], None]:
    """``failing(hook)``: ``hook(client, round)`` runs before each client's training."""
    train: Trainer = LocalTrainer.train

    def install(hook: Callable[[str, int], None]) -> None:
        def hooked(self: LocalTrainer, *args: Any, **kwargs: Any) -> TrainResult:
            hook(kwargs["client"], kwargs["round"])
            return train(self, *args, **kwargs)

        monkeypatch.setattr(LocalTrainer, "train", hooked)

    return install


def fp32_bytes(config: Config) -> int:
    return 4 * Workspace(config, Path()).spec.size


# ---- learning -----------------------------------------------------------------------------------


def test_loss_falls_and_the_adapter_is_there(tiny_config: MakeConfig) -> None:
    result = cgfedllm.run(tiny_config("federation.rounds=4", "training.local_steps=4"))
    assert [record.round for record in result.records] == [0, 1, 2, 3, 4]
    first, last = result.records[0], result.records[-1]
    assert last.heldout_nll < first.heldout_nll - 0.3
    assert all(last.client_nll[name] < nll for name, nll in first.client_nll.items())
    assert not result.interrupted
    assert load_adapter(result.adapter_dir).norm() > 0
