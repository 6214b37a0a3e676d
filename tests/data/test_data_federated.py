"""From a configuration to every client's rows."""

from __future__ import annotations

import gzip
import json
import re
import tomllib
from pathlib import Path

import pytest

from cgfedllm.config import DataConfig, parse_config
from cgfedllm.data import load_federated_data
from cgfedllm.data.formats import parse_row
from cgfedllm.data.splits import content_key
from cgfedllm.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, rows: list[dict[str, object]]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def asked(numbers: range, **extra: object) -> list[dict[str, object]]:
    return [{"question": f"What is {n}?", "answer": f"It is {n}.", **extra} for n in numbers]


@pytest.fixture
def hospitals(tmp_path):
    """The layout of MedQuAD: one file, the site in a column, some rows twice, some blank."""
    rows = [
        *asked(range(40), site="north"),
        *asked(range(40, 100), site="south"),
        *asked(range(35, 45), site="east"),
        {"question": "Unanswered?", "answer": "", "site": "north"},
    ]
    return write(tmp_path / "medical.jsonl.gz", rows)


BY_SITE = {"column": "site"}


def test_clients_come_sorted_with_their_parts(hospitals):
    data = load_federated_data(DataConfig(source=hospitals, partition=BY_SITE), 0)
    assert [client.name for client in data.clients] == ["east", "north", "south"]
    table = {line.client: line for line in data.describe()}
    # a tenth of 60, less any whose copy another client holds out
    assert 0 < table["south"].validation <= 6
    assert all(line.train > 0 for line in data.describe())
    assert data.heldout
    assert any("1 rows dropped: prompt, answer or text is blank" in note for note in data.notes)


def test_the_same_seed_gives_the_same_data_and_another_seed_another(hospitals):
    config = DataConfig(source=hospitals, partition=BY_SITE)
    assert load_federated_data(config, 1) == load_federated_data(config, 1)
    assert load_federated_data(config, 1) != load_federated_data(config, 2)


def keys(rows, config):
    return {content_key(parse_row(row, config)) for row in rows}


def test_nothing_that_is_evaluated_is_trained_on_anywhere(hospitals):
    config = DataConfig(
        source=hospitals,
        partition=BY_SITE,
        splits={"validation": 0.3, "test": 0.2, "heldout": 0.2},
    )
    data = load_federated_data(config, 3)
    train = {key for client in data.clients for key in keys(client.train, config)}
    for client in data.clients:
        assert not train & keys(client.validation, config)
        assert not train & keys(client.test, config)
    assert not train & keys(data.heldout, config)


def test_a_heldout_source_takes_nothing_from_clients_but_the_rows_it_shares_with_them(
    tmp_path, hospitals
):
    rows = [*asked(range(30, 37)), *asked(range(500, 520)), *asked(range(500, 503))]
    config = DataConfig(
        source=hospitals,
        heldout_source=write(tmp_path / "exam.jsonl", rows),
        partition={"kind": "iid", "clients": 4},
    )
    data = load_federated_data(config, 0)
    assert len(data.heldout) == 27
    assert "9 rows dropped: they are in data.heldout_source" in data.notes
    assert "27 of 30 rows of data.heldout_source used" in " ".join(data.notes)
    held = keys(data.heldout, config)
    for client in data.clients:
        assert not held & keys([*client.train, *client.validation, *client.test], config)


def test_a_heldout_source_is_limited_by_max_heldout_rows_yet_all_of_it_is_kept_from_training(
    tmp_path, hospitals
):
    config = DataConfig(
        source=hospitals,
        heldout_source=write(tmp_path / "exam.jsonl", asked(range(50))),
        partition=BY_SITE | {"clients": 1},
        splits={"max_heldout_rows": 5},
    )
    data = load_federated_data(config, 0)
    assert len(data.heldout) == 5
    assert not keys(asked(range(50)), config) & keys(data.clients[0].train, config)


def test_one_client_a_file(tmp_path):
    for number in range(3):
        rows = [
            {"instruction": f"Say {number} {n}", "context": "", "response": "x", "category": "c"}
            for n in range(20)
        ]
        path = tmp_path / f"local_training_{number}.json.gz"
        path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    config = DataConfig(
        source=str(tmp_path / "local_training_*.json.gz"), partition={"kind": "files"}
    )
    data = load_federated_data(config, 0)
    assert [client.name for client in data.clients] == [f"local_training_{n}" for n in range(3)]


def test_limits_are_noted(hospitals):
    partition = BY_SITE | {"clients": 2}
    data = load_federated_data(DataConfig(source=hospitals, partition=partition, max_rows=20), 0)
    assert len(data.clients) == 2
    assert any("1 smaller clients left out" in note for note in data.notes)
    assert any("70 rows left out" in note for note in data.notes)


def test_an_error_in_a_row_says_which_row_of_which_file(tmp_path):
    rows = [*asked(range(3)), {"question": "a", "answr": "b"}]
    with pytest.raises(DataError, match=r"a\.jsonl, row 4: .*answr"):
        load_federated_data(DataConfig(source=write(tmp_path / "a.jsonl", rows)), 0)


