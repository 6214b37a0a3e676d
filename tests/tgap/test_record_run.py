"""Recording a run: it holds what clients computed, whatever happens on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cgfedllm
from cgfedllm import api, events
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.config import Config
from cgfedllm.errors import ConfigError, RecordingError, TrainingError
from cgfedllm.metrics import RoundRecord
from cgfedllm.peft_format import load_adapter
from cgfedllm.tgap.index import INDEX
from cgfedllm.tgap.recording import Recording
from cgfedllm.training import reference
from cgfedllm.training.local import LocalTrainer
from cgfedllm.workspace import Workspace

MakeConfig = Callable[..., Config]
SMALL = ("training.local_steps=1", "evaluation.every=0", "evaluation.clients=false")


class Killed(BaseException):
    """Nobody catches it."""


def killer(kind: type, at: Callable[[Any], bool]) -> Callable[[events.Event], None]:
    def listen(event: events.Event) -> None:
        if isinstance(event, kind) and at(event):
            raise Killed

    return listen


def kept(folder: Path) -> dict[str, Any]:
    """All that a recording holds and that does not depend on the clock or the folder's name."""
    index = json.loads((folder / INDEX).read_text())
    del index["environment"], index["config"]
    shards = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    return {"index": index, **shards}


@pytest.fixture(scope="module")
def unbroken() -> dict[str, Any]:
    return {}


@pytest.fixture
def undisturbed(tiny_config: MakeConfig, unbroken: dict[str, Any]) -> dict[str, Any]:
    """What a recording holds that nothing disturbed; made once."""
    if not unbroken:
        unbroken.update(kept(api.record(tiny_config(*SMALL, "name=unbroken")).path))
    return unbroken


def test_it_holds_what_clients_computed(tiny_config: MakeConfig) -> None:
    config = tiny_config(*SMALL)
    result = api.record(config)
    assert result.path == config.run_dir / "recording"
    assert (result.updates, result.rounds, result.clients) == (9, 3, 3)
    recording = Recording.open(result.path)
    assert recording.clients() == ["north", "south", "west"]
    records = {(r.round, c.client): c for r in result.run.records for c in r.clients}
    for entry in recording.entries:
        client = records[entry.round, entry.client]
        assert (entry.examples, entry.steps) == (client.examples, client.steps)
        assert (entry.tokens, entry.loss) == (client.tokens, client.train_loss)
        assert entry.weight == client.examples
        assert recording.update(entry).norm() == pytest.approx(client.update_norm, rel=1e-6)
    # FedAvg: the adapter is the start plus every round's mean
    total = Workspace(config, config.run_dir).start
    for round_ in recording.rounds():
        total = total + recording.aggregate(round_)
    final = load_adapter(result.run.adapter_dir)
    for name, view in total.views().items():
        np.testing.assert_allclose(final.views()[name], view, atol=1e-6)


@pytest.mark.parametrize(
    "stop",
    [
        killer(events.UpdateReceived, lambda e: (e.round, e.client) == (1, "south")),
        killer(events.UpdateReceived, lambda e: (e.round, e.client) == (2, "south")),
        killer(events.RoundAggregated, lambda e: e.round == 2),  # recorded, no checkpoint yet
        killer(events.RoundFinished, lambda e: e.record.round == 2),
        killer(events.RoundFinished, lambda e: e.record.round == 3),  # no adapter yet
    ],
    ids=["first round", "in a round", "before the checkpoint", "between rounds", "at the end"],
)
@pytest.mark.parametrize("again", [api.record, lambda c, to: api.resume(c.run_dir)])
def test_a_killed_recording_goes_on_to_the_same_files(
    tiny_config: MakeConfig,
    undisturbed: dict[str, Any],
    tmp_path: Path,
    stop: Callable[[events.Event], None],
    again: Callable[[Config, Path], Any],
) -> None:
    config = tiny_config(*SMALL)
    with pytest.raises(Killed):
        api.record(config, tmp_path / "kept", listeners=[stop])
    again(config, tmp_path / "kept")
    assert kept(tmp_path / "kept") == undisturbed


