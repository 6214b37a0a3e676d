"""Rows of results (flat dataclasses) as CSV and back, plain values for JSON, trees laid flat."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from cgfedllm.errors import CheckpointError

R = TypeVar("R")


def rows_to_csv(row_type: type[Any], rows: Iterable[Any]) -> str:
    """One line a row under the names of its fields."""
    names = [field.name for field in fields(row_type)]
    return table_to_csv(names, ([getattr(row, name) for name in names] for row in rows))


def table_to_csv(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Cells under a line of names: six digits, ``inf``, nothing for None."""
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return out.getvalue()


def read_rows(path: Path, row_type: type[R]) -> list[R]:
    """Inverse of `rows_to_csv`, of a file.

    Raises
    ------
    CheckpointError
        If it is missing or damaged.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [
                row_type(**{f.name: _value(cells[f.name], f.type) for f in fields(row_type)})  # type: ignore[arg-type]
                for cells in csv.DictReader(file)
            ]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error!r}); run it again") from None


def plain(value: Any) -> Any:
    """JSON has neither infinity nor NaN: the one becomes "inf", the other null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested tables under dotted keys; an empty table is a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _cell(value: object) -> object:
    """Six digits are more than any of it is worth."""
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value


def _value(cell: str, kind: Any) -> Any:
    """Inverse of `_cell`, for a field annotated as text (`kind`); other names are kinds of text."""
    if kind.endswith("None") and not cell:
        return None
    return {"int": int, "float": float}.get(kind.partition(" ")[0], str)(cell)
