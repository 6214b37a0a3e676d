"""examples/flower_quickstart/README.md, run as written, but for what needs Ray."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .pages import ROOT, blocks, commands

PAGE = "examples/flower_quickstart/README.md"
EXAMPLE = (ROOT / PAGE).parent
NOT_HERE = {
    "pip install": "installs packages",
    "flwr run . --stream": "needs Ray, which the lock of this repository leaves out",
}
# every message starts a process that loads torch
SHORTER = {"flwr run . here --stream": "--run-config num-server-rounds=1"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_page_leads_to_a_compressed_round(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE, tmp_path / "app", ignore=shutil.ignore_patterns("__pycache__"))
    (connection,) = blocks(PAGE, "toml")
    (tmp_path / "flower").mkdir()
    (tmp_path / "flower" / "config.toml").write_text(connection.text)
    script = "\n".join(
        " ".join([text, *(extra for begin, extra in SHORTER.items() if text.startswith(begin))])
        for text in (command.text for command in commands(PAGE))
        if not text.startswith(tuple(NOT_HERE))
    )
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(tmp_path / "app")]),
        "FLWR_HOME": str(tmp_path / "flower"),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    log = tmp_path / "page.log"
    with log.open("wb") as out:
        shell = subprocess.Popen(
            ["bash", "-c", f"set -e\n{script}"],
            cwd=tmp_path / "app",
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            assert shell.wait(1700) == 0, log.read_text(errors="replace")
        finally:
            # the servers too, wherever it stopped
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
    said = log.read_text(errors="replace")
    assert re.search(r"cgfedllm: 2 replies up in .* fewer\), 0 refused", said), said


def test_the_tables_are_about_commands_that_are_there() -> None:
    texts = [command.text for command in commands(PAGE)]
    for begin in (*SHORTER, *NOT_HERE):
        assert any(text.startswith(begin) for text in texts), f"the page does not say {begin!r}"
