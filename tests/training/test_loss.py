"""The loss is the same number however rows are batched, and it is Hugging Face's own."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cgfedllm.config import LoraConfig, TrainingConfig
from cgfedllm.data.batching import IGNORE, collate
from cgfedllm.data.encoding import Example
from cgfedllm.errors import TrainingError
from cgfedllm.lora import adapter_parameters, attach_lora
from cgfedllm.training.attention import packed_attention, supports_packing
from cgfedllm.training.local import LocalTrainer
from cgfedllm.training.loss import summed_loss, takes_logits_to_keep

LENGTHS = (9, 14, 5)
MAX_LENGTH = 32
SIZES = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT_SIZES = {"vocab_size": 200, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

# name: (model type, settings)
PACKABLE = {
    "llama": ("llama", SIZES),
    "llama, no grouped heads": ("llama", SIZES | {"num_key_value_heads": 4}),
    "qwen2": ("qwen2", SIZES),
    "qwen2, window as wide as a row": (
        "qwen2",
        SIZES | {"use_sliding_window": True, "sliding_window": MAX_LENGTH, "max_window_layers": 0},
    ),
    "qwen3": ("qwen3", SIZES),
    "mistral": ("mistral", SIZES | {"sliding_window": None}),
    "mistral, window as wide as a row": ("mistral", SIZES | {"sliding_window": MAX_LENGTH}),
    "gemma": ("gemma", SIZES),
    "gemma3, alternating windows": ("gemma3_text", SIZES | {"sliding_window": MAX_LENGTH}),
    "phi3": ("phi3", SIZES),
    "smollm3, layers without positions": ("smollm3", SIZES),
    "gpt2, learned positions": ("gpt2", GPT_SIZES),
}
REFUSED = {
    "window shorter than a row": ("mistral", SIZES | {"sliding_window": MAX_LENGTH - 1}),
    "window in some layers": ("gemma3_text", SIZES | {"sliding_window": 8}),
    "soft-capped attention": ("gemma2", SIZES | {"attn_logit_softcapping": 50.0}),
    "attention in chunks": (
        "llama4_text",
        SIZES | {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8},
    ),
    "convolutions between rows": (
        "lfm2",
        SIZES | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    ),
    "linear attention": (
        "minimax",
        SIZES | {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "attention that gets no word of the rows": ("nemotron", SIZES),
}


def build(kind: str, settings: dict) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
        for parameter in model.parameters():  # livelier than the initial 0.02
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return model


def adapted(kind: str, settings: dict) -> torch.nn.Module:
    """A random model with LoRA on every linear layer, A and B away from zero."""
    model = attach_lora(build(kind, settings), LoraConfig(rank=2, target_modules=["all-linear"]))
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval()


def packed_loss(model, rows) -> torch.Tensor:
    with packed_attention(model):
        return summed_loss(model, collate(rows, packed=True))


def padded_loss(model, rows) -> torch.Tensor:
    return summed_loss(model, collate(rows, packed=False))


def single_row_losses(model, rows) -> torch.Tensor:
    return torch.stack([padded_loss(model, [row]) for row in rows]).sum()


def hugging_face_loss(model, rows) -> torch.Tensor:
    """The model's own mean loss over all logits of a padded batch, times the labels in it."""
    width = max(len(row.input_ids) for row in rows)
    ids, labels = torch.zeros(len(rows), width).long(), torch.full((len(rows), width), IGNORE)
    mask = torch.zeros(len(rows), width).long()
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        ids[i, :n] = torch.from_numpy(row.input_ids)
        labels[i, :n] = torch.from_numpy(row.labels)
        mask[i, :n] = 1
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return loss * (labels[:, 1:] != IGNORE).sum()


def gradients(model, loss: torch.Tensor) -> torch.Tensor:
    parameters = list(adapter_parameters(model).values())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


# ---- one number ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_padded_single_and_hugging_face_agree_in_loss_and_gradient(name, make_rows):
    model = adapted(*PACKABLE[name])
    assert supports_packing(model, MAX_LENGTH)
    rows = make_rows(*LENGTHS)
    reference = hugging_face_loss(model, rows)
    expected = gradients(model, reference)
    assert expected.abs().max() > 0.01  # there is something to agree on
    for ours in (packed_loss, padded_loss, single_row_losses):
        loss = ours(model, rows)
        torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients(model, loss), expected, rtol=1e-3, atol=2e-4)


def test_the_loss_is_the_sum_over_label_tokens_of_minus_log_probability(model, make_rows):
    (row,) = make_rows(12)
    logits = model.model(input_ids=torch.from_numpy(row.input_ids).long()[None]).logits[0]
    log_p = torch.log_softmax(logits, -1)
    by_hand = -sum(
        log_p[i - 1, int(label)] for i, label in enumerate(row.labels) if label != IGNORE
    )
    torch.testing.assert_close(packed_loss(model.model, [row]), by_hand, rtol=1e-6, atol=1e-6)


