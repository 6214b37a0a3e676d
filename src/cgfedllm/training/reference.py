"""What federation is compared with: training on pooled data, and every client on its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from cgfedllm import events
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.config import Config
from cgfedllm.data.batching import steps_per_round
from cgfedllm.data.encoding import Example
from cgfedllm.evaluation.nll import evaluate_nll
from cgfedllm.interrupt import check_interrupt
from cgfedllm.metrics import RoundRecord
from cgfedllm.training.local import LocalTrainer, TrainResult
from cgfedllm.training.optim import OptimizerState
from cgfedllm.workspace import Workspace

CENTRALISED = "centralised"
ReferenceKind = Literal["centralised", "local-only"]
Sink = Callable[[RoundRecord], None]


def train_centralised(workspace: Workspace, sink: Sink) -> AdapterUpdate:
    """Train one adapter on all clients' rows together.

    It takes as many optimiser steps as all clients of the federated run together, so it sees as
    many rows; its optimiser is never reset, as in ordinary training. After every share of steps
    that corresponds to a federated round it is handed to `sink`, evaluated where one would be.

    Parameters
    ----------
    workspace : Workspace
        Configuration, model and data.
    sink : callable
        Takes the record of each round's worth of steps.

    Returns
    -------
    AdapterUpdate
        The trained adapter.
    """
    config = workspace.config
    clients = workspace.data.clients
    pooled = [example for client in clients for example in workspace.examples(client, "train")]
    per_round = _steps_of_federated_round(workspace)
    trainer = _trainer(workspace, per_round)
    adapter = workspace.start
    state: OptimizerState | None = None
    sink(_evaluated(workspace, 0, {"": adapter}, time.perf_counter()))
    for round_ in range(1, config.federation.rounds + 1):
        began = time.perf_counter()
        result = trainer.train(
            adapter, pooled, client=CENTRALISED, round=round_, optimizer_state=state
        )
        if events.anyone_listens():
            _publish_change(CENTRALISED, round_, adapter, result, len(pooled))
            events.publish(events.RoundAggregated(round_))
        adapter, state = result.adapter, result.optimizer_state
        sink(_evaluated(workspace, round_, {"": adapter}, began))
        check_interrupt()
    return adapter


def train_local_only(workspace: Workspace, sink: Sink) -> dict[str, AdapterUpdate]:
    """Train one adapter a client, each on its own rows, in every round.

    What each one changed is published round by round, as if it were sent. The held-out figure of
    a record is the mean over the clients' adapters.

    Returns
    -------
    dict of AdapterUpdate
        Each client's adapter.
    """
    config = workspace.config
    trainer = _trainer(workspace, config.training.local_steps)
    adapters = {client.name: workspace.start for client in workspace.data.clients}
    states: dict[str, OptimizerState | None] = dict.fromkeys(adapters)
    sink(_evaluated(workspace, 0, adapters, time.perf_counter()))
    for round_ in range(1, config.federation.rounds + 1):
        began = time.perf_counter()
        for client in workspace.data.clients:
            rows = workspace.examples(client, "train")
            result = trainer.train(
                adapters[client.name],
                rows,
                client=client.name,
                round=round_,
                optimizer_state=states[client.name],
            )
            if events.anyone_listens():
                _publish_change(client.name, round_, adapters[client.name], result, len(rows))
            adapters[client.name], states[client.name] = result.adapter, result.optimizer_state
            check_interrupt()
        events.publish(events.RoundAggregated(round_))
        sink(_evaluated(workspace, round_, adapters, began))
    return adapters


def _publish_change(
    client: str, round_: int, before: AdapterUpdate, result: TrainResult, examples: int
) -> None:
    """Tell of a round's worth of steps as of the update that a client sends."""
    metrics = {
        "num-examples": float(examples),
        "steps": float(result.steps),
        "tokens": float(result.tokens),
        "train-loss": result.loss,
    }
    change = result.adapter - before
    events.publish(events.UpdateReceived(client, round_, change, float(examples), metrics))


def _steps_of_federated_round(workspace: Workspace) -> int:
    """Optimiser steps that the clients of one federated round take together."""
    training, federation = workspace.config.training, workspace.config.federation
    clients = workspace.data.clients
    steps = [
        steps_per_round(
            len(workspace.examples(client, "train")),
            batch_size=training.batch_size,
            local_steps=training.local_steps,
            local_epochs=training.local_epochs,
        )
        for client in clients
    ]
    return max(1, round(sum(steps) * federation.sampled(len(clients)) / len(clients)))


def _trainer(workspace: Workspace, local_steps: int | None) -> LocalTrainer:
    config: Config = workspace.config
    # stateless federated clients could keep no optimiser; here there are no such clients
    changes: dict[str, object] = {
        "training.keep_optimizer": True,
        "federation.stateless": False,
        "training.subspace": False,  # there is no codec whose directions it could be
    }
    if local_steps is not None:
        changes["training.local_steps"] = local_steps
    workspace.reset_frozen_factors()
    return LocalTrainer(
        workspace.model,
        config.with_overrides(changes).training,
        seed=config.seed,
        rounds=config.federation.rounds,
        max_length=config.data.max_length,
    )


def _evaluated(
    workspace: Workspace, round_: int, adapters: dict[str, AdapterUpdate], began: float
) -> RoundRecord:
    """Record of a state: one adapter for all clients (under ""), or one for each."""
    training_seconds = time.perf_counter() - began
    evaluating = time.perf_counter()
    record, evaluation = RoundRecord(round=round_), workspace.config.evaluation
    due = evaluation.due(round_, (0, workspace.config.federation.rounds))
    heldout = workspace.examples(None, "heldout") if due and evaluation.heldout else []
    if heldout:
        values = [_nll(workspace, a, heldout, "held-out") for a in adapters.values()]
        record.heldout_nll = sum(values) / len(values)
    for client in workspace.data.clients if due and evaluation.clients else ():
        validation = workspace.examples(client, "validation")
        if validation:
            adapter = adapters.get(client.name, next(iter(adapters.values())))
            record.client_nll[client.name] = _nll(workspace, adapter, validation, client.name)
    record.seconds = {
        "train": training_seconds,
        "evaluate": time.perf_counter() - evaluating,
        "total": time.perf_counter() - began,
    }
    events.publish(events.RoundFinished(record))
    return record


def _nll(workspace: Workspace, adapter: AdapterUpdate, examples: list[Example], what: str) -> float:
    return evaluate_nll(
        workspace.model,
        adapter,
        examples,
        packed=workspace.packed,
        batch_size=workspace.config.evaluation.batch_size,
        what=what,
    ).nll
