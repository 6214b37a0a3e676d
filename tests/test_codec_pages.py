"""Numbers in the pages of codecs, the paper, the drop-in and `learned` are those of the files."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import codec_pages

    yield codec_pages
    del sys.modules["codec_pages"]


@pytest.fixture
def paper(pages):  # type: ignore[no-untyped-def]
    import paper_page

    yield paper_page
    del sys.modules["paper_page"]


@pytest.fixture
def drop_in(pages):  # type: ignore[no-untyped-def]
    import drop_in_page

    yield drop_in_page
    del sys.modules["drop_in_page"]


@pytest.fixture
def learned(pages):  # type: ignore[no-untyped-def]
    import learned_page

    yield learned_page
    del sys.modules["learned_page"]


def test_the_page_of_codecs_is_up_to_date(pages) -> None:  # type: ignore[no-untyped-def]
    page = pages.PAGE.read_text(encoding="utf-8")
    assert pages.filled(page) == page, "run `python benchmarks/codec_pages.py`"


def test_the_page_of_the_paper_is_up_to_date(paper) -> None:  # type: ignore[no-untyped-def]
    page = paper.PAGE.read_text(encoding="utf-8")
    assert paper.filled(page) == page, "run `python benchmarks/paper_page.py`"
    assert page.count("<!-- numbers: ") == 4


def test_the_page_of_the_drop_in_is_up_to_date(drop_in) -> None:  # type: ignore[no-untyped-def]
    page = drop_in.PAGE.read_text(encoding="utf-8")
    assert drop_in.filled(page) == page, "run `python benchmarks/drop_in_page.py`"
    assert page.count("<!-- numbers: ") == 2


def test_the_page_of_the_flagship_is_up_to_date(learned) -> None:  # type: ignore[no-untyped-def]
    page = learned.PAGE.read_text(encoding="utf-8")
    assert learned.filled(page) == page, "run `python benchmarks/learned_page.py`"
    assert page.count("<!-- numbers: ") == 9
    face = learned.FACE.read_text(encoding="utf-8")
    assert learned.filled(face) == face, "run `python benchmarks/learned_page.py`"


def test_every_block_names_a_codec_or_a_table(pages) -> None:  # type: ignore[no-untyped-def]
    from cgfedllm.codecs import codec_names

    page = pages.PAGE.read_text(encoding="utf-8")
    names = [match[2] for match in pages.BLOCK.finditer(page)]
    tables = {"structure", "closed loop", "auto-encoders", "auto-encoders, one thing at a time"}
    assert set(names) <= {*codec_names(), *tables}
    assert len(names) == len(set(names)) == page.count("<!-- numbers: ")


def test_figures_of_the_pages_exist(pages, paper, learned) -> None:  # type: ignore[no-untyped-def]
    import re

    for page in (pages.PAGE, paper.PAGE, learned.PAGE, learned.FACE):
        for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).resolve().is_file(), target
