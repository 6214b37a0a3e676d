"""Pages on faults and robustness: each row has its tests, each number its result file."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "docs" / "faults.md"


def test_every_row_names_tests_that_exist() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    page = re.sub("<!-- numbers.*?<!-- /numbers -->", "", FAULTS.read_text("utf-8"), flags=re.S)
    rows = [
        line
        for line in page.splitlines()
        if line.startswith("| ") and not line.startswith("| What happens")
    ]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.rsplit("|", 2)[1])
        assert named or row.endswith("| the same |"), row
        for name in named:
            assert f"def {name}(" in sources, name


@pytest.mark.parametrize(("script", "blocks"), [("robust_page", 2), ("faults_page", 3)])
def test_the_page_is_up_to_date(script: str, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    try:
        made = importlib.import_module(script)
        page = made.PAGE.read_text(encoding="utf-8")
        assert made.filled(page) == page, f"run `python benchmarks/{script}.py`"
        assert page.count("<!-- numbers: ") == blocks
    finally:
        for module in (script, "codec_pages"):
            sys.modules.pop(module, None)
