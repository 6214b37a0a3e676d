"""One client's round: the same numbers again, the base untouched, and errors that help."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from cgfedllm import events
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.config import TrainingConfig
from cgfedllm.data.batching import RowOrder, collate
from cgfedllm.data.encoding import RowEncoder
from cgfedllm.data.readers import read_file
from cgfedllm.errors import DataError, TrainingError
from cgfedllm.lora import initial_adapter
from cgfedllm.model import AdaptedModel
from cgfedllm.training.local import LocalTrainer, TrainResult
from cgfedllm.training.loss import summed_loss
from cgfedllm.training.optim import learning_rate

LENGTHS = (9, 14, 5, 11, 7, 16, 10, 8)
SEED = 3


def make_trainer(model: AdaptedModel, rounds: int = 4, **settings: object) -> LocalTrainer:
    if "local_epochs" not in settings:
        settings = {"local_steps": 3} | settings
    config = TrainingConfig(**{"batch_size": 4, "lr": 1e-2} | settings)
    return LocalTrainer(model, config, seed=SEED, rounds=rounds, max_length=32)


@pytest.fixture
def rows(make_rows):
    return make_rows(*LENGTHS)


@pytest.fixture
def start(model, random_adapter) -> AdapterUpdate:
    return random_adapter(model)


def change(result: TrainResult, start: AdapterUpdate) -> np.ndarray:
    return (result.adapter - start).vector


def base_weights(model: AdaptedModel) -> dict[str, torch.Tensor]:
    state = model.model.state_dict().items()
    return {name: tensor.clone() for name, tensor in state if ".lora_" not in name}


# ---- the same numbers again ---------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("dropout", ["0.0", "0.1"])
def test_training_twice_gives_the_same_bits(load, rows, random_adapter, dropout, batching):
    model = load(f"lora.dropout={dropout}")
    start = random_adapter(model)
    trainer = make_trainer(model, batching=batching)
    first, second = (trainer.train(start, rows, client="north", round=1) for _ in range(2))
    assert (first.adapter.vector == second.adapter.vector).all()
    assert first.loss == second.loss
    assert (first.adapter.vector != start.vector).any()


@pytest.mark.parametrize("dropout", ["0.0", "0.1"])
def test_an_update_does_not_depend_on_who_trained_before(
    load, rows, make_rows, random_adapter, dropout
):
    model = load(f"lora.dropout={dropout}")
    start = random_adapter(model)
    alone = make_trainer(model).train(start, rows, client="north", round=2)
    torch.manual_seed(12345)  # another past of this process
    trainer = make_trainer(model)
    trainer.train(random_adapter(model, seed=9), make_rows(6, 6, seed=1), client="south", round=1)
    after = trainer.train(start, rows, client="north", round=2)
    assert (alone.adapter.vector == after.adapter.vector).all()


def test_dropout_differs_between_clients_and_rounds_and_acts_in_training(load, rows):
    model = load("lora.dropout=0.1")
    start = AdapterUpdate.zeros(model.spec)
    start.vector[:] = 0.05
    # every step uses all rows, so that only dropout can make a difference
    trainer = make_trainer(model, local_steps=1, batch_size=len(rows), micro_batch_size=len(rows))
    updates = [
        trainer.train(start, rows, client=client, round=round_).loss
        for client, round_ in [("north", 1), ("north", 2), ("south", 1)]
    ]
    assert max(abs(a - b) for a, b in pairwise(sorted(updates))) > 1e-5


def test_training_leaves_the_processs_random_numbers_alone(load, rows, random_adapter):
    model = load("lora.dropout=0.1")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    make_trainer(model).train(random_adapter(model), rows, client="north", round=1)
    assert torch.equal(torch.get_rng_state(), before)


# ---- what training touches ----------------------------------------------------------------------


def test_the_base_model_is_unchanged_bit_for_bit(model, rows, start):
    before = base_weights(model)
    make_trainer(model, local_steps=5).train(start, rows, client="north", round=1)
    after = base_weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_start_is_not_written_to(model, rows, start):
    before = start.vector.copy()
    make_trainer(model).train(start, rows, client="north", round=1)
    assert (start.vector == before).all()


def test_the_model_is_left_in_evaluation_mode_with_its_own_attention(model, rows, start):
    make_trainer(model).train(start, rows, client="north", round=1)
    assert not any(module.training for module in model.model.modules())
    assert model.model.config._attn_implementation == "sdpa"


def test_frozen_a_factors_keep_their_initial_values_and_only_b_is_trained(load, rows):
    model = load("lora.freeze_a=true")
    whole = initial_adapter(model.full_spec, 0)
    model.set_adapter(whole)
    result = make_trainer(model).train(model.get_adapter(), rows, client="north", round=1)
    assert {factor.kind for factor in result.adapter.spec} == {"B"}
    assert result.adapter.spec.size * 2 < model.full_spec.size * 1.5
    after = model.get_adapter(model.full_spec)
    for factor in model.full_spec:
        changed = (after.views()[factor.name] != whole.views()[factor.name]).any()
        assert changed == (factor.kind == "B")


# ---- what is reported ---------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_the_rounds_label_tokens(model, rows, start):
    # a learning rate so small that the model stands still
    result = make_trainer(model, lr=1e-12, local_epochs=1).train(
        start, rows, client="north", round=1
    )
    model.set_adapter(start)
    with torch.no_grad():
        batch = collate(rows, packed=False)
        expected = summed_loss(model.model, batch).item() / batch.label_tokens
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert (result.steps, result.tokens) == (2, sum(LENGTHS))


def test_every_step_is_published(model, rows, start):
    heard: list[events.Event] = []
    with events.listening(heard.append):
        result = make_trainer(model, local_steps=3).train(start, rows, client="west", round=2)
    assert heard[0] == events.ClientStarted("west", 2, 3)
    steps = heard[1:]
    assert [(step.client, step.step) for step in steps] == [("west", 1), ("west", 2), ("west", 3)]
    assert sum(step.tokens for step in steps) == result.tokens


def test_local_epochs_take_a_short_last_step(model, rows, start):
    result = make_trainer(model, local_epochs=1, batch_size=3).train(
        start, rows, client="north", round=1
    )
    assert (result.steps, result.tokens) == (3, sum(LENGTHS))


def test_the_loss_falls_over_rounds(model, tokenizer, tiny_config, tiny_data):
    config = tiny_config("training.local_steps=9")
    data = [row for row in read_file(tiny_data) if row["client"] == "north"]
    rows = RowEncoder(config.data, tokenizer).encode(data).examples
    adapter = initial_adapter(model.spec, 0)
    trainer = LocalTrainer(model, config.training, seed=0, rounds=6, max_length=96)
    losses = []
    for round_ in range(1, 7):
        result = trainer.train(adapter, rows, client="north", round=round_)
        adapter = result.adapter
        losses.append(result.loss)
    assert losses[-1] < losses[0] - 0.2


def test_a_round_uses_the_rows_that_its_number_names(model, rows, start):
    """A resumed client needs nothing else to go on with the right rows."""
    heard: list[events.Event] = []
    with events.listening(heard.append):
        make_trainer(model, local_steps=2, batch_size=3).train(start, rows, client="north", round=3)
    picked = RowOrder(len(rows), SEED, "north").take(12, 6)
    expected = [sum(LENGTHS[index] for index in step) for step in (picked[:3], picked[3:])]
    assert [step.tokens for step in heard[1:]] == expected


# ---- one step, taken apart ----------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_accumulated_gradients_equal_those_of_one_big_batch(model, rows, start, batching):
    # rows differ in labels, so a mean of micro-batch means would show here
    whole, parts = (
        make_trainer(
            model, optimizer="sgd", lr=0.1, batch_size=8, micro_batch_size=size, batching=batching
        ).train(start, rows, client="north", round=1)
        for size in (8, 2)
    )
    assert np.abs(change(whole, start)).max() > 1e-3
    np.testing.assert_allclose(change(parts, start), change(whole, start), rtol=1e-3, atol=2e-6)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.tokens == whole.tokens


def test_packed_and_padded_training_agree(model, rows, start):
    packed, padded = (
        make_trainer(model, optimizer="sgd", lr=0.1, batching=batching).train(
            start, rows, client="north", round=1
        )
        for batching in ("packed", "padded")
    )
    np.testing.assert_allclose(change(packed, start), change(padded, start), rtol=1e-3, atol=2e-6)


def test_auto_batching_packs_where_the_model_allows_it(model, rows, start):
    auto, packed = (
        make_trainer(model, batching=batching).train(start, rows, client="north", round=1)
        for batching in ("auto", "packed")
    )
    assert (auto.adapter.vector == packed.adapter.vector).all()


def gradient(model: AdaptedModel, rows, at: torch.Tensor, anchor=None, mu: float = 0.0):
    """Autograd's gradient of the mean label loss, and FedProx's term, at flat values."""
    model.set_adapter(AdapterUpdate(model.spec, at.numpy()))
    parameters = model.trainable_parameters()
    batch = collate(rows, packed=False)
    loss = summed_loss(model.model, batch) / batch.label_tokens
    if anchor is not None:
        flat = torch.cat([parameter.flatten() for parameter in parameters])
        loss = loss + mu / 2 * (flat - anchor).square().sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def test_sgd_steps_against_the_gradient_of_the_mean_loss(model, rows, start):
    result = make_trainer(
        model, optimizer="sgd", lr=0.5, batch_size=8, local_steps=1, max_grad_norm=0
    ).train(start, rows, client="north", round=1)
    expected = -0.5 * gradient(model, rows, torch.from_numpy(start.vector)).numpy()
    np.testing.assert_allclose(change(result, start), expected, rtol=1e-3, atol=1e-6)


def test_adamws_first_step_moves_every_value_by_the_learning_rate(model, rows, start):
    result = make_trainer(model, optimizer="adamw", lr=1e-3, batch_size=8, local_steps=1).train(
        start, rows, client="north", round=1
    )
    slope = gradient(model, rows, torch.from_numpy(start.vector)).numpy()
    clear = np.abs(slope) > 1e-5  # away from zero, where rounding decides the sign
    assert clear.mean() > 0.9
    expected = -1e-3 * np.sign(slope)[clear]
    np.testing.assert_allclose(change(result, start)[clear], expected, rtol=2e-2)


def test_gradients_are_clipped_to_max_grad_norm(model, rows, start):
    def moved(limit: float) -> float:
        trainer = make_trainer(
            model, optimizer="sgd", lr=1.0, batch_size=8, local_steps=1, max_grad_norm=limit
        )
        return (trainer.train(start, rows, client="north", round=1).adapter - start).norm()

    free = moved(0)  # off
    assert free > 0.2
    assert moved(0.1) == pytest.approx(0.1, rel=1e-3)
    assert moved(free * 2) == pytest.approx(free, rel=1e-4)


def test_weight_decay_pulls_towards_zero(model, rows, start):
    plain, decayed = (
        make_trainer(model, weight_decay=decay, lr=1e-2).train(start, rows, client="north", round=1)
        for decay in (0.0, 0.5)
    )
    assert decayed.adapter.norm() < plain.adapter.norm()


# ---- the optimiser's memory ---------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": {"optimizer": "adamw", "weight_decay": 0.01},
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "lr": 0.1},
    "sgd without momentum": {"optimizer": "sgd", "lr": 0.1},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_kept_optimiser_goes_on_as_if_never_interrupted(model, rows, start, name):
    settings = {"keep_optimizer": True, **OPTIMIZERS[name]}
    unbroken = make_trainer(model, local_steps=4, **settings).train(
        start, rows, client="north", round=1
    )
    halves = make_trainer(model, local_steps=2, **settings)
    first = halves.train(start, rows, client="north", round=1)
    second = halves.train(
        first.adapter, rows, client="north", round=2, optimizer_state=first.optimizer_state
    )
    assert (second.adapter.vector == unbroken.adapter.vector).all()
    for key, values in unbroken.optimizer_state.items():
        assert (second.optimizer_state[key] == values).all()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_without_it_every_round_starts_afresh(model, rows, start, name):
    trainer = make_trainer(model, local_steps=2, **OPTIMIZERS[name])
    first = trainer.train(start, rows, client="north", round=1)
    assert first.optimizer_state is None
    second = trainer.train(first.adapter, rows, client="north", round=2)
    kept = make_trainer(model, local_steps=2, keep_optimizer=True, **OPTIMIZERS[name])
    state = kept.train(start, rows, client="north", round=1).optimizer_state
    third = kept.train(first.adapter, rows, client="north", round=2, optimizer_state=state)
    assert (second.adapter.vector != third.adapter.vector).any()


def test_optimiser_state_is_plain_arrays_on_the_adapters_spec(model, rows, start):
    state = (
        make_trainer(model, keep_optimizer=True)
        .train(start, rows, client="north", round=1)
        .optimizer_state
    )
    assert set(state) == {"exp_avg", "exp_avg_sq", "step"}
    assert state["step"].tolist() == [3.0]
    for moment in ("exp_avg", "exp_avg_sq"):
        assert state[moment].shape == (model.spec.size,)
        assert state[moment].dtype == np.float32


def test_training_does_not_write_into_the_state_it_was_given(model, rows, start):
    trainer = make_trainer(model, keep_optimizer=True)
    state = trainer.train(start, rows, client="north", round=1).optimizer_state
    before = {key: values.copy() for key, values in state.items()}
    trainer.train(start, rows, client="north", round=2, optimizer_state=state)
    assert all((state[key] == before[key]).all() for key in before)


# ---- FedProx ------------------------------------------------------------------------------------


def test_a_larger_mu_keeps_the_client_nearer_to_the_start(model, rows, start):
    trainer = make_trainer(model, optimizer="sgd", lr=0.1, local_steps=8, max_grad_norm=0)
    norms = [
        (trainer.train(start, rows, client="north", round=1, proximal_mu=mu).adapter - start).norm()
        for mu in (0.0, 1.0, 5.0)
    ]
    assert norms[0] > norms[1] > norms[2] > 0


@pytest.mark.parametrize("mu", [0.0, 2.0])
def test_fedprox_descends_the_loss_plus_half_mu_times_the_squared_distance(model, rows, start, mu):
    lr, steps = 0.2, 3
    result = make_trainer(
        model, optimizer="sgd", lr=lr, batch_size=8, local_steps=steps, max_grad_norm=0
    ).train(start, rows, client="north", round=1, proximal_mu=mu)
    anchor = torch.from_numpy(start.vector)
    at = anchor.clone()
    for _ in range(steps):
        at = at - lr * gradient(model, rows, at, anchor, mu)
    np.testing.assert_allclose(result.adapter.vector, at.numpy(), rtol=1e-3, atol=2e-6)


# ---- the schedule -------------------------------------------------------------------------------


def lr_at(progress: float, rounds: int = 10, **settings: object) -> float:
    return learning_rate(TrainingConfig(lr=0.1, **settings), progress, rounds)


@pytest.mark.parametrize(
    ("schedule", "points"),
    {
        "constant": {0: 0.1, 5: 0.1, 9.9: 0.1},
        "linear": {0: 0.1, 2.5: 0.075, 5: 0.05, 9: 0.01, 10: 0.0},
        "cosine": {0: 0.1, 2.5: 0.05 * (1 + math.sqrt(0.5)), 5: 0.05, 10: 0.0},
    }.items(),
)
def test_schedules_run_from_the_peak_to_their_end_over_all_rounds(schedule, points):
    for progress, expected in points.items():
        assert lr_at(progress, schedule=schedule) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_linearly_to_the_peak_and_the_schedule_takes_the_rest(schedule):
    settings = {"schedule": schedule, "warmup_rounds": 2}
    assert [lr_at(p, **settings) for p in (0, 0.5, 1, 2)] == pytest.approx([0, 0.025, 0.05, 0.1])
    half_way = {"constant": 0.1, "linear": 0.05, "cosine": 0.05}[schedule]
    assert lr_at(6, **settings) == pytest.approx(half_way)


def test_warm_up_longer_than_the_run_is_only_warm_up():
    assert lr_at(9, schedule="linear", warmup_rounds=20) == pytest.approx(0.045)


def test_each_step_takes_the_rate_of_its_place_in_the_run(model, rows, start):
    # sgd on all rows with the gradient clipped to 1 moves by exactly the learning rate
    def moved(round_: int) -> float:
        trainer = make_trainer(
            model,
            rounds=4,
            optimizer="sgd",
            lr=1e-3,
            batch_size=8,
            local_steps=1,
            max_grad_norm=1e-3,
            schedule="linear",
            warmup_rounds=1,
        )
        return (trainer.train(start, rows, client="north", round=round_).adapter - start).norm()

    moves = [moved(round_) / 1e-6 for round_ in (1, 2, 3, 4)]
    # each round's one step takes the rate at its middle
    assert moves == pytest.approx([1 / 2, 5 / 6, 1 / 2, 1 / 6], abs=0.02)


def test_the_rate_changes_within_a_round(model, rows, start):
    """Two warm-up steps of one round take a quarter and three quarters of the peak rate."""
    # the gradient is clipped so far that both steps go the same way: their lengths add up
    settings = {"optimizer": "sgd", "lr": 1e-3, "batch_size": 8, "max_grad_norm": 1e-3}
    warming = make_trainer(model, local_steps=2, warmup_rounds=1, **settings).train(
        start, rows, client="north", round=1
    )
    peak = make_trainer(model, local_steps=1, **settings).train(
        start, rows, client="north", round=1
    )
    moved, full = change(warming, start), change(peak, start)
    assert np.linalg.norm(moved) == pytest.approx((1 / 4 + 3 / 4) * np.linalg.norm(full), rel=0.02)


# ---- gradient checkpointing ---------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("dropout", ["0.0", "0.1"])
def test_gradient_checkpointing_gives_the_same_update(
    load, rows, random_adapter, dropout, batching
):
    updates = {}
    for checkpointing in ("false", "true"):
        model = load(f"model.gradient_checkpointing={checkpointing}", f"lora.dropout={dropout}")
        forwards = 0

        def count(*_args: object) -> None:
            nonlocal forwards
            forwards += 1

        layer = model.model.get_base_model().model.layers[0].self_attn
        hook = layer.register_forward_pre_hook(count)
        try:
            trainer = make_trainer(model, optimizer="sgd", lr=0.1, batching=batching)
            forwards = 0  # a trainer may try the model out
            updates[checkpointing] = trainer.train(
                random_adapter(model), rows, client="north", round=1
            ).adapter.vector
        finally:
            hook.remove()
        assert forwards == (6 if checkpointing == "true" else 3)
    np.testing.assert_allclose(updates["true"], updates["false"], rtol=1e-5, atol=1e-7)


# ---- what goes wrong ----------------------------------------------------------------------------


def test_a_client_without_rows_is_named(model, start):
    with pytest.raises(DataError, match="client 'west' has no rows"):
        make_trainer(model).train(start, [], client="west", round=1)


def not_a_number(start: AdapterUpdate) -> AdapterUpdate:
    return AdapterUpdate(start.spec, np.full_like(start.vector, np.nan))


def test_a_loss_that_is_no_number_names_client_round_step_and_remedy(model, rows, start):
    with pytest.raises(
        TrainingError, match=r"client 'west', round 3, step 1: the loss is nan.*lower training\.lr"
    ):
        make_trainer(model).train(not_a_number(start), rows, client="west", round=3)


def test_a_run_that_blows_up_names_the_step_where_it_did(model, rows, start):
    trainer = make_trainer(model, optimizer="sgd", lr=1e30, max_grad_norm=0)
    with pytest.raises(TrainingError, match=r"client 'west', round 1, step 2: .*max_grad_norm"):
        trainer.train(start, rows, client="west", round=1)


@pytest.mark.parametrize("dropout", ["0.0", "0.1"])
def test_a_client_that_fails_leaves_no_trace_in_those_after_it(load, rows, random_adapter, dropout):
    model = load(f"lora.dropout={dropout}")
    start = random_adapter(model)
    trainer = make_trainer(model)
    alone = trainer.train(start, rows, client="north", round=1)
    with pytest.raises(TrainingError):
        trainer.train(not_a_number(start), rows, client="west", round=1)
    assert not any(module.training for module in model.model.modules())
    after = trainer.train(start, rows, client="north", round=1)
    assert (after.adapter.vector == alone.adapter.vector).all()


def test_an_interrupted_step_leaves_no_trace_either(model, rows, start):
    trainer = make_trainer(model)
    alone = trainer.train(start, rows, client="north", round=1)
    layer = model.model.get_base_model().lm_head
    calls = []

    def interrupt(*_args: object) -> None:
        calls.append(1)
        if len(calls) == 2:  # after the gradient of the first micro-batch is in
            raise KeyboardInterrupt

    hook = layer.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            make_trainer(model, micro_batch_size=2, batching="padded").train(
                start, rows, client="west", round=1
            )
    finally:
        hook.remove()
    after = trainer.train(start, rows, client="north", round=1)
    assert (after.adapter.vector == alone.adapter.vector).all()
