"""What a codec keeps of each client's update is known, by module, and nobody can lie it absurd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import MetricRecord, RecordDict

import cgfedllm
from cgfedllm import events
from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, make_codec
from cgfedllm.codecs.feedback import encode_with_feedback
from cgfedllm.config import Config
from cgfedllm.errors import PacketError
from cgfedllm.federation import client_app
from cgfedllm.federation.fidelity import (
    ERROR,
    MOST_KINDS,
    OTHER,
    SIGNAL,
    module_energies,
    tell_fidelity,
    told_fidelity,
)
from cgfedllm.federation.messages import METRICS
from cgfedllm.metrics import ModuleRecord, RoundRecord

MakeConfig = Callable[..., Config]
RandomAdapter = Callable[..., AdapterUpdate]

KINDS = ["q_proj.A", "q_proj.B", "v_proj.A", "v_proj.B"]


def said(codec: str, update: AdapterUpdate, **feedback: Any) -> tuple[RecordDict, AdapterUpdate]:
    """A client's metrics, and what the server decodes."""
    context = CodecContext(update.spec, 1)
    encoded = encode_with_feedback(make_codec(codec), update, context, **feedback)
    metrics = MetricRecord({"num-examples": 1})
    tell_fidelity(metrics, encoded)
    return RecordDict({METRICS: metrics}), make_codec(codec).decode(encoded.packet, context)


# ---- the measure --------------------------------------------------------------------------------


def test_energies_are_summed_over_layers() -> None:
    shapes = {f"m.{n}.q_proj.lora_{x}.weight": (1, 2) for n in (0, 1) for x in "AB"}
    update = AdapterUpdate(AdapterSpec.from_shapes(shapes), np.arange(8, dtype=np.float32))
    assert module_energies(update) == {"q_proj.A": 0 + 1 + 16 + 25, "q_proj.B": 4 + 9 + 36 + 49}


def test_an_adapter_of_very_many_modules_makes_a_small_reply() -> None:
    spec = AdapterSpec.from_shapes({f"m.0.p{n}.lora_A.weight": (1, 1) for n in range(200)})
    energies = module_energies(AdapterUpdate(spec, np.ones(200, np.float32)))
    assert len(energies) == MOST_KINDS
    assert list(energies)[-1] == OTHER
    assert energies[OTHER] == 200 - (MOST_KINDS - 1)


def test_what_is_measured_is_the_packet_against_what_the_codec_was_given(
    random_adapter: RandomAdapter,
) -> None:
    update, residual = random_adapter(0), random_adapter(1)
    content, decoded = said("int4", update, residual=residual, decay=0.5)
    told = told_fidelity(content, decoded)
    assert list(told) == KINDS
    wanted = update + residual.scaled(0.5)
    for kind, parts in (("signal", wanted), ("decoded", decoded), ("error", wanted - decoded)):
        for name, energy in module_energies(parts).items():
            assert getattr(told[name], kind) == pytest.approx(energy, rel=1e-5)
    # the same with nothing kept for the next round
    alone, decoded = said("int4", wanted, enabled=False)
    assert told_fidelity(alone, decoded) == told


def test_an_exact_codec_has_no_error(random_adapter: RandomAdapter) -> None:
    content, decoded = said("raw", random_adapter(0))
    told = told_fidelity(content, decoded)
    assert [module.error for module in told.values()] == [0, 0, 0, 0]
    assert all(module.signal == module.decoded > 0 for module in told.values())


