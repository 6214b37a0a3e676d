"""Files somebody had their hands on: checkpoints, metrics, recordings, ledgers, anything.

Checksums tell accidents from what was written, and stop nobody who can compute one; here they are
right. Whatever such a file says, reading it ends in the error its reader promises, or in values of
the types that it should hold.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecState, make_codec
from cgfedllm.codecs.learning import LearnedCodec
from cgfedllm.codecs.packet import HEADER_SIZE, Packet
from cgfedllm.config import Config
from cgfedllm.errors import (
    AdapterError,
    CgFedLlmError,
    CheckpointError,
    PrivacyError,
    RecordingError,
)
from cgfedllm.federation.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cgfedllm.federation.client_state import ClientState
from cgfedllm.federation.codec_state import CodecSnapshot, StatefulCodec
from cgfedllm.metrics import ClientRecord, FailureRecord, RoundRecord
from cgfedllm.privacy.ledger import Ledger
from cgfedllm.report.inspection import inspect
from cgfedllm.report.summary import summarise
from cgfedllm.runs import RunFolder
from cgfedllm.storage import load_tensors, read_json, save_tensors
from cgfedllm.tgap.index import INDEX
from cgfedllm.tgap.recording import Recording, RecordingWriter

SPEC = AdapterSpec.from_shapes({"m.0.q.lora_A.weight": (2, 7), "m.0.q.lora_B.weight": (6, 2)})
ONES = AdapterUpdate(SPEC, np.ones(SPEC.size, np.float32))
CONFIG = Config()
DEEP = "[" * 100_000

SHORT = settings(max_examples=50, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=3_000, suppress_health_check=list(HealthCheck))

ODD: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(
        [None, True, -1, 2**70, 1e308, float("nan"), float("inf"), "", "\x1b[2J", "../x", "\ud800"]
    ),
    st.sampled_from([[], {}, [[]], {"a": {}}, "1", 1.5]),
    st.text(max_size=5),
)
Damage = Callable[[Any], Any]


@st.composite
def damage(draw: st.DrawFn) -> Damage:
    """Something done to one or two places of a tree of JSON."""
    steps = draw(st.lists(st.tuples(st.lists(st.floats(0, 1), max_size=5), ODD), max_size=2))
    what = draw(st.sampled_from(["replace", "replace", "remove", "add"]))

    def damaged(tree: Any) -> Any:
        tree = copy.deepcopy(tree)
        for path, value in steps:
            tree = _changed(tree, path, what, value)
        return tree

    return damaged


def _changed(tree: Any, path: list[float], what: str, value: Any) -> Any:
    keys: list[Any] = []
    if isinstance(tree, dict | list):
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    if not path or not keys:
        return copy.deepcopy(value)
    key = keys[min(int(path[0] * len(keys)), len(keys) - 1)]
    if len(path) == 1 and what == "remove":
        del tree[key]
    elif len(path) == 1 and what == "add" and isinstance(tree, dict):
        tree["another"] = value
    else:
        tree[key] = _changed(tree[key], path[1:], what, value)
    return tree


def at_length(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.slow(pytest.mark.timeout(3600)(LONG(test)))


# ---- metrics.jsonl ------------------------------------------------------------------------------


def full_record() -> RoundRecord:
    client = ClientRecord("north", 3, 2, 90, 1.5, 0.1, 100, 200, 1.0, 0.1, 0.1)
    return RoundRecord(
        1, [client], [FailureRecord("west", "late")], heldout_nll=2.5, client_nll={"north": 2.0}
    )


def metrics_line(run: RunFolder, tree: Any) -> None:
    run.metrics_path.write_text(json.dumps(tree) + "\n")
    try:
        (record,) = run.records()
    except CheckpointError as error:
        told = str(error)
        if "line 1 is damaged" not in told:
            pytest.fail(told)
        return
    # whatever was accepted can be computed with, and written again
    summarise([record])
    run.truncate_after(5)
    run.append(record)


@SHORT
@given(damage())
def test_a_line_of_metrics_is_read_or_refused(tmp_path: Path, damaged: Damage) -> None:
    metrics_line(RunFolder(tmp_path), damaged(full_record().to_dict()))


@at_length
@given(damage())
def test_a_line_of_metrics_is_read_or_refused_at_length(tmp_path: Path, damaged: Damage) -> None:
    metrics_line(RunFolder(tmp_path), damaged(full_record().to_dict()))


HALF = json.dumps({**full_record().to_dict(), "client_nll": {"\ud800": 2.0}})


@pytest.mark.parametrize("line", [HALF, DEEP, '{"round":' + DEEP, "1" * 10_000, "\ufeff{}", "\0"])
def test_lines_that_no_writer_writes_are_named(tmp_path: Path, line: str) -> None:
    run = RunFolder(tmp_path)
    run.metrics_path.write_text(line + "\n")
    with pytest.raises(CheckpointError, match="line 1 is damaged"):
        run.records()


# ---- checkpoints --------------------------------------------------------------------------------


def a_checkpoint(folder: Path) -> Path:
    codec = make_codec("learned", {"directions": 2})
    snapshot = CodecSnapshot(codec.initial_state(SPEC), {"north": 0}, b"increment")
    checkpoint = Checkpoint(
        1, ONES, ONES, {"north": 1}, b"increment", {"m_t/adapter": ONES.vector}, full_record(),
        previous=ONES, codec=snapshot,
    )  # fmt: skip
    return save_checkpoint(folder, checkpoint, CONFIG)


def rewritten(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """With the checksum that belongs to it."""
    save_tensors(path, tensors, metadata)


def checkpoint_read(path: Path) -> None:
    try:
        found = load_checkpoint(path, SPEC, CONFIG)
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    assert isinstance(found.round, int)
    assert all(isinstance(version, int) for version in found.held.values())
    assert all(values.shape == (SPEC.size,) for values in found.strategy.values())
    summarise([found.record])


def damaged_checkpoint(folder: Path, key: str, damaged: Damage) -> None:
    path = a_checkpoint(folder)
    tensors, metadata = load_tensors(path)
    tree = damaged(json.loads(metadata[key]))
    metadata[key] = json.dumps(tree)
    rewritten(path, tensors, metadata)
    checkpoint_read(path)


WRITTEN = st.sampled_from(["held", "record", "codec", "round"])


@SHORT
@given(WRITTEN, damage())
def test_a_checkpoint_is_read_or_refused(tmp_path: Path, key: str, damaged: Damage) -> None:
    damaged_checkpoint(tmp_path, key, damaged)


@at_length
@given(WRITTEN, damage())
def test_a_checkpoint_is_read_or_refused_at_length(
    tmp_path: Path, key: str, damaged: Damage
) -> None:
    damaged_checkpoint(tmp_path, key, damaged)


@pytest.mark.parametrize("key", ["held", "record", "codec", "round"])
@pytest.mark.parametrize("text", [DEEP, "", "{", "9" * 5_000, "nan"])
def test_what_no_server_writes_into_a_checkpoint_is_refused(
    tmp_path: Path, key: str, text: str
) -> None:
    path = a_checkpoint(tmp_path)
    tensors, metadata = load_tensors(path)
    rewritten(path, tensors, {**metadata, key: text})
    with pytest.raises(CheckpointError, match="incomplete"):
        load_checkpoint(path, SPEC, CONFIG)


@pytest.mark.parametrize("name", ["adapter", "reference", "previous", "strategy/m_t/adapter"])
@pytest.mark.parametrize(
    "values",
    [np.zeros(3, np.float32), np.zeros(SPEC.size, np.int8), np.zeros((), np.float32)],
    ids=["short", "integers", "scalar"],
)
def test_arrays_of_a_checkpoint_have_the_adapters_size(
    tmp_path: Path, name: str, values: Any
) -> None:
    path = a_checkpoint(tmp_path)
    tensors, metadata = load_tensors(path)
    rewritten(path, {**tensors, name: values}, metadata)
    with pytest.raises(CheckpointError, match="incomplete"):
        load_checkpoint(path, SPEC, CONFIG)


# ---- recordings ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "recording"
    with RecordingWriter(folder, SPEC, CONFIG, environment={"versions": {}}) as writer:
        for client in ("north", "south"):
            writer.add(ONES, round=1, client=client, steps=1, examples=2, tokens=3, loss=1.0)
    return folder


def changed_recording(folder: Path, recorded: Path, change: Damage) -> None:
    for file in recorded.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tree = change(json.loads((recorded / INDEX).read_text()))
    (folder / INDEX).write_text(json.dumps(tree))
    try:
        recording = Recording.open(folder)
        for number in range(len(recording)):
            assert recording.update(number).is_finite()
        for round_ in recording.rounds():
            assert recording.aggregate(round_).is_finite()
        assert all(fact.isprintable() for fact in inspect(folder).facts.values())
    except RecordingError as error:
        assert str(folder) in str(error)  # noqa: PT017


@SHORT
@given(damage())
def test_a_recording_is_read_or_refused(tmp_path: Path, recorded: Path, damaged: Damage) -> None:
    changed_recording(tmp_path, recorded, damaged)


@at_length
@given(damage())
def test_a_recording_is_read_or_refused_at_length(
    tmp_path: Path, recorded: Path, damaged: Damage
) -> None:
    changed_recording(tmp_path, recorded, damaged)


@pytest.mark.parametrize(
    "change",
    [
        {"weight": 0.0}, {"weight": -1.0}, {"weight": float("inf")}, {"weight": float("nan")},
        {"weight": 1e-320}, {"round": 0}, {"client": "../../north"}, {"client": "\x1b[2J"},
        {"client": ""}, {"shard": "../../round-000001.safetensors"},
    ],
)  # fmt: skip
def test_an_entry_of_a_recording_that_no_writer_writes_is_refused(
    tmp_path: Path, recorded: Path, change: dict[str, Any]
) -> None:
    for file in recorded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tree = json.loads((recorded / INDEX).read_text())
    tree["updates"][0] |= change
    (tmp_path / INDEX).write_text(json.dumps(tree))
    if change == {"weight": 1e-320}:  # small, and a weight all the same
        assert Recording.open(tmp_path).aggregate(1).is_finite()
        return
    with pytest.raises(RecordingError, match="damaged"):
        Recording.open(tmp_path)


@pytest.mark.parametrize("key", ["spec", "config", "updates", "environment", "kind"])
@pytest.mark.parametrize("value", [None, 1, [1], {"a": 1}, "[" * 10_000, "a = " + "[" * 10_000])
def test_tables_of_a_recording_of_another_type_are_refused(
    tmp_path: Path, recorded: Path, key: str, value: Any
) -> None:
    changed_recording(tmp_path, recorded, lambda tree: {**tree, key: value})


# ---- what a client and an owner of noise keep ---------------------------------------------------


def test_a_clients_memory_with_other_arrays_is_not_taken_for_its_own(tmp_path: Path) -> None:
    state = ClientState(tmp_path, SPEC)
    spec = {"spec": SPEC.hash.hex()}
    save_tensors(tmp_path / "reference-000001.safetensors", {"other": ONES.vector}, spec)
    assert state.reference(1) is None
    save_tensors(tmp_path / "reference-000002.safetensors", {"values": np.zeros(3)}, spec)
    with pytest.raises(AdapterError):
        state.reference(2)
    save_tensors(tmp_path / "memory-000001.safetensors", {"residual": np.zeros(3)}, spec)
    with pytest.raises(AdapterError):
        state.residual(2)
    codec = make_codec("learned", {"directions": 2})
    assert isinstance(codec, LearnedCodec)
    state.save_codec(StatefulCodec(codec, CodecState.of({}, 1)))
    for about in (
        {"codec": "no such"},
        {"codec": "raw"},
        {"codec": "learned", "options": DEEP},
        {},
    ):
        save_tensors(tmp_path / "codec-000001.safetensors", {}, {**spec, **about})
        assert state.codec(1) is None


@SHORT
@given(damage())
def test_a_damaged_ledger_stops_the_run(tmp_path: Path, damaged: Damage) -> None:
    path = tmp_path / "privacy.json"
    path.unlink(missing_ok=True)
    Ledger(path, 3).noise(ONES.vector, 1)
    tree = read_json(path)
    path.write_text(json.dumps(damaged(tree)))
    try:
        ledger = Ledger(path, 3)
    except PrivacyError:
        return
    assert ledger.releases <= 1


def test_a_ledger_that_goes_too_deep_stops_the_run(tmp_path: Path) -> None:
    path = tmp_path / "privacy.json"
    path.write_text(DEEP)
    with pytest.raises(PrivacyError, match="recursion limit"):
        Ledger(path, 3)


# ---- `cgfedllm inspect` on anything -------------------------------------------------------------


def inspected(path: Path) -> None:
    try:
        found = inspect(path)
    except CgFedLlmError:
        return
    assert all(key.isprintable() and text.isprintable() for key, text in found.facts.items())


METADATA = st.dictionaries(
    st.sampled_from(["format", "round", "spec", "record", "config", "codec", "x"]) | st.text(),
    st.text(max_size=20) | st.sampled_from(["\x1b[2J", DEEP, SPEC.to_json(), "cgfedllm-codec"]),
    max_size=4,
)


@SHORT
@given(METADATA.filter(lambda found: all(c < "\ud800" or c > "\udfff" for k in found for c in k)))
def test_any_file_of_tensors_is_shown_or_refused(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = tmp_path / "some.safetensors"
    save_tensors(path, {"x": np.zeros(3)}, metadata)
    inspected(path)


@SHORT
@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda own: b"CGFP" + own))
def test_any_file_is_shown_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    inspected(path)


def test_a_packet_whose_codec_is_a_terminal_escape_is_shown_without_it(tmp_path: Path) -> None:
    path = tmp_path / "packet"
    path.write_bytes(Packet("\x1b]0;x\x07", 1, SPEC.hash, bytes(8), 1, SPEC.size, b"").to_bytes())
    assert path.stat().st_size == HEADER_SIZE
    assert inspect(path).facts["codec"].startswith("?]0;x?, version 1")


ADAPTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "a list": ([], {"m.0.q.lora_A.weight": np.zeros((2, 3))}),
    "targets of all types": ({"target_modules": [1, "a", None]}, {"x": np.zeros(3)}),
    "no product": (
        {"lora_alpha": 1e308},
        {"m.lora_A.weight": np.ones((2, 3)), "m.lora_B.weight": np.ones((4, 3))},
    ),
    "vectors": (
        {"r": "\x1b[2J"},
        {"m.lora_A.weight": np.ones(3), "m.lora_B.weight": np.ones(4)},
    ),
    "no numbers": ({}, {"m.lora_A.weight": np.zeros((2, 3), np.complex64)}),
    "nothing": ({}, {}),
    "empty": ({}, {"m.lora_A.weight": np.zeros((0, 3))}),
    "too large": ({"lora_alpha": True}, {"m.lora_A.weight": np.full((2, 3), 1e308)}),
}


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.filterwarnings("ignore:overflow")
def test_an_adapter_from_a_stranger_is_shown_or_refused(tmp_path: Path, case: str) -> None:
    config, tensors = ADAPTERS[case]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_tensors(tmp_path / "adapter_model.safetensors", tensors)
    inspected(tmp_path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "BF16", "F4", "F99"])
def test_types_that_numpy_lacks_are_refused_by_name(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "x.safetensors"
    size = 4 if dtype == "BF16" else 2
    header = {"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        load_tensors(path)


def test_json_that_goes_too_deep_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(DEEP)
    with pytest.raises(CheckpointError, match="recursion limit"):
        read_json(path)


@pytest.mark.parametrize("content", ["[]", "3", '{"resumed": 3}', DEEP, "{"])
def test_a_run_is_resumed_without_the_environment_that_it_cannot_read(
    tmp_path: Path, content: str
) -> None:
    run = RunFolder(tmp_path)
    run.environment_path.write_text(content)
    run.note_resume(3)
    assert read_json(run.environment_path)["resumed"][0]["after_round"] == 3


def test_a_configuration_that_goes_too_deep_is_refused_by_name(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.config_path.write_text("a = " + DEEP)
    with pytest.raises(CheckpointError, match=r"config\.toml"):
        run.config()
