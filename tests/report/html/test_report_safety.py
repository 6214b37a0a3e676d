"""Nothing from data becomes markup, nothing is fetched, nothing runs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from cgfedllm.metrics import RoundRecord
from cgfedllm.report.html.page import write_comparison, write_run_report
from cgfedllm.runs import RunFolder
from cgfedllm.storage import write_json

MakeRun = Callable[..., RunFolder]
ReadPage = Callable[[Path], Any]

HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src='http://elsewhere.example/x' onerror=alert(1)>",
    "</title></style></svg><iframe srcdoc=x>",
    "{{ 7 * 7 }}{% raw %}&lt;",
)
ELEMENTS = {
    "html", "head", "meta", "link", "title", "style", "body", "header", "main", "footer", "section",
    "aside", "h1", "h2", "p", "span", "strong", "dl", "dt", "dd", "div", "ul", "li", "table",
    "caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "details", "summary",
    "pre", "svg", "g", "path", "rect", "circle", "text", "desc", "wbr",
}  # fmt: skip


@pytest.fixture
def hostile(make_run: MakeRun, make_records: Callable[..., list[RoundRecord]]) -> RunFolder:
    """A run in which every text that comes from elsewhere is an attack."""
    records = make_records(clients=HOSTILE)
    records[1].failures = [*records[2].failures]
    records[1].failures[0].client, records[1].failures[0].reason = HOSTILE[:2]
    folder = make_run(records, f"data.source={json.dumps(HOSTILE[0])}")
    facts = json.loads(folder.environment_path.read_text())
    facts |= {"gpu": HOSTILE[0], "platform": HOSTILE[1], "command": [*HOSTILE]}
    facts["versions"] = {HOSTILE[0]: HOSTILE[1]}
    write_json(folder.environment_path, facts)
    write_json(folder.adapter_dir / "adapter_config.json", [HOSTILE[0]])
    return folder


@pytest.fixture(params=["run", "comparison"])
def page(
    request: pytest.FixtureRequest, hostile: RunFolder, tmp_path: Path, read_page: ReadPage
) -> Iterator[Any]:
    if request.param == "run":
        yield read_page(write_run_report(hostile))
    else:
        yield read_page(write_comparison([hostile, hostile], tmp_path / "both.html"))


def test_texts_stay_texts(hostile: RunFolder, read_page: ReadPage) -> None:
    page = read_page(write_run_report(hostile))
    assert {tag for tag, _ in page.tags} <= ELEMENTS
    assert set(HOSTILE) <= set(page.table("Clients over the whole run"))
    [fault] = {row[2] for row in page.tables["2 replies that could not be used"][1:]}
    assert fault == HOSTILE[1]
    assert HOSTILE[0] in page.table("Where and with what it ran")["GPU"]["value"]


def test_only_known_elements_and_no_handlers(page: Any) -> None:
    assert {tag for tag, _ in page.tags} <= ELEMENTS
    names = {name for _, attributes in page.tags for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("style", "srcdoc")]


def test_nothing_is_fetched(page: Any) -> None:
    addresses = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset")
    ]
    assert addresses == ["data:,"]
    [style] = page.of("style")
    assert not re.search(r"@import|url\(|expression", style)


def test_the_policy_allows_this_style_and_nothing_else(page: Any) -> None:
    [policy] = [
        attributes["content"]
        for tag, attributes in page.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    style = files("cgfedllm.report.html").joinpath("templates/report.css").read_bytes()
    digest = base64.b64encode(hashlib.sha256(style).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'",
        f"style-src 'sha256-{digest}'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]


def test_half_a_surrogate_pair_is_written_too(
    make_run: MakeRun, records: list[RoundRecord], read_page: ReadPage
) -> None:
    folder = make_run(records)
    text = folder.metrics_path.read_text().replace('"numpy"', r'"\ud800numpy"')
    folder.metrics_path.write_text(text)
    assert "?numpy" in read_page(write_run_report(folder)).table("Clients over the whole run")


# ---- what a reader with weak eyes, or a wheel, needs ---------------------------------------------


def _themes() -> dict[str, dict[str, str]]:
    style = files("cgfedllm.report.html").joinpath("templates/report.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6});", block))
                   for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL))  # fmt: skip
    assert light.keys() == dark.keys()
    return {"light": light, "dark": dark}


def _contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return sum(weight * s for weight, s in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_is_enough(theme: str) -> None:
    colours = _themes()[theme]
    for ink in ("ink", "muted"):
        for paper in ("paper", "panel"):
            assert _contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
    assert _contrast(colours["warn-ink"], colours["warn-paper"]) >= 4.5
    for line in ("s0", "s1", "s2", "s3", "s4", "s5", "accent"):
        assert _contrast(colours[line], colours["paper"]) >= 3, line


def test_templates_are_packaged() -> None:
    import tomllib

    root = Path(__file__).parents[3]
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["*"]
    package = root / "src" / "cgfedllm" / "report" / "html"
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    assert set((package / "templates").iterdir()) <= packaged
