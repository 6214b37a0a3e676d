"""Pages on faults and robustness: each row has its tests, each number its result file."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "docs" / "faults.md"


def test_every_row_names_tests_that_exist() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    rows = [
        line
        for line in FAULTS.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith("| What happens")
    ]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.rsplit("|", 2)[1])
        assert named or row.endswith("| the same |"), row
        for name in named:
            assert f"def {name}(" in sources, name


def test_the_page_on_robustness_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    try:
        import robust_page

        page = robust_page.PAGE.read_text(encoding="utf-8")
        assert robust_page.filled(page) == page, "run `python benchmarks/robust_page.py`"
        assert page.count("<!-- numbers: ") == 2
    finally:
        for module in ("robust_page", "codec_pages"):
            sys.modules.pop(module, None)
