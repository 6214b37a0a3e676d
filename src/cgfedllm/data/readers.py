"""One reader for each kind of data file.

::

    file --(.gz)--> bytes --(extension)--> rows

Every reader gives all rows or a `DataError` that says where in the file the trouble is.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cgfedllm.data.rows import Row
from cgfedllm.errors import DataError

# cells of scraped texts go beyond the csv module's default of 128 KiB
_LARGEST_CELL = 1 << 30


def data_extension(path: Path) -> str | None:
    """``".jsonl"`` for ``x.jsonl`` and ``x.jsonl.gz``; None where no reader knows the file."""
    name = path.name.lower().removesuffix(".gz")
    extension = Path(name).suffix
    return extension if extension in _READERS else None


def file_stem(path: Path) -> str:
    """The name without folder and known extensions."""
    extension = data_extension(path)
    name = path.name[: -len(".gz")] if path.name.lower().endswith(".gz") else path.name
    return name[: -len(extension)] if extension and len(name) > len(extension) else name


def read_file(path: Path) -> list[Row]:
    """All rows of a JSONL, JSON, CSV, TSV or Parquet file, plain or with ``.gz``.

    Parameters
    ----------
    path : Path
        The extension says what is in it.

    Returns
    -------
    list of Row
        At least one.

    Raises
    ------
    DataError
        If the extension is unknown, the file cannot be read, is damaged, is not what its
        extension says, or holds no rows.
    """
    extension = data_extension(path)
    if extension is None:
        raise DataError(
            f"{path}: unknown kind of file; known are {', '.join(_READERS)}, each also with .gz"
        )
    try:
        data = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            data = gzip.decompress(data)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; check the path") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}); copy it anew") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    rows = _READERS[extension](data, path)
    if not rows:
        raise DataError(f"{path} has no rows; leave the file out or fill it")
    return rows


def _jsonl(data: bytes, path: Path) -> list[Row]:
    return _json_lines(_text(data, path), path)


def _json(data: bytes, path: Path) -> list[Row]:
    text = _text(data, path)
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        # many .json files are JSON Lines inside: several objects, one below the other
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _json_lines(text, path)
        raise _bad_json(path, error.lineno, error) from None
    if not isinstance(value, list):
        raise DataError(
            f"{path} holds {_kind(value)} where a list of objects is expected; "
            "write [{...}, {...}], or one object a line with the extension .jsonl"
        )
    return [_object(item, f"{path}, item {number}") for number, item in enumerate(value, start=1)]


def _json_lines(text: str, path: Path) -> list[Row]:
    rows = []
    # not splitlines(): that also splits at characters which JSON allows inside a string
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise _bad_json(path, number, error) from None
        rows.append(_object(value, f"{path}, line {number}"))
    return rows


def _csv(data: bytes, path: Path) -> list[Row]:
    return list(_delimited(_text(data, path), path, ","))


def _tsv(data: bytes, path: Path) -> list[Row]:
    return list(_delimited(_text(data, path), path, "\t"))


def _delimited(text: str, path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(_LARGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) != len(header) or not all(name.strip() for name in header):
            raise DataError(
                f"{path}, line 1: the header {header} has an empty or repeated column name; "
                "the first line must name every column once"
            )
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells where the header has "
                    f"{len(header)}; quote cells that contain the separator or a line break"
                )
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: {error}; check the quotes around there"
        ) from None


def _parquet(data: bytes, path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[Row] = pq.read_table(pa.BufferReader(data)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from None
    return rows


_READERS: dict[str, Callable[[bytes, Path], list[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}


def _text(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8; convert the file to UTF-8") from None


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f'{where}: {_kind(value)} where an object like {{"a": 1}} is expected')
    return value


def _kind(value: Any) -> str:
    names = {dict: "one object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def _bad_json(path: Path, line: int, error: json.JSONDecodeError) -> DataError:
    return DataError(f"{path}, line {line}: not valid JSON ({error.msg}, column {error.colno})")
