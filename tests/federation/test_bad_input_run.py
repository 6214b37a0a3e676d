"""Bad input to a whole run: a named error that says what to do, and no damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import cgfedllm
from cgfedllm import events
from cgfedllm.config import Config
from cgfedllm.errors import CgFedLlmError, ConfigError, DataError, FederationError, ModelError
from cgfedllm.runs import RunExistsError, RunFolder, RunLockedError

MakeConfig = Callable[..., Config]


def rows(client: str, count: int, **more: str) -> list[dict[str, str]]:
    return [
        {"client": client, "question": f"what is {index} of {client}", "answer": f"{index}", **more}
        for index in range(count)
    ]


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[list[dict[str, str]]], str]:
    """Writes a data file and gives the override that names it."""

    def write(content: list[dict[str, str]]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        return f'data.source="{path}"'

    return write


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        (
            'data.source="./nowhere.jsonl"',
            DataError,
            r"nowhere\.jsonl does not exist.*data\.source",
        ),
        ('data.columns={question="quesion"}', DataError, r"no column 'quesion'.*'question'"),
        ("data.format=alpaca", DataError, r"no column 'instruction'.*data\.columns\.instruction"),
        ('data.partition.column="hospital"', DataError, r"column 'hospital'.*columns are"),
        ("data.partition.clients=7", DataError, r"7 clients, but there are 3.*set it to 3"),
        ("data.partition.min_rows=41", DataError, r"fewer than data\.partition\.min_rows = 41"),
        (
            "data.max_length=257",
            FederationError,
            r"0 clients.*max_length is 257.*takes 256.*= 256 or less",
        ),
        ('lora.target_modules=["qq_proj"]', ModelError, r"no module.*qq_proj.*q_proj"),
        ('model.id="/no/such/model"', ModelError, r"/no/such/model does not exist"),
        ("federation.min_clients=9", FederationError, r"3 clients.*min_clients is 9.*lower it"),
    ],
)
def test_a_run_stops_with_a_named_error_and_starts_again_once_it_is_mended(
    tiny_config: MakeConfig, setting: str, error: type[CgFedLlmError], message: str
) -> None:
    partition = ("data.partition.kind=natural", "data.partition.column=client")
    with pytest.raises(error, match=message):
        cgfedllm.run(tiny_config(*partition, "federation.rounds=1", setting))
    mended = cgfedllm.run(tiny_config(*partition, "federation.rounds=1"))
    assert len(mended.records) == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lora.rank=0", r"lora\.rank.*greater than"),
        ("federation.rounds=0", r"federation\.rounds"),
        ("training.lr=-1", r"training\.lr"),
        ("uplink.name=int88", r"uplink\.name.*int8"),
        ("federation.fraction_train=0", r"federation\.fraction_train"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_made(
    tiny_config: MakeConfig, tmp_path: Path, setting: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(setting)
    assert not (tmp_path / "runs").exists()


def test_a_client_whose_rows_are_all_dropped_is_left_out_with_a_word(
    tiny_config: MakeConfig, write_rows: Callable[..., str]
) -> None:
    """Nothing of an answer is left of its rows once they are cut."""
    told: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Notice) and event.level == "warning":
            told.append(event.text)

    wordy = [{**row, "question": f"{'why ' * 60} {row['question']}"} for row in rows("wordy", 20)]
    source = write_rows([*rows("full", 20), *rows("good", 20), *wordy])
    partition = ("data.partition.kind=natural", "data.partition.column=client")
    config = tiny_config(source, *partition, "federation.rounds=1")
    result = cgfedllm.run(config, listeners=[listen])
    assert [c.client for c in result.records[1].clients] == ["full", "good"]
    assert len(told) == 1
    assert "client 'wordy' has nothing to train on" in told[0]
    assert "data.max_length" in told[0]


def test_a_client_without_a_row_to_train_on_is_refused(
    tiny_config: MakeConfig, write_rows: Callable[..., str]
) -> None:
    """Its only row is in the held-out set already, with another client's copy."""
    shared = {"question": "what is 3 of full", "answer": "3", "client": "small"}
    source = write_rows([*rows("full", 20), shared])
    partition = ("data.partition.kind=natural", "data.partition.column=client")
    split = ("data.partition.min_rows=1", "data.splits.heldout=0.5", "data.splits.validation=0.45")
    config = tiny_config(source, *partition, *split)
    with pytest.raises(DataError, match=r"client 'small' has no training rows.*distinct rows"):
        cgfedllm.run(config)


@pytest.mark.parametrize(("steps", "seen"), [(4, "loss is"), (1, "loss on the held-out set is")])
def test_a_loss_that_is_not_finite_stops_the_run_clearly(
    tiny_config: MakeConfig, steps: int, seen: str
) -> None:
    """Seen by the clients; after a single step, only by the evaluation."""
    config = tiny_config(
        "training.lr=1e30", f"training.local_steps={steps}", "federation.round_retries=0"
    )
    with pytest.raises(FederationError, match=rf"round 1.*{seen}.*lower training\.lr"):
        cgfedllm.run(config)
    (line,) = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["round"] == 0


def test_an_earlier_run_is_not_overwritten_unasked(tiny_config: MakeConfig) -> None:
    config = tiny_config("federation.rounds=1")
    first = cgfedllm.run(config)
    with pytest.raises(RunExistsError, match=r"done up to round 1.*resume.*--overwrite.*--name"):
        cgfedllm.run(config)
    assert RunFolder(config.run_dir).records() == first.records
    assert len(cgfedllm.run(config, overwrite=True).records) == 2


def test_two_runs_in_one_folder_at_once(tiny_config: MakeConfig) -> None:
    config = tiny_config("federation.rounds=1")
    with (
        RunFolder(config.run_dir),
        pytest.raises(RunLockedError, match=r"in use by process \d+.*--name"),
    ):
        cgfedllm.run(config)
