"""The engine that is no server and no network: everything in this process."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, RecordDict

from cgfedllm.config import NODE_DATA, Config
from cgfedllm.errors import ConfigError
from cgfedllm.federation.client_app import make_client_app
from cgfedllm.federation.inprocess import InProcessGrid
from cgfedllm.federation.server_app import Server
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
    ConfigError
        If nodes are to bring rows of their own: here there are none.
    CgFedLlmError
        As the server raises.
    """
    if config.data.source == NODE_DATA:
        raise ConfigError(
            "data.source = 'node': every node brings rows of its own, and in one process there "
            "are no nodes. Run it on Flower's SuperLink (`cgfedllm run --superlink NAME`), or name "
            "the data here, e.g. data.source = 'clinics/*.jsonl' with data.partition.kind = 'files'"
        )
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
    Server(grid, workspace).run()
