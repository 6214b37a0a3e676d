"""From token sequences to tensors: packed end to end, or padded to a rectangle.

::

    packed   [a a a a b b b c c c c c]          one row, attention stays within a, b, c
    padded   [a a a a . .]                      rows of like length, padding masked out
             [b b b . . .]
             [c c c c c .]

Packing wastes nothing; padding works with every model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cgfedllm.data.encoding import Example
from cgfedllm.seeding import generator

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Parameters
    ----------
    input_ids, position_ids : LongTensor, shape (rows, width)
        Tokens and their positions within their own sequence.
    attention_mask : LongTensor, shape (rows, width), or None
        1 for tokens, 0 for padding; None when packed.
    lengths : tuple of int or None
        Lengths of the sequences laid end to end; None when padded.
    label_index : LongTensor, shape (k,)
        Columns whose next token carries loss in some row: logits are needed there only.
    targets : LongTensor, shape (rows, k)
        The tokens to predict at those columns, -100 where a row has no loss.
    tokens, label_tokens : int
        Real tokens and tokens with loss.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    lengths: tuple[int, ...] | None
    label_index: torch.Tensor
    targets: torch.Tensor
    tokens: int
    label_tokens: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        mask = self.attention_mask
        return Batch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            None if mask is None else mask.to(device),
            self.lengths,
            self.label_index.to(device),
            self.targets.to(device),
            self.tokens,
            self.label_tokens,
        )


def collate(examples: Sequence[Example], *, packed: bool, pad_token: int = 0) -> Batch:
    """Put examples into one batch.

    Parameters
    ----------
    examples : sequence of Example
        At least one.
    packed : bool
        End to end, or padded on the right.
    pad_token : int
        Token id for padding; it is masked and never carries loss.
    """
    # labels sit on the token itself; what predicts it is the position before
    following = [np.append(e.labels[1:], np.int32(IGNORE)) for e in examples]
    lengths = tuple(len(e.input_ids) for e in examples)
    if packed:
        ids = np.concatenate([e.input_ids for e in examples])[None]
        positions = np.concatenate([np.arange(n) for n in lengths])[None]
        labels = np.concatenate(following)[None]
        mask = None
    else:
        shape = (len(examples), max(lengths))
        ids = np.full(shape, pad_token, np.int64)
        positions = np.tile(np.arange(shape[1]), (shape[0], 1))
        labels = np.full(shape, IGNORE, np.int64)
        mask = np.zeros(shape, np.int64)
        for row, (example, after) in enumerate(zip(examples, following, strict=True)):
            ids[row, : lengths[row]] = example.input_ids
            labels[row, : lengths[row]] = after
            mask[row, : lengths[row]] = 1
    index = np.flatnonzero((labels != IGNORE).any(axis=0))
    return Batch(
        input_ids=_long(ids),
        position_ids=_long(positions),
        attention_mask=None if mask is None else _long(mask),
        lengths=lengths if packed else None,
        label_index=_long(index),
        targets=_long(labels[:, index]),
        tokens=sum(lengths),
        label_tokens=int((labels != IGNORE).sum()),
    )


def micro_batches(
    examples: Sequence[Example], size: int, *, packed: bool, pad_token: int = 0
) -> list[Batch]:
    """Split one step's rows into forward passes, rows of like length together."""
    by_length = sorted(examples, key=lambda example: len(example.input_ids))
    return [
        collate(by_length[start : start + size], packed=packed, pad_token=pad_token)
        for start in range(0, len(by_length), size)
    ]


class RowOrder:
    """The order in which one client's rows are used, over all rounds.

    Rows are shuffled anew for every pass. Any stretch can be asked for directly, so that a
    resumed client goes on exactly where it was, without saved state.

    Parameters
    ----------
    rows : int
        Number of rows, at least 1.
    seed, client : int, str
        Name the shuffles.
    """

    def __init__(self, rows: int, seed: int, client: str) -> None:
        self._rows = rows
        self._seed = seed
        self._client = client

    def take(self, start: int, count: int) -> list[int]:
        """Row numbers `start` to `start + count` of the endless shuffled sequence."""
        picked: list[int] = []
        while len(picked) < count:
            epoch, offset = divmod(start + len(picked), self._rows)
            order = generator(self._seed, "row order", self._client, epoch).permutation(self._rows)
            picked.extend(order[offset : offset + count - len(picked)].tolist())
        return picked


def steps_of_round(
    order: RowOrder,
    rows: int,
    round: int,
    *,
    batch_size: int,
    local_steps: int | None,
    local_epochs: float | None,
) -> Iterator[list[int]]:
    """Row numbers of every optimiser step of one round."""
    count = rows_per_round(
        rows, batch_size=batch_size, local_steps=local_steps, local_epochs=local_epochs
    )
    picked = order.take((round - 1) * count, count)
    for start in range(0, count, batch_size):
        yield picked[start : start + batch_size]


def rows_per_round(
    rows: int, *, batch_size: int, local_steps: int | None, local_epochs: float | None
) -> int:
    """How many rows (with repetition) a client goes through in one round, at least one."""
    if local_steps is not None:
        return local_steps * batch_size
    return max(1, round(rows * (local_epochs or 0.0)))


def steps_per_round(
    rows: int, *, batch_size: int, local_steps: int | None, local_epochs: float | None
) -> int:
    """How many optimiser steps a client takes in one round."""
    count = rows_per_round(
        rows, batch_size=batch_size, local_steps=local_steps, local_epochs=local_epochs
    )
    return math.ceil(count / batch_size)


def _long(array: np.ndarray[tuple[int, ...], np.dtype[np.integer]]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
