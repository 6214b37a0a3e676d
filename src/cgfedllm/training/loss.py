"""The loss, with logits computed only where a label asks for them.

The vocabulary head is a fifth of a small model; prompt tokens carry no loss and need no logits.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from cgfedllm.data.batching import IGNORE, Batch
from cgfedllm.training.attention import without_peft


def summed_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Sum of the negative log-likelihoods of a batch's label tokens, in nats.

    Parameters
    ----------
    model : PeftModel or PreTrainedModel
        A causal LM; in packed mode inside `packed_attention`.
    batch : Batch
        On the model's device.

    Returns
    -------
    Tensor, scalar float32
    """
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
    if batch.lengths is None:
        inputs["attention_mask"] = batch.attention_mask
    else:
        inputs["segment_lengths"] = batch.lengths
    logits = logits_at(model, batch.label_index, **inputs)
    return cross_entropy(
        logits.flatten(0, 1).float(),
        batch.targets.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
    )


def logits_at(model: Any, columns: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits at chosen columns only, where the model can do that; shape (rows, k, vocabulary)."""
    if takes_logits_to_keep(model):
        logits: torch.Tensor = model(**inputs, logits_to_keep=columns).logits
        return logits
    every: torch.Tensor = model(**inputs).logits
    return every[:, columns]


def takes_logits_to_keep(model: Any) -> bool:
    """Whether the model can compute the head at chosen positions only."""
    return "logits_to_keep" in inspect.signature(without_peft(model).forward).parameters
