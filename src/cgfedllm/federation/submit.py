"""Hand an experiment to a SuperLink through Flower's own command line, ``flwr run``.

::

    config --> bundle (pyproject.toml, nothing else) + run configuration --> flwr run --> SuperLink

The bundle names the apps; the code they run is the cgfedllm installed on the server and the nodes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w

from cgfedllm.config import NODE_DATA, Config
from cgfedllm.errors import FederationError

LOCAL = "local"
"""Flower's name for a simulation on this machine, behind a SuperLink that it starts itself."""


def submit(
    config: Config, superlink: str, *, overwrite: bool = False, federation_config: str = ""
) -> None:
    """Start a run behind a SuperLink and show its log until it ends.

    Parameters
    ----------
    config : Config
        The experiment. A relative `output` is taken from where the SuperLink was started.
    superlink : str
        Name of a connection in Flower's configuration (`flwr config list`).
    overwrite : bool
        Remove an earlier run of the same name on the server first.
    federation_config : str
        For a simulation, as `flwr run --federation-config` takes it, e.g.
        "num-supernodes=100 client-resources-num-gpus=0.25". `local` simulates every client there
        is unless told otherwise.

    Raises
    ------
    FederationError
        If Flower refuses, or the run fails.
    """
    if superlink == LOCAL:  # its SuperLink was started wherever it was first needed
        config = config.with_overrides({"output": str(Path(config.output).absolute())})
        if "num-supernodes" not in federation_config:
            federation_config = f"num-supernodes={_clients(config)} {federation_config}".strip()
    extra = ["--federation-config", federation_config] if federation_config else []
    # packages are installed by whoever runs a machine, not by a run
    environment = {**os.environ, "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
    # Flower starts its own programs by name
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory(prefix="cgfedllm-") as folder:
        app, settings = Path(folder) / "app", Path(folder) / "run.toml"
        app.mkdir()
        (app / "pyproject.toml").write_text(tomli_w.dumps(bundle()))
        settings.write_text(tomli_w.dumps({"config": config.to_toml(), "overwrite": overwrite}))
        flwr = [sys.executable, "-m", "flwr.cli.app", "run", str(app), superlink, "--stream"]
        done = subprocess.run(
            [*flwr, "--run-config", str(settings), *extra], env=environment, check=False
        )
    if done.returncode:
        raise FederationError(
            f"Flower could not run it behind {superlink!r} (it says why above); `flwr config list` "
            "shows the connections it knows"
        )


def bundle() -> dict[str, Any]:
    """The pyproject.toml of the app that is sent; the same tables as in this project's own."""
    return {
        "project": {
            "name": "cgfedllm",
            "version": metadata.version("cgfedllm"),
            "description": metadata.metadata("cgfedllm")["Summary"],
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "cgfedllm",
                    "components": {
                        "serverapp": "cgfedllm.apps:server",
                        "clientapp": "cgfedllm.apps:client",
                    },
                    "config": {"config": "", "overwrite": False},
                }
            }
        },
    }


def _clients(config: Config) -> int:
    """How many nodes a simulation takes."""
    from cgfedllm.data import load_federated_data

    if config.data.source == NODE_DATA:
        raise FederationError(
            "in a simulation no node has rows of its own; name the data in data.source"
        )
    return len(load_federated_data(config.data, config.seed).clients)
