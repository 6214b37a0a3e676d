"""Flower's strategies behind the wrapper: the results they give on plain clients."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    Strategy,
)

from cgfedllm.errors import FederationError
from cgfedllm.flower import CompressedStrategy, compression

from .apps import (
    MINIMA,
    NODES,
    Arrays,
    app_of,
    arrays_in,
    fedavg,
    grid_of,
    model,
    plain_app,
    record_of,
    wrapped,
)

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "fedavg": fedavg,
    "fedavgm": lambda: FedAvgM(**MINIMA, server_momentum=0.9),
    "fedadagrad": lambda: FedAdagrad(**MINIMA),
    "fedadam": lambda: FedAdam(**MINIMA),
    "fedyogi": lambda: FedYogi(**MINIMA),
    "fedprox": lambda: FedProx(**MINIMA, proximal_mu=0.1),
    "median": lambda: FedMedian(**MINIMA),
    "trimmed": lambda: FedTrimmedAvg(**MINIMA, beta=0.3),
    "krum": lambda: Krum(**MINIMA, num_malicious_nodes=1),
    "multikrum": lambda: MultiKrum(**MINIMA, num_malicious_nodes=1, num_nodes_to_select=2),
    "dp, clipped by the server": lambda: DifferentialPrivacyServerSideFixedClipping(
        fedavg(), noise_multiplier=0.0, clipping_norm=0.5, num_sampled_clients=len(NODES)
    ),
    "dp, clipped adaptively": lambda: DifferentialPrivacyServerSideAdaptiveClipping(
        fedavg(), noise_multiplier=0.0, num_sampled_clients=len(NODES), clipped_count_stddev=0.0
    ),
}


def floats_only() -> Arrays:
    """Flower's clipping turns counters into floats in place, which numpy refuses."""
    return {name: array for name, array in model().items() if array.dtype.kind == "f"}


def outcome(strategy: Strategy, app: Any, start: Arrays, rounds: int = 3) -> Arrays:
    random.seed(0)  # Flower samples from it, and Krum takes the first of equals
    result = strategy.start(grid_of(app), record_of(start), num_rounds=rounds)
    return arrays_in(result.arrays)


@pytest.mark.parametrize("name", STRATEGIES)
def test_three_rounds_give_what_plain_clients_give(name: str) -> None:
    start = floats_only()
    theirs = outcome(STRATEGIES[name](), plain_app(), start)
    ours = outcome(wrapped("raw", STRATEGIES[name]()), app_of("raw"), start)
    assert list(ours) == list(theirs)
    for key, array in theirs.items():
        assert ours[key].dtype == array.dtype
        np.testing.assert_allclose(ours[key], array, atol=2e-5)
    assert any(np.abs(theirs[key] - start[key]).max() > 1e-3 for key in start)


def test_counters_travel_with_fedavg() -> None:
    theirs = outcome(fedavg(), plain_app(), model())
    ours = outcome(wrapped(), app_of("raw"), model())
    assert ours["norm.num_batches_tracked"] == pytest.approx(theirs["norm.num_batches_tracked"])
    assert ours["norm.num_batches_tracked"].dtype == theirs["norm.num_batches_tracked"].dtype


def test_clipping_by_the_client_goes_inside_the_mod() -> None:
    def private() -> Strategy:
        return DifferentialPrivacyClientSideFixedClipping(
            fedavg(), noise_multiplier=0.0, clipping_norm=0.5, num_sampled_clients=len(NODES)
        )

    start = floats_only()
    theirs = outcome(private(), plain_app(mods=[fixedclipping_mod]), start)
    app = plain_app(mods=[compression("raw"), fixedclipping_mod])
    ours = outcome(wrapped("raw", private()), app, start)
    for key, array in theirs.items():
        np.testing.assert_allclose(ours[key], array, atol=2e-5)


def test_privacy_around_the_wrapper_fails_and_names_the_parcel() -> None:
    """The wrong order: the clipping strategy would clip parcels."""
    private = DifferentialPrivacyServerSideFixedClipping(
        wrapped("raw"), noise_multiplier=0.0, clipping_norm=0.5, num_sampled_clients=len(NODES)
    )
    with pytest.raises(TypeError, match=r"cgfedllm\.parcel"):
        outcome(private, app_of("raw"), floats_only(), rounds=1)


def test_a_strategy_with_a_start_of_its_own_is_refused() -> None:
    class Starting(FedAvg):
        def start(self, *args: Any, **options: Any) -> Any:
            raise AssertionError

    with pytest.raises(FederationError, match="Starting has a `start` of its own"):
        CompressedStrategy(Starting(), "raw")


