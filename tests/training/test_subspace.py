"""Training along the directions that a codec knows: there and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.config import TrainingConfig
from cgfedllm.errors import ConfigError
from cgfedllm.model import AdaptedModel
from cgfedllm.training.local import LocalTrainer

COUNT = 3


@pytest.fixture
def rows(make_rows):
    return make_rows(9, 14, 5, 11, 7, 16, 10, 8)


@pytest.fixture
def start(model, random_adapter) -> AdapterUpdate:
    return random_adapter(model)


def directions_of(spec: AdapterSpec, count: int = COUNT) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        f.name: np.linalg.qr(rng.standard_normal((max(f.shape), count)))[0].T.astype(np.float32)
        for f in spec
    }


def rows_of(update: AdapterUpdate, name: str) -> np.ndarray:
    view = update.views()[name].astype(np.float64)
    return view if "lora_A" in name else view.T


def changed(
    model: AdaptedModel,
    start: AdapterUpdate,
    rows: list,
    directions: dict[str, np.ndarray] | None,
    **settings: object,
) -> AdapterUpdate:
    config = TrainingConfig(**{"batch_size": 4, "lr": 1e-2, "local_steps": 3} | settings)
    trainer = LocalTrainer(model, config, seed=3, rounds=4, max_length=32)
    result = trainer.train(start, rows, client="north", round=1, directions=directions)
    return result.adapter - start


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_change_lies_along_the_directions(model, start, rows, optimizer):
    directions = directions_of(model.spec)
    update = changed(model, start, rows, directions, optimizer=optimizer)
    for name, vectors in directions.items():
        own = rows_of(update, name)
        assert np.abs(own).max() > 1e-6
        np.testing.assert_allclose(own @ vectors.T @ vectors, own, atol=2e-6)


def test_gradient_descent_is_what_it_was_but_projected(model, start, rows):
    settings = {"optimizer": "sgd", "local_steps": 1, "lr": 1.0, "max_grad_norm": 0}
    whole = changed(model, start, rows, None, **settings)
    along = changed(model, start, rows, directions_of(model.spec), **settings)
    for name, vectors in directions_of(model.spec).items():
        wanted = rows_of(whole, name) @ vectors.T @ vectors
        np.testing.assert_allclose(rows_of(along, name), wanted, atol=1e-5)


def test_a_step_of_adam_goes_no_further_than_with_all_parameters(model, start, rows):
    whole, along = (
        changed(model, start, rows, directions, local_steps=1)
        for directions in (None, directions_of(model.spec))
    )
    for name in directions_of(model.spec):
        assert 0 < np.linalg.norm(rows_of(along, name)) < np.linalg.norm(rows_of(whole, name))


def test_moments_go_on_from_round_to_round(model, start, rows):
    directions = directions_of(model.spec)
    settings = {"batch_size": 4, "lr": 1e-2, "local_steps": 2, "keep_optimizer": True}
    trainer = LocalTrainer(model, TrainingConfig(**settings), seed=3, rounds=4, max_length=32)
    first = trainer.train(start, rows, client="north", round=1, directions=directions)
    second, afresh = (
        trainer.train(
            first.adapter,
            rows,
            client="north",
            round=2,
            directions=directions,
            optimizer_state=state,
        )
        for state in (first.optimizer_state, None)
    )
    assert (second.adapter - afresh.adapter).norm() > 1e-4
    for name, vectors in directions.items():
        own = rows_of(second.adapter - first.adapter, name)
        np.testing.assert_allclose(own @ vectors.T @ vectors, own, atol=2e-6)


def test_factors_without_directions_are_trained_along_all(model, start, rows):
    directions = directions_of(model.spec)
    free = next(iter(directions))
    vectors = directions.pop(free)
    own = rows_of(changed(model, start, rows, directions), free)
    assert np.abs(own - own @ vectors.T @ vectors).max() > 1e-3


def test_the_schedule_and_every_step_count(model, start, rows):
    directions = directions_of(model.spec)
    norms = [
        changed(model, start, rows, directions, **settings).norm()
        for settings in ({"local_steps": 1}, {}, {"lr": 5e-3})
    ]
    assert norms[0] < norms[1]
    assert norms[2] < 0.7 * norms[1]


def test_a_codec_that_knows_no_directions_is_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"names? a codec file|it has\s+learned nothing"):
        tiny_config("training.subspace=true", "uplink.name=learned")
