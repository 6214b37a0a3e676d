"""Odd updates are noticed among those of their round, written down, and left out if so wished."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import cgfedllm
from cgfedllm import events
from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.config import Config, ScreeningConfig
from cgfedllm.errors import ConfigError, FederationError
from cgfedllm.federation import engine
from cgfedllm.federation.client_app import make_client_app
from cgfedllm.federation.screening import BUCKETS, Screen, Screened, Sketch
from cgfedllm.metrics import RoundRecord

MakeConfig = Callable[..., Config]
Run = Callable[..., tuple[list[RoundRecord], list[str]]]

LARGE = AdapterSpec.from_shapes({"x.lora_A.weight": (8, 4096), "x.lora_B.weight": (4096, 8)})
NINE = (
    "data.partition.kind=iid",
    "data.partition.clients=9",
    "data.partition.min_rows=4",
    "data.splits.max_validation_rows=1",
    "evaluation.every=0",
    "evaluation.clients=false",
)
LIARS = ("client-03", "client-07")


def update(seed: int, scale: float = 1.0, common: float = 0.3) -> AdapterUpdate:
    """An update that has a share of its energy in common with those of other seeds."""
    own, shared = (np.random.default_rng([s]).standard_normal(LARGE.size) for s in (seed + 1, 0))
    values = scale * (np.sqrt(1 - common) * own + np.sqrt(common) * shared)
    return AdapterUpdate(LARGE, values.astype(np.float32))


def screened(updates: dict[str, AdapterUpdate], **options: Any) -> dict[str, Screened]:
    screen = Screen(ScreeningConfig(**options), Sketch(LARGE.size, seed=3))
    for client, each in updates.items():
        screen.add(client, each)
    return screen.results()


# ---- one round ----------------------------------------------------------------------------------


def test_norms_are_over_the_rounds_median_and_cosines_to_the_median_of_the_others() -> None:
    updates = {str(seed): update(seed) for seed in range(9)}
    updates["0"] = update(0, scale=2.5)
    found = screened(updates)
    norms = {client: each.norm() for client, each in updates.items()}
    vectors = {c: u.vector.astype(np.float64) / norms[c] for c, u in updates.items()}
    for client, each in found.items():
        assert each.norm_ratio == pytest.approx(norms[client] / np.median(list(norms.values())))
        others = np.median([v for c, v in vectors.items() if c != client], axis=0)
        exact = vectors[client] @ others / np.linalg.norm(others)
        assert each.cosine == pytest.approx(exact, abs=5 / np.sqrt(BUCKETS))
        assert each.suspicion == ""


@pytest.mark.parametrize("clients", [4, 5, 8, 9])
def test_the_median_of_the_others_is_that_without_ones_own(
    clients: int, spec: AdapterSpec, random_adapter: Callable[..., AdapterUpdate]
) -> None:
    """An adapter of fewer values than buckets is its own sketch, so the cosine is exact."""
    updates = {str(seed): random_adapter(seed) for seed in range(clients)}
    screen = Screen(ScreeningConfig(), Sketch(spec.size, seed=3))
    for client, each in updates.items():
        screen.add(client, each)
    units = {c: u.vector.astype(np.float64) / u.norm() for c, u in updates.items()}
    for client, found in screen.results().items():
        others = np.median([v for c, v in units.items() if c != client], axis=0)
        exact = units[client] @ others / np.linalg.norm(others)
        assert found.cosine == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize(
    ("scale", "word"), [(10.0, "norm is"), (-1.0, "cosine"), (-5.0, "norm is"), (0.0, "")]
)
def test_what_is_odd_is_said_and_nobody_else_is_blamed(scale: float, word: str) -> None:
    updates = {str(seed): update(seed) for seed in range(9)}
    for liar in ("2", "6"):
        updates[liar] = updates[liar].scaled(scale)
    found = screened(updates)
    for client, each in found.items():
        lies = client in ("2", "6") and bool(word)
        assert bool(each.suspicion) == lies, client
        assert not lies or word in each.suspicion
    if scale == -5.0:
        assert "cosine to the others' median is -0." in found["2"].suspicion
    if not scale:
        assert (found["2"].norm_ratio, found["2"].cosine) == (0.0, None)


def test_thresholds_are_those_asked_for() -> None:
    updates = {str(seed): update(seed) for seed in range(8)} | {"far": update(9, scale=-2.5)}
    assert "norm" not in screened(updates)["far"].suspicion
    assert "norm" in screened(updates, max_norm_ratio=2.0)["far"].suspicion
    assert screened(updates, min_cosine=-1.0)["far"].suspicion == ""


def test_updates_that_are_zero_nearly_everywhere_are_compared_too() -> None:
    """One value in a hundred, at places all agree on: a sample of places would see a handful."""
    places = np.random.default_rng(5).choice(LARGE.size, LARGE.size // 100, replace=False)
    sparse = {}
    for seed in range(9):
        vector = np.zeros(LARGE.size, np.float32)
        vector[places] = update(seed).vector[places]
        sparse[str(seed)] = AdapterUpdate(LARGE, vector * np.float32(-1 if seed == 4 else 1))
    found = screened(sparse)
    assert {client for client, each in found.items() if each.suspicion} == {"4"}


@pytest.mark.parametrize("clients", [0, 1, 3])
def test_too_few_updates_are_not_compared(clients: int) -> None:
    assert screened({str(seed): update(seed) for seed in range(clients)}) == {}


def test_updates_of_zeros_are_not_compared() -> None:
    assert screened({str(seed): AdapterUpdate.zeros(LARGE) for seed in range(5)}) == {}


def test_a_client_is_remembered_by_a_sketch_and_not_by_its_update() -> None:
    direction = Sketch(LARGE.size, seed=3).direction(update(1))
    assert direction.shape == (BUCKETS,)
    assert direction.dtype == np.float32
    assert float(direction @ direction) == pytest.approx(1.0, abs=1e-5)


# ---- a run --------------------------------------------------------------------------------------


@pytest.fixture
def attacks(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import attacks

    yield attacks
    del sys.modules["attacks"]


@pytest.fixture
def run_with(attacks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run_with(config, attack)``: records and warnings of a run in which two of nine lie."""

    def run(config: Config, kind: str = "") -> tuple[list[RoundRecord], list[str]]:
        mods = [attacks.attack(kind, LIARS)] if kind else []
        monkeypatch.setattr(engine, "make_client_app", lambda: make_client_app(*mods))
        told: list[str] = []

        def listen(event: events.Event) -> None:
            if isinstance(event, events.Notice) and event.level == "warning":
                told.append(event.text)

        return list(cgfedllm.run(config, listeners=[listen]).records), told

    return run


