"""A small made-up run, shared by the report tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cgfedllm.metrics import ClientRecord, FailureRecord, ModuleRecord, RoundRecord

CLIENTS = ("numpy", "torch", "transformers")
PARAMETERS = 921_600


def make_records(rounds: int = 3, clients: tuple[str, ...] = CLIENTS) -> list[RoundRecord]:
    """Rounds 0..rounds of a run whose NLL falls and whose codec sends a quarter of fp32."""
    fp32 = 4 * PARAMETERS * len(clients)
    records = []
    for r in range(rounds + 1):
        sent = fp32 // 4 if r else 0
        rows = [
            ClientRecord(c, 100, 4, 8000, 2.9 - 0.1 * r, 0.5, sent // len(clients), 4 * PARAMETERS,
                         5.0, 0.05, 0.02)
            for c in clients
        ]  # fmt: skip
        records.append(
            RoundRecord(
                round=r,
                clients=rows if r else [],
                failures=[FailureRecord("sklearn", "NaN loss")] if r == 2 else [],
                uplink_bytes=sent,
                downlink_bytes=fp32 if r else 0,
                uplink_bytes_total=sent * r,
                downlink_bytes_total=fp32 * r,
                uplink_bytes_fp32=fp32 if r else 0,
                uplink_bytes_fp32_total=fp32 * r,
                downlink_bytes_fp32=fp32 if r else 0,
                downlink_bytes_fp32_total=fp32 * r,
                update_norm=0.4,
                product_gap=0.01,
                heldout_nll=3.0 - 0.2 * r,
                client_nll={c: 3.1 - 0.2 * r - 0.01 * i for i, c in enumerate(clients)},
                seconds={"train": 15.0, "encode": 0.15, "transfer": 0.01, "decode": 0.06,
                         "aggregate": 0.02, "evaluate": 6.0, "checkpoint": 0.05, "total": 21.5}
                if r else {"evaluate": 6.0, "total": 6.1},
            )
        )  # fmt: skip
    return records


@pytest.fixture(name="make_records")
def _make_records() -> Callable[..., list[RoundRecord]]:
    return make_records


@pytest.fixture
def records() -> list[RoundRecord]:
    """Rounds 0 to 3."""
    return make_records()


@pytest.fixture
def learning(records: list[RoundRecord]) -> list[RoundRecord]:
    """The same run through a codec that was pre-trained and adapts after round 1."""
    records[0].tgap_uplink_bytes, records[0].tgap_downlink_bytes = 5 * 2**20, 0
    records[2].codec_bytes = 3 * 2**20
    for record in records[2:]:
        record.codec_bytes_total = 3 * 2**20
    return records


@pytest.fixture
def keeping(records: list[RoundRecord]) -> list[RoundRecord]:
    """The same run through a codec that keeps A factors well and B factors less and less."""
    for record in records[1:]:
        for client in record.clients:
            for module in ("q_proj", "v_proj"):
                client.fidelity[f"{module}.A"] = ModuleRecord(1.0, 0.99, 0.01)
                client.fidelity[f"{module}.B"] = ModuleRecord(3.0, 2.0, float(record.round))
    return records