# ---- metrics, evaluation, messages --------------------------------------------------------------


def test_the_apps_metrics_stay_and_bytes_are_added() -> None:
    strategy = wrapped("int8")
    result = strategy.start(grid_of(app_of("int8")), record_of(model()), num_rounds=2)
    for round_, metrics in result.train_metrics_clientapp.items():
        assert metrics["loss"] == pytest.approx(1.0 / round_)
        assert metrics["cgfedllm-uplink-refused"] == 0
        traffic = strategy.traffic[round_ - 1]
        assert traffic.round == round_
        assert set(traffic.received) == set(NODES)
        assert metrics["cgfedllm-uplink-bytes"] == traffic.uplink_bytes
        plain = len(NODES) * sum(array.nbytes for array in model().values())
        assert traffic.plain_bytes == plain
        assert metrics["cgfedllm-uplink-ratio"] == plain / traffic.uplink_bytes > 2.5


def test_bytes_are_those_of_the_messages() -> None:
    strategy, grid = wrapped("int8"), grid_of(app_of("int8"))
    messages = strategy.configure_train(1, record_of(model()), ConfigRecord(), grid)
    replies = list(grid.send_and_receive(messages))
    sent = {
        reply.metadata.src_node_id: [len(array.data) for array in reply.content["arrays"].values()]
        for reply in replies
    }
    strategy.aggregate_train(1, replies)
    assert {node: [size] for node, size in strategy.traffic[0].received.items()} == sent


def test_each_round_is_a_line_in_flowers_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "flwr"):
        wrapped("int8").start(grid_of(app_of("int8")), record_of(model()), num_rounds=1)
    (line,) = [text for text in caplog.messages if text.startswith("cgfedllm: ")]
    assert line.startswith("cgfedllm: 4 replies up in ")
    assert "fewer" in line
    assert line.endswith("0 refused")
    assert any("int8" in text for text in caplog.messages)


def test_evaluation_passes_unchanged() -> None:
    start = model()
    strategy = wrapped("int8")
    result = strategy.start(grid_of(app_of("int8")), record_of(start), num_rounds=1)
    total = sum(float(np.abs(array).sum()) for array in arrays_in(result.arrays).values())
    assert result.evaluate_metrics_clientapp[1]["total"] == pytest.approx(total)


def test_a_client_sees_the_apps_own_records_only() -> None:
    seen = []

    def look(message: Message, context: Any, call_next: Any) -> Message:
        seen.append(sorted(message.content))
        return call_next(message, context)

    app = plain_app(mods=[compression("raw"), look])
    wrapped().start(grid_of(app), record_of(model()), num_rounds=1)
    assert {tuple(names) for names in seen} == {("arrays", "config")}


def test_a_strategy_may_send_each_client_arrays_of_its_own() -> None:
    class Personal(FedAvg):
        def configure_train(
            self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
        ) -> list[Message]:
            messages = list(super().configure_train(server_round, arrays, config, grid))
            for message in messages:
                own = {n: a + message.metadata.dst_node_id for n, a in arrays_in(arrays).items()}
                content = message.content.copy()
                content["arrays"] = record_of(own)
                message.content = content
            return messages

    start = floats_only()
    theirs = outcome(Personal(**MINIMA), plain_app(), start)
    ours = outcome(wrapped("raw", Personal(**MINIMA)), app_of("raw"), start)
    for key, array in theirs.items():
        np.testing.assert_allclose(ours[key], array, atol=2e-5)


def test_messages_without_arrays_are_none_of_the_wrappers_business() -> None:
    class Asking(FedAvg):
        def configure_train(
            self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
        ) -> list[Message]:
            return [Message(RecordDict({"config": config}), node, "train") for node in NODES]

        def aggregate_train(
            self, server_round: int, replies: Any
        ) -> tuple[ArrayRecord | None, MetricRecord | None]:
            self.answers = [reply.content["metrics"]["x"] for reply in replies]
            return None, None

    app = ClientApp(mods=[compression("raw")])

    @app.train()
    def _train(message: Message, context: Any) -> Message:
        content = RecordDict({"metrics": MetricRecord({"x": context.node_id})})
        return Message(content, reply_to=message)

    inner = Asking(**MINIMA)
    wrapped("raw", inner).start(grid_of(app), record_of(model()), num_rounds=1)
    assert inner.answers == list(NODES)
