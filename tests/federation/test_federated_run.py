"""A federated run from end to end, on a tiny model: what is learned, sent and written down."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cgfedllm
from cgfedllm import events
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.codecs import Codec, make_codec
from cgfedllm.config import Config
from cgfedllm.errors import FederationError, TrainingError
from cgfedllm.federation.checkpoint import latest_checkpoint
from cgfedllm.federation.inprocess import InProcessGrid
from cgfedllm.metrics import RoundRecord
from cgfedllm.peft_format import load_adapter
from cgfedllm.runs import RunFolder
from cgfedllm.training.local import LocalTrainer, TrainResult
from cgfedllm.workspace import Workspace

MakeConfig = Callable[..., Config]
Outcome = Callable[[Path], dict[str, Any]]
Failing = Callable[[Callable[[str, int], None]], AbstractContextManager[None]]

FAST = ("evaluation.clients=false", "federation.rounds=2")
FP32_TOTALS = ("uplink_bytes", "downlink_bytes", "uplink_bytes_fp32", "downlink_bytes_fp32")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """``with failing(hook):`` has ``hook(client, round)`` run before each client's training."""

    @contextmanager
    def install(hook: Callable[[str, int], None]) -> Iterator[None]:
        train = LocalTrainer.train

        def hooked(self: LocalTrainer, *args: Any, **kwargs: Any) -> TrainResult:
            hook(kwargs["client"], kwargs["round"])
            return train(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(LocalTrainer, "train", hooked)
            yield

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


def test_frozen_a_stays_as_it_started_and_is_not_sent(tiny_config: MakeConfig) -> None:
    config = tiny_config(*FAST, "lora.freeze_a=true", "seed=3")
    result = cgfedllm.run(config)
    workspace = Workspace(config, result.run_dir)
    adapter, start = load_adapter(result.adapter_dir).views(), workspace.whole(workspace.start)
    for factor in start.spec:
        same = np.array_equal(adapter[factor.name], start.views()[factor.name])
        assert same == (factor.kind == "A")
    assert {factor.kind for factor in workspace.spec} == {"B"}
    assert result.records[1].product_gap is None


def test_frozen_a_belongs_to_the_run_not_to_the_run_before(
    tiny_config: MakeConfig,
) -> None:
    """Runs in one process share a model; its frozen factors must still follow the seed."""
    one, two = (
        tiny_config("lora.freeze_a=true", "federation.rounds=1", f"seed={seed}", f"name=of-{seed}")
        for seed in (1, 2)
    )
    first = cgfedllm.run(one)
    cgfedllm.run(two)
    again = cgfedllm.run(one, overwrite=True)
    assert again.records[-1].heldout_nll == first.records[-1].heldout_nll


def test_product_aggregation_learns_and_reports_the_gap(tiny_config: MakeConfig) -> None:
    result = cgfedllm.run(tiny_config("federation.aggregation=product", "federation.rounds=2"))
    assert result.records[-1].heldout_nll < result.records[0].heldout_nll
    assert all(record.product_gap > 0 for record in result.records[1:])


def test_fedprox_holds_clients_near_the_global_adapter(tiny_config: MakeConfig) -> None:
    norms = {}
    for mu in (0.0, 100.0):
        config = tiny_config(
            "federation.strategy.name=fedprox",
            f"federation.strategy.proximal_mu={mu}",
            "federation.rounds=1",
            "training.local_steps=6",
            "training.optimizer=sgd",
            "training.max_grad_norm=0",
            f"name=mu-{mu:g}",
        )
        norms[mu] = cgfedllm.run(config).records[1].clients[0].update_norm
    assert norms[100.0] < 0.7 * norms[0.0]


def test_kept_optimisers_change_the_second_round_not_the_first(tiny_config: MakeConfig) -> None:
    fresh, kept = (
        cgfedllm.run(tiny_config(*FAST, f"training.keep_optimizer={keep}", f"name=keep-{keep}"))
        for keep in ("false", "true")
    )
    losses = [
        [client.update_norm for record in result.records[1:] for client in record.clients]
        for result in (fresh, kept)
    ]
    assert losses[0][:3] == losses[1][:3]
    assert all(a != b for a, b in zip(losses[0][3:], losses[1][3:], strict=True))


@pytest.mark.parametrize(
    "strategy", ["fedavgm", "fedadam", "fedyogi", "median", "trimmed_mean", "krum"]
)
def test_every_strategy_runs_to_the_end(tiny_config: MakeConfig, strategy: str) -> None:
    config = tiny_config(*FAST, f"federation.strategy.name={strategy}")
    result = cgfedllm.run(config)
    assert len(result.records) == 3
    assert result.records[-1].heldout_nll < result.records[0].heldout_nll


def test_server_learning_rate_scales_the_step(tiny_config: MakeConfig) -> None:
    whole, half = (
        cgfedllm.run(
            tiny_config("federation.rounds=1", f"federation.server_lr={lr}", f"name=lr-{lr}")
        )
        for lr in (1.0, 0.5)
    )
    norm = whole.records[1].update_norm
    assert half.records[1].update_norm == pytest.approx(norm / 2, rel=1e-5)
    one, other = load_adapter(whole.adapter_dir), load_adapter(half.adapter_dir)
    workspace = Workspace(tiny_config(), Path())
    start = AdapterUpdate.from_arrays(one.spec, workspace.whole(workspace.start).views())
    np.testing.assert_allclose((other - start).vector, (one - start).scaled(0.5).vector, atol=1e-6)


def test_summed_changes_go_as_many_times_as_far_as_there_are_clients(
    tiny_config: MakeConfig,
) -> None:
    common = ("evaluation.clients=false", "federation.rounds=1", "federation.weighting=uniform")
    mean, total, scaled = (
        cgfedllm.run(tiny_config(*common, f"name=rule-{number}", *settings))
        for number, settings in enumerate(
            [
                (),
                ("federation.aggregation=sum",),
                ("federation.aggregation=sum", f"federation.server_lr={1 / 3}"),
            ]
        )
    )
    norm = mean.records[1].update_norm
    assert total.records[1].update_norm == pytest.approx(3 * norm, rel=1e-4)
    assert scaled.records[1].update_norm == pytest.approx(norm, rel=1e-4)
    same = [load_adapter(run.adapter_dir) for run in (mean, scaled)]
    np.testing.assert_allclose(same[0].vector, same[1].vector, atol=1e-6)


# ---- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["raw", "bf16", "int8"])
def test_bytes_are_the_exact_lengths_of_the_packets(tiny_config: MakeConfig, codec: str) -> None:
    config = tiny_config(f"uplink.name={codec}", f"downlink.name={codec}", "federation.rounds=2")
    spec = Workspace(config, Path()).spec
    packet = make_codec(codec).packet_size(spec)
    whole = make_codec("raw").packet_size(spec)
    result = cgfedllm.run(config)
    start, first, second = result.records
    # evaluation at the start sends everybody the whole adapter; each later one an increment,
    # after which training finds every client current
    assert (start.uplink_bytes, start.downlink_bytes) == (0, 3 * whole)
    for record in (first, second):
        assert [client.uplink_bytes for client in record.clients] == [packet] * 3
        assert [client.downlink_bytes for client in record.clients] == [packet] * 3
        assert (record.uplink_bytes, record.downlink_bytes) == (3 * packet, 3 * packet)
        assert (record.uplink_bytes_fp32, record.downlink_bytes_fp32) == (
            3 * 4 * spec.size,
            3 * 4 * spec.size,
        )


def test_totals_add_up(tiny_config: MakeConfig) -> None:
    result = cgfedllm.run(tiny_config("uplink.name=int8", "federation.fraction_train=0.7"))
    for name in FP32_TOTALS:
        total = 0
        for record in result.records:
            total += getattr(record, name)
            assert getattr(record, f"{name}_total") == total
    assert result.records[-1].uplink_bytes_total > 0


def test_client_lines_tell_what_each_client_did(tiny_config: MakeConfig) -> None:
    config = tiny_config(*FAST, "training.local_steps=2", "training.batch_size=4")
    result = cgfedllm.run(config)
    data = Workspace(config, Path()).data
    for record in result.records[1:]:
        assert [client.client for client in record.clients] == ["north", "south", "west"]
        for client, rows in zip(record.clients, data.clients, strict=True):
            assert client.examples == len(rows.train)
            assert client.steps == 2
            assert client.tokens > 8 * 10
            assert 0 < client.train_loss < 20
            assert client.update_norm > 0
        assert record.seconds.keys() == {
            "train",
            "encode",
            "transfer",
            "decode",
            "aggregate",
            "evaluate",
            "checkpoint",
            "total",
        }
        assert record.seconds["total"] >= record.seconds["train"] > 0
    assert result.records[0].clients == []


def test_result_and_metrics_file_say_the_same(tiny_config: MakeConfig) -> None:
    told: list[RoundRecord] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished):
            told.append(event.record)

    result = cgfedllm.run(tiny_config(*FAST), listeners=[listen])
    assert result.records == told
    assert [record.to_dict() for record in RunFolder(result.run_dir).records()] == [
        record.to_dict() for record in told
    ]


