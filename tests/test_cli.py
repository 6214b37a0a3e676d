"""The command line is thin: right calls, right exit codes, errors without tracebacks."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from cgfedllm import __version__, events
from cgfedllm.cli import app
from cgfedllm.config import Config, load_config
from cgfedllm.errors import RunInterrupted, StorageError, TrainingError
from cgfedllm.metrics import RoundRecord
from cgfedllm.report.comparison import ComparisonEntry
from cgfedllm.runs import RunFolder

RECORDS = [
    RoundRecord(0, heldout_nll=3.0, seconds={"total": 1.0}),
    RoundRecord(
        1, heldout_nll=2.5, uplink_bytes=10, uplink_bytes_total=10, uplink_bytes_fp32_total=40,
        seconds={"train": 2.0, "total": 2.0},
    ),
]  # fmt: skip


class Api(SimpleNamespace):
    """Stands in for cgfedllm.api: remembers the calls, answers like a finished run."""

    def __init__(self) -> None:
        super().__init__(calls=[], interrupted=False, error=None, failures={})

    def run(self, config: Config, **options: Any) -> SimpleNamespace:
        self.calls.append(("run", config, options))
        return self._result(config.run_dir)

    def resume(self, run_dir: Path) -> SimpleNamespace:
        self.calls.append(("resume", run_dir))
        return self._result(run_dir)

    def compare(
        self, config: Config, codecs: list[str], seeds: list[int], **options: Any
    ) -> SimpleNamespace:
        self.calls.append(("compare", config, codecs, seeds, options))
        entries = [ComparisonEntry(c, s, RECORDS) for c in codecs for s in seeds]
        results = config.run_dir.with_name("compared.json")
        return SimpleNamespace(entries=entries, results=results, failures=self.failures)

    def plot_comparison(self, results: Path) -> list[Path]:
        self.calls.append(("plot_comparison", results))
        return [results.with_suffix(".png"), results.with_suffix(".svg")]

    def evaluate(self, path: Path, **options: Any) -> SimpleNamespace:
        self.calls.append(("evaluate", path, options))
        return SimpleNamespace(
            rows=lambda: [("NLL", "2.5")], to_dict=lambda: {"nll": 2.5}, benchmarks=[], files=[]
        )

    def export(self, run_dir: Path, to: Path, merge: bool = False) -> Path:
        self.calls.append(("export", run_dir, to, merge))
        return to

    def report(self, runs: list[Path], to: Path | None = None) -> Path:
        self.calls.append(("report", runs, to))
        return to or runs[0] / "report.html"

    def _result(self, run_dir: Path) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        for record in RECORDS:
            events.publish(events.RoundFinished(record))
        return SimpleNamespace(
            run_dir=run_dir,
            adapter_dir=run_dir / "adapter",
            records=RECORDS,
            interrupted=self.interrupted,
        )


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    fake = Api()
    for name in ("run", "resume", "compare", "plot_comparison", "evaluate", "export", "report"):
        monkeypatch.setattr(f"cgfedllm.api.{name}", getattr(fake, name))
    return fake


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.delenv("CGFEDLLM_DEBUG", raising=False)
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


Cli = Callable[..., Any]


def test_help_loads_nothing_heavy() -> None:
    script = """
import sys
from cgfedllm.cli import app
try:
    app(["--help"])
except SystemExit as end:
    assert not end.code
heavy = {"torch", "flwr", "transformers", "pydantic", "numpy", "rich.console"} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    commands = (
        "run", "resume", "compare", "evaluate", "export", "report", "inspect", "doctor", "plan",
    )  # fmt: skip
    for command in commands:
        assert f"\n  {command} " in done.stdout


def test_version(cli: Cli) -> None:
    assert cli("--version").output == f"cgfedllm {__version__}\n"


def test_no_arguments_shows_the_help(cli: Cli) -> None:
    assert "Commands:" in cli().output


