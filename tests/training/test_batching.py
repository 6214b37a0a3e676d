"""Batches: every token and label is where it belongs, and rows come in a known order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cgfedllm.data.batching import (
    IGNORE,
    RowOrder,
    collate,
    micro_batches,
    rows_per_round,
    steps_of_round,
    steps_per_round,
)
from cgfedllm.data.encoding import Example

pytestmark = pytest.mark.filterwarnings("error")

PAD = 99


def row(ids: list[int], labels: list[int]) -> Example:
    return Example(np.array(ids, np.int32), np.array(labels, np.int32))


# two prompt tokens and two answers; one prompt token and one answer
LONG = row([10, 11, 12, 13], [IGNORE, IGNORE, 12, 13])
SHORT = row([20, 21], [IGNORE, 21])

examples = st.lists(st.integers(1, 9), min_size=2, max_size=12).flatmap(
    lambda ids: st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1).map(
        lambda loss: row(
            ids, [IGNORE, *(i if has else IGNORE for i, has in zip(ids[1:], loss, strict=True))]
        )
    )
)


# ---- packed -------------------------------------------------------------------------------------


def test_packed_rows_lie_end_to_end_and_each_counts_its_positions_from_zero():
    batch = collate([LONG, SHORT], packed=True)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 20, 21]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.lengths == (4, 2)
    assert batch.attention_mask is None


def test_packed_labels_are_shifted_and_none_reaches_into_the_next_row():
    batch = collate([LONG, SHORT], packed=True)
    # 12 is predicted from column 1, 13 from 2, 21 from 4; nothing predicts 20, the first of a row
    assert batch.label_index.tolist() == [1, 2, 4]
    assert batch.targets.tolist() == [[12, 13, 21]]


def test_a_label_on_a_rows_first_token_is_not_predicted_from_the_row_before():
    first = row([20, 21], [20, 21])
    batch = collate([LONG, first], packed=True)
    assert batch.targets.tolist() == [[12, 13, 21]]
    assert batch.label_tokens == 3


# ---- padded -------------------------------------------------------------------------------------


def test_padded_rows_are_filled_up_on_the_right_and_the_padding_is_masked():
    batch = collate([LONG, SHORT], packed=False, pad_token=PAD)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13], [20, 21, PAD, PAD]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert batch.lengths is None


def test_padded_targets_cover_every_column_that_some_row_needs():
    batch = collate([LONG, SHORT], packed=False, pad_token=PAD)
    assert batch.label_index.tolist() == [0, 1, 2]
    assert batch.targets.tolist() == [[IGNORE, 12, 13], [21, IGNORE, IGNORE]]


def test_padding_never_carries_loss_even_where_its_id_is_a_label_elsewhere():
    answer_is_pad = row([1, PAD], [IGNORE, PAD])
    batch = collate([LONG, answer_is_pad], packed=False, pad_token=PAD)
    assert batch.label_tokens == 3
    assert int((batch.targets == PAD).sum()) == 1


# ---- both ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_tokens_and_label_tokens_count_no_padding(packed):
    batch = collate([LONG, SHORT], packed=packed, pad_token=PAD)
    assert (batch.tokens, batch.label_tokens) == (6, 3)


@pytest.mark.parametrize("packed", [True, False])
def test_indices_are_what_torch_needs(packed):
    batch = collate([LONG, SHORT], packed=packed)
    for tensor in (batch.input_ids, batch.position_ids, batch.label_index, batch.targets):
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()


def test_moving_a_batch_changes_its_device_and_nothing_else():
    for packed in (True, False):
        batch = collate([LONG, SHORT], packed=packed)
        moved = batch.to(torch.device("meta"))
        assert moved.input_ids.device.type == moved.targets.device.type == "meta"
        assert moved.label_index.device.type == moved.position_ids.device.type == "meta"
        assert (moved.lengths, moved.tokens, moved.label_tokens) == (
            batch.lengths,
            batch.tokens,
            batch.label_tokens,
        )
        assert (moved.attention_mask is None) == packed


@given(st.lists(examples, min_size=1, max_size=5), st.booleans())
def test_every_label_is_predicted_once_from_the_token_before_it(rows, packed):
    batch = collate(rows, packed=packed, pad_token=0)
    wanted = sorted(
        (int(before), int(label))
        for example in rows
        for before, label in zip(example.input_ids[:-1], example.labels[1:], strict=True)
        if label != IGNORE
    )
    columns = batch.input_ids[:, batch.label_index]
    has_loss = batch.targets != IGNORE
    found = zip(columns[has_loss].tolist(), batch.targets[has_loss].tolist(), strict=True)
    assert sorted(found) == wanted
    assert batch.label_tokens == len(wanted)
    assert batch.tokens == sum(len(example.input_ids) for example in rows)


# ---- micro-batches ------------------------------------------------------------------------------


def test_micro_batches_hold_rows_of_like_length_and_every_row_once():
    rows = [row([n] * n, [IGNORE, *[n] * (n - 1)]) for n in (7, 2, 5, 3, 6)]
    batches = micro_batches(rows, 2, packed=False, pad_token=0)
    assert [batch.input_ids.shape for batch in batches] == [(2, 3), (2, 6), (1, 7)]
    assert sum(batch.tokens for batch in batches) == 23


def test_micro_batches_of_the_whole_are_one_forward_pass():
    assert len(micro_batches([LONG, SHORT], 8, packed=True)) == 1


def test_no_rows_make_no_batches():
    assert micro_batches([], 4, packed=True) == []


@given(st.lists(examples, min_size=1, max_size=9), st.integers(1, 4), st.booleans())
def test_splitting_a_step_loses_no_token_and_no_label(rows, size, packed):
    whole = collate(rows, packed=packed)
    parts = micro_batches(rows, size, packed=packed)
    assert sum(part.tokens for part in parts) == whole.tokens
    assert sum(part.label_tokens for part in parts) == whole.label_tokens


# ---- row order ----------------------------------------------------------------------------------

sizes = st.integers(1, 30)


@given(rows=sizes, seed=st.integers(0, 5), epoch=st.integers(0, 4))
def test_every_pass_uses_each_row_once(rows, seed, epoch):
    order = RowOrder(rows, seed, "north")
    assert sorted(order.take(epoch * rows, rows)) == list(range(rows))


@given(rows=sizes, start=st.integers(0, 200), count=st.integers(0, 80))
def test_any_stretch_can_be_asked_for_directly(rows, start, count):
    order = RowOrder(rows, 0, "north")
    assert order.take(start, count) == order.take(0, start + count)[start:]


def test_passes_and_clients_and_seeds_are_shuffled_differently():
    order = RowOrder(50, 0, "north")
    first = order.take(0, 50)
    assert first != list(range(50))
    assert first != order.take(50, 50)
    assert first != RowOrder(50, 0, "south").take(0, 50)
    assert first != RowOrder(50, 1, "north").take(0, 50)
    assert first == RowOrder(50, 0, "north").take(0, 50)


# ---- steps of a round ---------------------------------------------------------------------------


def rounds_of(rows: int, rounds: int, **amount: object) -> list[list[list[int]]]:
    amount = {"local_steps": None, "local_epochs": None, **amount}
    order = RowOrder(rows, 0, "north")
    return [list(steps_of_round(order, rows, r, **amount)) for r in range(1, rounds + 1)]


def flat(steps: list[list[int]]) -> list[int]:
    return [index for step in steps for index in step]


@given(rows=sizes, size=st.integers(1, 7), steps=st.integers(1, 6))
def test_local_steps_are_that_many_full_batches_however_few_rows_there_are(rows, size, steps):
    (taken,) = rounds_of(rows, 1, batch_size=size, local_steps=steps)
    assert [len(step) for step in taken] == [size] * steps
    assert steps_per_round(rows, batch_size=size, local_steps=steps, local_epochs=None) == steps


@given(rows=sizes, size=st.integers(1, 7), epochs=st.sampled_from([0.25, 0.5, 1, 1.5, 2, 3.0]))
def test_local_epochs_are_that_many_passes_and_only_the_last_batch_is_short(rows, size, epochs):
    (taken,) = rounds_of(rows, 1, batch_size=size, local_epochs=epochs)
    amount = {"batch_size": size, "local_steps": None, "local_epochs": epochs}
    assert len(flat(taken)) == rows_per_round(rows, **amount) == max(1, round(rows * epochs))
    assert len(taken) == steps_per_round(rows, **amount)
    assert all(len(step) == size for step in taken[:-1])
    assert 1 <= len(taken[-1]) <= size


def test_a_round_goes_on_in_the_pass_where_the_last_one_stopped():
    halves = rounds_of(12, 4, batch_size=3, local_epochs=0.5)
    assert sorted(flat(halves[0]) + flat(halves[1])) == list(range(12))
    assert sorted(flat(halves[2]) + flat(halves[3])) == list(range(12))


def test_rounds_of_steps_use_every_row_equally_often_in_the_long_run():
    used = [
        index for steps in rounds_of(10, 5, batch_size=4, local_steps=1) for index in flat(steps)
    ]
    assert sorted(used) == sorted(list(range(10)) * 2)


def test_a_round_can_be_asked_for_without_those_before_it():
    order = RowOrder(9, 3, "west")
    amount = {"batch_size": 2, "local_steps": 3, "local_epochs": None}
    alone = list(steps_of_round(order, 9, 7, **amount))
    through = [list(steps_of_round(order, 9, r, **amount)) for r in range(1, 8)][-1]
    assert alone == through


def test_the_smallest_share_of_an_epoch_is_still_one_row():
    (taken,) = rounds_of(5, 1, batch_size=4, local_epochs=0.01)
    assert [len(step) for step in taken] == [1]
