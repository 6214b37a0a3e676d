"""Run folders made of records, and their reports read back as a browser's parser would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cgfedllm.config import load_config
from cgfedllm.metrics import RoundRecord
from cgfedllm.report.html.page import write_run_report
from cgfedllm.runs import RunFolder

_VOID = {"meta", "link", "img", "br", "hr", "input", "wbr"}


@dataclass
class Page(HTMLParser):
    """What is in a page."""

    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    """Innermost element and text, in order."""
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    """Rows, headings first, by caption."""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[str] = []
        self._caption = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "caption":
            self._caption = ""
        if tag == "tr":
            self.tables[self._caption].append([])
        if tag in ("th", "td"):
            self.tables[self._caption][-1].append("")
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not data.strip():
            return
        inside = self._open[-1]
        self.texts.append((inside, data.strip()))
        if inside == "caption":
            self._caption = data.strip()
            self.tables[self._caption] = []
        if inside in ("th", "td"):
            self.tables[self._caption][-1][-1] += data

    @property
    def text(self) -> str:
        """All words that are shown."""
        return " ".join(text for tag, text in self.texts if tag not in ("style", "title", "desc"))

    def of(self, tag: str) -> list[str]:
        """Texts of all elements of a kind."""
        return [text for inside, text in self.texts if inside == tag]

    def table(self, caption: str) -> dict[str, dict[str, str]]:
        """Cells by heading, by row."""
        head, *rows = self.tables[caption]
        return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def read_page(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert not page._open
    return page


@pytest.fixture(name="read_page")
def _read_page() -> Callable[[Path], Page]:
    return read_page


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunFolder]:
    """``make_run(records, *settings)``: a run folder of these rounds, by nobody held."""

    def make(records: Sequence[RoundRecord], *settings: str, rounds: int = 3) -> RunFolder:
        config = load_config(
            None,
            ["name=trial", f'output="{tmp_path}"', f"federation.rounds={rounds}", *settings],
        )
        with RunFolder.create(config, overwrite=True) as folder:
            for record in records:
                folder.append(record)
        return folder

    return make


@pytest.fixture
def report_of() -> Callable[[RunFolder], Page]:
    """Writes a run's report and reads it."""
    return lambda folder: read_page(write_run_report(folder))
