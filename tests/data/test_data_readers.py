"""Every kind of file gives the same rows, and every kind of damage has a message."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cgfedllm.data.readers import data_extension, file_stem, read_file
from cgfedllm.errors import DataError

ROWS = [
    {"question": 'a\tb, "c"?', "answer": "line one\nline two"},
    {"question": "naïve \u2028 separator", "answer": "日本"},
]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    kind = data_extension(path)
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        data = path.read_bytes()
    elif kind == ".json":
        data = json.dumps(rows, indent=2).encode()
    elif kind in (".jsonl", ".ndjson"):
        data = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    else:
        plain = path.with_suffix(".tmp")
        with plain.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if kind == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
        data = plain.read_bytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_all_kinds_of_file_give_the_same_rows(tmp_path, kind, zipped):
    assert read_file(write(tmp_path / f"clinic.a.{kind}{zipped}", ROWS)) == ROWS


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("ward-3.jsonl.gz", "ward-3"),
        ("ward.3.csv", "ward.3"),
        ("WARD.JSON.GZ", "WARD"),
        ("notes.txt", "notes.txt"),
    ],
)
def test_stem_is_the_name_without_known_extensions(name, stem):
    assert file_stem(Path(name)) == stem


def test_byte_order_mark_and_blank_lines_are_no_content(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n\r\n{"text": "y"}\n\n')
    assert read_file(path) == [{"text": "x"}, {"text": "y"}]


def test_json_lines_in_a_json_file_are_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"text": "x"}\n{"text": "y"}\n')
    assert read_file(path) == [{"text": "x"}, {"text": "y"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": ', r"a\.jsonl, line 3: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]', r"line 2: a list where an object"),
        ("a.jsonl", b'{"a": 1}\n"\xff"', r"line 2: not UTF-8"),
        ("a.jsonl", b"", r"a\.jsonl has no rows"),
        ("a.json", b" ", r"has no rows"),
        ("a.json", b"[]", r"has no rows"),
        ("a.json", b'[{"a": 1},\n 2 3]', r"line 2: not valid JSON"),
        ("a.json", b'{"a": 1}', r"holds one object where a list of objects is expected"),
        ("a.json", b'[{"a": 1}, null]', r"item 2: null where an object"),
        ("a.csv", b"", r"has no rows"),
        ("a.csv", b"x,y\n", r"has no rows"),
        ("a.csv", b"x,y\n1,2\n1,2,3\n", r"line 3: 3 cells where the header has 2"),
        ("a.csv", b'x,y\n1,"2\n', r"line 2: .*quotes"),
        ("a.csv", b"x,x\n1,2\n", r"line 1: the header .* repeated column"),
        ("a.tsv", b"x\t\n1\t2\n", r"line 1: the header .* empty"),
        ("a.parquet", b"PAR1 is not enough", r"not a readable Parquet file"),
        ("a.jsonl.gz", b"not gzip", r"damaged gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 99)[:-12], r"damaged gzip"),
        ("a.xlsx", b"", r"unknown kind of file; known are \.jsonl, .*\.parquet"),
    ],
)
def test_damage_is_named_with_file_and_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_file(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone.jsonl does not exist"):
        read_file(tmp_path / "gone.jsonl")
