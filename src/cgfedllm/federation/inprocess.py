"""The in-process engine: a Flower Grid that runs the ClientApp right here, one client at a time.

No server, no ports, no worker processes: all clients share this process and its one base model.
Messages are copied on the way, so that neither side can reach into the other's objects, and a
client's exception comes back as an error reply, as it would over a network.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterable, Mapping

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

# private, hence flwr is pinned to 1.42.x: without it Message() cannot be made outside of an
# engine of Flower's own. tests/federation/test_inprocess.py covers it.
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from cgfedllm.errors import CgFedLlmError

_SERVER_NODE = 1
_RUN_ID = 1
_TASK_ID = 1
_CLIENT_APP_RAISED = 2  # flwr.common.constant.ErrorCode.CLIENT_APP_RAISED_EXCEPTION


class InProcessGrid(Grid):
    """Delivers messages to a ClientApp in this process.

    A message runs when its reply is pulled, so the server can aggregate each reply before the
    next client trains, and memory does not grow with the number of clients.

    Parameters
    ----------
    client_app : ClientApp
        The one client program.
    contexts : mapping of int to Context
        One context for each node id.
    """

    complete = True  # every client there will ever be is connected from the start

    def __init__(self, client_app: ClientApp, contexts: Mapping[int, Context]) -> None:
        self._client_app = client_app
        self._contexts = dict(contexts)
        self._pending: dict[str, Message] = {}
        self._run = Run.create_empty(_RUN_ID)
        TaskIdentity.run_id = _RUN_ID
        TaskIdentity.node_id = _SERVER_NODE
        TaskIdentity.task_id = _TASK_ID

    def set_run(self, run: Run) -> None:
        """Part of the Grid interface; there is only ever one run here."""
        self._run = run

    @property
    def run(self) -> Run:
        """The one run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Part of the Grid interface; `Message(...)` does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of all clients, in order."""
        return sorted(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages for delivery; each runs when its reply is pulled."""
        ids = []
        for message in messages:
            message_id = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = message_id
            self._pending[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the first of these messages that has not run and return its reply."""
        for message_id in message_ids:
            message = self._pending.pop(message_id, None)
            if message is not None:
                return [self._deliver(message)]
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run all messages and return their replies."""
        ids = list(self.push_messages(messages))
        return [reply for message_id in ids for reply in self.pull_messages([message_id])]

    def _deliver(self, message: Message) -> Message:
        context = self._contexts.get(message.metadata.dst_node_id)
        if context is None:
            reason = f"there is no node {message.metadata.dst_node_id}"
            return Message(Error(_CLIENT_APP_RAISED, reason), reply_to=message)
        try:
            return copy.deepcopy(self._client_app(copy.deepcopy(message), context))
        except CgFedLlmError as error:
            reason = str(error)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        return Message(Error(_CLIENT_APP_RAISED, reason), reply_to=message)
