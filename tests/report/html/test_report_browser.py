"""Reports in a real browser: they render, fit a phone, obey the theme, and fetch nothing.

The browser resolves no name, and writes down every request with the page that made it: its own,
for updates and the like, have none.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cgfedllm.metrics import ModuleRecord, RoundRecord
from cgfedllm.report.html.page import write_comparison, write_run_report
from cgfedllm.runs import RunFolder

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")

WIDTHS = (1100, 360)
PAGES = ("report.html", "comparison.html")
THEMES = {"light": (1, "rgb(255, 255, 255)"), "dark": (0, "rgb(20, 24, 27)")}

# Frames give exact widths, which a headless window does not.
PROBE = """<!DOCTYPE html><link rel="icon" href="data:,"><body>FRAMES<script>
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const seen = element => element.getBoundingClientRect();
    return {
      heading: page.querySelector("h1").textContent,
      overflow: root.scrollWidth - root.clientWidth,
      background: getComputedStyle(page.body).backgroundColor,
      charts: [...page.querySelectorAll("figure > svg")].map(svg => seen(svg).width),
      columns: getComputedStyle(page.querySelector(".charts")).gridTemplateColumns,
      smallest: Math.min(...[...page.querySelectorAll(".chart text")].map(t => seen(t).height)),
      outside: [...page.querySelectorAll(".chart text")].filter(text =>
        seen(text).right > seen(text.ownerSVGElement).right + 1 ||
        seen(text).left < seen(text.ownerSVGElement).left - 1).map(text => text.textContent),
    };
  });
  document.body.innerHTML = "<pre></pre>";
  document.querySelector("pre").textContent = JSON.stringify(found);
};
</script>"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@dataclass(frozen=True)
class Visit:
    """What came of opening a page."""

    dom: str
    log: str
    asked: list[str]
    """Addresses that pages asked for."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which it is served."""
    root = tmp_path / "site"
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield root, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def browse(site: tuple[Path, str], tmp_path: Path) -> Callable[..., Visit]:
    """``browse(file, *flags)``: open a page of the site."""

    def visit(file: str, *flags: str) -> Visit:
        network = tmp_path / "network.json"
        done = subprocess.run(
            [
                str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                "--no-first-run", "--disable-background-networking", "--disable-component-update",
                "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
                "--enable-logging=stderr", "--v=0", "--window-size=1600,1200",
                "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
                f"--log-net-log={network}", *flags, "--dump-dom", f"{site[1]}/{file}",
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        written = json.loads(network.read_text())
        started = written["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
        asked = [
            event["params"]["url"]
            for event in written["events"]
            if event["type"] == started and "url" in event.get("params", {})
            and event["params"]["initiator"] == site[1]
        ]  # fmt: skip
        return Visit(done.stdout, done.stderr, asked)

    return visit


@pytest.fixture
def reports(
    site: tuple[Path, str], make_run: Callable[..., RunFolder], learning: list[RoundRecord]
) -> None:
    """A report of a run with much in it, and a comparison, on the site."""
    for record in learning:
        record.epsilon = 2.0 * record.round
        for client in record.clients:
            client.client = f"{client.client}-{'with-a-long-name-' * 6}"
            for number in range(7):
                told = ModuleRecord(1.0, 0.9, 0.1 * number * record.round)
                client.fidelity[f"{number}_{'long_name_' * number}.A"] = told
    settings = ("uplink.name=cg_cnn", "privacy.mechanism=local", "uplink.error_feedback=false")
    one, other = make_run(learning, *settings), make_run(learning, "name=other")
    write_run_report(one, site[0] / "report.html")
    write_comparison([one, other], site[0] / "comparison.html")
    frames = (f'<iframe src="{page}" width="{width}" height="900" style="border:0"></iframe>'
              for page in PAGES for width in WIDTHS)  # fmt: skip
    (site[0] / "probe.html").write_text(PROBE.replace("FRAMES", "".join(frames)))


@pytest.mark.usefixtures("reports")
@pytest.mark.parametrize("theme", THEMES)
def test_reports_render_everywhere_and_ask_for_nothing(
    theme: str, site: tuple[Path, str], browse: Callable[..., Visit]
) -> None:
    number, paper = THEMES[theme]
    visit = browse("probe.html", f"--blink-settings=preferredColorScheme={number}")
    assert "CONSOLE" not in visit.log
    # the probe asks for its frames, and they for nothing
    assert set(visit.asked) == {f"{site[1]}/{page}" for page in PAGES}
    match = re.search(r"<pre>(.*)</pre>", visit.dom, re.DOTALL)
    assert match
    frames = json.loads(html.unescape(match[1]))
    assert [frame["heading"] for frame in frames[::2]] == ["trial", "Comparison of 2 runs"]
    for frame, width in zip(frames, WIDTHS * len(PAGES), strict=True):
        assert frame["overflow"] == 0
        assert frame["background"] == paper
        assert frame["outside"] == []
        assert frame["charts"]
        assert all(250 < chart <= min(width, 520) for chart in frame["charts"])
        assert len(frame["columns"].split()) == (2 if width > 800 else 1)
        assert frame["smallest"] >= 11  # height of a line of text, CSS pixels


def test_the_checks_above_can_fail(site: tuple[Path, str], browse: Callable[..., Visit]) -> None:
    """A page that does what reports must not is caught."""
    (site[0] / "bad.html").write_text(
        "<meta http-equiv='Content-Security-Policy' content=\"script-src 'none'\">"
        "<link rel=icon href='data:,'><script>1</script><img src='http://elsewhere.example/x.png'>"
    )
    visit = browse("bad.html")
    assert "CONSOLE" in visit.log
    assert visit.asked == ["http://elsewhere.example/x.png"]