def test_a_client_without_a_training_row_is_named(tmp_path):
    rows = asked(range(40), client="a") + asked(range(2), client="b")
    exam = write(tmp_path / "exam.jsonl", asked(range(2)))
    config = DataConfig(
        source=write(tmp_path / "a.jsonl", rows), heldout_source=exam, partition={"min_rows": 1}
    )
    with pytest.raises(DataError, match="client 'b' has no training rows left of 2"):
        load_federated_data(config, 0)


def test_d1_and_d2_divide_the_training_rows_and_leave_the_evaluation_alone(hospitals):
    options = {"source": hospitals, "partition": BY_SITE, "splits": {"test": 0.1}}
    whole, d1, d2 = (
        load_federated_data(DataConfig(**options, part=part), 3) for part in ("all", "d1", "d2")
    )
    assert whole.heldout == d1.heldout == d2.heldout
    for both, first, second in zip(whole.clients, d1.clients, d2.clients, strict=True):
        assert (both.validation, both.test) == (first.validation, first.test)
        assert (both.validation, both.test) == (second.validation, second.test)
        assert [r for r in both.train if r in first.train] == first.train
        assert [r for r in both.train if r not in first.train] == second.train
        assert len(first.train) == pytest.approx(0.3 * len(both.train), abs=2)
    config = DataConfig(**options)
    first = {key for client in d1.clients for key in keys(client.train, config)}
    assert not first & {key for client in d2.clients for key in keys(client.train, config)}
    rows = [sum(len(c.train) for c in data.clients) for data in (d1, d2, whole)]
    assert rows[0] + rows[1] == rows[2]
    said = "{} of {} training rows used: data.part = {}, data.d1_share = 0.3"
    assert said.format(rows[0], rows[2], "d1") in d1.notes
    assert said.format(rows[1], rows[2], "d2") in d2.notes
    assert not any("data.part" in note for note in whole.notes)


def test_the_seed_of_the_data_decides_what_d1_is(hospitals):
    options = {"source": hospitals, "partition": BY_SITE, "part": "d1"}
    fixed = DataConfig(**options, seed=1)
    assert load_federated_data(fixed, 7) == load_federated_data(DataConfig(**options), 1)
    assert load_federated_data(fixed, 7) != load_federated_data(DataConfig(**options), 7)


@pytest.mark.parametrize("part", ["d1", "d2"])
def test_a_client_without_a_row_for_d1_is_named(tmp_path, part):
    rows = asked(range(40), client="a") + asked(range(50, 51), client="b")
    config = DataConfig(
        source=write(tmp_path / "a.jsonl", rows),
        partition={"min_rows": 1},
        splits={"validation": 0.0, "heldout": 0.0},
        part=part,
    )
    with pytest.raises(DataError, match=r"client 'b' has no row for d1: its 1 .*min_rows"):
        load_federated_data(config, 0)


def test_a_client_whose_rows_are_all_in_d1_elsewhere_is_named(tmp_path):
    rows = asked(range(40), client="a") + asked(range(2), client="b")
    config = DataConfig(
        source=write(tmp_path / "a.jsonl", rows),
        partition={"min_rows": 1},
        splits={"validation": 0.0, "heldout": 0.0},
        part="d2",
        d1_share=0.97,
    )
    with pytest.raises(DataError, match="client 'b' has no row for d2"):
        load_federated_data(config, 0)


def test_a_source_of_blank_rows_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": " "}])
    with pytest.raises(DataError, match=r"every row of .* is blank"):
        load_federated_data(DataConfig(source=path), 0)


def test_the_demo_cannot_be_the_heldout_source():
    with pytest.raises(DataError, match="heldout_source cannot be 'demo'"):
        load_federated_data(DataConfig(heldout_source="demo", partition={"min_rows": 1}), 0)


def test_every_snippet_of_the_guide_is_a_valid_configuration():
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    assert len(snippets) >= 8
    for snippet in snippets:
        parse_config(tomllib.loads(snippet))


SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("options", "clients"),
    [
        ({"source": "medquad/medquad_16407.jsonl.gz", "partition": {"column": "source"}}, 9),
        (
            {
                "source": "gsm8k/train.jsonl.gz",
                "heldout_source": "gsm8k/test.jsonl.gz",
                "partition": {"kind": "iid", "clients": 4},
            },
            4,
        ),
        (
            {
                "source": "dolly/data_dolly/10/local_training_*.json.gz",
                "partition": {"kind": "files"},
            },
            10,
        ),
    ],
    ids=["medquad", "gsm8k", "dolly"],
)
def test_published_data_sets_load_as_they_come(options, clients):
    if not SHARED.is_dir():
        pytest.skip(f"the published data sets are not at {SHARED} on this machine")
    paths = {k: str(SHARED / v) for k, v in options.items() if k.endswith("source")}
    assert len(load_federated_data(DataConfig(**options | paths), 0).clients) == clients
