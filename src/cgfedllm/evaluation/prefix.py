"""Attention over packed rows that begin alike: what they share is computed once.

::

    [p p p p | a a a | b b | c c c c]     a attends to p and to a, b to p and to b, ...

The questions of a subject begin with the same words, and with worked examples most of every prompt
is the same. Keys and values at a position depend only on what comes before it, so the shared part
may be computed once and attended to by all; the result differs by rounding alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from cgfedllm.training.attention import attention_by

_NAME = "cgfedllm_shared_prefix"


def shared_prefix(rows: Sequence[tuple[int, ...]], most: int) -> int:
    """How many tokens all rows begin with alike, up to `most`."""
    first, last = min(rows), max(rows)  # in alphabetical order: what these share all share
    for length in range(most):
        if first[length] != last[length]:
            return length
    return most


def shared_prefix_attention(model: Any) -> AbstractContextManager[None]:
    """Inside this block `segment_lengths` names the shared part first, then each row's own.

    Only for models whose rows can be packed (`training.attention.supports_packing`).
    """
    return attention_by(model, _NAME)


def shared_prefix_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_lengths: tuple[int, ...] = (),
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each segment to the first one and to itself.

    Parameters
    ----------
    query : Tensor, shape (1, heads, width, head_dim)
        Packed queries.
    key, value : Tensor, shape (1, key_value_heads, width, head_dim)
        Packed keys and values; heads may be grouped.
    attention_mask : None
        Not used; packed rows have no padding.
    segment_lengths : tuple of int
        Length of the shared part (0 if there is none), then of the rows' own parts.

    Returns
    -------
    Tensor, shape (1, width, heads, head_dim)
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    prefix, *own = segment_lengths
    queries, keys, values = (x.split(segment_lengths, dim=2) for x in (query, key, value))
    longest = max(own)
    seen = torch.ones(longest, prefix + longest, dtype=torch.bool, device=query.device)
    seen = seen.tril(diagonal=prefix)
    outputs = []
    if prefix:
        outputs.append(
            scaled_dot_product_attention(
                queries[0], keys[0], values[0], is_causal=True, scale=scaling
            )
        )
    for length, q, k, v in zip(own, queries[1:], keys[1:], values[1:], strict=True):
        outputs.append(
            scaled_dot_product_attention(
                q,
                torch.cat([keys[0], k], dim=2),
                torch.cat([values[0], v], dim=2),
                attn_mask=seen[:length, : prefix + length],
                scale=scaling,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, shared_prefix_forward)
