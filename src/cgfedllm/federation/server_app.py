"""The server: rounds, checkpoints, evaluation, whatever engine carries the messages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from cgfedllm import events
from cgfedllm.codecs import Codec, make_codec
from cgfedllm.codecs.learning import LearnedCodec
from cgfedllm.config import FederationConfig
from cgfedllm.errors import CgFedLlmError, CheckpointError, CodecStateError, FederationError
from cgfedllm.evaluation.nll import evaluate_nll
from cgfedllm.federation.accounting import Stopwatch, client_record, time_split
from cgfedllm.federation.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from cgfedllm.federation.codec_card import card_after_run
from cgfedllm.federation.codec_state import CodecBroadcaster, UpdateSample
from cgfedllm.federation.directory import POLL_SECONDS, STRAY, Directory, NamedGrid, receive
from cgfedllm.federation.downlink import Broadcaster
from cgfedllm.federation.flush import FlushStrategy, flush_config
from cgfedllm.federation.messages import (
    CODEC_MISSING,
    NO_RESIDUAL,
    REFERENCE_MISSING,
    adapter_of,
    adapter_record,
    numbers_of,
    status_of,
)
from cgfedllm.federation.private import PrivateAverage
from cgfedllm.federation.secure import SecureStrategy
from cgfedllm.federation.secure_client import threshold
from cgfedllm.federation.strategies import make_strategy, restore_strategy, strategy_state
from cgfedllm.federation.strategy import CompressedStrategy, RoundTally
from cgfedllm.interrupt import check_interrupt
from cgfedllm.metrics import FailureRecord, RoundRecord
from cgfedllm.peft_format import save_adapter
from cgfedllm.privacy.ledger import Ledger
from cgfedllm.privacy.plan import PrivacyPlan
from cgfedllm.runs import RunFolder
from cgfedllm.workspace import Workspace

# with no other client connecting, before the first round begins without the rest
_LATECOMERS_SECONDS = 60.0


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
        self._directory = Directory(grid, spec.hash.hex(), workspace.base_weights, self._timeout)
        self._grid = NamedGrid(grid, self._directory)
        self._broadcaster = Broadcaster(
            spec,
            workspace.downlink,
            self._config.seed,
            keep_previous=workspace.uplink.uses_previous,
            stateless=federation.stateless,
        )
        self._codec = _codec_broadcaster(workspace)
        self._strategy = self._coded(self._kind(), federation, workspace.uplink, self._codec)
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
                rounds=self._config.last_round,
                clients=self._directory.names(),
                parameters=self._workspace.spec.size,
                uplink_codec=self._config.uplink.name,
                downlink_codec=self._config.downlink.name,
                resumed_from=max(done, 0),
            )
        )
        events.publish(events.Notice(self._directory.rows()))
        if self._workspace.privacy is not None:
            self._tell_privacy(self._workspace.privacy)
        if self._config.privacy.secagg.enabled:
            self._tell_sums()
        if done < 0:
            self._finish_round(self._start(), RoundTally(), time.perf_counter(), {})
        for round_ in range(max(done, 0) + 1, self._config.federation.rounds + 1):
            self._round(round_)
        if done < self._config.last_round and self._config.uplink.flush:
            self._flush()
        self._save_codec()
        self._save_adapter()

    def _start(self) -> RoundRecord:
        """Record of the state before any training, with what it took to get this far."""
        file = self._workspace.codec_file
        cost = {} if file is None else file.card.get("cost", {})
        return RoundRecord(
            round=0,
            tgap_uplink_bytes=int(cost.get("uplink_bytes", 0)),
            tgap_downlink_bytes=int(cost.get("downlink_bytes", 0)),
        )

    def _kind(self) -> Callable[..., CompressedStrategy]:
        """The wrapper of training rounds."""
        if not self._config.privacy.secagg.enabled:
            return CompressedStrategy
        return partial(
            SecureStrategy,
            exchange=lambda messages: receive(self._grid, messages, self._timeout, self._stray),
            threshold=partial(threshold, self._config),
            folder=self._folder.path,
        )

    def _coded(
        self,
        kind: Callable[..., CompressedStrategy],
        federation: FederationConfig,
        uplink: Codec,
        codec_states: CodecBroadcaster | None = None,
    ) -> CompressedStrategy:
        spec = self._workspace.spec
        return kind(
            make_strategy(
                federation, spec, self._private(), secure=self._config.privacy.secagg.enabled
            ),
            spec=spec,
            uplink=uplink,
            broadcaster=self._broadcaster,
            codec_states=codec_states,
            seed=self._config.seed,
            weighting=federation.weighting,
            summed=federation.aggregation == "sum",
            min_replies=federation.min_clients,
            client_name=self._directory.name,
            origin=self._workspace.start,
            run=self._folder.key,
            screening=None if self._central else federation.screening,
            max_norm=federation.max_update_norm,
        )

    def _private(self) -> tuple[PrivacyPlan, Ledger] | None:
        """What the server needs to add noise, if it is the server that does."""
        plan = self._workspace.privacy
        if plan is None or not self._central:
            return None
        return plan, plan.ledger(self._folder.path, "server")

    @property
    def _central(self) -> bool:
        """Whether it is the server that adds noise."""
        return self._config.privacy.mechanism == "central"

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
            checkpoint.reference,
            checkpoint.round,
            checkpoint.held,
            checkpoint.increment,
            checkpoint.previous,
        )
        restore_strategy(self._strategy.inner, checkpoint.strategy)
        if self._codec is not None and checkpoint.codec is not None:
            try:
                self._codec.restore(checkpoint.codec)
            except CodecStateError as error:
                raise CheckpointError(
                    f"{self._folder.path} cannot go on with {self._config.uplink.state}: {error}; "
                    "put the codec file back that the run began with"
                ) from None
        # the checkpoint is written before the line; a kill in between leaves the line to us
        self._folder.truncate_after(checkpoint.round - 1)
        self._folder.append(checkpoint.record)
        return checkpoint.round

    def _wait_for_clients(self) -> None:
        """Until all are there, or enough of them and no other came for a while."""
        federation = self._config.federation
        expected = max(federation.min_clients, self._workspace.n_clients or 0)
        began = latest = time.monotonic()
        seen = 0
        while True:
            self._directory.refresh()
            here, now = len(self._directory.nodes()), time.monotonic()
            if here > seen:
                seen, latest = here, now
            alone = self._complete or now - latest > _LATECOMERS_SECONDS
            if here >= (federation.min_clients if alone else expected):
                return
            check_interrupt()
            if now - began > federation.timeout or self._complete:
                raise FederationError(
                    f"{here} clients are there, federation.min_clients is "
                    f"{federation.min_clients}; connect more or lower it"
                    f"{self._directory.refusals()}"
                )
            time.sleep(POLL_SECONDS)

    def _flush(self) -> None:
        """One more round, in which clients send their residuals and do not train."""
        config = self._config
        codec = make_codec(config.uplink.flush, config.uplink.flush_options)
        self._strategy = self._coded(FlushStrategy, flush_config(config.federation), codec)
        self._round(config.last_round)

    def _round(self, round_: int) -> None:
        federation = self._config.federation
        began = time.perf_counter()
        tally, clip = RoundTally(), self._clip()
        for attempt in range(1, federation.round_retries + 2):
            self._directory.refresh()
            self._strategy.attempt = attempt
            self._strategy.sample = self._sample(round_)
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
            failures = [f"{client}: {reason}" for client, reason in tally.failures[-3:]]
            reasons = "; ".join(failures) or "none"
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
        self._adapt_codec(round_, seconds)
        record = RoundRecord(
            round=round_,
            flush=round_ > federation.rounds,
            attempts=attempt,
            update_norm=change.norm(),
            product_gap=tally.product_gap,
            clip=clip,
        )
        self._finish_round(record, tally, began, seconds)

    def _sample(self, round_: int) -> UpdateSample | None:
        """What keeps decoded updates of a round, if the codec adapts to them."""
        every = self._config.uplink.adapt_every
        trains = round_ <= self._config.federation.rounds
        if self._codec is None or not every or round_ % every or not trains:
            return None
        return UpdateSample(self._config.seed, round_)

    def _adapt_codec(self, round_: int, seconds: dict[str, float]) -> None:
        sample = self._strategy.sample
        if self._codec is None or sample is None:
            return
        began = time.perf_counter()
        try:
            self._codec.adapt(sample.updates(), round=round_, seed=self._config.seed)
        except CodecStateError as error:
            text = f"round {round_}: the uplink codec stays as it is, it cannot adapt: {error}"
            events.publish(events.Notice(text, "warning"))
        seconds["adapt"] = time.perf_counter() - began

    def _train(self, round_: int, seconds: dict[str, float]) -> ArrayRecord | None:
        """Broadcast, collect and aggregate once."""
        began = time.perf_counter()
        messages = list(
            self._strategy.configure_train(
                round_, adapter_record(self._adapter), ConfigRecord(), self._grid
            )
        )
        events.publish(events.RoundStarted(round_, len(messages)))
        waiting = Stopwatch(self._replies(messages))
        arrays, _ = self._strategy.aggregate_train(round_, waiting)
        seconds["waiting"] = waiting.seconds
        seconds["exchange"] = time.perf_counter() - began
        return arrays

    def _replies(self, messages: list[Message]) -> Iterator[Message]:
        """Replies as they come; a client that lost what it held is sent it whole, once."""
        by_node = {message.metadata.dst_node_id: message for message in messages}
        again: list[Message] = []
        for reply in receive(self._grid, messages, self._timeout, self._stray):
            node = reply.metadata.src_node_id
            status = status_of(reply.content) if reply.has_content() else set()
            if status & {REFERENCE_MISSING, CODEC_MISSING}:
                again.append(self._strategy.resend(by_node[node], status))
                continue
            by_node.pop(node, None)
            flushing = isinstance(self._strategy, FlushStrategy)
            if not (flushing and NO_RESIDUAL in status):  # having nothing to flush is no failure
                yield reply
        for reply in receive(self._grid, again, self._timeout, self._stray):
            by_node.pop(reply.metadata.src_node_id, None)
            yield reply
        for node in by_node:
            reason = f"no reply within {self._timeout:g} s"
            self._strategy.tally.fail(self._directory.name(node), reason)

    def _stray(self, reply: Message) -> None:
        name = self._directory.name(reply.metadata.src_node_id)
        self._strategy.tally.fail(name, STRAY)

    def _tell_privacy(self, plan: PrivacyPlan) -> None:
        events.publish(events.Notice(plan.describe(self._workspace.spec.size)))
        if plan.mechanism == "local" and self._config.evaluation.clients:
            text = (
                "clients send the loss on their validation rows without noise, which the privacy "
                "budget does not cover; set evaluation.clients = false"
            )
            events.publish(events.Notice(text, "warning"))

    def _tell_sums(self) -> None:
        members = self._config.federation.sampled(len(self._directory.nodes()))
        least = threshold(self._config, members)
        text = (
            f"secure aggregation: the server sees sums of {least} to {members} updates and none "
            f"alone; a round needs {least} clients from its start to its end"
        )
        events.publish(events.Notice(text))
        if self._config.evaluation.clients:
            text = (
                "clients send the loss on their validation rows each for itself; set "
                "evaluation.clients = false if the server is not to see that"
            )
            events.publish(events.Notice(text, "warning"))

    def _clip(self) -> float | None:
        """Longest norm of an update in the round to come, under differential privacy."""
        plan, inner = self._workspace.privacy, self._strategy.inner
        if isinstance(inner, PrivateAverage):
            return inner.clip
        return None if plan is None else plan.clip

    def _finish_round(
        self, record: RoundRecord, tally: RoundTally, began: float, seconds: dict[str, float]
    ) -> None:
        """Evaluate, write down, make durable, tell."""
        self._strategy.tally = tally
        evaluating = time.perf_counter()
        self._evaluate(record)
        seconds["evaluate"] = time.perf_counter() - evaluating
        record.failures = [FailureRecord(client, reason) for client, reason in tally.failures]
        self._count(record, tally)
        self._warn(record)
        if self._workspace.privacy is not None:
            record.epsilon = self._workspace.privacy.spent(record.round)
        record.seconds = time_split(record, tally, seconds, time.perf_counter() - began)
        events.publish(events.RoundAggregated(record.round))
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
                previous=self._broadcaster.previous,
                codec=None if self._codec is None else self._codec.snapshot(),
            ),
            self._config,
        )
        record.seconds["checkpoint"] = time.perf_counter() - saving
        self._folder.append(record)
        self._record = record
        events.publish(events.RoundFinished(record))

    def _warn(self, record: RoundRecord) -> None:
        """Tell of what was not used, and of what was used and is odd."""
        counted = {client.client for client in record.clients}
        for failure in record.failures:
            # not its first reply, or of an attempt before, or to the evaluation
            out = "" if failure.client in counted else " is left out"
            told = f"round {record.round}: {failure.client}{out}: {failure.reason}"
            events.publish(events.Notice(told, "warning"))
        for client in record.clients:
            if client.suspicion:
                told = f"round {record.round}: {client.client}'s update is odd, and was used: "
                events.publish(events.Notice(told + client.suspicion, "warning"))

    def _evaluate(self, record: RoundRecord) -> None:
        evaluation = self._config.evaluation
        # before and after a flush too, so that its worth is seen
        ends = (0, self._config.federation.rounds, self._config.last_round)
        if not evaluation.due(record.round, ends):
            return
        heldout = self._workspace.examples(None, "heldout") if evaluation.heldout else []
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
                    self._strategy.tally.fail(name, str(error))
                    continue
                if "nll" in metrics:
                    record.client_nll[name] = metrics["nll"]
            record.client_nll = dict(sorted(record.client_nll.items()))

    def _count(self, record: RoundRecord, tally: RoundTally) -> None:
        before, fp32 = self._record, 4 * self._workspace.spec.size
        record.clients = [
            client_record(received, tally)
            for received in sorted(tally.received, key=lambda received: received.client)
        ]
        record.uplink_bytes = tally.uplink_bytes
        record.downlink_bytes = sum(tally.downlink_bytes.values())
        record.codec_bytes = sum(tally.codec_bytes.values())
        record.secagg_uplink_bytes = tally.secagg_uplink_bytes
        record.secagg_downlink_bytes = tally.secagg_downlink_bytes
        record.uplink_bytes_fp32 = fp32 * tally.uplinks
        record.downlink_bytes_fp32 = fp32 * tally.broadcasts
        for name in (
            "uplink_bytes",
            "downlink_bytes",
            "codec_bytes",
            "secagg_uplink_bytes",
            "secagg_downlink_bytes",
            "uplink_bytes_fp32",
            "downlink_bytes_fp32",
        ):
            total = getattr(before, f"{name}_total") + getattr(record, name)
            setattr(record, f"{name}_total", total)

    def _save_codec(self) -> None:
        """Leave the codec as the last round left it, for other runs to begin with."""
        if self._codec is None:
            return
        file, state = self._workspace.codec_file, self._codec.state
        card = card_after_run(
            {} if file is None else file.card,
            self._config,
            state=state,
            adapted=state.hash != self._workspace.codec_state.hash,
            last=self._record,
        )
        self._workspace.save_codec(self._folder.codec_path, state, card)

    def _save_adapter(self) -> None:
        save_adapter(self._folder.adapter_dir, self._workspace.whole(self._adapter), self._config)


def _codec_broadcaster(workspace: Workspace) -> CodecBroadcaster | None:
    codec, config = workspace.uplink, workspace.config
    if not isinstance(codec, LearnedCodec):
        return None
    return CodecBroadcaster(
        workspace.spec,
        codec,
        workspace.codec_state,
        held=config.uplink.state_is_at_clients,
        stateless=config.federation.stateless,
    )
