"""Programs of a node that misbehaves, found on its PATH before Flower's own of the same names.

::

    flwr-clientapp    handles each message as it should, then fails as planned for the round
    flower-supernode  hands in every reply twice

What the node runs besides is what every node runs; only the node's owner could put these there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

_SCRIPT = """#!{python}
import sys
sys.path.insert(0, {beside!r})
import faulty_node
faulty_node.{call}
"""


def write_client(folder: Path, kinds: Mapping[int, str], run_dir: Path) -> Path:
    """A node whose client fails: how, by round. Returns the folder for its PATH.

    Kinds are those of `fault_injection.py`. Who is late waits until the server is done with the
    round: its metrics are in `run_dir`.
    """
    settings = f"{dict(kinds)!r}, {str(run_dir)!r}, {str(folder / 'packet')!r}"
    return _write(folder, "flwr-clientapp", f"client_program({settings})")


def write_supernode(folder: Path) -> Path:
    """A node that says everything twice. Returns the folder for its PATH."""
    return _write(folder, "flower-supernode", "supernode_program()")


def _write(folder: Path, name: str, call: str) -> Path:
    folder.mkdir()
    text = _SCRIPT.format(python=sys.executable, beside=str(Path(__file__).parent), call=call)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
    return folder


def client_program(kinds: Mapping[int, str], run_dir: str, packet: str) -> None:
    """Flower's program, around a client that fails."""
    from flwr.supernode.cli import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    loader = run_clientapp.get_load_client_app_fn

    def faulty(*args: Any, **kwargs: Any) -> Any:
        load = loader(*args, **kwargs)
        return lambda *app: FaultyClient(load(*app), kinds, Path(run_dir), Path(packet))

    run_clientapp.get_load_client_app_fn = faulty
    flwr_clientapp()


def supernode_program() -> None:
    """Flower's program, on a line that delivers each reply again, under another id."""
    from flwr.supernode import fleet_http_client
    from flwr.supernode.cli import flower_supernode

    push = fleet_http_client.FleetHttpClient.PushMessages

    def twice(self: Any, request: Any) -> Any:
        first = push(self, request)
        again = type(request)()
        again.CopyFrom(request)
        message, tree = again.messages_list[0], again.message_object_trees[0]
        message.metadata.message_id = tree.object_id = message.metadata.message_id[::-1]
        push(self, again)
        return first

    fleet_http_client.FleetHttpClient.PushMessages = twice  # type: ignore[method-assign]
    flower_supernode()


class FaultyClient(ClientApp):
    """Trains as it should, and fails as planned."""

    def __init__(
        self, app: ClientApp, kinds: Mapping[int, str], run_dir: Path, packet: Path
    ) -> None:
        super().__init__()
        self._app, self._kinds = app, kinds
        self._metrics = run_dir / "metrics.jsonl"
        # each message is a process of its own: what a stale reply is made of
        self._earlier = packet

    def __call__(self, message: Message, context: Context) -> Message:
        import fault_injection

        from cgfedllm.federation.client_app import open_session
        from cgfedllm.federation.messages import ARRAYS, CONFIG, PACKET, SERVER_ROUND

        if message.metadata.message_type != "train":
            return self._app(message, context)
        spec = open_session(message, context).workspace.spec
        round_ = int(message.content[CONFIG][SERVER_ROUND])
        reply = self._app(message, context)
        kind = self._kinds.get(round_)
        if kind is None:
            self._earlier.write_bytes(reply.content[ARRAYS][PACKET].data)
        elif kind == "crash":
            raise RuntimeError(fault_injection.DIED)
        elif kind == "late":
            self._wait(round_)
        elif kind == "silent":
            self._wait(None)
        else:
            earlier = self._earlier.read_bytes() if kind == "stale" else None
            fault_injection.spoil(kind, reply, spec, earlier)
        return reply

    def _wait(self, round_: int | None) -> None:
        """Until the server has written down a round, which is a line after that of round 0."""
        while round_ is None or self._metrics.read_text().count("\n") <= round_:
            time.sleep(0.5)
