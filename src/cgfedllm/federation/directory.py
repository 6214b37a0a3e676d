"""Who is out there: nodes greeted, named and ordered, and messages to them and back."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TypeGuard

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from cgfedllm import __version__, events
from cgfedllm.base_weights import BaseWeights
from cgfedllm.data.names import is_safe_name
from cgfedllm.errors import CgFedLlmError, FederationError
from cgfedllm.federation.messages import (
    BASE_MATRICES,
    BASE_MODEL,
    BASE_VECTORS,
    CONFIG,
    MOST_COUNTED,
)
from cgfedllm.interrupt import check_interrupt
from cgfedllm.text import printable

POLL_SECONDS = 0.5
# of flwr.common.constant.ErrorCode: what Flower answers for a node that is not there
_AWAY_CODES = (3, 4, 5)
_GREET_AGAIN_SECONDS = 30.0
STRAY = "a reply that nobody waits for (a second one, or one that came too late) is not used"
_REASONS_SHOWN = 5


class Directory:
    """Who is behind which node id. Names, not ids, decide order and sampling.

    Node ids differ from engine to engine and from start to start; client names do not.
    """

    def __init__(self, grid: Grid, spec_hash: str, base: BaseWeights, timeout: float) -> None:
        self._grid = grid
        self._spec_hash = spec_hash
        self._base = base
        self._timeout = timeout
        self._names: dict[int, str] = {}
        self._refused: dict[int, str] = {}
        # Flower lists a node for a while after it has gone; when each of them was last greeted
        self._away: dict[int, float] = {}
        self._rows: dict[str, Counter[str]] = {}

    def refresh(self) -> None:
        """Greet nodes not met before; those that run something else are left out, with a word."""
        present = set(self._grid.get_node_ids())
        # who was away and is back may be another now, under the id it had
        self._refused = {node: why for node, why in self._refused.items() if node in present}
        recently = time.monotonic() - _GREET_AGAIN_SECONDS
        away = {node for node, greeted in self._away.items() if greeted > recently}
        new = sorted(present - self._names.keys() - self._refused.keys() - away)
        messages = [Message(RecordDict({CONFIG: ConfigRecord()}), node, "query") for node in new]
        silent = dict.fromkeys(new)
        for reply in receive(self._grid, messages, self._timeout, self._stray):
            node = reply.metadata.src_node_id
            del silent[node]
            if reply.has_error() and reply.error.code in _AWAY_CODES:
                self._note_away(node, reply.error.reason or "no reason given")
                continue
            self._away.pop(node, None)
            try:
                name = self._accept(reply, present)
            except CgFedLlmError as error:
                self._refuse(node, str(error))
                continue
            # a client that was started again has a new id; the old one is gone
            self._names = {n: known for n, known in self._names.items() if known != name}
            self._names[node] = name
        for node in silent:  # waited for once, not at the beginning of every round
            self._refuse(node, f"no reply to the greeting within {self._timeout:g} s")

    def name(self, node: int) -> str:
        """Name of the client on a node."""
        return self._names.get(node, f"node {node}")

    def nodes(self) -> list[int]:
        """Nodes of all accepted clients, ordered by client name."""
        return sorted(self._names, key=self._names.__getitem__)

    def names(self) -> tuple[str, ...]:
        """Names of all accepted clients, in order."""
        return tuple(self._names[node] for node in self.nodes())

    def rows(self) -> str:
        """How many training rows all clients have, and what the length limit did to them."""
        total = sum(self._rows.values(), Counter())
        cut, dropped = total["rows-cut"], total["rows-dropped"]
        return (
            f"{total['rows']} training rows in {len(self._names)} clients; "
            f"{cut} were cut to data.max_length, {dropped} dropped (no answer left to learn from)"
        )

    def refusals(self) -> str:
        """Why nodes were left out, each reason once; nothing if none was."""
        reasons = list(dict.fromkeys(self._refused.values()))[:_REASONS_SHOWN]
        return f". {len(self._refused)} were left out: {'; '.join(reasons)}" if reasons else ""

    def _note_away(self, node: int, reason: str) -> None:
        if node not in self._away:
            text = f"node {node} is not there and will be greeted again: {printable(reason)}"
            events.publish(events.Notice(text, "warning"))
        self._away[node] = time.monotonic()

    def _refuse(self, node: int, reason: str) -> None:
        self._refused[node] = reason = printable(reason) or "no reason given"
        events.publish(events.Notice(f"node {node} is left out: {reason}", "warning"))

    def _stray(self, reply: Message) -> None:
        name = self.name(reply.metadata.src_node_id)
        events.publish(events.Notice(f"{name}: {STRAY}", "warning"))

    def _accept(self, reply: Message, present: set[int]) -> str:
        if reply.has_error():
            raise FederationError(reply.error.reason or "it answered with an error")
        about = reply.content.config_records.get(CONFIG, ConfigRecord())
        name, release, spec = (about.get(key) for key in ("client", "release", "spec"))
        if not (isinstance(name, str) and isinstance(release, str) and isinstance(spec, str)):
            raise FederationError("it does not answer as a client of this app does")
        if not is_safe_name(name):
            # it goes into logs, reports and the names of curves
            raise FederationError(f"{printable(name, 40)!r} is no name that a client can have")
        if release != __version__:
            raise FederationError(
                f"{name} runs release {printable(release, 40)}, not {__version__}"
            )
        if spec != self._spec_hash:
            raise FederationError(
                f"{name} has another adapter (other base model, rank or target modules)"
            )
        self._check_base(name, about)
        # some file systems, and some people, do not tell upper from lower case
        taken = {
            known.casefold(): known for node, known in self._names.items() if node in present
        }.get(name.casefold())
        if taken is not None:
            raise FederationError(f"a client named {taken!r} is connected already")
        counts = {key: about.get(key) for key in ("rows", "rows-cut", "rows-dropped")}
        self._rows[name] = Counter({k: n for k, n in counts.items() if _is_count(n)})
        return name

    def _check_base(self, name: str, about: ConfigRecord) -> None:
        told = [about.get(key) for key in (BASE_MODEL, BASE_VECTORS, BASE_MATRICES)]
        words = [word for word in told if isinstance(word, str)]
        if len(words) < len(told):
            raise FederationError(f"{name} does not tell its base model as a client of this app")
        base = BaseWeights(*words)
        if self._base.differs(base):
            raise FederationError(
                f"{name} has other base weights: its model is {printable(base.model, 100)!r}, this "
                f"run's is {self._base.model!r}. They have the same shapes and are not the same "
                "checkpoint (base and instruct, another revision, another quantisation?); give "
                "every node the same one"
            )


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_COUNTED


class NamedGrid(Grid):
    """A grid that shows only accepted clients, in the order of their names."""

    def __init__(self, grid: Grid, directory: Directory) -> None:
        self._grid = grid
        self._directory = directory

    def get_node_ids(self) -> Iterable[int]:
        """Accepted nodes, ordered by client name."""
        return self._directory.nodes()

    def set_run(self, run: object) -> None:
        """Not needed: the engine has set its run already."""

    @property
    def run(self):  # type: ignore[no-untyped-def]
        """The engine's run."""
        return self._grid.run

    def create_message(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        """As the engine does."""
        return self._grid.create_message(*args, **kwargs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the engine does."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the engine does."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """As the engine does."""
        return self._grid.send_and_receive(messages, timeout=timeout)


def receive(
    grid: Grid, messages: Iterable[Message], timeout: float, stray: Callable[[Message], None]
) -> Iterator[Message]:
    """Send messages and yield the reply to each as it comes, until all are in or time is up.

    Parameters
    ----------
    grid : Grid
        Carries them.
    messages : iterable of Message
        What is sent.
    timeout : float
        Seconds to wait for replies.
    stray : callable
        Gets what comes in besides: second replies, and replies to messages of earlier rounds.

    Raises
    ------
    RunInterrupted
        Between two replies, if a stop was requested.
    """
    messages = list(messages)
    ids = grid.push_messages(messages)
    # Flower gives no id to what it could not store (the node is gone), and none at all to a batch
    # that is too large: no reply to wait for
    pending = {id: message for id, message in zip(ids, messages, strict=False) if id}
    deadline = time.monotonic() + timeout
    while pending and time.monotonic() < deadline:
        check_interrupt()
        replies = list(grid.pull_messages(list(pending)))
        for reply in replies:
            message = pending.get(reply.metadata.reply_to_message_id)
            asked = None if message is None else message.metadata.dst_node_id
            if message is not None and reply.has_error() and asked != reply.metadata.src_node_id:
                # Flower's own word that a reply cannot be had; it comes in the server's name
                reply = Message(reply.error, reply_to=message)
            if message is None or asked != reply.metadata.src_node_id:
                stray(reply)
                continue
            del pending[reply.metadata.reply_to_message_id]
            yield reply
        if not replies:
            time.sleep(POLL_SECONDS)
