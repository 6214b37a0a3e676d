"""Training along the directions that a codec knows: there and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.config import TrainingConfig
from cgfedllm.errors import ConfigError
from cgfedllm.model import AdaptedModel
from cgfedllm.training.local import LocalTrainer
from cgfedllm.training.subspace import REACH

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


def test_a_first_step_of_adam_goes_as_far_as_a_direction_has_entries(model, start, rows):
    """All that entries could do together, times a share: little along one of few entries."""
    directions = directions_of(model.spec)
    for vectors in directions.values():  # the first is one entry
        vectors[:] = np.linalg.qr(np.concatenate([np.eye(1, vectors.shape[1]), vectors[1:]]).T)[0].T
    update = changed(model, start, rows, directions, local_steps=1)
    for name, vectors in directions.items():
        steps = np.median(np.abs(rows_of(update, name) @ vectors.T), axis=0)
        np.testing.assert_allclose(steps, 1e-2 * REACH * np.abs(vectors).sum(axis=1), rtol=0.05)
        assert steps[0] < steps[1:].min()


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["uplink.name=learned"], r"names? a codec file|it has\s+learned nothing"),
        (["training.keep_optimizer=true"], "keep_optimizer means nothing there"),
        (["training.weight_decay=0.1"], "weight_decay means nothing there"),
    ],
)
def test_settings_that_go_against_it_are_refused(tiny_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config("training.subspace=A", *changes)
