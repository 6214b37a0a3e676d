"""Stateless clients: nothing is kept between rounds, everything comes down whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cgfedllm
from cgfedllm import events
from cgfedllm.codecs import make_codec
from cgfedllm.config import Config
from cgfedllm.errors import ConfigError
from cgfedllm.federation.checkpoint import latest_checkpoint
from cgfedllm.runs import RunFolder
from cgfedllm.workspace import Workspace

MakeConfig = Callable[..., Config]
STATELESS = ("federation.stateless=true", "uplink.name=int8")


@pytest.mark.parametrize("downlink", ["raw", "bf16", "int8", "test-delta"])
def test_no_client_folder_is_written_and_each_message_carries_the_whole_adapter(
    tiny_config: MakeConfig, delta_codec: str, downlink: str
) -> None:
    config = tiny_config(
        "federation.stateless=true", f"uplink.name={delta_codec}", f"downlink.name={downlink}"
    )
    result = cgfedllm.run(config)
    assert not (config.run_dir / "clients").exists()
    spec = Workspace(config, Path()).spec
    whole = make_codec("raw").packet_size(spec)
    # three clients evaluate at the start; later they train and evaluate
    sent = [record.downlink_bytes for record in result.records]
    assert sent == [3 * whole] + [6 * whole] * 3
    assert not any(record.failures for record in result.records)
    assert result.records[-1].heldout_nll < result.records[0].heldout_nll
    checkpoint = latest_checkpoint(RunFolder(config.run_dir).checkpoints_dir, spec, config)
    assert (checkpoint.held, checkpoint.previous, checkpoint.increment) == ({}, None, None)
    assert (checkpoint.adapter - checkpoint.reference).norm() == 0


def test_a_tenth_of_many_clients_each_round(tiny_config: MakeConfig) -> None:
    config = tiny_config(
        *STATELESS,
        "data.partition.kind=iid",
        "data.partition.clients=20",
        "data.partition.min_rows=1",
        "data.splits.validation=0",
        "training.local_steps=1",
        "training.batch_size=2",
        "evaluation.clients=false",
        "federation.fraction_train=0.1",
        "federation.rounds=4",
    )
    result = cgfedllm.run(config)
    whole = make_codec("raw").packet_size(Workspace(config, Path()).spec)
    assert [len(record.clients) for record in result.records] == [0, 2, 2, 2, 2]
    assert [record.downlink_bytes for record in result.records] == [0] + [2 * whole] * 4
    assert not (config.run_dir / "clients").exists()


def test_error_feedback_is_without_effect(tiny_config: MakeConfig) -> None:
    with_it, without = (
        cgfedllm.run(tiny_config(*STATELESS, f"uplink.error_feedback={on}", f"name=ef-{on}"))
        for on in ("true", "false")
    )
    losses = [[record.heldout_nll for record in run.records] for run in (with_it, without)]
    assert losses[0] == losses[1]


def test_a_stopped_run_goes_on_to_the_same_result(
    tiny_config: MakeConfig,
    outcome: Callable[[Path], dict[str, Any]],
    undisturbed: Callable[..., dict[str, Any]],
) -> None:
    class Stop(Exception):
        pass

    def stop(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished) and event.record.round == 2:
            raise Stop

    config = tiny_config(*STATELESS)
    with pytest.raises(Stop):
        cgfedllm.run(config, listeners=[stop])
    assert outcome(cgfedllm.resume(config.run_dir).run_dir) == undisturbed(*STATELESS)


def test_an_optimiser_that_is_to_be_kept_is_refused(tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"stateless.*training\.keep_optimizer = false"):
        tiny_config(*STATELESS, "training.keep_optimizer=true")


@pytest.mark.parametrize("kind", ["centralised", "local-only"])
def test_references_of_a_stateless_run_train(tiny_config: MakeConfig, kind: str) -> None:
    result = cgfedllm.reference(tiny_config(*STATELESS, "federation.rounds=1"), kind)
    assert len(result.records) == 2