def test_run_merges_file_settings_and_names(cli: Cli, api: Api, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("seed = 5\n[federation]\nrounds = 7\n")
    result = cli(
        "run", file, "--set", "federation.rounds=9", "--set", "uplink.name=int8",
        "--name", "3", "--output", tmp_path / "out", "--overwrite",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    ((_, config, options),) = api.calls
    assert (config.seed, config.federation.rounds, config.uplink.name) == (5, 9, "int8")
    assert config.run_dir == tmp_path / "out" / "3"
    assert options == {"overwrite": True}
    assert "held-out NLL 2.5000 (-0.5000)" in result.stdout
    assert "uplink (int8)" in result.stdout
    assert f"Adapter  {tmp_path / 'out' / '3' / 'adapter'}" in result.stdout


def test_run_without_a_config_takes_the_defaults(cli: Cli, api: Api) -> None:
    assert cli("run").exit_code == 0
    assert api.calls[0][1] == Config()


def test_run_quiet(cli: Cli, api: Api) -> None:
    assert cli("run", "--quiet").stdout == "runs/run/adapter\n"


def test_run_json(cli: Cli, api: Api) -> None:
    lines = [json.loads(line) for line in cli("run", "--json").stdout.splitlines()]
    assert [line["round"] for line in lines[:2]] == [0, 1]
    assert lines[2]["summary"]["heldout"] == {"before": 3.0, "after": 2.5}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "--quiet", "--json"], "exclude each other"),
        (["run", "--set", "federation.ronds=3"], "did you mean 'federation.rounds'"),
        (["run", "nowhere.toml"], "nowhere.toml does not exist"),
        (["run", "--set", "rounds"], "--set wants key=value"),
        (["run", "--no-such-option"], "No such option"),
        (["nonsense"], "No such command"),
        (["compare", "--codec", "raw"], "at least two codecs"),
        (["compare", "--codec", "raw", "--codec", "int9"], "did you mean 'int8'"),
        (["compare", "--codec", "raw", "--codec", "int8", "--seeds", "a"], "whole numbers"),
        (["compare", "--codec", "raw", "--codec", "int8", "--seeds", "1,1"], "distinct"),
        (["compare", "--codec", "raw", "--codec", "int8:bits=3"], "option 'bits'"),
        (["compare", "--codec", "raw", "--variant", "x:lora.rnk=2"], "did you mean 'lora.rank'"),
        (["compare", "--codec", "raw", "--codec", "int8", "--tune", "lr"], "KEY=value"),
        (["compare", "--codec", "raw", "--plot", "r.json"], "leave --codec out"),
        (["evaluate", "x", "--split", "train"], "one of heldout, validation, test"),
        (["evaluate", "x", "--benchmark", "mmul"], "no benchmark 'mmul'"),
        (["config", "zzz"], "no key contains"),
        (["resume"], "Missing argument"),
    ],
)
def test_usage_errors_exit_with_2(cli: Cli, api: Api, args: list[str], message: str) -> None:
    result = cli(*args)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert api.calls == []


@pytest.mark.parametrize("error", [TrainingError("loss is NaN"), StorageError("disk is full")])
def test_errors_are_messages(cli: Cli, api: Api, error: Exception) -> None:
    api.error = error
    result = cli("run")
    assert result.exit_code == 1
    assert result.stderr == f"error: {error}\n"


@pytest.mark.parametrize("args", [["--debug", "run"], ["run", "--debug"]])
def test_debug_keeps_the_traceback(cli: Cli, api: Api, args: list[str]) -> None:
    api.error = TrainingError("loss is NaN")
    assert cli(*args).exception is api.error


