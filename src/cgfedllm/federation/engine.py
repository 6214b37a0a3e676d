"""How the one ServerApp and the one ClientApp are run."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, RecordDict

from cgfedllm.config import Config
from cgfedllm.federation.client_app import make_client_app
from cgfedllm.federation.inprocess import InProcessGrid
from cgfedllm.federation.server_app import make_server_app
from cgfedllm.workspace import workspace_for


def run_in_process(config: Config, run_dir: Path) -> None:
    """Run the federation in this process, one node for each client of the data.

    Parameters
    ----------
    config : Config
        The experiment.
    run_dir : Path
        Its folder; if it holds checkpoints, the run goes on from the last one.

    Raises
    ------
    CgFedLlmError
        As the server raises.
    """
    run_config: dict[str, bool | float | int | str | bytes] = {
        "config": config.to_toml(),
        "run-dir": str(run_dir),
    }
    workspace = workspace_for(config.to_toml(), str(run_dir))
    clients = workspace.data.clients
    # a workspace made earlier in this process shares its model with later runs
    workspace.reset_frozen_factors()
    contexts = {
        # node ids from 2: the server is node 1
        partition + 2: Context(
            run_id=1,
            node_id=partition + 2,
            node_config={"partition-id": partition, "num-partitions": len(clients)},
            state=RecordDict(),
            run_config=run_config,  # type: ignore[arg-type]
        )
        for partition in range(len(clients))
    }
    grid = InProcessGrid(make_client_app(), contexts)
    server_context = Context(
        run_id=1,
        node_id=1,
        node_config={},
        state=RecordDict(),
        run_config=run_config,  # type: ignore[arg-type]
    )
    make_server_app()(grid, server_context)