# ---- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "evaluated"), [(1, [0, 1, 2, 3]), (2, [0, 2, 3]), (0, [0, 3]), (5, [0, 3])]
)
def test_evaluation_at_the_start_the_end_and_every_so_many_rounds(
    tiny_config: MakeConfig, every: int, evaluated: list[int]
) -> None:
    result = cgfedllm.run(tiny_config(f"evaluation.every={every}"))
    for record in result.records:
        done = record.round in evaluated
        assert (record.heldout_nll is not None) == done
        assert sorted(record.client_nll) == (["north", "south", "west"] if done else [])


def test_clients_evaluate_only_where_they_have_rows_to(tiny_config: MakeConfig) -> None:
    result = cgfedllm.run(tiny_config("data.splits.validation=0", "federation.rounds=1"))
    assert [record.client_nll for record in result.records] == [{}, {}]
    assert result.records[-1].failures == []


def test_a_client_that_fails_to_evaluate_is_noted(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cgfedllm.federation import client_app

    evaluate = client_app.evaluate_nll

    def fail(*args: Any, what: str, **kwargs: Any) -> Any:
        if what == "south":
            raise RuntimeError("no memory left")
        return evaluate(*args, what=what, **kwargs)

    monkeypatch.setattr(client_app, "evaluate_nll", fail)
    result = cgfedllm.run(tiny_config("federation.rounds=1"))
    for record in result.records:
        assert sorted(record.client_nll) == ["north", "west"]
        assert [(f.client, f.reason) for f in record.failures] == [
            ("south", "RuntimeError: no memory left")
        ]


# ---- who takes part -----------------------------------------------------------------------------


def test_a_fraction_of_the_clients_trains_each_round(tiny_config: MakeConfig) -> None:
    result = cgfedllm.run(
        tiny_config("federation.fraction_train=0.4", "federation.rounds=6", "evaluation.every=0")
    )
    sizes = [len(record.clients) for record in result.records]
    assert sizes == [0, 1, 1, 1, 1, 1, 1]
    assert len({record.clients[0].client for record in result.records[1:]}) > 1


def test_partial_participation_with_a_lossy_downlink(tiny_config: MakeConfig) -> None:
    """Clients come back after rounds away and are sent the whole adapter again."""
    config = tiny_config(
        "downlink.name=int8",
        "federation.fraction_train=0.7",
        "federation.rounds=6",
        "evaluation.every=0",
    )
    spec = Workspace(config, Path()).spec
    step, whole = (make_codec(name).packet_size(spec) for name in ("int8", "raw"))
    result = cgfedllm.run(config)
    sent = {client.downlink_bytes for record in result.records[2:-1] for client in record.clients}
    assert sent == {step, whole}
    assert not any(record.failures for record in result.records)


def test_a_client_that_lost_its_reference_is_sent_it_again_and_charged(
    tiny_config: MakeConfig,
) -> None:
    config = tiny_config("downlink.name=int8", "federation.rounds=2")
    spec = Workspace(config, Path()).spec
    step, whole = (make_codec(name).packet_size(spec) for name in ("int8", "raw"))

    def lose(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished) and event.record.round == 1:
            for file in (config.run_dir / "clients" / "south").glob("reference-*"):
                file.unlink()

    unharmed = cgfedllm.run(config.with_overrides({"name": "unharmed"}))
    harmed = cgfedllm.run(config, listeners=[lose])
    second = harmed.records[2]
    assert [client.downlink_bytes for client in second.clients] == [step, whole + step, step]
    assert second.failures == []
    assert second.heldout_nll == unharmed.records[2].heldout_nll


# ---- clients that fail --------------------------------------------------------------------------


def test_a_client_that_raises_is_left_out_of_its_round_alone(
    tiny_config: MakeConfig, failing: Failing
) -> None:
    def hook(client: str, round_: int) -> None:
        if (client, round_) == ("south", 2):
            raise RuntimeError("disk on fire")

    notices: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Notice) and event.level == "warning":
            notices.append(event.text)

    with failing(hook):
        result = cgfedllm.run(tiny_config(), listeners=[listen])
    assert [[c.client for c in record.clients] for record in result.records] == [
        [],
        ["north", "south", "west"],
        ["north", "west"],
        ["north", "south", "west"],
    ]
    assert [(f.client, f.reason) for f in result.records[2].failures] == [
        ("south", "RuntimeError: disk on fire")
    ]
    assert notices == ["round 2: south is left out: RuntimeError: disk on fire"]
    assert result.records[-1].heldout_nll < result.records[0].heldout_nll


