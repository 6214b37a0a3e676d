"""The configurations that ship: each loads, says how it is launched, and is what its name says."""

from pathlib import Path

import pytest

from cgfedllm.config import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.glob("*.toml"))


def test_all_are_there() -> None:
    assert {path.stem for path in FILES} >= {
        "quickstart",
        "medquad",
        "dolly",
        "gsm8k",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loads_and_names_its_run_after_itself(path: Path) -> None:
    assert load_config(path).name == path.stem


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_opens_with_the_command_that_launches_it(path: Path) -> None:
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    command = "compare" if path.stem.startswith(("compare-", "flagship-")) else "run"
    assert f"cgfedllm {command} configs/{path.name}" in first
    assert first.startswith("# ")
    assert second.startswith("#")


def test_quickstart_needs_nothing_from_outside() -> None:
    config = load_config(CONFIGS / "quickstart.toml")
    assert config.model.id == "embedded"
    assert config.data.source == "demo"
