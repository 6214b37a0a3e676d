"""The flush after the last round: what error feedback still holds comes in, once, untrained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cgfedllm
from cgfedllm import events
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.codecs import make_codec
from cgfedllm.config import Config, FederationConfig, other_uplink
from cgfedllm.errors import ConfigError, FederationError
from cgfedllm.federation import client_app
from cgfedllm.federation.checkpoint import latest_checkpoint
from cgfedllm.federation.client_state import ClientState
from cgfedllm.federation.flush import flush_config
from cgfedllm.report.summary import mean_train_loss
from cgfedllm.report.trackers import scalars
from cgfedllm.runs import RunFolder
from cgfedllm.workspace import Workspace

MakeConfig = Callable[..., Config]
Outcome = Callable[[Path], dict[str, Any]]
FLUSH = ("uplink.name=int8", "uplink.flush=bf16", "federation.rounds=2")


class Stop(Exception):
    pass


def stop_at(kind: type, round_: int) -> Callable[[events.Event], None]:
    """Breaks a run off at the first event of a kind in a round."""
    now = 0

    def listen(event: events.Event) -> None:
        nonlocal now
        if isinstance(event, events.RoundStarted):
            now = event.round
        if isinstance(event, kind) and now == round_:
            raise Stop

    return listen


def adapter_after(config: Config, round_: int) -> AdapterUpdate:
    from cgfedllm.federation.checkpoint import load_checkpoint

    path = config.run_dir / "checkpoints" / f"round-{round_:06d}.safetensors"
    return load_checkpoint(path, Workspace(config, Path()).spec, config).adapter


def residuals(config: Config, before: int) -> dict[str, AdapterUpdate | None]:
    spec = Workspace(config, Path()).spec
    folders = {name: config.run_dir / "clients" / name for name in ("north", "south", "west")}
    return {n: ClientState(path, spec).residual(before) for n, path in folders.items()}


def test_residuals_are_added_with_their_weights_decayed_and_scaled(
    tiny_config: MakeConfig,
) -> None:
    config = tiny_config(*FLUSH, "uplink.error_feedback_decay=0.5", "federation.server_lr=0.25")
    result = cgfedllm.run(config)
    flush = result.records[-1]
    assert [(r.round, r.flush) for r in result.records] == [
        (0, False),
        (1, False),
        (2, False),
        (3, True),
    ]
    weights = {client.client: client.examples for client in flush.clients}
    assert weights == {client.client: client.examples for client in result.records[2].clients}
    total = sum(
        weights[name] * residual.scaled(0.5).vector.astype(np.float64)
        for name, residual in residuals(config, 3).items()
        if residual is not None
    ) / sum(weights.values())
    change = (adapter_after(config, 3) - adapter_after(config, 2)).vector
    # bf16 keeps eight bits
    np.testing.assert_allclose(change, 0.25 * total, rtol=0, atol=0.01 * np.abs(total).max())
    assert np.abs(total).max() > 0


def test_its_bytes_are_counted_and_it_is_evaluated(tiny_config: MakeConfig) -> None:
    config = tiny_config(*FLUSH, "evaluation.every=0")
    result = cgfedllm.run(config)
    spec = Workspace(config, Path()).spec
    packet = make_codec("bf16").packet_size(spec)
    trained, flush = result.records[-2:]
    assert [client.uplink_bytes for client in flush.clients] == [packet] * 3
    assert flush.uplink_bytes == 3 * packet
    assert flush.uplink_bytes_total == trained.uplink_bytes_total + 3 * packet
    assert flush.uplink_bytes_fp32 == 3 * 4 * spec.size
    # nothing goes down for the flush itself, only for the evaluation after it
    assert flush.downlink_bytes == 3 * make_codec("raw").packet_size(spec)
    for record in (trained, flush):
        assert record.heldout_nll is not None
        assert sorted(record.client_nll) == ["north", "south", "west"]
    assert RunFolder(config.run_dir).records()[-1].flush
    assert [client.steps for client in flush.clients] == [0, 0, 0]
    assert mean_train_loss(flush) is None
    assert not any(name.startswith("loss") for name in scalars(flush))


def test_it_brings_the_run_nearer_to_the_uncompressed_one(tiny_config: MakeConfig) -> None:
    """One round: what int8 lost is all there is between the two."""
    one = ("federation.rounds=1", "evaluation.clients=false")
    exact = tiny_config(*one, "name=exact")
    flushed = tiny_config(*one, "uplink.name=int8", "uplink.flush=raw", "name=flushed")
    cgfedllm.run(exact)
    cgfedllm.run(flushed)
    aim = adapter_after(exact, 1)
    before, after = ((adapter_after(flushed, r) - aim).norm() for r in (1, 2))
    assert after < 1e-3 * before  # float32 rounding is left


def test_all_clients_are_asked_and_those_that_hold_nothing_do_not_count(
    tiny_config: MakeConfig,
) -> None:
    config = tiny_config(*FLUSH, "federation.fraction_train=0.4", "evaluation.clients=false")
    asked: list[int] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.RoundStarted):
            asked.append(event.clients)

    result = cgfedllm.run(config, listeners=[listen])
    took_part = {client.client for record in result.records[:-1] for client in record.clients}
    assert asked == [1, 1, 3]
    assert {client.client for client in result.records[-1].clients} == took_part
    assert len(took_part) < 3
    assert result.records[-1].failures == []


@pytest.mark.parametrize("strategy", ["fedadam", "fedavgm", "median", "krum"])
def test_any_strategy_may_be_followed_by_a_flush(tiny_config: MakeConfig, strategy: str) -> None:
    result = cgfedllm.run(tiny_config(*FLUSH, f"federation.strategy.name={strategy}"))
    update, flush = result.records[-2:]
    assert 0 < flush.update_norm < 0.1 * update.update_norm


def test_server_optimisers_give_way_to_the_mean_and_robust_strategies_stay() -> None:
    def name(strategy: str) -> str:
        return flush_config(
            FederationConfig.model_validate({"strategy": {"name": strategy}})
        ).strategy.name

    for strategy in ("fedavgm", "fedadam", "fedyogi"):
        assert name(strategy) == "fedavg"
    for strategy in ("fedavg", "fedprox", "median", "trimmed_mean", "krum"):
        assert name(strategy) == strategy


@pytest.mark.parametrize(
    ("kind", "round_"),
    [
        (events.RoundFinished, 2),
        (events.RoundStarted, 3),
        (events.EvaluationProgress, 3),
        (events.RoundFinished, 3),
    ],
)
def test_a_run_that_is_stopped_around_it_ends_the_same(
    tiny_config: MakeConfig,
    outcome: Outcome,
    undisturbed: Callable[..., dict[str, Any]],
    kind: type,
    round_: int,
) -> None:
    config = tiny_config(*FLUSH)
    with pytest.raises(Stop):
        cgfedllm.run(config, listeners=[stop_at(kind, round_)])
    resumed = cgfedllm.resume(config.run_dir)
    assert outcome(resumed.run_dir) == undisturbed(*FLUSH)
    assert cgfedllm.resume(config.run_dir) == resumed  # complete now


def test_too_few_residuals_are_asked_for_again(
    tiny_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    outcome: Outcome,
    undisturbed: Callable[..., dict[str, Any]],
) -> None:
    flush, tries = client_app._flush, []

    def failing(*args: Any) -> Any:
        tries.append(1)
        if len(tries) <= 5:
            raise RuntimeError("out of luck")
        return flush(*args)

    settings = (*FLUSH, "federation.min_clients=3")
    monkeypatch.setattr(client_app, "_flush", failing)
    result = cgfedllm.run(tiny_config(*settings))
    record = result.records[-1]
    assert (record.attempts, len(record.failures), len(record.clients)) == (3, 5, 3)
    assert record.uplink_bytes == 4 * record.clients[0].uplink_bytes
    assert outcome(result.run_dir)["adapter"] == undisturbed(*settings)["adapter"]


def test_a_flush_nobody_answers_stops_the_run_and_can_be_resumed(
    tiny_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    outcome: Outcome,
    undisturbed: Callable[..., dict[str, Any]],
) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("gone")

    config = tiny_config(*FLUSH)
    with monkeypatch.context() as patch:
        patch.setattr(client_app, "_flush", fail)
        with pytest.raises(FederationError, match=r"round 3 had too few.*gone.*cgfedllm resume"):
            cgfedllm.run(config)
    spec = Workspace(config, Path()).spec
    assert latest_checkpoint(RunFolder(config.run_dir).checkpoints_dir, spec, config).round == 2
    assert outcome(cgfedllm.resume(config.run_dir).run_dir) == undisturbed(*FLUSH)


# ---- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["uplink.error_feedback=false"], "error_feedback is off"),
        (["uplink.error_feedback_decay=0"], "error_feedback_decay is 0"),
        (["uplink.name=raw"], "codec 'raw' loses nothing"),
        (["federation.stateless=true"], "stateless clients keep nothing"),
    ],
)
def test_where_there_is_nothing_to_flush_it_is_refused(
    tiny_config: MakeConfig, settings: list[str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"uplink.flush = 'bf16'.*{reason}.*Remove uplink.flush"):
        tiny_config(*FLUSH, *settings)


def test_its_codec_and_options_are_checked(tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"uplink\.flush: no codec.*did you mean 'int8'"):
        tiny_config("uplink.name=int8", "uplink.flush=int9")
    with pytest.raises(ConfigError, match=r"uplink\.flush_options.*no_such"):
        tiny_config("uplink.name=int8", "uplink.flush=int8", "uplink.flush_options.no_such=1")
    with pytest.raises(ConfigError, match=r"uplink\.flush_options.*names no codec"):
        tiny_config("uplink.name=int8", "uplink.flush_options.no_such=1")


def test_references_and_lossless_codecs_of_a_comparison_leave_it_out(
    tiny_config: MakeConfig,
) -> None:
    config = tiny_config(*FLUSH, "federation.rounds=1", "evaluation.clients=false")
    assert config.with_overrides(other_uplink("raw")).uplink.flush == ""
    assert config.with_overrides(other_uplink("sign")).uplink.flush == "bf16"
    comparison = cgfedllm.compare(config, ["int8", "raw"], references=["centralised"])
    assert len(comparison.entries) == 3
    rounds = {entry.codec: entry.records[-1].round for entry in comparison.entries}
    assert rounds == {"int8": 2, "raw": 1, "centralised": 1}
