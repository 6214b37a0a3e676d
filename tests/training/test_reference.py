"""What federation is compared with gets as much training, and is recorded in the same way."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from cgfedllm import events
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.data.batching import steps_per_round
from cgfedllm.metrics import RoundRecord
from cgfedllm.training.reference import train_centralised, train_local_only
from cgfedllm.workspace import Workspace

CLIENTS = ("north", "south", "west")


class Run:
    """A reference training with what it recorded and published."""

    def __init__(self, train, config, folder: Path) -> None:
        self.workspace = Workspace(config, folder)
        self.records: list[RoundRecord] = []
        heard: list[events.Event] = []
        with events.listening(heard.append):
            self.result = train(self.workspace, self.records.append)
        self.steps = [event for event in heard if isinstance(event, events.StepFinished)]
        self.starts = [event for event in heard if isinstance(event, events.ClientStarted)]
        self.finished = [event for event in heard if isinstance(event, events.RoundFinished)]


@pytest.fixture
def run(tiny_config, tmp_path):
    def go(train, *overrides: str) -> Run:
        return Run(train, tiny_config(*overrides), tmp_path / "run")

    return go


# ---- centralised --------------------------------------------------------------------------------


def test_centralised_takes_as_many_steps_as_all_clients_together(run):
    done = run(train_centralised)
    assert len(done.steps) == 3 * len(CLIENTS) * 2  # rounds, clients, local steps
    assert [start.steps for start in done.starts] == [6, 6, 6]


def test_with_epochs_it_takes_the_steps_that_the_clients_epochs_come_to(run):
    done = run(train_centralised, "training.local_epochs=1.5", "federation.rounds=1")
    training = done.workspace.config.training
    expected = sum(
        steps_per_round(
            len(done.workspace.examples(client, "train")),
            batch_size=training.batch_size,
            local_steps=None,
            local_epochs=1.5,
        )
        for client in done.workspace.data.clients
    )
    assert len(done.steps) == expected > 30


def test_if_only_a_share_of_the_clients_trains_it_takes_their_steps_only(run):
    done = run(train_centralised, "federation.fraction_train=0.67", "federation.rounds=2")
    assert len(done.steps) == 2 * 2 * 2  # two of three clients are sampled


def test_it_trains_everywhere_whatever_clients_of_the_federation_do(run, tmp_path):
    # the codec file is not looked at: there is no uplink
    along = ("uplink.name=learned", f'uplink.state="{tmp_path}/no"', "training.subspace=A")
    assert len(run(train_centralised, *along).steps) == 3 * len(CLIENTS) * 2


def test_its_optimiser_is_never_reset(run, tiny_config, tmp_path):
    """As in ordinary training: rounds are only where it is looked at."""
    in_three = run(train_centralised, "training.local_steps=2", "federation.rounds=3")
    in_one = run(train_centralised, "training.local_steps=6", "federation.rounds=1")
    assert (in_three.result.vector == in_one.result.vector).all()


def test_centralised_uses_the_rows_of_every_client(run):
    done = run(train_centralised, "training.local_steps=9", "federation.rounds=1")
    rows = sum(
        len(done.workspace.examples(client, "train")) for client in done.workspace.data.clients
    )
    tokens = sum(
        len(example.input_ids)
        for client in done.workspace.data.clients
        for example in done.workspace.examples(client, "train")
    )
    assert rows <= 9 * 3 * 4 < 2 * rows  # the first pass sees each row once
    assert sum(step.tokens for step in done.steps) >= tokens


def test_centralised_training_lowers_the_held_out_loss(run):
    records = run(train_centralised, "training.local_steps=6").records
    assert records[-1].heldout_nll < records[0].heldout_nll - 0.1
    for client in CLIENTS:
        assert records[-1].client_nll[client] < records[0].client_nll[client]


# ---- local only ---------------------------------------------------------------------------------


def test_local_only_gives_every_client_an_adapter_of_its_own(run):
    adapters = run(train_local_only).result
    assert tuple(adapters) == CLIENTS
    vectors = [adapter.vector for adapter in adapters.values()]
    assert all((vectors[i] != vectors[j]).any() for i, j in [(0, 1), (0, 2), (1, 2)])


def test_each_client_takes_the_steps_it_takes_in_the_federated_run(run):
    done = run(train_local_only)
    for client in CLIENTS:
        assert len([step for step in done.steps if step.client == client]) == 3 * 2


def test_local_only_takes_epochs_as_well(run):
    done = run(train_local_only, "training.local_epochs=0.5", "federation.rounds=2")
    for client in done.workspace.data.clients:
        rows = len(done.workspace.examples(client, "train"))
        taken = [step for step in done.steps if step.client == client.name]
        assert len(taken) == 2 * math.ceil(round(rows / 2) / 4)


def test_a_clients_adapter_does_not_depend_on_the_other_clients(run):
    together = run(train_local_only).result
    alone = run(train_local_only, "data.partition.clients=1").result
    assert set(alone) < set(together)
    for client, adapter in alone.items():
        assert (adapter.vector == together[client].vector).all()


def test_local_training_lowers_every_clients_own_loss(run):
    records = run(train_local_only, "training.local_steps=6").records
    for client in CLIENTS:
        assert records[-1].client_nll[client] < records[0].client_nll[client]
    assert records[-1].heldout_nll < records[0].heldout_nll


# ---- both ---------------------------------------------------------------------------------------

both = pytest.mark.parametrize("train", [train_centralised, train_local_only])


@both
def test_there_is_a_record_for_the_start_and_for_each_round(run, train):
    done = run(train)
    assert [record.round for record in done.records] == [0, 1, 2, 3]
    assert [event.record for event in done.finished] == done.records
    for record in done.records:
        assert math.isfinite(record.heldout_nll)
        assert set(record.client_nll) == set(CLIENTS)
        assert record.seconds["total"] >= record.seconds["train"] >= 0
        assert record.seconds["evaluate"] > 0
        # nothing crosses a network
        assert record.uplink_bytes == record.downlink_bytes == 0


@both
def test_references_start_where_the_federation_starts(run, train):
    """All adapters of one seed begin alike: B is zero, the model is the base model."""
    first = run(train, "federation.rounds=1")
    again = run(train, "federation.rounds=1", "seed=1")
    assert first.records[0].heldout_nll == pytest.approx(math.log(298), rel=0.05)
    assert not first.workspace.start.vector[
        np.concatenate(
            [
                np.arange(first.workspace.spec.size)[first.workspace.spec.slices[factor.name]]
                for factor in first.workspace.spec
                if factor.kind == "B"
            ]
        )
    ].any()
    assert (first.workspace.start.vector != again.workspace.start.vector).any()


@both
def test_a_reference_is_the_same_each_time(run, train):
    def values(result: AdapterUpdate | dict[str, AdapterUpdate]) -> np.ndarray:
        adapters = result.values() if isinstance(result, dict) else [result]
        return np.stack([adapter.vector for adapter in adapters])

    first, second = (run(train, "lora.dropout=0.1") for _ in range(2))
    assert (values(first.result) == values(second.result)).all()
    assert [r.heldout_nll for r in first.records] == [r.heldout_nll for r in second.records]


@both
def test_frozen_a_factors_are_those_of_the_runs_own_seed(run, train):
    """Runs share the loaded model; one with another seed must not leave its A behind."""
    alone = run(train, "lora.freeze_a=true", "seed=5", "federation.rounds=1")
    run(train, "lora.freeze_a=true", "seed=6", "federation.rounds=1")
    after = run(train, "lora.freeze_a=true", "seed=5", "federation.rounds=1")
    assert alone.records[-1].heldout_nll == after.records[-1].heldout_nll


@both
def test_without_held_out_rows_only_the_clients_are_measured(run, train):
    done = run(train, "data.splits.heldout=0", "federation.rounds=1")
    assert all(record.heldout_nll is None for record in done.records)
    assert all(set(record.client_nll) == set(CLIENTS) for record in done.records)


@both
@pytest.mark.parametrize(("every", "wanted"), [(0, [0, 5]), (2, [0, 2, 4, 5])])
def test_it_is_evaluated_as_often_as_a_run_and_at_both_ends(run, train, every, wanted):
    settings = ("training.local_steps=1", "federation.rounds=5", "evaluation.clients=false")
    records = run(train, *settings, f"evaluation.every={every}").records
    assert [record.round for record in records] == list(range(6))
    assert [record.round for record in records if record.heldout_nll is not None] == wanted
    assert not any(record.client_nll for record in records)