def test_debug_by_environment(cli: Cli, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CGFEDLLM_DEBUG", "1")
    api.error = TrainingError("loss is NaN")
    assert cli("run").exception is api.error


def test_a_bug_keeps_its_traceback(cli: Cli, api: Api) -> None:
    api.error = KeyError("bug")
    assert cli("run").exception is api.error


@pytest.mark.parametrize("error", [RunInterrupted("stopped"), KeyboardInterrupt()])
def test_interrupts_exit_with_130(cli: Cli, api: Api, error: BaseException) -> None:
    api.error = error
    assert cli("run").exit_code == 130


def test_an_interrupted_run_says_how_to_resume(cli: Cli, api: Api) -> None:
    api.interrupted = True
    result = cli("run")
    assert result.exit_code == 130
    assert "cgfedllm resume runs/run" in result.stderr
    assert "Adapter" not in result.stdout


def test_resume(cli: Cli, api: Api, tmp_path: Path) -> None:
    config = load_config(None, [f"output={str(tmp_path)!r}", "uplink.name=bf16"])
    RunFolder.create(config).release()
    result = cli("resume", config.run_dir)
    assert result.exit_code == 0
    assert api.calls == [("resume", config.run_dir)]
    assert "uplink (bf16)" in result.stdout


def test_resume_of_something_else(cli: Cli, api: Api, tmp_path: Path) -> None:
    result = cli("resume", tmp_path)
    assert result.exit_code == 1
    assert "not a run folder" in result.stderr
    assert api.calls == []


def test_compare(cli: Cli, api: Api) -> None:
    args = ("compare", "--codec", "raw", "--codec", "int8", "--codec", "raw", "--seeds", "0,1")
    result = cli(*args)
    assert result.exit_code == 0
    assert api.calls[0][2:4] == (["raw", "int8"], [0, 1])
    assert "reference" in result.stdout
    assert "Results  runs/compared.json\nFigure   runs/compared.png" in result.stdout
    rows = json.loads(cli(*args, "--json").stdout)
    assert [(row["codec"], row["seed"]) for row in rows] == [
        ("raw", 0), ("raw", 1), ("int8", 0), ("int8", 1),
    ]  # fmt: skip


def test_compare_passes_everything_on(cli: Cli, api: Api) -> None:
    args = (
        "--codec", "raw", "--variant", "rank2:lora.rank=2", "--reference", "centralised",
        "--tune", "server_lr=0.7,1", "--tune-rounds", "2", "--results", "r.json",
    )  # fmt: skip
    assert cli("compare", *args).exit_code == 0
    assert api.calls[0][4] == {
        "variants": ["rank2:lora.rank=2"],
        "references": ["centralised"],
        "tune": ["server_lr=0.7,1"],
        "tune_rounds": 2,
        "results": Path("r.json"),
    }


def test_compare_with_failed_cells_says_which(cli: Cli, api: Api) -> None:
    api.failures = {"int8, seed 0": "the loss is not finite"}
    result = cli("compare", "--codec", "raw", "--codec", "int8")
    assert result.exit_code == 1
    assert "failed: int8, seed 0: the loss is not finite" in result.stderr
    assert "reference" in result.stdout


def test_compare_only_plots(cli: Cli, api: Api) -> None:
    assert cli("compare", "--plot", "a/b.json").stdout == "a/b.png\na/b.svg\n"
    assert api.calls == [("plot_comparison", Path("a/b.json"))]


def test_evaluate(cli: Cli, api: Api) -> None:
    assert cli("evaluate", "runs/x", "--split", "test").stdout == "NLL  2.5\n"
    _, path, options = api.calls[0]
    assert (path, options["config"], options["split"]) == (Path("runs/x"), None, "test")
    assert (options["benchmarks"], options["samples"], options["base"]) == ((), 0, True)
    assert json.loads(cli("evaluate", "a", "--set", "seed=1", "--json").stdout) == {"nll": 2.5}
    assert api.calls[1][2]["config"].seed == 1


def test_evaluate_with_benchmarks_and_samples(cli: Cli, api: Api) -> None:
    cli(
        *("evaluate", "a", "--benchmark", "ceval", "--benchmark", "mmlu", "--shots", 5),
        *("--per-subject", 20, "--hub", "data", "--sample", 3, "--max-new-tokens", 9),
        *("--no-base", "--to", "out"),
    )
    options = api.calls[0][2]
    assert options["benchmarks"] == ["ceval", "mmlu"]
    assert (options["shots"], options["per_subject"], options["hub"]) == (5, 20, Path("data"))
    assert (options["samples"], options["max_new_tokens"]) == (3, 9)
    assert (options["base"], options["to"]) == (False, Path("out"))


def test_export(cli: Cli, api: Api) -> None:
    assert cli("export", "runs/x", "--to", "out", "--merge").stdout == "out\n"
    assert api.calls == [("export", Path("runs/x"), Path("out"), True)]


def test_report(cli: Cli, api: Api, tmp_path: Path) -> None:
    done = cli("report", "runs/a")
    assert done.stdout == "runs/a/report.html\n"
    done = cli("report", "runs/a", "runs/b", "--to", tmp_path / "both.html")
    assert done.stdout == f"{tmp_path / 'both.html'}\n"
    assert api.calls[0] == ("report", [Path("runs/a")], None)
    assert api.calls[1] == ("report", [Path("runs/a"), Path("runs/b")], tmp_path / "both.html")
    assert cli("report").exit_code == 2


def test_a_run_ends_with_the_path_of_its_report(cli: Cli, api: Api, tmp_path: Path) -> None:
    args = ("run", "--name", "trial", "--output", tmp_path)
    assert "Report" not in cli(*args).stdout
    assert json.loads(cli(*args, "--json").stdout.splitlines()[-1])["report"] is None
    path = tmp_path / "trial" / "report.html"
    path.parent.mkdir()
    path.touch()
    assert f"Report   {path}" in cli(*args).stdout.splitlines()
    assert json.loads(cli(*args, "--json").stdout.splitlines()[-1])["report"] == str(path)


def test_inspect(cli: Cli, tmp_path: Path) -> None:
    config = load_config(None, [f"output={str(tmp_path)!r}"])
    RunFolder.create(config).release()
    assert "unfinished" in cli("inspect", config.run_dir).stdout
    assert json.loads(cli("inspect", config.run_dir, "--json").stdout)["kind"] == "run"
    assert cli("inspect", tmp_path / "none").exit_code == 1


def test_codecs(cli: Cli) -> None:
    listed = cli("codecs").stdout
    assert all(name in listed for name in ("raw", "bf16", "int8"))
    assert "lossless" in cli("codecs", "raw").stdout
    missing = cli("codecs", "in8")
    assert missing.exit_code == 1
    assert "did you mean 'int8'" in missing.stderr


def test_config_lists_keys_with_defaults(cli: Cli) -> None:
    text = cli("config").stdout
    assert 'model.id = "embedded"' in text
    assert "training.betas = [0.9, 0.999]" in text
    assert "model.revision = (unset)" in text
    assert "Federated rounds." in text
    some = cli("config", "federation.strategy").stdout
    assert "federation.strategy.trim" in some
    assert "model.id" not in some


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("missing", 1)])
def test_doctor_fails_on_what_every_run_needs(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, status: str, code: int
) -> None:
    from cgfedllm import doctor

    found = doctor.Examination(
        [doctor.Finding("torch", status, "x"), doctor.Finding("extra [gpu]", "missing", "y", "z")]  # type: ignore[arg-type]
    )
    monkeypatch.setattr(doctor, "examine", lambda: found)
    result = cli("doctor")
    assert result.exit_code == code
    assert result.stdout == f"torch        {status}: x\nextra [gpu]  missing: y\n             z\n"


def test_completion_knows_codecs_and_keys() -> None:
    from cgfedllm.cli import _complete_codec, _complete_key

    assert _complete_codec("int8") == ["int8"]
    assert "federation.rounds=" in _complete_key("federation.r")


def test_dry_run_prints_toml_that_runs_again(cli: Cli, api: Api, tmp_path: Path) -> None:
    result = cli("run", "--set", "federation.rounds=9", "--dry-run")
    assert result.exit_code == 0, result.output
    assert api.calls == []
    assert tomllib.loads(result.stdout)["federation"]["rounds"] == 9
    assert "# Plan" in result.stdout


def test_plan_overrides_the_config(cli: Cli) -> None:
    result = cli(
        "plan", "--rank", "4", "--codec", "int8", "--clients", "3", "--rounds", "2",
        "--up", "1", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["uplink"]["codec"] == "int8"
    assert plan["uplink"]["packets"] == 6
    assert "adapter" in cli("plan").stdout
