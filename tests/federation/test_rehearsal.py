"""A server's round with made-up clients is a round, and its memory is the strategy's alone."""

from __future__ import annotations

import tracemalloc

import pytest

from cgfedllm.adapter import AdapterSpec
from cgfedllm.codecs import codec_names, make_codec
from cgfedllm.config import FederationConfig
from cgfedllm.errors import CodecError
from cgfedllm.federation.rehearsal import Rehearsal, made_up_update

SPEC = AdapterSpec.from_shapes(
    {
        f"model.layers.{layer}.self_attn.q_proj.lora_{kind}.weight": shape
        for layer in range(4)
        for kind, shape in (("A", (8, 512)), ("B", (512, 8)))
    }
)


def rehearsal(codec: str = "int8", strategy: str = "fedavg") -> Rehearsal:
    federation = FederationConfig.model_validate(
        {"strategy": {"name": strategy}, "fraction_train": 0.1, "min_clients": 3}
    )
    uplink = make_codec(codec)
    return Rehearsal(federation, SPEC, uplink, make_codec("raw"), uplink.initial_state(SPEC))


@pytest.mark.parametrize("name", codec_names())
def test_every_codecs_replies_are_decoded_and_timed(name: str) -> None:
    try:
        took = rehearsal(name).round(3)
    except CodecError:
        pytest.fail(f"{name} cannot be rehearsed")
    size = make_codec(name).packet_size(SPEC)
    assert took.clients == 3
    assert size is None or took.packet == size
    assert took.decode_seconds > 0
    assert took.reply_seconds * 3 == pytest.approx(
        took.broadcast_seconds + took.decode_seconds + took.aggregate_seconds
    )


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "median", "trimmed_mean", "krum"])
def test_every_strategy_can_be_rehearsed_with_all_of_the_clients(name: str) -> None:
    assert rehearsal(strategy=name).round(7).clients == 7


def peak(strategy: str, clients: int) -> float:
    """Of a round, in adapters."""
    made = rehearsal("sign", strategy)
    made.round(2)
    tracemalloc.start()
    try:
        made.round(clients)
        return tracemalloc.get_traced_memory()[1] / (4 * SPEC.size)
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_clients_where_means_are_streamed() -> None:
    few, many = peak("fedavg", 10), peak("fedavg", 100)
    # a message and a record a client remain
    assert many - few < 0.05 * 90


@pytest.mark.parametrize("name", ["median", "krum"])
def test_memory_grows_by_an_adapter_a_client_at_least_where_every_reply_is_needed(
    name: str,
) -> None:
    assert peak(name, 40) - peak(name, 10) > 30


def test_made_up_updates_are_the_same_every_time() -> None:
    first, again = made_up_update(SPEC, 1), made_up_update(SPEC, 1)
    assert first.vector.tobytes() == again.vector.tobytes()
    assert first.vector.tobytes() != made_up_update(SPEC, 2).vector.tobytes()
    odd = AdapterSpec.from_shapes({"scalar": (), "vector": (5,), "cube": (2, 3, 4)})
    assert made_up_update(odd, 1).is_finite()
