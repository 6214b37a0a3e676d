"""The embedded demo: docstrings of installed libraries, never run."""

from __future__ import annotations

import importlib
import sys

import pytest

from cgfedllm.config import DataConfig
from cgfedllm.data.demo import demo_files
from cgfedllm.data.docstrings import documented, library_folder
from cgfedllm.data.formats import Dialogue, parse_row
from cgfedllm.errors import DataError

SOURCE = '''
raise SystemExit("this file must never be run")

def clip(values: list[float], *, limit: float = 1.0) -> list[float]:
    """Cut every value to the range that
    the given limit allows.

    Not part of the summary.
    """

def twin(a):
    """CUT every value to the range that the given limit allows."""

def _private(a):
    """Nobody outside is meant to call this function."""

def short(a):
    """Too short."""

def old(a):
    """Deprecated since the first version of this library."""

class Box(dict):
    """A dictionary that remembers when it was made."""

    def __init__(self, size=3):
        pass

    @property
    def width(self):
        """The width of the box in whole characters."""

    async def close(self):
        """Wait for all writers and close the box for good."""
'''


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Makes an importable library out of one source."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, source: str = SOURCE) -> str:
        folder = tmp_path / name
        (folder / "tests").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise SystemExit")
        (folder / "core.py").write_text(source)
        (folder / "broken.py").write_text("def (")
        (folder / "tests" / "test_core.py").write_text(
            'def check(a):\n    """Check something that only the tests need."""\n'
        )
        importlib.invalidate_caches()
        return name

    return make


def test_signatures_and_summaries_are_read_without_running_anything(library):
    name = library("demolib_a")
    items = documented(name, library_folder(name), 100)
    assert [(item.kind, item.name, item.signature, item.summary) for item in items] == [
        (
            "function",
            "clip",
            "def clip(values: list[float], *, limit: float=1.0) -> list[float]:",
            "Cut every value to the range that the given limit allows.",
        ),
        (
            "class",
            "Box",
            "class Box(dict):\n    def __init__(self, size=3):",
            "A dictionary that remembers when it was made.",
        ),
        (
            "method",
            "Box.close",
            "class Box:\n    async def close(self):",
            "Wait for all writers and close the box for good.",
        ),
    ]
    assert {item.module for item in items} == {"demolib_a.core"}
    assert name not in sys.modules


def numbered(count: int, start: int = 0) -> str:
    return "\n".join(
        f'def add_{n}(number):\n    """Return the number {n} added to the argument."""'
        for n in range(start, start + count)
    )


def test_rows_are_distinct_across_clients_and_limited(library):
    names = (
        library("demolib_c", numbered(50, 40)),
        library("demolib_b", numbered(50)),
        library("demolib_d", numbered(90, 90)),
    )
    files = demo_files(names, rows_per_library=45)
    assert [file.stem for file in files] == ["demolib_b", "demolib_c", "demolib_d"]
    assert all(len(file.rows) <= 45 for file in files)
    rows = [row for file in files for row in file.rows]
    assert len({row["completion"] for row in rows}) == len(rows)
    assert files == demo_files(names, rows_per_library=45)


def test_absent_libraries_are_left_out_but_three_are_needed(library):
    names = tuple(library(f"demolib_{n}", numbered(9, 9 * n)) for n in range(3))
    assert len(demo_files((*names, "no_such_library_here"), rows_per_library=9)) == 3
    with pytest.raises(DataError, match=r"at least 3 of the libraries.*2 can be read"):
        demo_files((*names[:2], "no_such_library_here"), rows_per_library=9)


def test_the_real_demo_has_enough_for_a_federation():
    files = demo_files(rows_per_library=60)
    assert len(files) >= 3
    for file in files:
        assert len(file.rows) >= 40
        for row in file.rows:
            assert row["client"] == file.stem
            assert isinstance(parse_row(row, DataConfig()), Dialogue)
            assert row["prompt"].startswith(f"Write the docstring of this {row['kind']} from ")
            assert row["completion"].isascii()
