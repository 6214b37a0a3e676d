"""What is saved is what PEFT itself loads, and what is damaged is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.config import load_config
from cgfedllm.errors import AdapterError, CheckpointError
from cgfedllm.model import load_adapted_model
from cgfedllm.peft_format import CONFIG, EMBEDDED_HUB_ID, WEIGHTS, load_adapter, save_adapter
from cgfedllm.workspace import Workspace

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture
def config(tiny_model):
    def make(*overrides: str):
        base = [f'model.id="{tiny_model}"', "model.device=cpu", "lora.rank=4"]
        return load_config(None, [*base, *overrides])

    return make


def random_values(spec, seed: int = 0) -> AdapterUpdate:
    rng = np.random.default_rng(seed)
    return AdapterUpdate(spec, rng.normal(scale=0.1, size=spec.size).astype(np.float32))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


# ---- what PEFT makes of it ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ('lora.target_modules=["all-linear"]',),
        ("lora.rank_pattern={v_proj=2}", "lora.alpha_pattern={q_proj=32.0}"),
        ("lora.alpha=12.5", "lora.dropout=0.1"),
    ],
    ids=["default", "all-linear", "patterns", "fractional alpha"],
)
def test_plain_peft_loads_the_folder_and_answers_alike(config, tiny_model, tmp_path, overrides):
    settings = config(*overrides)
    ours = load_adapted_model(settings)
    adapter = random_values(ours.full_spec)
    ours.set_adapter(adapter)
    save_adapter(tmp_path, adapter, settings)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    unadapted = logits(base)
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(ours.model))
    assert not torch.allclose(logits(theirs), unadapted, atol=1e-2)


def test_a_frozen_a_is_in_the_folder_too(config, tiny_model, tmp_path):
    settings = config("lora.freeze_a=true", "seed=3")
    workspace = Workspace(settings, tmp_path / "run")
    trained = random_values(workspace.spec)
    assert {factor.kind for factor in trained.spec} == {"B"}
    save_adapter(tmp_path / "adapter", workspace.whole(trained), settings)
    names = load_file(tmp_path / "adapter" / WEIGHTS)
    assert sum(".lora_A." in name for name in names) == sum(".lora_B." in name for name in names)
    workspace.reset_frozen_factors()
    workspace.model.set_adapter(trained)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs), logits(workspace.model.model))


# ---- the configuration file ---------------------------------------------------------------------


def test_the_configuration_is_valid_sorted_json_with_the_settings_in_it(
    config, tiny_model, tmp_path
):
    settings = config("lora.dropout=0.05", 'lora.target_modules=["v_proj", "q_proj"]')
    model = load_adapted_model(settings)
    save_adapter(tmp_path, model.get_adapter(), settings)
    text = (tmp_path / CONFIG).read_text()
    saved = json.loads(text)
    assert list(saved) == sorted(saved)
    assert text.endswith("}\n")
    assert saved["r"] == 4
    assert saved["lora_alpha"] == 16.0
    assert saved["lora_dropout"] == 0.05
    assert saved["target_modules"] == ["q_proj", "v_proj"]
    assert saved["task_type"] == "CAUSAL_LM"
    assert saved["peft_type"] == "LORA"
    assert saved["inference_mode"] is True
    assert saved["base_model_name_or_path"] == str(tiny_model)


def test_equal_adapters_give_equal_bytes(config, tmp_path):
    settings = config()
    adapter = random_values(load_adapted_model(settings).full_spec)
    for folder in ("a", "b"):
        save_adapter(tmp_path / folder, adapter, settings)
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_adapter_of_the_embedded_model_names_a_base_that_others_can_load(config, tmp_path):
    settings = config('model.id="embedded"')
    spec = random_values(load_adapted_model(config()).full_spec)
    save_adapter(tmp_path, spec, settings)
    saved = json.loads((tmp_path / CONFIG).read_text())
    assert saved["base_model_name_or_path"] == EMBEDDED_HUB_ID


# ---- reading it back ----------------------------------------------------------------------------


@pytest.fixture
def saved(config, tmp_path):
    settings = config()
    adapter = random_values(load_adapted_model(settings).full_spec)
    save_adapter(tmp_path, adapter, settings)
    return tmp_path, adapter


def test_an_adapter_comes_back_bit_for_bit(saved):
    folder, adapter = saved
    loaded = load_adapter(folder).views()
    assert loaded.keys() == adapter.views().keys()
    assert all((loaded[name] == view).all() for name, view in adapter.views().items())


def test_an_adapter_that_peft_saved_is_read_as_well(config, tmp_path):
    model = load_adapted_model(config())
    adapter = random_values(model.full_spec)
    model.set_adapter(adapter)
    model.model.save_pretrained(tmp_path)
    loaded = load_adapter(tmp_path).views()
    assert all((loaded[name] == view).all() for name, view in adapter.views().items())


def test_saving_again_replaces_the_old_values(saved, config):
    folder, adapter = saved
    other = random_values(adapter.spec, seed=1)
    save_adapter(folder, other, config())
    assert load_adapter(folder).norm() == pytest.approx(other.norm())


def cut_short(data: bytes) -> bytes:
    return data[: len(data) // 2]


def one_bit_flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def other_content(data: bytes) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\n"


@pytest.mark.parametrize("damage", [cut_short, one_bit_flipped, other_content, lambda data: b""])
def test_a_damaged_file_is_refused_by_name(saved, damage):
    folder, _ = saved
    path = folder / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} is damaged"):
        load_adapter(folder)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} does not exist"):
        load_adapter(tmp_path)


def test_a_file_without_lora_factors_is_no_adapter(tmp_path):
    save_file({"model.embed_tokens.weight": np.ones((2, 2), np.float32)}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=rf"{WEIGHTS} holds no LoRA factors"):
        load_adapter(tmp_path)
