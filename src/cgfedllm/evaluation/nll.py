"""Held-out negative log-likelihood: the metric that moves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from cgfedllm import events
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.data.batching import micro_batches
from cgfedllm.data.encoding import Example
from cgfedllm.model import AdaptedModel
from cgfedllm.training.attention import packed_attention
from cgfedllm.training.loss import summed_loss


@dataclass(frozen=True)
class NllResult:
    """Loss over a set of rows.

    Parameters
    ----------
    nll : float
        Negative log-likelihood per label token, nats; NaN over no tokens.
    label_tokens, rows : int
        What it was averaged over.
    """

    nll: float
    label_tokens: int
    rows: int

    @property
    def perplexity(self) -> float:
        """exp(nll); infinite where floats end."""
        return math.inf if self.nll > 709 else math.exp(self.nll)


def evaluate_nll(
    model: AdaptedModel,
    adapter: AdapterUpdate,
    examples: Sequence[Example],
    *,
    packed: bool,
    batch_size: int,
    what: str = "held-out",
) -> NllResult:
    """Negative log-likelihood per label token under an adapter.

    Parameters
    ----------
    model : AdaptedModel
        Its adapter values are overwritten.
    adapter : AdapterUpdate
        Values on the model's spec.
    examples : sequence of Example
        Rows to score.
    packed : bool
        Batching mode.
    batch_size : int
        Rows in one forward pass.
    what : str
        Name shown while it runs.
    """
    model.set_adapter(adapter)
    pad = int(model.tokenizer.pad_token_id or 0)
    batches = micro_batches(examples, batch_size, packed=packed, pad_token=pad)
    loss, tokens = 0.0, 0
    with torch.inference_mode(), packed_attention(model.model) if packed else nullcontext():
        for done, batch in enumerate(batches, start=1):
            loss += summed_loss(model.model, batch.to(model.device)).item()
            tokens += batch.label_tokens
            events.publish(events.EvaluationProgress(what, done, len(batches)))
    return NllResult(loss / tokens if tokens else math.nan, tokens, len(examples))
