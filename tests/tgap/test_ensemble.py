"""Who is trained on and who is not: sampling over rounds and clients, and no leak between pools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.config import Config
from cgfedllm.errors import ConfigError, RecordingError
from cgfedllm.tgap.ensemble import EnsembleSettings, Pools, draw_pools
from cgfedllm.tgap.recording import Recording, RecordingWriter

Write = Callable[..., Path]
SIX = ("a", "b", "c", "d", "e", "f")
TINY = AdapterSpec.from_shapes({"w": (2, 2)})


def pools_of(*folders: Path, **options: object) -> Pools:
    return draw_pools([Recording.open(folder) for folder in folders], EnsembleSettings(**options))


def places(pools: Pools) -> dict[str, list[tuple[int, str, tuple[int, ...]]]]:
    return {
        name: [(s.recording, s.client, s.rounds) for s in pool.samples]
        for name, pool in pools.named().items()
    }


def test_four_pools_by_round_and_by_client(write: Write) -> None:
    pools = pools_of(write(rounds=8, clients=SIX), validation_clients=0.34)
    assert [len(pool) for pool in pools.named().values()] == [24, 8, 12, 4]
    assert pools.train.rounds() == pools.unseen_clients.rounds() == [[1, 2, 3, 4, 5, 6]]
    assert pools.unseen_rounds.rounds() == pools.unseen_both.rounds() == [[7, 8]]
    assert pools.unseen_clients.clients() == pools.unseen_both.clients()
    assert sorted(pools.train.clients() + pools.unseen_clients.clients()) == list(SIX)
    assert len(pools.validation) == 20
    assert pools.notes == ()


def partial_recording(folder: Path, seed: int, rounds: int, clients: int) -> Path:
    """Some of the clients in each round, as where a fraction is sampled."""
    rng = np.random.default_rng(seed)
    with RecordingWriter(folder, TINY, Config(), kind="local-only", environment={}) as writer:
        for round_ in range(1, rounds + 1):
            for number in sorted(rng.permutation(clients)[: rng.integers(1, clients + 1)]):
                writer.add(AdapterUpdate.zeros(TINY), round=round_, client=f"c{number}")
            writer.finish_round()
    return folder


@given(
    seed=st.integers(0, 2**16),
    rounds=st.integers(2, 7),
    clients=st.integers(1, 5),
    span=st.integers(1, 3),
    stride=st.integers(1, 3),
    sampling=st.sampled_from(["uniform", "rounds", "clients"]),
)
@settings(max_examples=25)
def test_nothing_leaks(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    rounds: int,
    clients: int,
    span: int,
    stride: int,
    sampling: str,
) -> None:
    """No update of a held-out round or client is in what is trained on, spans included."""
    folder = tmp_path_factory.mktemp("leaks")
    folders = [partial_recording(folder / str(n), seed + n, rounds + n, clients) for n in (0, 1)]
    try:
        pools = pools_of(*folders, span=span, stride=stride, sampling=sampling, seed=seed)
    except RecordingError as error:
        assert "split" in str(error)  # noqa: PT017
        return
    trained = {(s.recording, e) for s in pools.train.samples for e in s.entries}
    for name, pool in pools.named().items():
        if name == "train":
            continue
        for sample in pool.samples:
            assert not trained & {(sample.recording, e) for e in sample.entries}
            if "rounds" in name or "both" in name:
                seen = [e.round for r, e in trained if r == sample.recording]
                assert sample.rounds[0] > max(seen, default=0)
            if "clients" in name or "both" in name:
                assert sample.client not in {e.client for _, e in trained}
        assert len(set(pool.samples)) == len(pool.samples)


def test_a_client_is_held_out_of_all_recordings(write: Write) -> None:
    pools = pools_of(write("one", clients=SIX), write("two", clients=SIX[::-1]))
    held_out = pools.unseen_clients.clients()
    assert len(held_out) == 1
    assert {s.recording for s in pools.unseen_clients.samples} == {0, 1}
    assert not set(held_out) & set(pools.train.clients())


def test_the_draw_of_clients_is_the_seeds(write: Write) -> None:
    folder = write(clients=SIX)
    drawn = [pools_of(folder, seed=seed).unseen_clients.clients() for seed in range(6)]
    assert drawn[0] == pools_of(folder).unseen_clients.clients()
    assert len({tuple(names) for names in drawn}) > 1


@pytest.mark.parametrize(
    ("kind", "clients", "options", "reason"),
    [
        ("centralised", ("centralised",), {}, "centralised recording is of all clients"),
        ("federated", ("north",), {}, "'north' is the only one"),
        ("federated", SIX, {"validation_clients": 0.0}, "validation_clients = 0"),
    ],
)
def test_where_no_client_is_held_out_it_says_so(
    write: Write, kind: str, clients: tuple[str, ...], options: dict[str, float], reason: str
) -> None:
    pools = pools_of(write(kind=kind, clients=clients), **options)
    assert list(pools.named()) == ["train", "unseen_rounds"]
    assert any(reason in note for note in pools.notes)


def uneven(folder: Path) -> Path:
    """Client a in all of four rounds, b in two, c in one; a fifth and sixth round to judge by."""
    members = {1: "abc", 2: "ab", 3: "a", 4: "a", 5: "abc", 6: "abc"}
    with RecordingWriter(folder, TINY, Config(), environment={}) as writer:
        for round_, clients in members.items():
            for client in clients:
                writer.add(AdapterUpdate.zeros(TINY), round=round_, client=client)
            writer.finish_round()
    return folder


@pytest.mark.parametrize(
    ("sampling", "by_round", "by_client"),
    [
        ("uniform", {1: 3, 2: 2, 3: 1, 4: 1}, {"a": 4, "b": 2, "c": 1}),
        ("rounds", {1: 3, 2: 3, 3: 3, 4: 3}, None),
        ("clients", None, {"a": 4, "b": 4, "c": 4}),
    ],
)
def test_what_counts_alike(
    tmp_path: Path,
    sampling: str,
    by_round: dict[int, int] | None,
    by_client: dict[str, int] | None,
) -> None:
    pools = pools_of(uneven(tmp_path / "r"), sampling=sampling, validation_clients=0.0)
    rounds = Counter(sample.rounds[0] for sample in pools.train.samples)
    clients = Counter(sample.client for sample in pools.train.samples)
    assert rounds == (by_round or rounds)
    assert clients == (by_client or clients)
    assert pools.train.distinct() == 7
    if sampling == "clients":  # each of b's two updates as often as the other
        assert set(Counter(s.rounds for s in pools.train.samples if s.client == "b").values()) == {
            2
        }
    assert len(pools.unseen_rounds) == 6  # judged is each update once, whatever the sampling
    assert any("more than once" in note for note in pools.notes) == (sampling != "uniform")


def test_a_stride_thins_out_training_only(write: Write) -> None:
    pools = pools_of(write(rounds=8, clients=SIX), stride=3)
    assert pools.train.rounds() == [[1, 4]]
    assert pools.unseen_clients.rounds() == [[1, 2, 3, 4, 5, 6]]
    assert pools.unseen_rounds.rounds() == [[7, 8]]


def test_a_span_sums_up_rounds_in_a_row(
    write: Write, values: Callable[[int, str], AdapterUpdate]
) -> None:
    pools = pools_of(write(rounds=7, kind="local-only"), span=2)
    assert {s.rounds for s in pools.train.samples} == {(1, 2), (2, 3), (3, 4), (4, 5)}
    assert {s.rounds for s in pools.unseen_rounds.samples} == {(6, 7)}
    first = pools.train.samples[0]
    expected = values(1, first.client).vector + values(2, first.client).vector
    np.testing.assert_allclose(pools.train[0].vector, expected, rtol=1e-6)


def test_a_span_over_a_federated_recording_is_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"span = 2 .* no path of its own"):
        pools_of(write(rounds=8), span=2)


def test_updates_are_those_recorded_and_few_are_kept_in_memory(
    write: Write,
    values: Callable[[int, str], AdapterUpdate],
    spec: AdapterSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: list[object] = []
    update = Recording.update
    monkeypatch.setattr(
        Recording, "update", lambda self, which: reads.append(which) or update(self, which)
    )
    pools = draw_pools([Recording.open(write())], EnsembleSettings(), cache_bytes=2 * 4 * spec.size)
    assert reads == []  # nothing is read before it is asked for
    for _ in range(2):
        for sample, found in zip(pools.train.samples, pools.train, strict=True):
            (round_,) = sample.rounds
            np.testing.assert_array_equal(found.vector, values(round_, sample.client).vector)
    assert len(reads) == 2 * len(pools.train)  # two fit, the pass is longer
    reads.clear()
    assert pools.train[0] is pools.train[0]
    assert len(reads) == 1


def test_previous_aggregates_are_those_of_a_federation(write: Write) -> None:
    recording = Recording.open(write("federated"))
    pools = draw_pools([recording], EnsembleSettings())
    for index, sample in enumerate(pools.unseen_rounds.samples):
        expected = recording.aggregate(sample.rounds[0] - 1).vector
        np.testing.assert_array_equal(pools.unseen_rounds.previous(index), expected)
    assert pools.train.previous(0) is None  # nothing came before the first round
    alone = pools_of(write("alone", kind="local-only"))
    assert alone.unseen_rounds.previous(0) is None


@pytest.mark.parametrize(("rounds", "span"), [(1, 1), (3, 2), (7, 4)])
def test_a_recording_too_short_to_split_is_named(write: Write, rounds: int, span: int) -> None:
    folder = write(rounds=rounds, kind="local-only")
    with pytest.raises(RecordingError, match=rf"{folder} has {rounds} round.* too few to split"):
        pools_of(folder, span=span)


def test_recordings_of_different_adapters_are_refused(write: Write, tmp_path: Path) -> None:
    first, second = write("one"), tmp_path / "two"
    rank_3 = AdapterSpec.from_shapes(
        {f.name: (3, 7) if f.kind == "A" else (6, 3) for f in Recording.open(first).spec}
    )
    with RecordingWriter(second, rank_3, Config(), environment={}) as writer:
        writer.add(AdapterUpdate.zeros(rank_3), round=1, client="north")
    with pytest.raises(RecordingError, match=r"two is of another adapter.*rank 3, not 2"):
        pools_of(first, second)


def test_the_same_recording_twice_is_refused(write: Write) -> None:
    folder = write()
    with pytest.raises(RecordingError, match="given twice"):
        pools_of(folder, folder)


def test_no_recording_is_refused() -> None:
    with pytest.raises(RecordingError, match="no recording is given"):
        pools_of()


def test_a_fingerprint_is_of_the_content(write: Write, spec: AdapterSpec) -> None:
    first, again = Recording.open(write("one")), Recording.open(write("two"))
    assert first.fingerprint == again.fingerprint
    other = Recording.open(write("three", make=lambda *_: AdapterUpdate.zeros(spec)))
    assert len({first.fingerprint, other.fingerprint, first.select(rounds=[1]).fingerprint}) == 3
    assert Recording.open(write("four", kind="local-only")).fingerprint != first.fingerprint
