"""What `data.source` may be: a file, a glob, a folder, a hub id, the demo."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from cgfedllm.config import DataConfig
from cgfedllm.data import sources
from cgfedllm.data.sources import load_sources
from cgfedllm.errors import DataError


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts(source: object, **config: object) -> dict[str, list[str]]:
    files = load_sources(DataConfig(source=str(source), **config))
    return {file.stem: [row["text"] for row in file.rows] for file in files}


@pytest.fixture
def _no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def test_a_file(tmp_path):
    assert texts(write(tmp_path / "north.jsonl", "a", "b")) == {"north": ["a", "b"]}


def test_a_glob_is_read_in_order_of_paths_and_keeps_the_files_apart(tmp_path):
    write(tmp_path / "b.jsonl", "2")
    write(tmp_path / "a.jsonl", "1")
    write(tmp_path / "c.json.txt", "no match")
    assert texts(tmp_path / "*.jsonl") == {"a": ["1"], "b": ["2"]}


def test_a_relative_glob_starts_in_the_current_folder(tmp_path, monkeypatch):
    write(tmp_path / "sites" / "a.jsonl", "1")
    monkeypatch.chdir(tmp_path)
    assert texts("sites/*.jsonl") == {"a": ["1"]}


def test_files_of_one_name_are_told_apart_by_their_folder(tmp_path):
    write(tmp_path / "north" / "train.jsonl", "n")
    write(tmp_path / "south" / "train.jsonl", "s")
    assert texts(tmp_path / "*" / "train.jsonl") == {"north-train": ["n"], "south-train": ["s"]}


def test_a_folder_gives_the_files_of_the_wanted_split(tmp_path):
    write(tmp_path / "local_training_1.jsonl", "1")
    write(tmp_path / "ward.jsonl", "no split word: training")
    write(tmp_path / "global_test.jsonl", "t")
    assert texts(tmp_path).keys() == {"local_training_1", "ward"}
    assert texts(tmp_path, split="test") == {"global_test": ["t"]}
    with pytest.raises(DataError, match="no split 'validation'; it has test, train"):
        texts(tmp_path, split="validation")


def test_a_folder_laid_out_like_a_hub_data_set(tmp_path):
    write(tmp_path / "en" / "train.jsonl", "a", "b")
    write(tmp_path / "en" / "test.jsonl", "t")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n"
        "    path: en/train.jsonl\n  - split: test\n    path: en/test.jsonl\n"
        "- config_name: de\n  data_files: en/test.jsonl\n---\n"
    )
    assert texts(tmp_path, name="en") == {tmp_path.name: ["a", "b"]}
    assert texts(tmp_path, name="en", split="test") == {tmp_path.name: ["t"]}
    with pytest.raises(DataError, match=r"no configuration 'fr'.*Set data.name"):
        texts(tmp_path, name="fr")
    with pytest.raises(DataError, match=r"split 'dev'.*Set data.split"):
        texts(tmp_path, name="en", split="dev")


def test_a_folder_saved_to_disk(tmp_path):
    data = datasets.Dataset.from_list([{"text": "a"}])
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "many")
    assert texts(tmp_path / "one") == {"one": ["a"]}
    assert texts(tmp_path / "many") == {"many": ["a"]}
    with pytest.raises(DataError, match=r"no split 'trian'.*Did you mean 'train'"):
        texts(tmp_path / "many", split="trian")


def test_a_damaged_saved_folder_is_named(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        texts(tmp_path)


@pytest.mark.parametrize("source", ["gone.jsonl", "./gone", "some/deep/folder", "data/gone.csv.gz"])
def test_what_cannot_be_a_hub_id_is_a_missing_file(source):
    with pytest.raises(DataError, match="does not exist"):
        texts(source)


def test_a_glob_without_match_says_where_it_looked(tmp_path):
    with pytest.raises(DataError, match=r"no file matches .*\*\.jsonl \(looked in"):
        texts(tmp_path / "*.jsonl")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no files"):
        texts(tmp_path)


@pytest.mark.usefixtures("_no_network")
def test_a_hub_id_offline_says_so_and_what_to_do():
    with pytest.raises(DataError, match=r"HF_HUB_OFFLINE is set.*Give a local file or folder"):
        texts("nobody/no-such-data-set")


def test_the_demo_is_a_source(monkeypatch):
    monkeypatch.setattr(sources, "demo_files", lambda: ["the demo's files"])
    assert load_sources(DataConfig(source="demo")) == ["the demo's files"]
