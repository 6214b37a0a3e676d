"""Held-out loss: a mean over label tokens, however rows are grouped."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cgfedllm import events
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.config import load_config
from cgfedllm.data.encoding import NO_LOSS, Example
from cgfedllm.evaluation.nll import NllResult, evaluate_nll
from cgfedllm.model import AdaptedModel, load_adapted_model


@pytest.fixture(scope="module")
def model(tiny_model) -> AdaptedModel:
    base = [f'model.id="{tiny_model}"', "model.device=cpu", "lora.rank=4", "lora.dropout=0.1"]
    return load_adapted_model(load_config(None, base))


@pytest.fixture(scope="module")
def adapter(model) -> AdapterUpdate:
    values = np.random.default_rng(0).normal(scale=0.1, size=model.spec.size)
    return AdapterUpdate(model.spec, values.astype(np.float32))


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    """Rows of unlike length with unlike shares of labels."""
    rng = np.random.default_rng(1)
    rows = []
    for length, prompt in [(12, 4), (5, 1), (20, 18), (9, 1), (3, 1), (16, 8), (7, 6)]:
        ids = rng.integers(4, 200, length).astype(np.int32)
        labels = ids.copy()
        labels[:prompt] = NO_LOSS
        rows.append(Example(ids, labels))
    return rows


def token_losses(model: AdaptedModel, rows: list[Example]) -> list[float]:
    """Minus log-probability of every label token, one row at a time."""
    losses = []
    for row in rows:
        with torch.no_grad():
            out = model.model(input_ids=torch.from_numpy(row.input_ids).long()[None])
        log_p = torch.log_softmax(out.logits[0].double(), -1)
        losses += [
            -log_p[i - 1, int(label)].item() for i, label in enumerate(row.labels) if label >= 0
        ]
    return losses


both = pytest.mark.parametrize("packed", [True, False])


@both
def test_it_is_the_mean_over_all_label_tokens(model, adapter, rows, packed):
    result = evaluate_nll(model, adapter, rows, packed=packed, batch_size=3)
    losses = token_losses(model, rows)
    assert result.nll == pytest.approx(np.mean(losses), rel=1e-5)
    assert (result.label_tokens, result.rows) == (len(losses), len(rows))
    # not the mean of the rows' means
    row_means = [np.mean(token_losses(model, [row])) for row in rows]
    assert result.nll != pytest.approx(np.mean(row_means), rel=1e-3)


@both
def test_it_does_not_depend_on_the_batch_size_or_the_order(model, adapter, rows, packed):
    expected = evaluate_nll(model, adapter, rows, packed=packed, batch_size=1).nll
    for size in (2, 3, 100):
        result = evaluate_nll(model, adapter, rows[::-1], packed=packed, batch_size=size)
        assert result.nll == pytest.approx(expected, rel=1e-5)


@both
def test_no_rows_have_no_loss(model, adapter, packed):
    result = evaluate_nll(model, adapter, [], packed=packed, batch_size=4)
    assert math.isnan(result.nll)
    assert (result.label_tokens, result.rows) == (0, 0)


def test_it_is_the_adapter_that_is_evaluated(model, adapter, rows):
    zero = AdapterUpdate.zeros(model.spec)
    first = evaluate_nll(model, adapter, rows, packed=True, batch_size=4)
    base = evaluate_nll(model, zero, rows, packed=True, batch_size=4)
    assert abs(first.nll - base.nll) > 1e-3
    with model.model.disable_adapter():
        expected = np.mean(token_losses(model, rows))
    assert base.nll == pytest.approx(expected, rel=1e-5)


def test_evaluating_is_repeatable_and_draws_nothing_at_random(model, adapter, rows):
    before = torch.get_rng_state()
    values = {evaluate_nll(model, adapter, rows, packed=True, batch_size=4).nll for _ in range(3)}
    assert len(values) == 1
    assert torch.equal(torch.get_rng_state(), before)


@both
def test_it_leaves_the_model_as_it_was(model, adapter, rows, packed):
    evaluate_nll(model, adapter, rows, packed=packed, batch_size=4)
    assert model.model.config._attn_implementation == "sdpa"
    assert not model.model.training
    assert (model.get_adapter().vector == adapter.vector).all()
    assert all(p.grad is None for p in model.trainable_parameters())


def test_progress_is_published_after_every_batch(model, adapter, rows):
    heard: list[events.Event] = []
    with events.listening(heard.append):
        evaluate_nll(model, adapter, rows, packed=True, batch_size=3, what="north")
    assert heard == [events.EvaluationProgress("north", done, 3) for done in (1, 2, 3)]


def test_perplexity_is_its_exponential():
    assert NllResult(math.log(7.0), 10, 2).perplexity == pytest.approx(7.0)
