"""Flower's strategies behind codecs: the same results as without, and thick-skinned."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    Strategy,
)

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, make_codec
from cgfedllm.codecs.packet import HEADER_SIZE
from cgfedllm.config import FederationConfig
from cgfedllm.federation.downlink import Broadcaster
from cgfedllm.federation.inprocess import InProcessGrid
from cgfedllm.federation.messages import (
    ARRAYS,
    CONFIG,
    KIND,
    METRICS,
    NUM_EXAMPLES,
    PACKET,
    REFERENCE_MISSING,
    VERSION,
    adapter_of,
    adapter_record,
    packet_limit,
    packet_of,
    packet_record,
)
from cgfedllm.federation.strategies import (
    averages_first,
    make_strategy,
    restore_strategy,
    strategy_state,
)
from cgfedllm.federation.strategy import CompressedStrategy

RandomAdapter = Callable[..., AdapterUpdate]
MakeGrid = Callable[..., InProcessGrid]

SEED = 11
CLIENTS = 6
NODES = range(2, 2 + CLIENTS)
PLAIN: dict[str, Any] = {
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
}
FLOWER: dict[str, Callable[[], Strategy]] = {
    "fedavg": lambda: FedAvg(**PLAIN),
    "fedavgm": lambda: FedAvgM(**PLAIN, server_momentum=0.9),
    "fedadam": lambda: FedAdam(**PLAIN, eta=0.01, beta_1=0.9, beta_2=0.99, tau=1e-3),
    "fedyogi": lambda: FedYogi(**PLAIN, eta=0.01, beta_1=0.9, beta_2=0.99, tau=1e-3),
    "fedprox": lambda: FedProx(**PLAIN, proximal_mu=0.01),
    "median": lambda: FedMedian(**PLAIN),
    "trimmed_mean": lambda: FedTrimmedAvg(**PLAIN, beta=0.2),
    "krum": lambda: Krum(**PLAIN, num_malicious_nodes=1),
}
MEAN_BASED = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedprox")


def name_of(node: int) -> str:
    return f"client-{node:02d}"


def examples_of(node: int) -> int:
    return 10 * node


class Wrapped:
    """A wrapped strategy and what is needed to drive it."""

    def __init__(self, spec: AdapterSpec, grid: InProcessGrid, **federation: Any) -> None:
        config = FederationConfig.model_validate(federation)
        self.spec, self.grid = spec, grid
        self.codec = make_codec("raw")
        self.broadcaster = Broadcaster(spec, self.codec, SEED)
        self.strategy = CompressedStrategy(
            make_strategy(config, spec),
            spec=spec,
            uplink=self.codec,
            broadcaster=self.broadcaster,
            seed=SEED,
            weighting=config.weighting,
            summed=config.aggregation == "sum",
            min_replies=config.min_clients,
            client_name=name_of,
            max_norm=config.max_update_norm,
        )

    def send(self, round_: int, adapter: AdapterUpdate) -> list[Message]:
        self.start = adapter
        self.broadcaster.advance(adapter, round_ - 1)
        return list(
            self.strategy.configure_train(
                round_, adapter_record(adapter), ConfigRecord(), self.grid
            )
        )

    def reply(
        self, message: Message, adapter: AdapterUpdate, round_: int, **metrics: Any
    ) -> Message:
        """As a client without training or error feedback answers."""
        packet = self.codec.encode(adapter - self.start, CodecContext(self.spec, round_, SEED))
        numbers = {NUM_EXAMPLES: examples_of(message.metadata.dst_node_id), **metrics}
        content = RecordDict({ARRAYS: packet_record(packet), METRICS: MetricRecord(numbers)})
        return Message(content, reply_to=message)

    def aggregate(self, round_: int, replies: Any) -> AdapterUpdate | None:
        arrays, _ = self.strategy.aggregate_train(round_, replies)
        return None if arrays is None else adapter_of(self.spec, arrays)


@pytest.fixture
def grid(make_grid: MakeGrid) -> InProcessGrid:
    return make_grid(NODES)


@pytest.fixture
def wrap(spec: AdapterSpec, grid: InProcessGrid) -> Callable[..., Wrapped]:
    return lambda **federation: Wrapped(spec, grid, **federation)


def trained(start: AdapterUpdate, node: int, round_: int) -> AdapterUpdate:
    """What client `node` makes of `start`, the same however often it is asked."""
    rng = np.random.default_rng([node, round_])
    step = rng.standard_normal(start.spec.size).astype(np.float32) * np.float32(0.1)
    return start + AdapterUpdate(start.spec, step)


def named_arrays(adapter: AdapterUpdate) -> ArrayRecord:
    """An adapter as a Flower app without this package sends it."""
    return ArrayRecord({name: Array(view) for name, view in adapter.views().items()})


def flower_round(
    strategy: Strategy, start: AdapterUpdate, round_: int, grid: InProcessGrid
) -> AdapterUpdate:
    """One round of Flower's own, on plain adapters."""
    replies = []
    sent = strategy.configure_train(round_, named_arrays(start), ConfigRecord(), grid)
    for message in sorted(sent, key=lambda message: message.metadata.dst_node_id):
        node = message.metadata.dst_node_id
        content = {
            ARRAYS: named_arrays(trained(start, node, round_)),
            METRICS: MetricRecord({NUM_EXAMPLES: examples_of(node)}),
        }
        replies.append(Message(RecordDict(content), reply_to=message))
    arrays, _ = strategy.aggregate_train(round_, replies)
    assert arrays is not None
    result = {name: np.asarray(array.numpy(), np.float32) for name, array in arrays.items()}
    return AdapterUpdate.from_arrays(start.spec, result)


