"""Recordings: what is written is read back, views are what they say, damage is named."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.config import Config
from cgfedllm.errors import RecordingError, StorageError
from cgfedllm.tgap.index import INDEX
from cgfedllm.tgap.recording import RecordedUpdate, Recording, RecordingWriter
from cgfedllm.tgap.writer import discard_recording

Values = Callable[[int, str], AdapterUpdate]
Write = Callable[..., Path]


def places(recording: Recording) -> set[tuple[int, str]]:
    return {(entry.round, entry.client) for entry in recording.entries}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def edit_index(folder: Path, **changes: Any) -> None:
    path = folder / INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- reading back -------------------------------------------------------------------------------


def test_reads_back_what_was_written(recording: Recording, values: Values) -> None:
    assert len(recording) == 12
    assert recording.rounds() == [1, 2, 3, 4]
    assert recording.clients() == ["north", "south", "west"]
    for number, entry in enumerate(recording.entries):
        expected = values(entry.round, entry.client).vector
        np.testing.assert_array_equal(recording.update(number).vector, expected)
        np.testing.assert_array_equal(recording.update(entry).vector, expected)
    entry = recording.entries[4]
    assert (entry.round, entry.client, entry.row) == (2, "south", 1)
    assert (entry.steps, entry.examples, entry.tokens, entry.loss) == (4, 20, 100, 2.5)
    assert entry.weight == 20.0
    assert recording.config == Config()
    assert recording.metadata["kind"] == "federated"
    assert recording.metadata["model"] == "embedded"
    assert recording.nbytes == 12 * 4 * recording.spec.size


def test_shards_are_plain_safetensors(recording: Recording, values: Values) -> None:
    shard = load_file(recording.path / "round-000003.safetensors")
    assert list(shard) == ["updates"]
    assert shard["updates"].dtype == np.float32
    np.testing.assert_array_equal(shard["updates"][2], values(3, "west").vector)


def test_an_update_may_be_changed_without_changing_the_recording(recording: Recording) -> None:
    before = recording.update(0).vector.copy()
    recording.update(0).vector[:] = 0
    np.testing.assert_array_equal(recording.update(0).vector, before)


def test_there_is_no_update_beyond_the_last(recording: Recording) -> None:
    with pytest.raises(IndexError):
        recording.update(12)


def test_reading_one_update_takes_the_memory_of_one(tmp_path: Path) -> None:
    big = AdapterSpec.from_shapes({"w": (1000, 100)})
    with RecordingWriter(tmp_path / "big", big, Config(), environment={}) as writer:
        for client in range(50):
            update = AdapterUpdate(big, np.full(big.size, client, np.float32))
            writer.add(update, round=1, client=f"{client:02d}")
    one = 4 * big.size
    tracemalloc.start()
    try:
        recording = Recording.open(tmp_path / "big")
        assert recording.update(37).vector[5] == 37
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert recording.nbytes == 50 * one
    assert one <= peak < 4 * one


@settings(max_examples=30)
@given(
    weights=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_aggregate_is_the_weighted_mean(
    weights: list[float], seed: int, spec: AdapterSpec, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("aggregate")
    vectors = np.random.default_rng(seed).standard_normal((len(weights), spec.size))
    vectors = vectors.astype(np.float32)
    with RecordingWriter(folder, spec, Config(), environment={}) as writer:
        for number, (vector, weight) in enumerate(zip(vectors, weights, strict=True)):
            update = AdapterUpdate(spec, vector)
            writer.add(update, round=1, client=str(number), weight=weight)
    expected = np.average(vectors.astype(np.float64), axis=0, weights=weights)
    got = Recording.open(folder).aggregate(1).vector
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


# ---- views --------------------------------------------------------------------------------------


def test_select(recording: Recording, values: Values) -> None:
    view = recording.select(rounds=[2, 3], clients=["west", "north"])
    assert places(view) == {(r, c) for r in (2, 3) for c in ("north", "west")}
    np.testing.assert_array_equal(view.update(0).vector, values(2, "north").vector)
    assert view.select(rounds=(3,)).rounds() == [3]
    alone = recording.select(clients=["south"]).aggregate(4).vector
    np.testing.assert_array_equal(alone, values(4, "south").vector)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.75, 0.99])
def test_splits_are_disjoint_and_complete(recording: Recording, share: float) -> None:
    for first, second in (
        recording.split_by_round(share),
        recording.split_by_client(share, seed=3),
    ):
        assert places(first) | places(second) == places(recording)
        assert not places(first) & places(second)
        assert len(first)
        assert len(second)


def test_split_by_round_puts_earlier_rounds_first(recording: Recording) -> None:
    first, second = recording.split_by_round(0.75)
    assert (first.rounds(), second.rounds()) == ([1, 2, 3], [4])


def test_split_by_client_keeps_clients_whole_and_follows_its_seed(write: Write) -> None:
    recording = Recording.open(write("many", 2, tuple("abcdefgh")))
    first, second = recording.split_by_client(0.25, seed=1)
    assert (len(first.clients()), len(second.clients())) == (2, 6)
    assert not set(first.clients()) & set(second.clients())
    assert recording.split_by_client(0.25, seed=1)[0].clients() == first.clients()
    draws = {tuple(recording.split_by_client(0.25, seed=s)[0].clients()) for s in range(8)}
    assert len(draws) > 1


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda r: r.select(rounds=[9]), "rounds 1 to 4 and 3 clients"),
        (lambda r: r.select(clients=[]), "nothing of"),
        (lambda r: r.select(clients=["east"]), "no client 'east'; it has north, south, west"),
        (lambda r: r.aggregate(5), "no updates of round 5; its rounds: 1 to 4"),
        (lambda r: r.select(rounds=[2]).split_by_round(), "split by round"),
        (lambda r: r.select(clients=["west"]).split_by_client(), "split by client"),
        (lambda r: r.split_by_round(1.0), "between 0 and 1"),
        (lambda r: r.split_by_client(-0.5), "between 0 and 1"),
    ],
)
def test_what_is_not_there_is_said(
    recording: Recording, ask: Callable[[Recording], object], message: str
) -> None:
    with pytest.raises(RecordingError, match=message):
        ask(recording)


# ---- writing ------------------------------------------------------------------------------------


def test_an_error_leaves_the_complete_rounds(
    tmp_path: Path, spec: AdapterSpec, values: Values
) -> None:
    def broken() -> None:
        with RecordingWriter(tmp_path / "r", spec, Config()) as writer:
            writer.add(values(1, "a"), round=1, client="a")
            writer.finish_round()
            writer.add(values(2, "a"), round=2, client="a")
            raise OSError("power cut")

    with pytest.raises(OSError, match="power cut"):
        broken()
    assert places(Recording.open(tmp_path / "r")) == {(1, "a")}


def test_a_round_that_is_tried_again_leaves_no_rows(
    tmp_path: Path, spec: AdapterSpec, values: Values
) -> None:
    with RecordingWriter(tmp_path / "r", spec, Config()) as writer:
        writer.add(values(1, "a"), round=1, client="a")
        writer.drop_round()
        writer.add(values(1, "b"), round=1, client="b")
    recording = Recording.open(tmp_path / "r")
    assert places(recording) == {(1, "b")}
    np.testing.assert_array_equal(recording.update(0).vector, values(1, "b").vector)


def test_rows_are_in_the_clients_order_whatever_order_they_come_in(
    tmp_path: Path, spec: AdapterSpec, values: Values
) -> None:
    for name, order in (("one", "abc"), ("two", "cab")):
        with RecordingWriter(tmp_path / name, spec, Config(), environment={}) as writer:
            for client in order:
                writer.add(values(1, client), round=1, client=client)
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.parametrize("last", [0, 1, 3])
def test_going_on_gives_the_same_files(write: Write, values: Values, last: int) -> None:
    whole, broken = write("whole"), write("broken", 3)
    if last == 3:  # killed after a shard was written, before the index was
        (broken / "round-000004.safetensors").write_bytes(b"not in the index")
        (broken / ".index.json.1234.tmp").write_bytes(b"{")
    writer = RecordingWriter.resume(broken)
    writer.keep_through(last)
    assert writer.rounds() == list(range(1, last + 1))
    for round_ in range(last + 1, 5):
        for number, client in enumerate(("north", "south", "west"), start=1):
            writer.add(
                values(round_, client), round=round_, client=client,
                steps=4, examples=10 * number, tokens=100, loss=2.5,
            )  # fmt: skip
        writer.finish_round()
    assert content(broken) == content(whole)


def test_a_failing_disk_keeps_what_is_there(
    write: Write, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(rounds=1)
    before = content(folder)
    writer = RecordingWriter.resume(folder)
    writer.add(values(2, "north"), round=2, client="north")

    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cgfedllm.storage.os.write", refuse)
    with pytest.raises(StorageError, match="free some space"):
        writer.finish_round()
    monkeypatch.undo()
    assert content(folder) == before


@pytest.mark.parametrize(
    ("round_", "weight", "value", "message"),
    [
        (3, 1.0, 1.0, "round 3 begins before round 2 is finished"),
        (1, 1.0, 1.0, "written already"),
        (0, 1.0, 1.0, "below 1"),
        (2, 0.0, 1.0, "weight 0.0 is not positive"),
        (2, float("nan"), 1.0, "weight nan"),
        (2, 1.0, float("nan"), "NaN or infinity"),
    ],
)
def test_what_makes_no_sense_is_not_written(
    write: Write,
    values: Values,
    spec: AdapterSpec,
    round_: int,
    weight: float,
    value: float,
    message: str,
) -> None:
    writer = RecordingWriter.resume(write(rounds=1))
    if round_ > 1:
        writer.add(values(2, "north"), round=2, client="north")
    update = AdapterUpdate(spec, np.full(spec.size, value, np.float32))
    with pytest.raises(RecordingError, match=message):
        writer.add(update, round=round_, client="south", weight=weight)


def test_updates_of_another_adapter_are_not_taken(write: Write) -> None:
    other = AdapterUpdate.zeros(AdapterSpec.from_shapes({"w": (2, 2)}))
    with pytest.raises(RecordingError, match="another adapter"):
        RecordingWriter.resume(write(rounds=1)).add(other, round=2, client="north")


def test_nothing_is_written_over(write: Write, spec: AdapterSpec, tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="holds a recording already"):
        RecordingWriter(write(), spec, Config())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "round-000001.safetensors").write_text("chapter one")
    with pytest.raises(RecordingError, match="other things"):
        RecordingWriter(tmp_path / "thesis", spec, Config())
    with pytest.raises(RecordingError, match="other things"):
        discard_recording(tmp_path / "thesis")
    assert len(content(tmp_path / "thesis")) == 1


def test_discarding_removes_a_recording_and_nothing_else(write: Write) -> None:
    folder = write()
    (folder / "notes.txt").write_text("mine")
    discard_recording(folder)
    assert list(content(folder)) == ["notes.txt"]


# ---- damage -------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_when_its_row_is_read(write: Write) -> None:
    folder = write()
    shard = folder / "round-000002.safetensors"
    blob = bytearray(shard.read_bytes())
    blob[-1] ^= 1  # in the last row
    shard.write_bytes(blob)
    recording = Recording.open(folder)
    recording.update(3)
    with pytest.raises(
        RecordingError, match=r"round-000002.*row 2 \(round 2, client 'west'\).*checksum"
    ):
        recording.update(5)
    with pytest.raises(RecordingError, match=r"round-000002\.safetensors"):
        recording.aggregate(2)
    assert recording.select(rounds=[1, 3, 4]).aggregate(3).is_finite()


def cut_short(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-10])


def no_longer_there(shard: Path) -> None:
    shard.unlink()


def something_else(shard: Path) -> None:
    shard.write_text("hello")


def of_another_adapter(shard: Path) -> None:
    other = AdapterSpec.from_shapes({"w": (13, 2)})  # of the same size
    with RecordingWriter(shard.parent / "other", other, Config()) as writer:
        for client in "abc":
            writer.add(AdapterUpdate.zeros(other), round=3, client=client)
    (shard.parent / "other" / shard.name).rename(shard)


def a_row_less(shard: Path) -> None:
    recording = Recording.open(shard.parent)
    with RecordingWriter(shard.parent / "other", recording.spec, Config()) as writer:
        writer.add(AdapterUpdate.zeros(recording.spec), round=3, client="a")
    (shard.parent / "other" / shard.name).rename(shard)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, "damaged"),
        (no_longer_there, "missing"),
        (something_else, "damaged"),
        (of_another_adapter, "another adapter"),
        (a_row_less, "it has 1 updates, the index says 3"),
    ],
)
def test_a_damaged_shard_is_named_when_opening(
    write: Write, damage: Callable[[Path], None], message: str
) -> None:
    folder = write()
    damage(folder / "round-000003.safetensors")
    with pytest.raises(RecordingError, match=f"round-000003.*{message}") as caught:
        Recording.open(folder)
    assert "--overwrite" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not a recording"),
        ({"version": 2}, "version 2; this release reads 1"),
        ({"version": None}, "version None"),
        ({"spec": "[]"}, "damaged"),
        ({"spec": '[["w",[13,2]]]'}, "spec does not match its hash"),
        ({"config": "seed = -1"}, "does not accept the configuration"),
        ({"config": "="}, "damaged"),
        ({"updates": [{"round": 1}]}, "damaged"),
        ({"updates": 3}, "damaged"),
        ({"updates": []}, "no complete round yet"),
    ],
)
def test_a_damaged_index_is_named(write: Write, changes: dict[str, Any], message: str) -> None:
    folder = write()
    edit_index(folder, **changes)
    with pytest.raises(RecordingError, match=message):
        Recording.open(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"shard": "../../etc/passwd"},
        {"shard": "/round-000001.safetensors"},
        {"row": -1},
        {"row": 1},  # taken by the next
        {"row": 0.5},
        {"round": "1"},
    ],
)
def test_places_in_the_index_are_checked(write: Write, change: dict[str, Any]) -> None:
    folder = write()
    rows = json.loads((folder / INDEX).read_text())["updates"]
    edit_index(folder, updates=[rows[0] | change, *rows[1:]])
    with pytest.raises(RecordingError, match="damaged"):
        Recording.open(folder)


def test_other_folders_are_no_recordings(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"is not a recording: it has no index\.json"):
        Recording.open(tmp_path / "nowhere")
    (tmp_path / INDEX).write_text("[1, 2]")
    with pytest.raises(RecordingError, match="another program"):
        Recording.open(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(RecordingError, match="cannot be read"):
        Recording.open(tmp_path)


def test_an_entry_of_elsewhere_is_not_read_unchecked(recording: Recording) -> None:
    known = recording.entries[0]
    foreign = RecordedUpdate(**{**vars(known), "row": 1, "checksum": 0})
    with pytest.raises(RecordingError, match="does not match its checksum"):
        recording.update(foreign)