def last_nll(records: list[RoundRecord]) -> float:
    nll = records[-1].heldout_nll
    assert nll is not None
    return nll


ROBUST = {
    "median": ("federation.strategy.name=median",),
    "trimmed_mean": ("federation.strategy.name=trimmed_mean", "federation.strategy.trim=0.25"),
    "krum": ("federation.strategy.name=krum", "federation.strategy.malicious=2"),
    "screening": ("federation.screening.mode=reject",),
}
CODED = (*NINE, "uplink.name=int8", "federation.rounds=2")


@pytest.fixture(scope="module")
def seen() -> dict[str, float]:
    return {}


@pytest.fixture
def clean(tiny_config: MakeConfig, run_with: Run, seen: dict[str, float]) -> float:
    """Loss after a run in which nobody lies, made once."""
    if not seen:
        seen["clean"] = last_nll(run_with(tiny_config(*CODED, "name=clean"))[0])
    return seen["clean"]


@pytest.mark.parametrize("defence", ROBUST)
@pytest.mark.parametrize(
    "kind",
    [
        "flip5",
        "noise",
        pytest.param("scale10", marks=pytest.mark.slow),
        pytest.param("flip", marks=pytest.mark.slow),
    ],
)
def test_with_two_of_nine_lying_robust_aggregation_stays_near_the_clean_run(
    kind: str, defence: str, clean: float, tiny_config: MakeConfig, run_with: Run
) -> None:
    records, _ = run_with(tiny_config(*CODED, *ROBUST[defence]), kind)
    assert last_nll(records) < 1.05 * clean


def test_without_it_they_do_harm(clean: float, tiny_config: MakeConfig, run_with: Run) -> None:
    """Else the test above would show nothing."""
    records, _ = run_with(tiny_config(*CODED), "flip5")
    assert last_nll(records) > 1.05 * clean


