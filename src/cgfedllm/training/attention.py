"""Attention over packed rows: each sequence attends to itself only, and no mask is built.

transformers looks attention up by name and hands our `segment_lengths` through to it. A causal
kernel per sequence costs exactly what the sequences cost; a block mask over the packed row would
cost the square of their sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

_NAME = "cgfedllm_packed"
_TRIED: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def without_peft(model: Any) -> Any:
    """The transformers model itself, adapters and all, out of PEFT's wrapper if it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def supports_packing(model: Any, max_length: int) -> bool:
    """Whether a model's attention can be packed without changing its result.

    Windows, chunks and soft-capping are seen in its configuration. Anything else that looks
    beyond a row (recurrent or convolutional layers, attention sinks, code that does not hand
    `segment_lengths` through) shows in a trial: two short rows, packed and each alone.
    """
    base = without_peft(model)
    config = base.config
    window = getattr(config, "sliding_window", None)
    windowed = getattr(config, "use_sliding_window", True)
    chunk = getattr(config, "attention_chunk_size", None)
    return bool(
        getattr(base, "_supports_attention_backend", False)
        and getattr(config, "attn_logit_softcapping", None) is None
        and not getattr(config, "alibi", False)
        and not (windowed and window is not None and window < max_length)
        and not (chunk is not None and chunk < max_length)
        and _packs_exactly(base)
    )


def _packs_exactly(model: Any) -> bool:
    """Compare the logits of two short rows, packed and alone; once for each model."""
    if model not in _TRIED:
        _TRIED[model] = _try_packing(model)
    return _TRIED[model]


def _try_packing(model: Any) -> bool:
    device = next(model.parameters()).device
    lengths = (7, 6)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(sum(lengths), device=device) * 7919 % vocabulary)[None]
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = torch.cat(
                [
                    model(input_ids=row, position_ids=at, use_cache=False).logits
                    for row, at in zip(
                        ids.split(lengths, 1), positions.split(lengths, 1), strict=True
                    )
                ],
                dim=1,
            ).float()
            with packed_attention(model):
                packed = model(
                    input_ids=ids, position_ids=positions, use_cache=False, segment_lengths=lengths
                ).logits
    except Exception:  # whatever the model's own code raises: it cannot be packed
        return False
    finally:
        model.train(was_training)
    tolerance = 1e-3 if packed.dtype == torch.float32 else 5e-2
    return bool((packed.float() - alone).abs().max() <= tolerance * alone.abs().max())


def packed_attention(model: Any) -> AbstractContextManager[None]:
    """Inside this block the model attends by `segment_lengths`."""
    return attention_by(model, _NAME)


@contextmanager
def attention_by(model: Any, name: str) -> Iterator[None]:
    """Inside this block the model attends as the registered function of that name does."""
    base = without_peft(model)
    before = base.config._attn_implementation
    base.set_attn_implementation(name)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def packed_attention_forward(
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
    """Causal attention within each segment.

    Parameters
    ----------
    query : Tensor, shape (1, heads, width, head_dim)
        Packed queries.
    key, value : Tensor, shape (1, key_value_heads, width, head_dim)
        Packed keys and values; heads may be grouped.
    attention_mask : None
        Not used; packed rows have no padding.
    segment_lengths : tuple of int
        Lengths of the segments; their sum is `width`.

    Returns
    -------
    Tensor, shape (1, width, heads, head_dim)
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        # expanding the few key and value heads is cheaper on CPU than the grouped kernel
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    outputs = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
        for q, k, v in zip(
            query.split(segment_lengths, dim=2),
            key.split(segment_lengths, dim=2),
            value.split(segment_lengths, dim=2),
            strict=True,
        )
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, packed_attention_forward)