def test_a_client_that_breaks_off_in_mid_training_changes_nothing_for_the_others(
    tiny_config: MakeConfig,
    failing: Failing,
    monkeypatch: pytest.MonkeyPatch,
    outcome: Outcome,
) -> None:
    """Gradients and dropout of a failed client must not reach the shared model's next user."""
    from cgfedllm.training import local

    summed_loss = local.summed_loss
    poison: set[str] = set()
    current: list[str] = []

    def loss(*args: Any, **kwargs: Any) -> Any:
        value = summed_loss(*args, **kwargs)
        return value * float("nan") if current[-1] in poison else value

    def listen(event: events.Event) -> None:
        if isinstance(event, events.ClientStarted):
            current.append(event.client)

    monkeypatch.setattr(local, "summed_loss", loss)
    settings = ("lora.dropout=0.2", "federation.rounds=2")
    poison.add("north")
    poisoned = cgfedllm.run(tiny_config(*settings, "name=poisoned"), listeners=[listen])
    poison.clear()

    def absent(client: str, round_: int) -> None:
        if client == "north":
            raise RuntimeError("not today")

    with failing(absent):
        without = cgfedllm.run(tiny_config(*settings, "name=without"), listeners=[listen])
    for record, other in zip(poisoned.records[1:], without.records[1:], strict=True):
        assert [c.client for c in record.clients] == ["south", "west"]
        assert "loss is nan" in record.failures[0].reason
        assert record.heldout_nll == other.heldout_nll
    assert outcome(poisoned.run_dir)["adapter"] == outcome(without.run_dir)["adapter"]


