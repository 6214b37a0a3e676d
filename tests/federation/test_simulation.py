"""The same run on Flower's simulation engine, behind a SuperLink that Flower starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import cgfedllm
from cgfedllm.config import Config
from cgfedllm.runs import RunFolder

from .deployment import Deployment

MakeConfig = Callable[..., Config]

pytest.importorskip("ray", reason='needs ray: pip install "cgfedllm[simulation]"')


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[Deployment]:
    """A home for Flower, and no SuperLink left when the test is over."""
    deployment = Deployment(tmp_path, ())
    Path(deployment.environment["FLWR_HOME"]).mkdir()
    deployment.environment["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    yield deployment
    home = deployment.environment["FLWR_HOME"]
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FLWR_HOME") == home:
                process.kill()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_simulation_ends_as_in_one_process(flower: Deployment, tiny_config: MakeConfig) -> None:
    config = tiny_config("name=simulated", "uplink.name=lowrank", "uplink.options={bpp=0.5}")
    path = flower.folder / "job.toml"
    path.write_text(config.to_toml())
    command = ("cgfedllm", "run", str(path), "--superlink", "local")
    with flower.process(*command, log="run.log") as run:
        assert run.wait(1000) == 0, run.log
    local = config.with_overrides({"name": "local"})
    cgfedllm.run(local)
    simulated, here = (RunFolder(own.run_dir).records() for own in (config, local))
    for one, other in zip(simulated, here, strict=True):
        assert one.heldout_nll == pytest.approx(other.heldout_nll, abs=1e-5)
        assert one.uplink_bytes == other.uplink_bytes
        assert not one.failures
