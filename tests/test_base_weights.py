"""Fingerprints of base weights: alike for loads of one checkpoint, different for another's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import cgfedllm
from cgfedllm import events
from cgfedllm.base_weights import BaseWeights, base_weights
from cgfedllm.config import Config, LoraConfig
from cgfedllm.errors import FederationError
from cgfedllm.lora import attach_lora
from cgfedllm.workspace import Workspace

MakeConfig = Callable[..., Config]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def told(model: Any) -> BaseWeights:
    return base_weights(model, "organisation/model")


def saved(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tuned(tiny_model: Path, tmp_path: Path, tokenizer: Any) -> Path:
    """The same model after a little training of all its matrices."""
    model = load(tiny_model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += 1e-3 * torch.ones_like(parameter)
    return saved(tmp_path / "tuned", model, tokenizer)


def test_one_checkpoint_is_alike_in_float32_and_bfloat16(tiny_model: Path) -> None:
    assert told(load(tiny_model)) == told(load(tiny_model, torch.bfloat16))


def test_a_checkpoint_stored_in_16_bits_is_alike_in_float16_too(
    tiny_model: Path, tmp_path: Path, tokenizer: Any
) -> None:
    stored = saved(tmp_path / "stored", load(tiny_model, torch.bfloat16), tokenizer)
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    assert len({told(load(stored, kind)) for kind in kinds}) == 1


def test_other_weights_of_the_same_shapes_differ(tiny_model: Path, tuned: Path) -> None:
    one, other = told(load(tiny_model)), told(load(tuned))
    assert one.vectors != other.vectors  # the embedding is among them
    assert one.matrices != other.matrices
    assert one.differs(other)


def test_an_adapter_changes_nothing(tiny_model: Path) -> None:
    bare = told(load(tiny_model))
    for targets in (["q_proj", "v_proj"], ["all-linear"], ["embed_tokens"]):
        adapted = attach_lora(load(tiny_model), LoraConfig(rank=2, target_modules=targets))
        assert told(adapted.get_base_model()) == bare


def test_quantised_matrices_are_left_out_and_the_rest_still_compares(
    tiny_model: Path, tuned: Path
) -> None:
    """What bitsandbytes leaves of a model: whole numbers where linear layers were."""
    whole, quantised = load(tiny_model), load(tiny_model)
    for module in quantised.modules():
        if isinstance(module, torch.nn.Linear) and module is not quantised.lm_head:
            codes = torch.zeros(module.weight.numel() // 2, 1, dtype=torch.uint8)
            module.weight = torch.nn.Parameter(codes, requires_grad=False)
    told_of = told(quantised)
    assert told_of.matrices == ""
    assert told_of.vectors == told(whole).vectors
    assert not told_of.differs(told(whole))
    assert told_of.differs(told(load(tuned)))


def test_of_a_folder_only_the_last_part_is_told(tiny_model: Path) -> None:
    model = load(tiny_model)
    assert base_weights(model, "/home/somebody/models/small").model == "small"
    assert base_weights(model, "~/small").model == "small"
    assert base_weights(model, "organisation/small").model == "organisation/small"


def test_a_node_with_another_checkpoint_is_left_out(
    tiny_config: MakeConfig, tuned: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has one model and its clients, of the very same adapter, another."""
    from cgfedllm.federation import client_app

    node_workspace = client_app.node_workspace

    def elsewhere(context: Any) -> Workspace:
        workspace = node_workspace(context)
        other = workspace.config.with_overrides({"model.id": str(tuned)})
        return Workspace(other, workspace.run_dir)

    heard: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Notice) and event.level == "warning":
            heard.append(event.text)

    monkeypatch.setattr(client_app, "node_workspace", elsewhere)
    with pytest.raises(FederationError, match="other base weights"):
        cgfedllm.run(tiny_config(), listeners=[listen])
    assert len(heard) == 3
    assert f"its model is 'tuned', this run's is {tiny_model.name!r}" in heard[0]
