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
        "paper-llama-dolly",
        "paper-llama-ceval",
        "paper-qwen-mmlu",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loads_and_names_its_run_after_itself(path: Path) -> None:
    assert load_config(path).name == path.stem


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_opens_with_the_command_that_launches_it(path: Path) -> None:
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    command = "compare" if path.stem.startswith("compare-") else "run"
    assert f"cgfedllm {command} configs/{path.name}" in first
    assert first.startswith("# ")
    assert second.startswith("#")


@pytest.mark.parametrize(
    ("name", "rounds", "clients", "fraction", "batch", "micro", "lr", "rank", "epochs"),
    [
        ("paper-llama-dolly", 20, 100, 0.05, 32, 16, 1.5e-4, 8, 1),
        ("paper-llama-ceval", 5, 3, 1.0, 24, 8, 2.0e-4, 16, 3),
        ("paper-qwen-mmlu", 8, 3, 1.0, 8, 4, 3.5e-4, 8, 2),
    ],
)
def test_paper_set_ups_have_the_papers_numbers(
    name: str,
    rounds: int,
    clients: int,
    fraction: float,
    batch: int,
    micro: int,
    lr: float,
    rank: int,
    epochs: int,
) -> None:
    config = load_config(CONFIGS / f"{name}.toml")
    assert config.federation.rounds == rounds
    assert config.data.partition.clients == clients
    assert config.federation.fraction_train == fraction
    assert config.training.batch_size == batch
    assert config.training.micro_batch_size == micro
    assert config.training.lr == lr
    assert config.lora.rank == rank
    assert config.training.local_epochs == epochs
    assert config.lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_quickstart_needs_nothing_from_outside() -> None:
    config = load_config(CONFIGS / "quickstart.toml")
    assert config.model.id == "embedded"
    assert config.data.source == "demo"
