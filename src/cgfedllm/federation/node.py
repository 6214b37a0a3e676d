"""Who a node is and where it keeps its memory, from what Flower hands to a ClientApp.

::

    node_config (whoever runs the node says)       run_config (whoever starts the run says)
        data, name     rows of its own                 config    the experiment, as TOML
        model          its copy of the base model      run-dir   in-process engine only
        codec          its copy of the codec file
        partition-id   or a share of common rows
        state-dir      where it remembers things
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from flwr.app import Context

from cgfedllm.config import NODE_DATA, config_from_toml
from cgfedllm.data import ClientData
from cgfedllm.errors import DataError, FederationError
from cgfedllm.workspace import OwnData, Workspace, workspace_for

_KEYS = ("codec", "data", "name", "model", "partition-id", "num-partitions", "state-dir")
_RUN_KEY = re.compile(r"[0-9a-f]{16}")


def node_workspace(context: Context) -> Workspace:
    """Model, data and codecs as this node has them.

    Raises
    ------
    ConfigError
        If the run's configuration is not valid here.
    DataError
        If the node's settings do not fit the run's source of data.
    """
    settings = context.node_config
    unknown = sorted(set(settings) - set(_KEYS))
    if unknown:
        raise DataError(
            f"--node-config has {unknown[0]!r}, which means nothing here; keys are "
            f"{', '.join(_KEYS)}"
        )
    text = str(context.run_config["config"])
    config = config_from_toml(text)
    own = _own_data(context, config.data.source)
    copies = {"model.id": "model"}
    if config.uplink.clients_hold_state:
        copies["uplink.state"] = "codec"
    theirs = {key: str(settings[name]) for key, name in copies.items() if name in settings}
    if theirs:
        text = config.with_overrides(theirs).to_toml()
    return workspace_for(text, str(context.run_config.get("run-dir", "")), own)


def node_data(workspace: Workspace, context: Context) -> ClientData:
    """Rows of this node.

    Raises
    ------
    DataError
        If it was not given any.
    """
    if workspace.own is not None:
        return workspace.client(0)
    partition = context.node_config.get("partition-id")
    if partition is None:
        raise DataError(
            "this node has no partition-id; start it with --node-config 'partition-id=0'"
        )
    return workspace.client(int(partition))


def state_folder(context: Context, client: str, run: str) -> Path:
    """Where a client remembers a run; the folder need not exist.

    In-process it is below the run folder. Elsewhere there is a folder a run in `state-dir`, or
    ``$XDG_STATE_HOME/cgfedllm``, or ``~/.local/state/cgfedllm``.

    Parameters
    ----------
    client : str
        Safe as a file name.
    run : str
        The key that the server gave its run.

    Raises
    ------
    FederationError
        If the key is not one: it comes from the server and becomes a name of a folder.
    """
    told = context.node_config.get("state-dir")
    if told is None and "run-dir" in context.run_config:
        return Path(str(context.run_config["run-dir"])) / "clients" / client
    if not _RUN_KEY.fullmatch(run):
        raise FederationError(f"the server calls its run {run!r}; is it another app?")
    root = _default_root() if told is None else Path(str(told)).expanduser()
    return root / run / client


def _own_data(context: Context, source: str) -> OwnData | None:
    data, name = context.node_config.get("data"), context.node_config.get("name")
    if source == NODE_DATA:
        if data is None:
            raise DataError(
                "in this run every node brings rows of its own and this one has none; start it "
                "with --node-config 'data=\"/path/to/rows.jsonl\"'"
            )
        path = Path(str(data))
        return OwnData(str(data), str(name or path.name.split(".")[0]))
    if data is not None:
        raise DataError(
            f"this node brings rows of its own ({data}), and the run has data.source = "
            f"{source!r}; set data.source = 'node' in the run, or start the node with a "
            "partition-id instead"
        )
    return None


def _default_root() -> Path:
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "cgfedllm"