# ---- what a client says -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SIGNAL, ERROR])
@pytest.mark.parametrize(
    "value",
    [
        [1.0, 1.0, 1.0],
        [1.0] * 5,
        [],
        1.0,
        [1.0, 1.0, 1.0, -1.0],
        [1.0, 1.0, 1.0, math.nan],
        [1.0, 1.0, 1.0, math.inf],
        [1.0, 1.0, 1.0, 1e121],
        [1, 1, 1, 10**400],
        None,
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(name: str, value: Any, random_adapter: RandomAdapter) -> None:
    content, decoded = said("int8", random_adapter(0))
    if value is None:
        del content[METRICS][name]
    else:
        content[METRICS][name] = value
    with pytest.raises(PacketError, match=f"{name} is not 4 numbers from 0 to 1e120"):
        told_fidelity(content, decoded)


def test_a_client_need_not_say_anything(random_adapter: RandomAdapter) -> None:
    content = RecordDict({METRICS: MetricRecord({"num-examples": 1})})
    assert told_fidelity(content, random_adapter(0)) == {}


# ---- runs ---------------------------------------------------------------------------------------

FAST = ("federation.rounds=2", "training.local_steps=1", "evaluation.clients=false")


def test_a_run_keeps_what_each_clients_packet_kept(tiny_config: MakeConfig) -> None:
    received: dict[tuple[int, str], float] = {}

    def listen(event: events.Event) -> None:
        if isinstance(event, events.UpdateReceived):
            received[event.round, event.client] = event.update.norm() ** 2

    result = cgfedllm.run(tiny_config(*FAST, "uplink.name=int4"), listeners=[listen])
    for record in result.records[1:]:
        for client in record.clients:
            assert set(client.fidelity) == {f"{m}_proj.{factor}" for m in "qkvo" for factor in "AB"}
            told = client.fidelity.values()
            assert sum(module.decoded for module in told) == pytest.approx(
                received[record.round, client.client], rel=1e-5
            )
            assert 0 < sum(m.error for m in told) < sum(m.signal for m in told)
    # written down, and read again
    (line,) = [r for r in result.records if r.round == 1]
    assert RoundRecord.from_dict(line.to_dict()) == line


@pytest.mark.parametrize(
    "private",
    [
        ("privacy.mechanism=local", "privacy.epsilon=8", "privacy.delta=1e-5"),
        (
            "privacy.mechanism=central", "privacy.epsilon=8", "privacy.delta=1e-5",
            "federation.weighting=uniform",
        ),
        (
            "privacy.secagg.enabled=true", "federation.weighting=uniform", "uplink.name=sketch",
            "uplink.options={bpp=8.5, bits=8, scale_exponent=-14}",
        ),
    ],
    ids=["local", "central", "sums"],
)  # fmt: skip
def test_nothing_is_told_under_privacy_and_where_only_sums_are_seen(
    private: tuple[str, ...], tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[object] = []
    monkeypatch.setattr(client_app, "tell_fidelity", lambda *told: measured.append(told))
    result = cgfedllm.run(tiny_config(*FAST, "uplink.error_feedback=false", *private))
    assert all(len(record.clients) for record in result.records[1:])
    assert measured == []
    assert not any(client.fidelity for r in result.records for client in r.clients)


def test_a_flush_tells_of_no_codec(tiny_config: MakeConfig) -> None:
    result = cgfedllm.run(tiny_config(*FAST, "uplink.name=int4", "uplink.flush=raw"))
    assert result.records[-1].flush
    assert all(client.fidelity for client in result.records[-2].clients)
    assert not any(client.fidelity for client in result.records[-1].clients)


def test_lines_of_earlier_releases_are_read() -> None:
    record = RoundRecord(round=0).to_dict()
    row = {
        "client": "north", "examples": 1, "steps": 1, "tokens": 1, "train_loss": 1.0,
        "update_norm": 1.0, "uplink_bytes": 1, "downlink_bytes": 1, "train_seconds": 1.0,
        "encode_seconds": 1.0, "decode_seconds": 1.0,
    }  # fmt: skip
    assert RoundRecord.from_dict(record | {"clients": [row]}).clients[0].fidelity == {}
    for bad in (-1.0, math.nan, math.inf):
        told = {"q_proj.A": vars(ModuleRecord(1.0, 1.0, bad))}
        with pytest.raises(ValueError, match="fidelity"):
            RoundRecord.from_dict(record | {"clients": [row | {"fidelity": told}]})