def wrapped_round(wrapped: Wrapped, start: AdapterUpdate, round_: int) -> AdapterUpdate:
    replies = [
        wrapped.reply(message, trained(start, message.metadata.dst_node_id, round_), round_)
        for message in wrapped.send(round_, start)
    ]
    result = wrapped.aggregate(round_, replies)
    assert result is not None
    return result


# ---- the same result as Flower's own ------------------------------------------------------------


@pytest.mark.parametrize("name", FLOWER)
def test_three_rounds_give_what_flowers_own_strategy_gives(
    name: str, wrap: Callable[..., Wrapped], grid: InProcessGrid, random_adapter: RandomAdapter
) -> None:
    wrapped, plain = wrap(strategy={"name": name}), FLOWER[name]()
    ours = theirs = random_adapter(0)
    for round_ in (1, 2, 3):
        theirs = flower_round(plain, theirs, round_, grid)
        ours = wrapped_round(wrapped, ours, round_)
        np.testing.assert_allclose(ours.vector, theirs.vector, rtol=0, atol=1e-6)
    assert (ours - random_adapter(0)).norm() > 0.01


@pytest.mark.parametrize("name", FLOWER)
def test_strategy_is_flowers_own_class(name: str, spec: AdapterSpec) -> None:
    config = FederationConfig.model_validate({"strategy": {"name": name}})
    assert type(make_strategy(config, spec)) is type(FLOWER[name]())


def test_fedprox_tells_clients_its_mu(
    wrap: Callable[..., Wrapped], random_adapter: RandomAdapter
) -> None:
    wrapped = wrap(strategy={"name": "fedprox", "proximal_mu": 0.5})
    message = wrapped.send(1, random_adapter(0))[0]
    assert message.content[CONFIG]["proximal-mu"] == 0.5
    assert message.content[CONFIG]["server-round"] == 1


