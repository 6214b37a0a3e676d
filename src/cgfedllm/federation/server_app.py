"""The one ServerApp: rounds, checkpoints, evaluation, whatever engine carries the messages."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from cgfedllm import __version__, events
from cgfedllm.errors import CgFedLlmError, FederationError
from cgfedllm.evaluation.nll import evaluate_nll
from cgfedllm.federation.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from cgfedllm.federation.downlink import Broadcaster
from cgfedllm.federation.messages import (
    CONFIG,
    REFERENCE_MISSING,
    STATUS,
    adapter_of,
    adapter_record,
    numbers_of,
)
from cgfedllm.federation.strategies import make_strategy, restore_strategy, strategy_state
from cgfedllm.federation.strategy import CompressedStrategy, Received, RoundTally
from cgfedllm.interrupt import check_interrupt
from cgfedllm.metrics import ClientRecord, FailureRecord, RoundRecord
from cgfedllm.peft_format import save_adapter
from cgfedllm.runs import RunFolder
from cgfedllm.workspace import Workspace, workspace_for

_POLL_SECONDS = 0.5


class Directory:
    """Who is behind which node id. Names, not ids, decide order and sampling.

    Node ids differ from engine to engine and from start to start; client names do not.
    """

    def __init__(self, grid: Grid, spec_hash: str, timeout: float) -> None:
        self._grid = grid
        self._spec_hash = spec_hash
        self._timeout = timeout
        self._names: dict[int, str] = {}
        self._refused: dict[int, str] = {}
        self._rows: dict[str, Counter[str]] = {}

    def refresh(self) -> None:
        """Greet nodes not met before; those that run something else are left out, with a word."""
        present = set(self._grid.get_node_ids())
        new = sorted(present - self._names.keys() - self._refused.keys())
        messages = [Message(RecordDict({CONFIG: ConfigRecord()}), node, "query") for node in new]
        for reply in receive(self._grid, messages, self._timeout):
            node = reply.metadata.src_node_id
            try:
                name = self._accept(reply, present)
            except CgFedLlmError as error:
                self._refused[node] = str(error)
                events.publish(events.Notice(f"node {node} is left out: {error}", "warning"))
                continue
            # a client that was started again has a new id; the old one is gone
            self._names = {n: known for n, known in self._names.items() if known != name}
            self._names[node] = name

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
        reasons = dict.fromkeys(self._refused.values())
        return f". {len(self._refused)} were left out: {'; '.join(reasons)}" if reasons else ""

    def _accept(self, reply: Message, present: set[int]) -> str:
        if reply.has_error():
            raise FederationError(reply.error.reason or "it answered with an error")
        about = reply.content.config_records.get(CONFIG, ConfigRecord())
        if not {"client", "release", "spec"} <= set(about):
            raise FederationError("it does not answer as a client of this app does")
        name = str(about["client"])
        if about["release"] != __version__:
            raise FederationError(f"{name} runs release {about['release']!s}, not {__version__}")
        if about["spec"] != self._spec_hash:
            raise FederationError(
                f"{name} has another adapter (other base model, rank or target modules)"
            )
        if any(known == name and node in present for node, known in self._names.items()):
            raise FederationError(f"a client named {name!r} is connected already")
        counts = {key: about.get(key, 0) for key in ("rows", "rows-cut", "rows-dropped")}
        self._rows[name] = Counter({k: n for k, n in counts.items() if isinstance(n, int)})
        return name


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


def receive(grid: Grid, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
    """Send messages and yield replies as they come, until all are in or time is up.

    Raises
    ------
    RunInterrupted
        Between two replies, if a stop was requested.
    """
    pending = dict.fromkeys(grid.push_messages(messages))
    deadline = time.monotonic() + timeout
    while pending and time.monotonic() < deadline:
        check_interrupt()
        replies = list(grid.pull_messages(list(pending)))
        for reply in replies:
            pending.pop(reply.metadata.reply_to_message_id, None)
            yield reply
        if not replies:
            time.sleep(_POLL_SECONDS)


class Server:
    """One federated run, from the first broadcast to the saved adapter.

    Parameters
    ----------
    grid : Grid
        Any engine's.
    workspace : Workspace
        Configuration, model and data on the server's side.
    """

    def __init__(self, grid: Grid, workspace: Workspace) -> None:
        self._workspace = workspace
        self._config = workspace.config
        self._folder = RunFolder(workspace.run_dir)
        federation = self._config.federation
        spec = workspace.spec
        # where every client runs in this very process none can be late, only last in the queue
        self._complete = bool(getattr(grid, "complete", False))
        self._timeout = math.inf if self._complete else federation.timeout
        self._directory = Directory(grid, spec.hash.hex(), self._timeout)
        self._grid = NamedGrid(grid, self._directory)
        self._broadcaster = Broadcaster(spec, workspace.downlink, self._config.seed)
        self._strategy = CompressedStrategy(
            make_strategy(federation, spec),
            spec=spec,
            uplink=workspace.uplink,
            broadcaster=self._broadcaster,
            seed=self._config.seed,
            weighting=federation.weighting,
            min_replies=federation.min_clients,
            client_name=self._directory.name,
        )
        self._adapter = workspace.start
        self._record = RoundRecord(round=0)

    def run(self) -> None:
        """Run (or resume) to the last round and save the adapter.

        Raises
        ------
        FederationError
            If too few clients give usable replies.
        RunInterrupted
            If a stop was requested.
        """
        done = self._restore()
        self._wait_for_clients()
        events.publish(
            events.RunStarted(
                name=self._config.name,
                rounds=self._config.federation.rounds,
                clients=self._directory.names(),
                parameters=self._workspace.spec.size,
                uplink_codec=self._config.uplink.name,
                downlink_codec=self._config.downlink.name,
                resumed_from=max(done, 0),
            )
        )
        events.publish(events.Notice(self._directory.rows()))
        if done < 0:
            self._finish_round(RoundRecord(round=0), RoundTally(), time.perf_counter(), {})
        for round_ in range(max(done, 0) + 1, self._config.federation.rounds + 1):
            self._round(round_)
        self._save_adapter()

    def _restore(self) -> int:
        """Go on from the last checkpoint; returns the rounds done, -1 for a fresh run."""
        checkpoint = latest_checkpoint(
            self._folder.checkpoints_dir, self._workspace.spec, self._config
        )
        if checkpoint is None:
            self._folder.truncate_after(-1)
            self._broadcaster.advance(self._adapter, 0)
            return -1
        self._adapter = checkpoint.adapter
        self._record = checkpoint.record
        self._broadcaster.restore(
            checkpoint.reference, checkpoint.round, checkpoint.held, checkpoint.increment
        )
        restore_strategy(self._strategy.inner, checkpoint.strategy)
        # the checkpoint is written before the line; a kill in between leaves the line to us
        self._folder.truncate_after(checkpoint.round - 1)
        self._folder.append(checkpoint.record)
        return checkpoint.round

    def _wait_for_clients(self) -> None:
        federation = self._config.federation
        deadline = time.monotonic() + federation.timeout
        while True:
            self._directory.refresh()
            here = len(self._directory.nodes())
            if here >= federation.min_clients:
                return
            check_interrupt()
            if time.monotonic() > deadline or self._complete:
                raise FederationError(
                    f"{here} clients are there, federation.min_clients is "
                    f"{federation.min_clients}; connect more or lower it"
                    f"{self._directory.refusals()}"
                )
            time.sleep(_POLL_SECONDS)

    def _round(self, round_: int) -> None:
        federation = self._config.federation
        began = time.perf_counter()
        tally = RoundTally()
        for attempt in range(1, federation.round_retries + 2):
            self._directory.refresh()
            self._strategy.attempt = attempt
            tally = self._strategy.tally = tally.next_attempt()
            seconds: dict[str, float] = {}
            arrays = self._train(round_, seconds)
            if arrays is not None:
                break
            events.publish(
                events.Notice(
                    f"round {round_}: {len(tally.received)} usable replies, "
                    f"{federation.min_clients} are needed",
                    "warning",
                )
            )
        else:
            reasons = "; ".join(f"{client}: {reason}" for client, reason in tally.failures[-3:])
            raise FederationError(
                f"round {round_} had too few usable replies in {attempt} attempts "
                f"(federation.min_clients = {federation.min_clients}). Last failures: {reasons}. "
                f"What was done is kept; to go on later: cgfedllm resume {self._folder.path}"
            )
        proposed = adapter_of(self._workspace.spec, arrays)
        if not proposed.is_finite():
            raise FederationError(
                f"round {round_}: what {federation.strategy.name!r} makes of the replies is not "
                "finite; lower training.lr (or federation.strategy.lr) and start again. Nothing "
                "of this round was kept"
            )
        change = (proposed - self._adapter).scaled(federation.server_lr)
        # adding back a difference is not exact; with a rate of one the proposal is taken as it is
        self._adapter = proposed if federation.server_lr == 1.0 else self._adapter + change
        self._broadcaster.advance(self._adapter, round_)
        record = RoundRecord(
            round=round_,
            attempts=attempt,
            update_norm=change.norm(),
            product_gap=tally.product_gap,
        )
        self._finish_round(record, tally, began, seconds)

    def _train(self, round_: int, seconds: dict[str, float]) -> ArrayRecord | None:
        """Broadcast, collect and aggregate once."""
        began = time.perf_counter()
        messages = list(
            self._strategy.configure_train(
                round_, adapter_record(self._adapter), ConfigRecord(), self._grid
            )
        )
        events.publish(events.RoundStarted(round_, len(messages)))
        waiting = _Stopwatch(self._replies(messages))
        arrays, _ = self._strategy.aggregate_train(round_, waiting)
        seconds["waiting"] = waiting.seconds
        seconds["exchange"] = time.perf_counter() - began
        return arrays

    def _replies(self, messages: list[Message]) -> Iterator[Message]:
        """Replies as they come; a client that lost its reference is sent it whole, once."""
        by_node = {message.metadata.dst_node_id: message for message in messages}
        again: list[Message] = []
        for reply in receive(self._grid, messages, self._timeout):
            node = reply.metadata.src_node_id
            if _lost_reference(reply):
                again.append(self._strategy.resend(by_node[node]))
            else:
                by_node.pop(node, None)
                yield reply
        for reply in receive(self._grid, again, self._timeout):
            by_node.pop(reply.metadata.src_node_id, None)
            yield reply
        for node in by_node:
            reason = f"no reply within {self._timeout:g} s"
            self._strategy.tally.failures.append((self._directory.name(node), reason))

    def _finish_round(
        self, record: RoundRecord, tally: RoundTally, began: float, seconds: dict[str, float]
    ) -> None:
        """Evaluate, write down, make durable, tell."""
        self._strategy.tally = tally
        evaluating = time.perf_counter()
        self._evaluate(record)
        seconds["evaluate"] = time.perf_counter() - evaluating
        record.failures = [FailureRecord(client, reason) for client, reason in tally.failures]
        for failure in record.failures:
            text = f"round {record.round}: {failure.client} is left out: {failure.reason}"
            events.publish(events.Notice(text, "warning"))
        self._count(record, tally)
        record.seconds = _time_split(record, tally, seconds, time.perf_counter() - began)
        saving = time.perf_counter()
        save_checkpoint(
            self._folder.checkpoints_dir,
            Checkpoint(
                round=record.round,
                adapter=self._adapter,
                reference=self._broadcaster.reference,
                held=self._broadcaster.held,
                increment=self._broadcaster.increment,
                strategy=strategy_state(self._strategy.inner),
                record=record,
            ),
            self._config,
        )
        record.seconds["checkpoint"] = time.perf_counter() - saving
        self._folder.append(record)
        self._record = record
        events.publish(events.RoundFinished(record))

    def _evaluate(self, record: RoundRecord) -> None:
        evaluation = self._config.evaluation
        ends = record.round in (0, self._config.federation.rounds)
        if not ends and (evaluation.every == 0 or record.round % evaluation.every):
            return
        heldout = self._workspace.examples(None, "heldout")
        if heldout:
            result = evaluate_nll(
                self._workspace.model,
                self._adapter,
                heldout,
                packed=self._workspace.packed,
                batch_size=evaluation.batch_size,
            )
            if not math.isfinite(result.nll):
                raise FederationError(
                    f"round {record.round}: the loss on the held-out set is {result.nll}; lower "
                    "training.lr (or federation.strategy.lr) and start again. Nothing of this "
                    "round was kept"
                )
            record.heldout_nll = result.nll
        if evaluation.clients:
            messages = self._strategy.configure_evaluate(
                record.round, adapter_record(self._adapter), ConfigRecord(), self._grid
            )
            for reply in self._replies(list(messages)):
                name = self._directory.name(reply.metadata.src_node_id)
                try:
                    if reply.has_error():
                        raise FederationError(reply.error.reason or "it answered with an error")
                    metrics = numbers_of(reply.content)
                except CgFedLlmError as error:
                    self._strategy.tally.failures.append((name, str(error)))
                    continue
                if "nll" in metrics:
                    record.client_nll[name] = metrics["nll"]
            record.client_nll = dict(sorted(record.client_nll.items()))

    def _count(self, record: RoundRecord, tally: RoundTally) -> None:
        before, fp32 = self._record, 4 * self._workspace.spec.size
        record.clients = [
            _client_record(received, tally.downlink_bytes.get(received.client, 0))
            for received in sorted(tally.received, key=lambda received: received.client)
        ]
        record.uplink_bytes = tally.uplink_bytes
        record.downlink_bytes = sum(tally.downlink_bytes.values())
        record.uplink_bytes_fp32 = fp32 * tally.uplinks
        record.downlink_bytes_fp32 = fp32 * tally.broadcasts
        for name in ("uplink_bytes", "downlink_bytes", "uplink_bytes_fp32", "downlink_bytes_fp32"):
            total = getattr(before, f"{name}_total") + getattr(record, name)
            setattr(record, f"{name}_total", total)

    def _save_adapter(self) -> None:
        save_adapter(self._folder.adapter_dir, self._workspace.whole(self._adapter), self._config)


class _Stopwatch:
    """Passes replies on and adds up the time spent waiting for them."""

    def __init__(self, replies: Iterator[Message]) -> None:
        self._replies = replies
        self.seconds = 0.0

    def __iter__(self) -> _Stopwatch:
        return self

    def __next__(self) -> Message:
        began = time.perf_counter()
        try:
            return next(self._replies)
        finally:
            self.seconds += time.perf_counter() - began


def _lost_reference(reply: Message) -> bool:
    if not reply.has_content() or CONFIG not in reply.content.config_records:
        return False
    return reply.content.config_records[CONFIG].get(STATUS) == REFERENCE_MISSING


def _client_record(received: Received, downlink_bytes: int) -> ClientRecord:
    metrics = received.metrics
    return ClientRecord(
        client=received.client,
        examples=int(metrics["num-examples"]),
        steps=int(metrics.get("steps", 0)),
        tokens=int(metrics.get("tokens", 0)),
        train_loss=metrics.get("train-loss", 0.0),
        update_norm=metrics.get("update-norm", 0.0),
        uplink_bytes=received.packet_bytes,
        downlink_bytes=downlink_bytes,
        train_seconds=metrics.get("train-seconds", 0.0),
        encode_seconds=metrics.get("encode-seconds", 0.0),
        decode_seconds=received.decode_seconds + metrics.get("decode-seconds", 0.0),
    )


def _time_split(
    record: RoundRecord, tally: RoundTally, seconds: dict[str, float], total: float
) -> dict[str, float]:
    """Where the round's time went.

    Client seconds are summed over clients; `transfer` is waiting that no client accounts for
    (copying, transport, idle), `aggregate` what the server did beyond decoding.
    """
    train = sum(client.train_seconds for client in record.clients)
    encode = sum(client.encode_seconds for client in record.clients)
    decode = sum(client.decode_seconds for client in record.clients)
    server_decode = sum(received.decode_seconds for received in tally.received)
    waiting = seconds.get("waiting", 0.0)
    on_clients = train + encode + decode - server_decode
    return {
        "train": train,
        "encode": encode,
        "transfer": max(0.0, waiting - on_clients),
        "decode": decode,
        "aggregate": max(0.0, seconds.get("exchange", 0.0) - waiting - server_decode),
        "evaluate": seconds.get("evaluate", 0.0),
        "checkpoint": 0.0,
        "total": total,
    }


def make_server_app() -> ServerApp:
    """The ServerApp; configuration and run folder come in the Flower run configuration."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run_dir = str(context.run_config["run-dir"])
        workspace = workspace_for(str(context.run_config["config"]), run_dir)
        Server(grid, workspace).run()

    return app


app = make_server_app()
