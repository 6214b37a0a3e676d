"""Two hundred clients, fifty rounds, faults of all kinds: nothing grows, nothing is lost."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import psutil
import pytest

import cgfedllm
from cgfedllm import events
from cgfedllm.config import Config

from .soak import CLIENTS, ROUNDS, SEED, SETTINGS, SHARE, write_many

MakeConfig = Callable[..., Config]

WARM = 10
# bytes that memory may gain after the first rounds
GROWTH = 24 * 2**20


def folder_size(path: Path) -> int:
    """Bytes of all that a run keeps, but for the metrics, which are a line a round."""
    files = (f for f in path.rglob("*") if f.is_file() and f.name != "metrics.jsonl")
    return sum(file.stat().st_size for file in files)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_long_run_of_many_clients_with_faults_grows_in_nothing(
    tmp_path: Path,
    tiny_config: MakeConfig,
    faults: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = psutil.Process()
    memory: dict[int, int] = {}
    kept: dict[int, int] = {}
    many = write_many(tmp_path / "many.jsonl")
    config = tiny_config(f'data.source="{many}"', *SETTINGS)

    def listen(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished) and event.record.round >= WARM:
            gc.collect()
            memory[event.record.round] = process.memory_info().rss
            if event.record.round in (WARM, ROUNDS):
                kept[event.record.round] = folder_size(config.run_dir)

    grids = faults.install(monkeypatch, faults.at_random(SEED, SHARE))
    records = cgfedllm.run(config, listeners=[listen]).records
    assert [record.round for record in records] == list(range(ROUNDS + 1))
    # every fault is in the record of its round, and nobody else is
    happened = grids[0].happened
    assert len(happened) > SHARE / 2 * CLIENTS * ROUNDS
    for record in records[1:]:
        hurt = {(client, kind) for client, round_, kind in happened if round_ == record.round}
        counted = {client.client for client in record.clients}
        named = {failure.client for failure in record.failures}
        assert {client for client, _ in hurt} <= named
        assert len(counted) == CLIENTS - len({c for c, kind in hurt if kind != "twice"})
    # the second half needs no more than the first
    middle = (WARM + ROUNDS) // 2
    early = [memory[round_] for round_ in range(WARM, middle)]
    late = [memory[round_] for round_ in range(middle, ROUNDS + 1)]
    assert max(late) - max(early) < GROWTH, (early, late)
    assert kept[ROUNDS] < 1.1 * kept[WARM], kept
    lines = (config.run_dir / "metrics.jsonl").read_bytes().splitlines()
    assert max(map(len, lines[1:])) < 1.5 * min(map(len, lines[1:]))
    assert records[-1].heldout_nll < records[0].heldout_nll