@pytest.mark.parametrize(
    ("weighting", "weights"),
    [("examples", [examples_of(node) for node in NODES]), ("uniform", [1] * CLIENTS)],
)
def test_the_mean_is_weighted_as_asked(
    weighting: str,
    weights: list[int],
    wrap: Callable[..., Wrapped],
    random_adapter: RandomAdapter,
) -> None:
    start = random_adapter(0)
    result = wrapped_round(wrap(weighting=weighting), start, 1)
    stacked = np.stack([trained(start, node, 1).vector for node in NODES])
    expected = np.average(stacked.astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(result.vector, expected, atol=1e-6)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_summed_changes_are_their_uniform_mean_times_the_clients(
    weighting: str, wrap: Callable[..., Wrapped], random_adapter: RandomAdapter
) -> None:
    start = random_adapter(0, scale=100.0)
    wrapped = wrap(aggregation="sum", weighting=weighting)
    total = wrapped_round(wrapped, start, 1) - start
    mean = wrapped_round(wrap(weighting="uniform"), start, 1) - start
    np.testing.assert_allclose(total.vector, CLIENTS * mean.vector, atol=2e-4)
    steps = np.stack([(trained(start, node, 1) - start).vector for node in NODES])
    # the start does not cancel badly: an error of its last place, not one a client
    np.testing.assert_allclose(total.vector, steps.sum(axis=0), atol=2e-5)
    assert averages_first(wrapped.strategy.inner)  # so no more than one reply is held


def test_fedavgm_goes_on_from_the_real_global_adapter(
    wrap: Callable[..., Wrapped], random_adapter: RandomAdapter
) -> None:
    """With a server learning rate of our own that is not what the strategy proposed last."""
    wrapped = wrap(strategy={"name": "fedavgm", "momentum": 0.5})
    momentum = np.zeros_like(random_adapter(0).vector)
    for round_ in (1, 2, 3):
        start = random_adapter(round_)
        steps = [trained(start, node, round_).vector - start.vector for node in NODES]
        mean = np.average(steps, axis=0, weights=[examples_of(node) for node in NODES])
        momentum = 0.5 * momentum + mean
        result = wrapped_round(wrapped, start, round_)
        np.testing.assert_allclose(result.vector, start.vector + momentum, atol=1e-6)


@pytest.mark.parametrize("name", FLOWER)
def test_saved_state_continues_bit_for_bit(
    name: str, wrap: Callable[..., Wrapped], random_adapter: RandomAdapter
) -> None:
    unbroken, before, after = (wrap(strategy={"name": name}) for _ in range(3))
    adapter = broken = random_adapter(0)
    for round_ in (1, 2):
        adapter = wrapped_round(unbroken, adapter, round_)
        broken = wrapped_round(before, broken, round_)
    state = strategy_state(before.strategy.inner)
    assert bool(state) == (name in ("fedavgm", "fedadam", "fedyogi"))
    restore_strategy(after.strategy.inner, {key: value.copy() for key, value in state.items()})
    for round_ in (3, 4):
        adapter = wrapped_round(unbroken, adapter, round_)
        broken = wrapped_round(after, broken, round_)
        assert adapter.vector.tobytes() == broken.vector.tobytes()


def test_product_aggregation_averages_products(
    wrap: Callable[..., Wrapped], spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    start = random_adapter(0)
    product = wrapped_round(wrap(aggregation="product"), start, 1)
    factors = wrapped_round(wrap(), start, 1)
    weights = np.array([examples_of(node) for node in NODES], np.float64)

    def error(adapter: AdapterUpdate) -> float:
        total = 0.0
        for a, b in spec.pairs():
            each = [trained(start, node, 1).views() for node in NODES]
            mean = np.average([v[b.name] @ v[a.name] for v in each], axis=0, weights=weights)
            views = adapter.views()
            total += float(np.square(views[b.name] @ views[a.name] - mean).sum())
        return total

    assert error(product) < 0.9 * error(factors)


def test_the_gap_is_that_of_averaging_the_factors_whatever_the_strategy_makes_of_it(
    wrap: Callable[..., Wrapped], random_adapter: RandomAdapter
) -> None:
    gaps = {}
    for options in (
        {},
        {"aggregation": "product"},
        {"strategy": {"name": "fedadam"}},
        {"strategy": {"name": "krum"}},
    ):
        wrapped = wrap(**options)
        wrapped_round(wrapped, random_adapter(0), 1)
        gaps[str(options)] = wrapped.strategy.tally.product_gap
    assert 0 < gaps["{}"] < 1
    assert set(gaps.values()) == {gaps["{}"]}


# ---- sampling -----------------------------------------------------------------------------------


def sampled(wrapped: Wrapped, rounds: int, adapter: AdapterUpdate) -> list[list[str]]:
    return [
        [name_of(message.metadata.dst_node_id) for message in wrapped.send(round_, adapter)]
        for round_ in range(1, rounds + 1)
    ]


def test_a_fraction_of_the_clients_is_sampled_anew_each_round(
    wrap: Callable[..., Wrapped], random_adapter: RandomAdapter
) -> None:
    rounds = sampled(wrap(fraction_train=0.5), 12, random_adapter(0))
    assert {len(names) for names in rounds} == {3}
    assert all(names == sorted(names) and len(set(names)) == 3 for names in rounds)
    assert {name for names in rounds for name in names} == {name_of(node) for node in NODES}
    assert len({tuple(names) for names in rounds}) > 4


def test_at_least_min_clients_are_sampled(
    wrap: Callable[..., Wrapped], random_adapter: RandomAdapter
) -> None:
    (names,) = sampled(wrap(fraction_train=0.1, min_clients=4), 1, random_adapter(0))
    assert len(names) == 4


def test_sampling_follows_the_seed_and_leaves_pythons_generator_alone(
    wrap: Callable[..., Wrapped], random_adapter: RandomAdapter
) -> None:
    random.seed(1)
    before = random.getstate()
    first = sampled(wrap(fraction_train=0.5), 6, random_adapter(0))
    assert random.getstate() == before
    random.seed(2)
    assert sampled(wrap(fraction_train=0.5), 6, random_adapter(0)) == first


def test_another_attempt_at_a_round_samples_others(
    wrap: Callable[..., Wrapped], random_adapter: RandomAdapter
) -> None:
    wrapped = wrap(fraction_train=0.5)
    seen = set()
    for attempt in range(1, 9):
        wrapped.strategy.attempt = attempt
        seen.add(tuple(sampled(wrapped, 1, random_adapter(0))[0]))
    assert len(seen) > 2


# ---- the downlink in messages -------------------------------------------------------------------


def test_messages_carry_a_packet_and_its_bytes_are_counted(
    wrap: Callable[..., Wrapped], spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    wrapped = wrap()
    messages = wrapped.send(1, random_adapter(0))
    blobs = [packet_of(message.content, limit=packet_limit(spec)) for message in messages]
    assert {len(blob) for blob in blobs} == {HEADER_SIZE + 4 * spec.size}
    assert {message.content[CONFIG][KIND] for message in messages} == {"full"}
    assert {message.content[CONFIG][VERSION] for message in messages} == {0}
    tally = wrapped.strategy.tally
    assert tally.broadcasts == CLIENTS
    assert tally.downlink_bytes == {name_of(node): len(blobs[0]) for node in NODES}


def test_a_current_client_gets_a_message_without_arrays_that_costs_nothing(
    wrap: Callable[..., Wrapped], random_adapter: RandomAdapter
) -> None:
    wrapped = wrap()
    wrapped.send(1, random_adapter(0))
    tally = wrapped.strategy.tally
    sent, count = sum(tally.downlink_bytes.values()), tally.broadcasts
    messages = list(
        wrapped.strategy.configure_evaluate(
            0, adapter_record(random_adapter(0)), ConfigRecord(), wrapped.grid
        )
    )
    assert {message.content[CONFIG][KIND] for message in messages} == {"hold"}
    assert all(not message.content[ARRAYS] for message in messages)
    assert (sum(tally.downlink_bytes.values()), tally.broadcasts) == (sent, count)


def test_a_client_that_lost_its_reference_is_sent_it_whole_and_charged(
    wrap: Callable[..., Wrapped], spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    wrapped = wrap()
    message = wrapped.send(1, random_adapter(0))[0]
    again = wrapped.strategy.resend(message, {REFERENCE_MISSING})
    assert again.content[CONFIG][KIND] == "full"
    assert again.metadata.dst_node_id == message.metadata.dst_node_id
    name = name_of(message.metadata.dst_node_id)
    assert wrapped.strategy.tally.downlink_bytes[name] == 2 * (HEADER_SIZE + 4 * spec.size)


# ---- bad replies --------------------------------------------------------------------------------


def with_packet(reply: Message, blob: bytes) -> Message:
    reply.content[ARRAYS] = packet_record(blob)
    return reply


def with_metrics(reply: Message, **metrics: Any) -> Message:
    for name, value in metrics.items():
        reply.content[METRICS][name.replace("_", "-")] = value
    return reply


def without(reply: Message, record: str) -> Message:
    del reply.content[record]
    return reply


def blob_of(reply: Message) -> bytes:
    return reply.content[ARRAYS][PACKET].data


def coded_with(reply: Message, codec: str, spec: AdapterSpec, round_: int = 1) -> Message:
    zeros = AdapterUpdate.zeros(spec)
    return with_packet(reply, make_codec(codec).encode(zeros, CodecContext(spec, round_, SEED)))


def nan_payload(reply: Message, spec: AdapterSpec) -> Message:
    """A packet with a right checksum around values that are not finite."""
    from cgfedllm.codecs.packet import Packet

    packet = Packet.from_bytes(blob_of(reply))
    payload = np.full(spec.size, np.nan, "<f4").tobytes()
    fields = {**vars(packet), "payload": payload}
    return with_packet(reply, Packet(**fields).to_bytes())


def plain_arrays(reply: Message, spec: AdapterSpec) -> Message:
    """What a client without the compression mod sends."""
    reply.content[ARRAYS] = adapter_record(AdapterUpdate.zeros(spec))
    return reply


def foreign_array(reply: Message) -> Message:
    reply.content[ARRAYS] = ArrayRecord({PACKET: Array(np.zeros(3, np.float32))})
    return reply


def two_packets(reply: Message) -> Message:
    reply.content[ARRAYS]["another"] = reply.content[ARRAYS][PACKET]
    return reply


OTHER = AdapterSpec.from_shapes({"x.lora_A.weight": (2, 3)})
BAD_REPLIES: dict[str, tuple[Callable[[Message, AdapterSpec], Message], str]] = {
    "error": (
        lambda reply, spec: Message(Error(2, "out of memory"), reply_to=reply.request),
        "out of memory",
    ),
    "error without reason": (
        lambda reply, spec: Message(Error(7), reply_to=reply.request),
        "error code 7",
    ),
    "wrong codec": (lambda reply, spec: coded_with(reply, "int8", spec), "packet codec"),
    "stale": (lambda reply, spec: coded_with(reply, "raw", spec, round_=9), "packet round"),
    "another adapter": (lambda reply, spec: coded_with(reply, "raw", OTHER), "spec hash"),
    "truncated": (lambda reply, spec: with_packet(reply, blob_of(reply)[:-3]), "truncated"),
    "extended": (lambda reply, spec: with_packet(reply, blob_of(reply) + b"x"), "extended"),
    "empty": (lambda reply, spec: with_packet(reply, b""), "too short"),
    "noise": (lambda reply, spec: with_packet(reply, bytes(range(200))), "not a packet"),
    "flipped bit": (
        lambda reply, spec: with_packet(reply, blob_of(reply)[:-1] + b"\x01"),
        "checksum",
    ),
    "oversized": (
        lambda reply, spec: with_packet(reply, bytes(packet_limit(spec) + 1)),
        "cannot be right",
    ),
    "not finite": (nan_payload, "NaN or infinity"),
    "plain arrays": (plain_arrays, "does not carry one packet"),
    "foreign array": (lambda reply, spec: foreign_array(reply), "does not carry one packet"),
    "two packets": (lambda reply, spec: two_packets(reply), "does not carry one packet"),
    "no arrays": (lambda reply, spec: without(reply, ARRAYS), "does not carry one packet"),
    "no metrics": (lambda reply, spec: without(reply, METRICS), "no metrics"),
    "NaN metrics": (
        lambda reply, spec: with_metrics(reply, train_loss=float("nan")),
        "from 0 to 1e60: train-loss",
    ),
    "infinite examples": (
        lambda reply, spec: with_metrics(reply, num_examples=float("inf")),
        "from 0 to 1e60: num-examples",
    ),
    "zero examples": (
        lambda reply, spec: with_metrics(reply, num_examples=0),
        "must be a positive count",
    ),
    "negative examples": (
        lambda reply, spec: with_metrics(reply, num_examples=-5),
        "from 0 to 1e60: num-examples",
    ),
    "huge examples": (
        lambda reply, spec: with_metrics(reply, num_examples=2**60),
        "must be a positive count",
    ),
    "next to no examples": (
        lambda reply, spec: with_metrics(reply, num_examples=1e-300),
        "must be a positive count",
    ),
    "number beyond all floats": (
        lambda reply, spec: with_metrics(reply, tokens=10**400),
        "from 0 to 1e60: tokens",
    ),
    "negative seconds": (
        lambda reply, spec: with_metrics(reply, train_seconds=-1.0),
        "from 0 to 1e60: train-seconds",
    ),
    "many metrics": (
        lambda reply, spec: with_metrics(reply, **{f"x{i}": 1 for i in range(100)}),
        "at most 64",
    ),
    "long metric": (lambda reply, spec: with_metrics(reply, **{"x" * 100: 1}), "too long"),
    "metric with escapes": (
        lambda reply, spec: with_metrics(reply, **{"\x1b[2Jx": float("nan")}),
        "from 0 to 1e60: ?[2Jx",
    ),
    "error with escapes": (
        lambda reply, spec: Message(
            Error(2, "\x1b]0;owned\x07 over\n two lines"), reply_to=reply.request
        ),
        "?]0;owned? over two lines",
    ),
    "error of white space": (
        lambda reply, spec: Message(Error(2, " \r\n"), reply_to=reply.request),
        "no reason given",
    ),
    "error without end": (
        lambda reply, spec: Message(Error(2, "a" * 10**7), reply_to=reply.request),
        "a" * 1000 + "...",
    ),
    "list of examples": (
        lambda reply, spec: with_metrics(reply, num_examples=[1, 2]),
        "must be a positive count",
    ),
    "no examples": (
        lambda reply, spec: Message(
            RecordDict({ARRAYS: reply.content[ARRAYS], METRICS: MetricRecord({"steps": 1})}),
            reply_to=reply.request,
        ),
        "must be a positive count",
    ),
}


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("name", ["fedavg", "krum"])
@pytest.mark.parametrize("case", BAD_REPLIES)
def test_a_bad_reply_costs_only_its_own_share(
    case: str,
    name: str,
    weighting: str,
    wrap: Callable[..., Wrapped],
    spec: AdapterSpec,
    random_adapter: RandomAdapter,
) -> None:
    spoil, reason = BAD_REPLIES[case]
    start = random_adapter(0)

    def replies(wrapped: Wrapped, bad: int | None) -> Iterator[Message]:
        for message in wrapped.send(1, start):
            node = message.metadata.dst_node_id
            reply = wrapped.reply(message, trained(start, node, 1), 1)
            if node == NODES[2]:
                if bad is None:
                    continue
                reply.__dict__["request"] = message
                reply = spoil(reply, spec)
            yield reply

    options = {"strategy": {"name": name}, "weighting": weighting}
    clean, hurt = wrap(**options), wrap(**options)
    expected = clean.aggregate(1, replies(clean, None))
    result = hurt.aggregate(1, replies(hurt, NODES[2]))
    assert result.vector.tobytes() == expected.vector.tobytes()
    ((client, told),) = hurt.strategy.tally.failures
    assert client == name_of(NODES[2])
    assert reason in told
    assert len(hurt.strategy.tally.received) == CLIENTS - 1


def test_no_usable_reply_gives_nothing(
    wrap: Callable[..., Wrapped], random_adapter: RandomAdapter
) -> None:
    wrapped = wrap()
    messages = wrapped.send(1, random_adapter(0))
    assert wrapped.aggregate(1, [Message(Error(1, "no"), reply_to=m) for m in messages]) is None
    assert wrapped.aggregate(1, []) is None


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "median"])
def test_too_few_replies_leave_the_server_optimiser_alone(
    name: str, wrap: Callable[..., Wrapped], random_adapter: RandomAdapter
) -> None:
    start = random_adapter(0)
    wrapped = wrap(strategy={"name": name}, min_clients=3)
    messages = wrapped.send(1, start)[:2]
    replies = [wrapped.reply(m, trained(start, m.metadata.dst_node_id, 1), 1) for m in messages]
    assert wrapped.aggregate(1, replies) is None
    assert strategy_state(wrapped.strategy.inner) == {}


def test_every_packet_that_came_in_is_counted_usable_or_not(
    wrap: Callable[..., Wrapped], spec: AdapterSpec, random_adapter: RandomAdapter
) -> None:
    start = random_adapter(0)
    wrapped = wrap()
    replies = [
        wrapped.reply(m, trained(start, m.metadata.dst_node_id, 1), 1)
        for m in wrapped.send(1, start)
    ]
    with_metrics(replies[0], num_examples=-1)
    replies[1] = with_packet(replies[1], bytes(70))
    wrapped.aggregate(1, replies)
    packet = HEADER_SIZE + 4 * spec.size
    assert wrapped.strategy.tally.uplink_bytes == (CLIENTS - 1) * packet + 70
    assert wrapped.strategy.tally.uplinks == CLIENTS
    again = wrapped.strategy.tally.next_attempt()
    assert (again.uplink_bytes, again.received) == (wrapped.strategy.tally.uplink_bytes, [])
    assert len(again.failures) == 2


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEAN_BASED)
def test_one_decoded_reply_lives_at_a_time_however_many_clients(
    name: str, spec: AdapterSpec, make_grid: MakeGrid, random_adapter: RandomAdapter
) -> None:
    clients = 100
    start = random_adapter(0)
    wrapped = Wrapped(spec, make_grid(range(2, 2 + clients)), strategy={"name": name})
    alive: list[weakref.ref[Message]] = []
    most = 0

    def replies() -> Iterator[Message]:
        nonlocal most
        for message in wrapped.send(1, start):
            reply = wrapped.reply(message, trained(start, message.metadata.dst_node_id, 1), 1)
            alive.append(weakref.ref(reply))
            yield reply
            del reply
            most = max(most, sum(ref() is not None for ref in alive))

    assert wrapped.aggregate(1, replies()) is not None
    assert len(alive) == clients
    assert most <= 2


def test_an_update_beyond_float32_costs_only_its_own_share(
    wrap: Callable[..., Wrapped], spec: AdapterSpec
) -> None:
    most = AdapterUpdate(spec, np.full(spec.size, 3e38, np.float32))
    wrapped = wrap()
    first, *others = wrapped.send(1, most)
    zeros = AdapterUpdate.zeros(spec)
    packet = wrapped.codec.encode(most, CodecContext(spec, 1, SEED))
    replies = [wrapped.reply(message, wrapped.start, 1) for message in others]
    hostile = with_packet(wrapped.reply(first, wrapped.start + zeros, 1), packet)
    result = wrapped.aggregate(1, [hostile, *replies])
    assert result is not None
    assert result.is_finite()
    assert wrapped.strategy.tally.failures == [
        (name_of(NODES[0]), "the update leads to values beyond float32; it is left out")
    ]


def test_an_update_too_large_for_diagnostics_leaves_them_out(
    wrap: Callable[..., Wrapped], spec: AdapterSpec
) -> None:
    wrapped = wrap()
    first, *others = wrapped.send(1, AdapterUpdate.zeros(spec))
    huge = AdapterUpdate(spec, np.full(spec.size, 3e38, np.float32))
    replies = [wrapped.reply(message, wrapped.start, 1) for message in others]
    assert wrapped.aggregate(1, [wrapped.reply(first, huge, 1), *replies]) is not None
    assert wrapped.strategy.tally.product_gap is None


def test_an_update_with_a_larger_norm_than_allowed_is_left_out(
    spec: AdapterSpec, grid: InProcessGrid, random_adapter: RandomAdapter
) -> None:
    bounded = Wrapped(spec, grid, max_update_norm=2.5)
    start = random_adapter(0)
    replies = []
    for norm, message in enumerate(bounded.send(1, start)):
        update = random_adapter(1 + norm)
        own = start + update.scaled(norm / update.norm())
        replies.append(bounded.reply(message, own, 1))
    assert bounded.aggregate(1, replies) is not None
    assert len(bounded.strategy.tally.received) == 3
    assert bounded.strategy.tally.failures[-1] == (
        name_of(NODES[-1]),
        "the update's norm is 5; federation.max_update_norm is 2.5",
    )