def test_evaluation_after_a_failed_client_is_free_of_dropout(
    tiny_config: MakeConfig,
) -> None:
    def stop(event: events.Event) -> None:
        if isinstance(event, events.StepFinished) and event.client == "west":
            raise RuntimeError("listener that fails in the client")

    config = tiny_config("lora.dropout=0.5", "federation.rounds=1")
    result = cgfedllm.run(config, listeners=[stop])
    assert [f.client for f in result.records[1].failures] == ["west"]
    measured = cgfedllm.evaluate(result.run_dir)
    assert measured.adapter[0].nll == result.records[1].heldout_nll


def test_too_few_replies_are_tried_again(
    tiny_config: MakeConfig, failing: Failing, outcome: Outcome
) -> None:
    tries: list[tuple[str, int]] = []

    def hook(client: str, round_: int) -> None:
        tries.append((client, round_))
        if round_ == 2 and tries.count((client, 2)) == 1 and client != "north":
            raise RuntimeError("out of luck")

    settings = (
        "federation.min_clients=2",
        "federation.strategy.name=fedadam",
        "uplink.name=int8",
        "uplink.error_feedback=false",
    )
    unbroken = cgfedllm.run(tiny_config(*settings, "name=unbroken"))
    with failing(hook):
        retried = cgfedllm.run(tiny_config(*settings, "name=retried"))
    second = retried.records[2]
    packet = second.clients[0].uplink_bytes
    assert second.attempts == 2
    assert [f.client for f in second.failures] == ["south", "west"]
    # the first attempt's only packet was sent, although nothing came of it
    assert second.uplink_bytes == 4 * packet
    assert second.uplink_bytes_fp32 == 4 * fp32_bytes(tiny_config())
    # and the server optimiser took one step, not two
    ours, theirs = outcome(retried.run_dir)["adapter"], outcome(unbroken.run_dir)["adapter"]
    assert ours == theirs