def test_a_round_that_is_tried_again_is_recorded_once(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, failed = LocalTrainer.train, []

    def failing(self: LocalTrainer, *args: Any, **kwargs: Any) -> Any:
        if (kwargs["client"], kwargs["round"]) == ("west", 2) and not failed:
            failed.append(1)
            raise TrainingError("the cat lay down on the keyboard")
        return train(self, *args, **kwargs)

    monkeypatch.setattr(LocalTrainer, "train", failing)
    result = api.record(tiny_config(*SMALL, "federation.min_clients=3"))
    assert failed
    assert result.run.records[2].attempts == 2
    clients = [(e.round, e.client) for e in Recording.open(result.path).entries]
    assert clients == [(r, c) for r in (1, 2, 3) for c in ("north", "south", "west")]


def test_a_complete_recording_is_not_made_again(
    tiny_config: MakeConfig, undisturbed: dict[str, Any]
) -> None:
    config = tiny_config(*SMALL)
    first = api.record(config)
    heard: list[events.Event] = []
    again = api.record(config, listeners=[heard.append])
    assert heard == []
    assert again == first
    assert kept(again.path) == undisturbed


def test_overwriting_starts_again(tiny_config: MakeConfig, tmp_path: Path) -> None:
    api.record(tiny_config(*SMALL, "federation.rounds=1"), tmp_path / "r")
    result = api.record(tiny_config(*SMALL, "federation.rounds=2"), tmp_path / "r", overwrite=True)
    assert result.rounds == 2
    assert len(list((tmp_path / "r").glob("*.safetensors"))) == 2


def test_centralised(tiny_config: MakeConfig) -> None:
    config = tiny_config(*SMALL, "federation.rounds=2")
    with pytest.raises(Killed):
        api.record(
            config,
            kind="centralised",
            listeners=[killer(events.RoundFinished, lambda e: e.record.round == 1)],
        )
    result = api.record(config, kind="centralised")  # references start again
    assert result.run.run_dir.name == "tiny-centralised"
    recording = Recording.open(result.path)
    assert recording.metadata["kind"] == "centralised"
    assert [(e.round, e.client) for e in recording.entries] == [
        (1, "centralised"), (2, "centralised"),
    ]  # fmt: skip
    assert {e.steps for e in recording.entries} == {3}  # as many as the clients together
    total = Workspace(config, config.run_dir).start
    for number in range(2):
        total = total + recording.update(number)
    final = load_adapter(result.run.adapter_dir)
    for name, view in total.views().items():
        np.testing.assert_allclose(final.views()[name], view, atol=1e-6)
    assert api.record(config, kind="centralised") == result


def test_nothing_is_computed_where_nobody_listens(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_publish_change", lambda *_: pytest.fail("computed"))
    cgfedllm.reference(tiny_config(*SMALL, "federation.rounds=1"), "centralised")


def test_a_lossy_uplink_is_refused(tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"'int8' is lossy.*'raw'"):
        api.record(tiny_config("uplink.name=int8"))


def test_local_only(tiny_config: MakeConfig) -> None:
    """Every client's own way, round by round: G_i^t as the paper has it."""
    config = tiny_config(*SMALL, "federation.rounds=2")
    with pytest.raises(Killed):
        api.record(
            config,
            kind="local-only",
            listeners=[killer(events.UpdateReceived, lambda e: (e.round, e.client) == (2, "west"))],
        )
    result = api.record(config, kind="local-only")  # references start again
    assert result.run.run_dir.name == "tiny-local-only"
    recording = Recording.open(result.path)
    assert recording.kind == "local-only"
    clients = ["north", "south", "west"]
    assert [(e.round, e.client) for e in recording.entries] == [
        (r, c) for r in (1, 2) for c in clients
    ]
    assert {e.steps for e in recording.entries} == {1}
    start = Workspace(config, config.run_dir).start
    for client in clients:
        own = recording.select(clients=[client])
        final = load_adapter(result.run.adapter_dir / client)
        moved = AdapterUpdate.from_arrays(start.spec, final.views()) - start
        np.testing.assert_allclose((own.update(0) + own.update(1)).vector, moved.vector, atol=1e-6)
    assert api.record(config, kind="local-only") == result


def test_an_unknown_kind_is_refused(tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="one of federated, centralised, local-only"):
        api.record(tiny_config(), kind="local")  # type: ignore[arg-type]


def test_the_run_folder_itself_is_no_place(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    with pytest.raises(ConfigError, match="folder of the run itself"):
        api.record(config, config.run_dir)


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_things_are_left_alone(
    tiny_config: MakeConfig, tmp_path: Path, overwrite: bool
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "index.json").write_text("[]")
    with pytest.raises(RecordingError, match="other things"):
        api.record(tiny_config(), tmp_path / "thesis", overwrite=overwrite)
    assert not tiny_config().run_dir.exists()


def test_what_was_started_otherwise_is_not_gone_on_with(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config(*SMALL, "federation.rounds=2")
    stop = killer(events.RoundFinished, lambda e: e.record.round == 1)
    with pytest.raises(Killed):
        api.record(config, tmp_path / "r", listeners=[stop])
    with pytest.raises(ConfigError, match="another configuration"):
        api.record(config.with_overrides({"seed": 1}), tmp_path / "r")
    with pytest.raises(RecordingError, match=rf"recorded into {tmp_path / 'r'}, not"):
        api.record(config)
    with pytest.raises(RecordingError, match="holds a recording already"):
        api.record(config.with_overrides({"name": "other"}), tmp_path / "r")
    shutil.rmtree(tmp_path / "r")
    with pytest.raises(RecordingError, match="no index"):
        api.record(config, tmp_path / "r")


def test_a_run_that_was_not_recorded_is_not_recorded_halfway(tiny_config: MakeConfig) -> None:
    config = tiny_config(*SMALL, "federation.rounds=1")
    cgfedllm.run(config)
    with pytest.raises(RecordingError, match="was not recorded"):
        api.record(config)


def test_a_round_that_nobody_recorded_is_missed(tiny_config: MakeConfig) -> None:
    config = tiny_config(*SMALL)
    stop = killer(events.RoundFinished, lambda e: e.record.round == 1)
    with pytest.raises(Killed):
        api.record(config, listeners=[stop])
    path = config.run_dir / "recording" / INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | {"updates": []}))
    with pytest.raises(RecordingError, match="lacks round 1 of the run"):
        api.record(config)


def test_stopped_before_the_first_round_is_done(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(*SMALL)

    def stop(event: events.Event) -> None:
        if isinstance(event, events.UpdateReceived):
            raise cgfedllm.errors.RunInterrupted("stopped")

    result = api.record(config, listeners=[stop])
    assert result.run.interrupted
    assert (result.updates, result.rounds) == (0, 0)
    assert isinstance(result.run.records[0], RoundRecord)
    assert api.record(config).updates == 9