def test_odd_updates_are_told_of_and_written_down(tiny_config: MakeConfig, run_with: Run) -> None:
    records, told = run_with(tiny_config(*CODED, "federation.rounds=1"), "scale10")
    odd = {client.client: client for client in records[1].clients if client.suspicion}
    assert set(odd) == set(LIARS)
    assert all(client.norm_ratio > 5 for client in odd.values())
    assert all(client.cosine is not None for client in records[1].clients)
    assert records[1].failures == []
    for liar in LIARS:
        assert any(f"round 1: {liar}'s update is odd, and was used: its norm" in t for t in told)


def test_rejected_updates_leave_no_trace(
    tiny_config: MakeConfig,
    run_with: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither in the aggregate, nor in what listeners hear; bit for bit as if never sent."""
    heard: list[tuple[str, bytes]] = []
    publish = events.publish

    def hear(event: events.Event) -> None:
        if isinstance(event, events.UpdateReceived):
            heard.append((event.client, event.update.vector.tobytes()))
        publish(event)

    monkeypatch.setattr(events, "publish", hear)
    config = tiny_config(*CODED, "federation.rounds=1", "federation.screening.mode=reject")
    records, told = run_with(config, "noise")
    honest = [client.client for client in records[1].clients]
    assert honest == sorted({f"client-{n:02d}" for n in range(9)} - set(LIARS))
    assert [client for client, _ in heard] == honest
    assert {f.client for f in records[1].failures} == set(LIARS)
    for failure in records[1].failures:
        assert failure.reason.startswith("screened out: its norm is ")
        assert f"round 1: {failure.client} is left out: {failure.reason}" in told
    # all nine were sent, and are charged
    assert records[1].uplink_bytes > sum(client.uplink_bytes for client in records[1].clients)


def test_a_rejected_client_keeps_its_residual_and_nothing_of_what_it_sent(
    tiny_config: MakeConfig, run_with: Run
) -> None:
    """As in any round whose reply is not used: no word goes back, so nothing is added again."""
    from cgfedllm.federation.client_state import ClientState
    from cgfedllm.workspace import Workspace

    spec = Workspace(tiny_config(*CODED), Path()).spec
    residuals = {}
    for mode in ("reject", "log"):
        config = tiny_config(
            *CODED, "federation.rounds=1", f"federation.screening.mode={mode}", f"name={mode}"
        )
        run_with(config, "scale10")
        residual = ClientState(config.run_dir / "clients" / LIARS[0], spec).residual(2)
        assert residual is not None
        residuals[mode] = residual.vector.tobytes()
    assert residuals["reject"] == residuals["log"]


def test_a_round_in_which_too_many_are_rejected_is_a_round_with_too_few_replies(
    tiny_config: MakeConfig, run_with: Run
) -> None:
    settings = ("federation.screening.mode=reject", "federation.min_clients=8")
    config = tiny_config(*CODED, *settings, "federation.round_retries=0")
    with pytest.raises(FederationError, match=r"round 1 had too few.*screened out"):
        run_with(config, "noise")


def test_nothing_is_screened_where_it_is_off_or_the_server_is_to_keep_it_private(
    tiny_config: MakeConfig, run_with: Run
) -> None:
    central = ("privacy.mechanism=central", "federation.weighting=uniform")
    exact = (*CODED, "federation.rounds=1", "uplink.error_feedback=false")
    for at, settings in enumerate((("federation.screening.mode=off",), central)):
        records, _ = run_with(tiny_config(*exact, *settings, f"name=off-{at}"))
        assert len(records[1].clients) == 9
        assert {(c.norm_ratio, c.cosine) for c in records[1].clients} == {(None, None)}
    with pytest.raises(ConfigError, match=r"screening\.mode = 'reject'.*set it to 'off'"):
        tiny_config(*exact, *central, "federation.screening.mode=reject")


def test_rejecting_screens_what_codecs_adapt_to(
    tiny_config: MakeConfig,
    run_with: Run,
    learned: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cgfedllm.federation.codec_state import UpdateSample

    sampled: list[str] = []
    add = UpdateSample.add
    monkeypatch.setattr(
        UpdateSample, "add", lambda self, client, u: (sampled.append(client), add(self, client, u))
    )
    config = tiny_config(
        *NINE,
        f"uplink.name={learned.MEAN}",
        "uplink.adapt_every=1",
        "federation.rounds=1",
        "federation.screening.mode=reject",
    )
    run_with(config, "noise")
    assert sampled
    assert not set(sampled) & set(LIARS)