def test_failures_of_all_attempts_and_of_evaluation_are_written_down(
    tiny_config: MakeConfig, failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cgfedllm.federation import client_app

    tries: list[str] = []

    def hook(client: str, round_: int) -> None:
        tries.append(client)
        if len(tries) <= 4:
            raise RuntimeError(f"try {len(tries)}")

    def fail(*args: Any, what: str, **kwargs: Any) -> Any:
        if what == "west":
            raise RuntimeError("blind")
        return evaluate(*args, what=what, **kwargs)

    evaluate = client_app.evaluate_nll
    monkeypatch.setattr(client_app, "evaluate_nll", fail)
    with failing(hook):
        record = cgfedllm.run(tiny_config("federation.rounds=1")).records[1]
    assert record.attempts == 2
    assert [(f.client, f.reason) for f in record.failures] == [
        ("north", "RuntimeError: try 1"),
        ("south", "RuntimeError: try 2"),
        ("west", "RuntimeError: try 3"),
        ("north", "RuntimeError: try 4"),
        ("west", "RuntimeError: blind"),
    ]


def test_a_round_nobody_can_finish_stops_the_run_and_keeps_the_rest(
    tiny_config: MakeConfig, failing: Failing, outcome: Outcome
) -> None:
    asked: list[str] = []

    def hook(client: str, round_: int) -> None:
        if round_ == 2:
            asked.append(client)
            raise TrainingError(f"{client}: the loss is nan")

    unbroken = cgfedllm.run(tiny_config("name=unbroken"))
    with failing(hook):
        config = tiny_config("federation.round_retries=1")
        with pytest.raises(FederationError) as caught:
            cgfedllm.run(config)
    assert len(asked) == 6
    message = str(caught.value)
    assert "round 2" in message
    assert "2 attempts" in message
    assert "west: the loss is nan" in message
    assert f"cgfedllm resume {config.run_dir}" in message
    kept = outcome(config.run_dir)
    assert kept["rounds"] == outcome(unbroken.run_dir)["rounds"][:2]
    assert kept["adapter"] == {}
    # with the cause gone, resuming ends where the unbroken run does
    assert outcome(cgfedllm.resume(config.run_dir).run_dir) == outcome(unbroken.run_dir)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_aggregate_that_is_not_finite_stops_the_run_before_anything_is_kept(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cgfedllm.federation import strategy

    value = strategy._Mean.value

    def poisoned(self: Any) -> AdapterUpdate:
        mean = value(self)
        return replace(mean, vector=np.full_like(mean.vector, np.inf))

    monkeypatch.setattr(strategy._Mean, "value", poisoned)
    config = tiny_config()
    with pytest.raises(FederationError, match=r"round 1.*not finite.*lower training\.lr"):
        cgfedllm.run(config)
    folder = RunFolder(config.run_dir)
    assert [record.round for record in folder.records()] == [0]
    spec = Workspace(config, Path()).spec
    assert latest_checkpoint(folder.checkpoints_dir, spec, config).round == 0


# ---- error feedback -----------------------------------------------------------------------------


def test_error_feedback_changes_the_second_round_not_the_first(tiny_config: MakeConfig) -> None:
    variants = {
        "off": ("uplink.error_feedback=false",),
        "on": (),
        "decay": ("uplink.error_feedback_decay=0.5",),
        "decayed away": ("uplink.error_feedback_decay=0",),
    }
    nll = {}
    for name, settings in variants.items():
        own = ("uplink.name=int8", f"name={name.replace(' ', '-')}")
        records = cgfedllm.run(tiny_config(*FAST, *own, *settings)).records
        nll[name] = [record.heldout_nll for record in records]
    assert len({values[1] for values in nll.values()}) == 1
    assert nll["decayed away"] == nll["off"]
    assert len({nll[name][2] for name in ("off", "on", "decay")}) == 3


def test_error_feedback_keeps_a_residual_only_for_codecs_that_lose_something(
    tiny_config: MakeConfig,
) -> None:
    for codec, lossy in (("raw", False), ("int8", True)):
        result = cgfedllm.run(tiny_config(*FAST, f"uplink.name={codec}", f"name={codec}"))
        files = list((result.run_dir / "clients" / "north").glob("memory-*"))
        assert bool(files) == lossy


# ---- many clients -------------------------------------------------------------------------------


def test_replies_do_not_pile_up_with_the_number_of_clients(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver, decode = InProcessGrid._deliver, Codec.decode
    alive: list[weakref.ref[Any]] = []
    most = {12: 0, 36: 0}
    clients = 0

    def noted(made: Any) -> Any:
        alive.append(weakref.ref(made))
        most[clients] = max(most[clients], sum(ref() is not None for ref in alive))
        return made

    monkeypatch.setattr(InProcessGrid, "_deliver", lambda *args: noted(deliver(*args)))
    monkeypatch.setattr(Codec, "decode", lambda *args: noted(decode(*args)))
    for clients in most:
        config = tiny_config(
            "data.partition.kind=iid",
            f"data.partition.clients={clients}",
            "data.partition.min_rows=1",
            "data.splits.validation=0",
            "training.local_steps=1",
            "training.batch_size=2",
            "evaluation.clients=false",
            "federation.rounds=1",
            f"name=of-{clients}",
        )
        assert len(cgfedllm.run(config).records[1].clients) == clients
    assert most[12] == most[36] <= 8
