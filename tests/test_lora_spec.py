"""Specs from a configuration alone are those of the real model with its adapter."""

from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from cgfedllm.architectures import architecture
from cgfedllm.config import LoraConfig
from cgfedllm.errors import ModelError
from cgfedllm.lora import peft_config, specs_from_config


@pytest.fixture
def small() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


def test_llama_7b_has_the_papers_size() -> None:
    config = architecture("huggyllama/llama-7b")
    assert config is not None
    trained, full = specs_from_config(config, LoraConfig())
    assert trained.size == full.size == 8_388_608
    assert len(trained) == 32 * 4 * 2
    assert len(trained.pairs()) == 32 * 4
    assert {factor.layer for factor in trained} == set(range(32))


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(),
        LoraConfig(rank=3, target_modules=["q_proj", "down_proj"]),
        LoraConfig(target_modules=["all-linear"]),
        LoraConfig(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 4.0}),
    ],
    ids=["default", "some", "all-linear", "patterns"],
)
def test_names_and_shapes_are_those_peft_saves(small: PretrainedConfig, lora: LoraConfig) -> None:
    model: Any = get_peft_model(AutoModelForCausalLM.from_config(small), peft_config(lora))
    saved = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()}
    order = [
        name.replace(".default.", ".")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    trained, _ = specs_from_config(small, lora)
    assert {factor.name: factor.shape for factor in trained} == saved
    assert [factor.name for factor in trained] == order
    assert all(factor.kind in ("A", "B") for factor in trained)


def test_frozen_a_is_in_the_full_spec_only(small: PretrainedConfig) -> None:
    trained, full = specs_from_config(small, LoraConfig(freeze_a=True))
    assert {factor.kind for factor in trained} == {"B"}
    assert {factor.kind for factor in full} == {"A", "B"}
    assert [f for f in full if f.kind == "B"] == list(trained)


def test_rank_pattern_changes_the_shape(small: PretrainedConfig) -> None:
    trained, _ = specs_from_config(small, LoraConfig(rank=8, rank_pattern={"q_proj": 2}))
    ranks = {factor.module: factor.shape[0] for factor in trained if factor.kind == "A"}
    assert ranks["self_attn.q_proj"] == 2
    assert ranks["self_attn.v_proj"] == 8


def test_alpha_and_dropout_reach_peft() -> None:
    made = peft_config(LoraConfig(rank=4, alpha=12.0, dropout=0.1, alpha_pattern={"q_proj": 3.0}))
    assert (made.r, made.lora_alpha, made.lora_dropout) == (4, 12.0, 0.1)
    assert made.alpha_pattern == {"q_proj": 3.0}


@pytest.mark.parametrize("targets", [["c_attn"], ["q_proj", "query"]])
def test_targets_that_match_nothing_are_named_with_what_there_is(
    small: PretrainedConfig, targets: list[str]
) -> None:
    with pytest.raises(ModelError, match=rf"{targets[-1]}.*q_proj"):
        specs_from_config(small, LoraConfig(target_modules=targets))


def test_targets_that_cannot_be_adapted(small: PretrainedConfig) -> None:
    with pytest.raises(ModelError):
        specs_from_config(small, LoraConfig(target_modules=["input_layernorm"]))


def test_nothing_is_left_on_meta_by_default(small: PretrainedConfig) -> None:
    specs_from_config(small, LoraConfig())
    assert torch.zeros(1).device.type == "cpu"
