"""What a row is, before and after its file is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]
"""One record as it was read: column name to value."""


@dataclass(frozen=True)
class SourceFile:
    """The rows of one file, or of one data set read through the `datasets` library.

    Parameters
    ----------
    name : str
        Where the rows came from, for messages.
    stem : str
        Short name without folders and extensions; the client's name when kind = "files".
    rows : list of Row
        In file order, at least one.
    """

    name: str
    stem: str
    rows: list[Row]