def test_the_loss_is_float32_on_a_bfloat16_base(load, make_rows):
    model = load("model.dtype=bfloat16")
    rows = make_rows(*LENGTHS)
    packed, padded = packed_loss(model.model, rows), padded_loss(model.model, rows)
    assert packed.dtype == padded.dtype == torch.float32
    torch.testing.assert_close(packed, padded, rtol=1e-2, atol=1e-2)


# ---- rows are apart -----------------------------------------------------------------------------


def other_tokens(row: Example) -> Example:
    ids = (row.input_ids + 1).astype(np.int32)
    return Example(ids, np.where(row.labels == IGNORE, IGNORE, ids).astype(np.int32))


def without_labels(row: Example) -> Example:
    return Example(row.input_ids, np.full_like(row.labels, IGNORE))


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral, window as wide as a row"])
def test_a_packed_row_does_not_see_the_rows_beside_it(name, make_rows):
    model = adapted(*PACKABLE[name])
    first, second, third = make_rows(*LENGTHS)
    with torch.no_grad():
        # only the middle row carries loss: it is the same to the bit, whatever lies beside it
        losses = [
            packed_loss(model, [without_labels(before), second, without_labels(after)]).item()
            for before, after in [(first, third), (other_tokens(first), other_tokens(third))]
        ]
        changed = packed_loss(
            model, [without_labels(first), other_tokens(second), without_labels(third)]
        )
    assert losses[0] == losses[1]
    assert changed.item() != losses[0]


def test_a_padded_row_does_not_see_the_padding(model, make_rows):
    rows = make_rows(*LENGTHS)
    with torch.no_grad():
        losses = [
            summed_loss(model.model, collate(rows, packed=False, pad_token=pad)).item()
            for pad in (0, 7)
        ]
    assert losses[0] == losses[1]


# ---- models without logits_to_keep --------------------------------------------------------------


class OldModel(torch.nn.Module):
    """A causal LM from before `logits_to_keep`: it gives all logits, always."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
        )
        return SimpleNamespace(logits=out.logits)


def test_a_model_that_cannot_choose_logits_gives_the_same_loss(make_rows):
    model = build("llama", SIZES)
    rows = make_rows(*LENGTHS)
    assert takes_logits_to_keep(model)
    assert not takes_logits_to_keep(OldModel(model))
    with torch.no_grad():
        expected = padded_loss(model, rows)
        torch.testing.assert_close(padded_loss(OldModel(model), rows), expected)


def test_logits_are_computed_only_where_a_label_asks_for_them(model, make_rows):
    rows = make_rows(*LENGTHS)
    seen = []
    head = model.model.get_base_model().lm_head
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    try:
        packed_loss(model.model, rows)
    finally:
        hook.remove()
    assert seen == [sum(int((row.labels != IGNORE).sum()) for row in rows)]


# ---- models that must not be packed -------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_attention_would_change_is_padded(name, make_rows):
    model = build(*REFUSED[name])
    assert not supports_packing(model, MAX_LENGTH)
    # and padding is right for it
    rows = make_rows(*LENGTHS)
    with torch.no_grad():
        torch.testing.assert_close(
            padded_loss(model, rows), single_row_losses(model, rows), rtol=1e-5, atol=1e-4
        )


def trainer(model, batching: str) -> LocalTrainer:
    return LocalTrainer(
        SimpleNamespace(model=model),
        TrainingConfig(batching=batching),
        seed=0,
        rounds=1,
        max_length=MAX_LENGTH,
    )


@pytest.mark.parametrize("name", REFUSED)
def test_demanding_packing_of_such_a_model_is_refused_and_auto_is_not(name):
    model = build(*REFUSED[name])
    with pytest.raises(TrainingError, match=r"training\.batching = 'packed'.*use 'auto' or 'pad"):
        trainer(model, "packed")
    trainer(model, "auto")
    trainer(model, "padded")


def test_packing_is_found_out_through_the_adapter_as_well():
    mistral = SIZES | {"sliding_window": 8}
    assert supports_packing(adapted("llama", SIZES), MAX_LENGTH)
    assert not supports_packing(adapted("mistral", mistral), MAX_LENGTH)
    assert supports_packing(adapted("mistral", mistral), 8)


# ---- the model is left as it was ----------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_models_own_attention_is_back_after_packing(implementation, make_rows):
    model = build("llama", SIZES)
    model.set_attn_implementation(implementation)
    with packed_attention(model):
        assert model.config._attn_implementation != implementation
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(
        padded_loss(model, make_rows(5, 8)), single_row_losses(model, make_rows(5, 8))
    )


def test_the_models_own_attention_is_back_even_after_an_error():
    model = build("llama", SIZES)
    with pytest.raises(RuntimeError, match="midway"), packed_attention(model):
        raise RuntimeError("midway")
    assert model.config._attn_implementation == "sdpa"
