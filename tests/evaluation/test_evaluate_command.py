"""`cgfedllm evaluate` with everything: tables on screen, results in files, going on."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.cli import app
from cgfedllm.config import Config
from cgfedllm.errors import DataError
from cgfedllm.evaluating import evaluate_adapter
from cgfedllm.evaluation.scorer import Scorer
from cgfedllm.peft_format import save_adapter
from cgfedllm.workspace import Workspace

MakeConfig = Callable[..., Config]


@pytest.fixture
def adapter(tiny_config: MakeConfig, tmp_path: Path) -> tuple[Path, Path]:
    """An adapter folder, and the configuration it goes with."""
    config = tiny_config()
    spec = Workspace(config, tmp_path).model.full_spec
    values = np.random.default_rng(0).normal(scale=0.3, size=spec.size).astype(np.float32)
    save_adapter(tmp_path / "adapter", AdapterUpdate(spec, values), config)
    toml = tmp_path / "experiment.toml"
    toml.write_text(config.to_toml())
    return tmp_path / "adapter", toml


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_everything_at_once(
    adapter: tuple[Path, Path], hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, toml = adapter
    to = tmp_path / "results"
    command: list[Any] = [
        *("evaluate", folder, "--config", toml, "--to", to, "--hub", hub, "--per-subject", 4),
        *("--benchmark", "mmlu", "--sample", 2, "--max-new-tokens", 3),
    ]
    arguments = [str(part) for part in command]
    monkeypatch.setattr("sys.argv", ["/opt/bin/cgfedllm", *arguments])
    # three of the subjects are enough
    monkeypatch.setattr(
        "cgfedllm.evaluation.benchmarks.members_of",
        lambda benchmark: {
            "STEM": ("anatomy",), "Humanities": ("philosophy",), "Social Sciences": (),
            "Other": ("virology",), "average": ("anatomy", "philosophy", "virology"),
            "average of subjects": ("anatomy", "philosophy", "virology"),
        },
    )  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    for said in (
        "held-out",
        "MMLU, zero-shot, 4 a subject of the test split",
        "average of subjects",
        "difference",
        "adapter chose A ",
        str(to / "samples.md"),
    ):
        assert said in done.stdout
    assert "MMLU: anatomy (adapter)" in done.stderr

    told = json.loads((to / "evaluation.json").read_text())
    assert [(r["benchmark"], r["adapter"]) for r in told["benchmarks"]] == [
        ("mmlu", "base"),
        ("mmlu", "adapter"),
    ]
    assert len(told["benchmarks"][1]["differences_to_base"]) == 5
    assert len(told["samples"]) == 2
    assert told["environment"]["versions"]["lm-eval"]
    # no folder of this machine, wherever it may stand
    assert str(tmp_path) not in (to / "evaluation.json").read_text()
    assert told["command"].startswith("cgfedllm evaluate adapter --config experiment.toml")

    kinds = [(r["adapter"], r["kind"]) for r in rows_of(to / "benchmarks.csv")]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        ("base", "group"): 5,
        ("base", "subject"): 3,
        ("adapter", "group"): 5,
        ("adapter", "subject"): 3,
        ("adapter", "difference to base"): 5,
    }
    assert [(r["adapter"], r["name"]) for r in rows_of(to / "nll.csv")] == [
        ("base", "held-out"),
        ("adapter", "held-out"),
    ]
    assert (to / "samples.md").read_text().count("**adapter**") == 2

    # the same command asks nothing again
    monkeypatch.setattr(Scorer, "_loglikelihood_tokens", None)
    again = CliRunner().invoke(app, [*arguments, "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["benchmarks"] == told["benchmarks"]


def evaluate(folder: Path, config: Config, **options: Any) -> Any:
    plain: dict[str, Any] = {
        "base": True, "benchmarks": (), "shots": 0, "per_subject": None, "hub": None, "samples": 0,
        "max_new_tokens": 8, "to": None,
    }  # fmt: skip
    return evaluate_adapter(folder, config, "heldout", **{**plain, **options})


def test_losses_alone_write_nothing_unless_told_where(
    adapter: tuple[Path, Path],
    tiny_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    result = evaluate(adapter[0], tiny_config(), base=False)
    assert set(tmp_path.rglob("*")) == before
    assert (result.base, result.files) == ([], [])
    assert "base" not in result.rows()[0][1]
    told = evaluate(adapter[0], tiny_config(), to=tmp_path / "out")
    assert [path.name for path in told.files] == ["evaluation.json", "nll.csv"]
    assert told.adapter == result.adapter


def test_answers_that_cannot_fit_are_refused_before_a_question_is_asked(
    adapter: tuple[Path, Path], hub: Path, tmp_path: Path
) -> None:
    folder, toml = adapter
    command: list[Any] = [
        *("evaluate", folder, "--config", toml, "--to", tmp_path / "to", "--hub", hub),
        *("--benchmark", "mmlu", "--sample", 2, "--max-new-tokens", 100_000),
    ]
    done = CliRunner().invoke(app, [str(part) for part in command])
    assert done.exit_code == 2
    assert "lower --max-new-tokens" in done.stderr
    assert "MMLU" not in done.stderr


def test_a_missing_copy_of_the_questions_is_told_before_anything_is_loaded(
    adapter: tuple[Path, Path], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config('model.id="./nowhere"')
    with pytest.raises(DataError, match="holds no folder cais/mmlu"):
        evaluate(adapter[0], config, benchmarks=["mmlu"], hub=tmp_path)
