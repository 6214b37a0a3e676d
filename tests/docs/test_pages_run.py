"""The pages do what they say: their commands are run, page by page, in the order they stand in.

A page is a session: what one command leaves is there for the next. Each begins in a fresh copy of
the repository, with a tiny model and few rows in place of the real ones (workspace.py). What is
changed, done before, or left out stands in the four tables below, and nowhere else.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cgfedllm.cli import app

from .pages import ALL, PAGES, ROOT, SHELL, Block, Command, blocks
from .workspace import make_workspace

# appended to every command that trains
TRAINS = {"run", "record", "pretrain", "compare", "reproduce"}
SHORT_TRAINING = (
    "--set model.id=model --set federation.rounds=2 --set data.max_length=96 "
    "--set data.max_rows=48 --set tracking.tensorboard=false"
)

# appended to the commands that begin so
SHORTER = {
    "cgfedllm compare configs/compare-medquad.toml": "--seeds 0",
    "cgfedllm pretrain": "--set tgap.rounds=4 --set tgap.epochs=2",
    "cgfedllm reproduce paper": "--set tgap.rounds=4 --set tgap.epochs=2 --per-subject 1",
    "cgfedllm evaluate runs/mine --benchmark": "--hub HUB",
    "python benchmarks/scale.py": "--quick",
}

# what a page takes for granted
BEFORE = {
    "README.md": ["cgfedllm run configs/quickstart.toml"],  # as `make quickstart` does
    "docs/analysis.md": [
        "cgfedllm record configs/recordings/medquad_4.toml --to runs/recordings/medquad_4",
        "cgfedllm pretrain cg_resnet -r runs/recordings/medquad_4 --name medquad",
    ],
    "docs/evaluation.md": [
        "cgfedllm run mine.toml --set data.splits.test=0.1",
        "cgfedllm export runs/mine --to exported/adapter",
    ],
    "docs/paper.md": [
        "cgfedllm record configs/recordings/medquad_4.toml --to runs/recordings/medquad_4",
    ],
    "docs/report.md": [
        "cgfedllm run mine.toml",
        "cgfedllm run mine.toml --name raw --set uplink.name=raw",
        "cgfedllm run mine.toml --name int8 --set uplink.name=int8",
    ],
}

# commands and Python blocks that begin so are not run here
NOT_HERE = {
    "make quickstart": "installs an environment; BEFORE runs what it runs",
    "make test": "runs these tests",
    "cgfedllm run mine.toml --superlink federation": "needs a SuperLink: test_deployment_page.py",
    "cgfedllm bench codecs -r runs/recordings/medquad_4 --codec ecsq": "peers not installed",
    "hf download": "needs a network",
    "python benchmarks/robust.py": "half an hour of the embedded model",
    "python benchmarks/faults.py": "ten minutes of faults and kills",
}
# pages that have a test of their own
ELSEWHERE = {
    "examples/deployment/README.md": "tests/federation/test_deployment_page.py",
    "examples/flower_quickstart/README.md": "tests/docs/test_flower_app_page.py",
}

SESSIONS = [page for page in PAGES if page not in ELSEWHERE and blocks(page, *SHELL, "python")]


def steps(page: str) -> Iterator[Command | Block]:
    """Commands and Python blocks in the order they stand in."""
    for block in blocks(page, *SHELL, "python"):
        if block.language == "python":
            yield block
        else:
            yield from block.commands()


@pytest.fixture
def session(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.chdir(make_workspace(tmp_path, tiny_model))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PWD", str(Path.cwd()))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return Session()


class Session:
    """Does what a reader would; fails with what he would see."""

    def __init__(self) -> None:
        # what Python blocks leave to the reader
        self.names: dict[str, Any] = {"base_model": AutoModelForCausalLM.from_pretrained("model")}

    def run(self, command: str) -> None:
        extra = [value for begin, value in SHORTER.items() if command.startswith(begin)]
        words = shlex.split(command)
        if words[0] == "cgfedllm" and words[1] in TRAINS:
            extra.append(SHORT_TRAINING)
        command = " ".join([command, *extra])
        if words[0] == "cgfedllm":
            # in this process: loading torch anew would take longer than most of them
            arguments = shlex.split(os.path.expandvars(command))[1:]
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception!r}"
        else:
            shell = subprocess.run(
                ["bash", "-c", command], capture_output=True, text=True, check=False
            )
            assert shell.returncode == 0, f"{command}\n{shell.stdout}{shell.stderr}"

    def execute(self, block: Block) -> None:
        exec(compile(block.text, str(block), "exec"), self.names)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", SESSIONS)
def test_a_page_runs_as_written(page: str, session: Session) -> None:
    for command in BEFORE.get(page, ()):
        session.run(command)
    for step in steps(page):
        if step.text.startswith(tuple(NOT_HERE)):
            continue
        if isinstance(step, Block):
            session.execute(step)
        else:
            session.run(step.text)


def test_the_tables_are_about_commands_that_are_there() -> None:
    texts = [step.text for page in SESSIONS for step in steps(page)]
    for begin in (*SHORTER, *NOT_HERE):
        assert any(text.startswith(begin) for text in texts), f"no page says {begin!r}"
    assert set(BEFORE) <= set(SESSIONS)
    assert set(ELSEWHERE) <= {command.page for command in ALL}
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())
