"""Base models: found, loaded, adapted and merged, or refused with a remedy."""

from __future__ import annotations

import importlib.util
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.config import Config, ModelConfig, load_config
from cgfedllm.errors import MissingExtraError, ModelError, StorageError
from cgfedllm.lora import adapter_parameters, initial_adapter
from cgfedllm.model import (
    AdaptedModel,
    load_adapted_model,
    load_model_config,
    load_tokenizer,
    pick_device,
    pick_dtype,
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10]])
CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_model):
    """Configuration of the tiny model with an adapter of rank 4."""

    def make(*overrides: str) -> Config:
        base = [f'model.id="{tiny_model}"', "model.device=cpu", "lora.rank=4"]
        return load_config(None, [*base, *overrides])

    return make


@pytest.fixture
def load(config):
    return lambda *overrides: load_adapted_model(config(*overrides))


def save_random(folder: Path, kind: str, tokenizer, **settings: object) -> Path:
    """A random model of another architecture as a local folder."""
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = AutoConfig.for_model(kind, **sizes | settings)
        AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def randomised(model: AdaptedModel, seed: int = 0) -> AdapterUpdate:
    """Set random values for the whole adapter, B included."""
    values = np.random.default_rng(seed).normal(scale=0.1, size=model.full_spec.size)
    adapter = AdapterUpdate(model.full_spec, values.astype(np.float32))
    model.set_adapter(adapter)
    return adapter


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()


# ---- finding and loading ------------------------------------------------------------------------


def test_a_local_folder_is_loaded_frozen_in_evaluation_mode(load):
    model = load()
    assert not model.model.training
    assert model.device == CPU
    assert model.max_positions == 256
    trained = {name for name, p in model.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)


def test_a_fresh_adapter_does_not_change_the_base_model(load, tiny_model):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.testing.assert_close(logits(load().model), logits(base))


@pytest.mark.parametrize("model_id", ["./no-such-model", "/no/such/model", "~/no-such-model"])
@pytest.mark.parametrize("loader", [load_model_config, load_tokenizer])
def test_a_missing_folder_is_named_with_a_remedy(loader, model_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no.such.model does not exist; give a folder"):
        loader(ModelConfig(id=model_id))


def test_an_unknown_hub_id_is_named_with_a_remedy_when_there_is_no_network():
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_model_config(ModelConfig(id="nobody/no-such-model"))
    assert "'nobody/no-such-model'" in str(caught.value)
    assert "give a local folder" in str(caught.value)
    assert "'embedded'" in str(caught.value)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_adapted_model(load_config(None, [f'model.id="{tmp_path}"']))


@pytest.mark.parametrize("damage", ["cut short", "empty", "gone"])
def test_damaged_weights_are_a_model_error(config, tiny_model, tmp_path, damage):
    folder = shutil.copytree(tiny_model, tmp_path / "damaged")
    weights = folder / "model.safetensors"
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[: 5000 if damage == "cut short" else 0])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_adapted_model(config(f'model.id="{folder}"'))


@pytest.mark.parametrize("kind", ["gemma2", "gptj"])
def test_models_without_the_fast_attention_kernel_load_with_their_own(
    config, tokenizer, tmp_path, kind
):
    """Some architectures (soft-capping, sinks, older code) cannot use PyTorch's kernel."""
    folder = save_random(
        tmp_path / kind, kind, tokenizer, n_embd=32, n_layer=2, n_head=4, rotary_dim=4
    )
    model = load_adapted_model(config(f'model.id="{folder}"', 'lora.target_modules=["q_proj"]'))
    assert torch.isfinite(logits(model.model)).all()


def test_the_fast_kernel_is_used_where_the_model_knows_it(load):
    assert load().model.config._attn_implementation == "sdpa"


# ---- device, dtype, quantisation ----------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """Pretend there is, or is not, a GPU."""

    def present(there: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)

    return present


@pytest.mark.parametrize(("there", "kind", "dtype"), [(False, "cpu", "32"), (True, "cuda", "b16")])
def test_auto_takes_the_gpu_in_bfloat16_if_there_is_one_else_the_cpu_in_float32(
    gpu, there, kind, dtype
):
    gpu(there)
    auto = ModelConfig()
    device = pick_device(auto)
    assert device.type == kind
    assert pick_dtype(auto, device) == (torch.bfloat16 if dtype == "b16" else torch.float32)


def test_what_is_asked_for_is_taken(gpu):
    gpu(True)
    assert pick_device(ModelConfig(device="cpu")) == CPU
    assert pick_device(ModelConfig(device="cuda:1")) == torch.device("cuda", 1)
    assert pick_dtype(ModelConfig(dtype="float16"), CPU) == torch.float16


def test_a_gpu_that_is_not_there_is_refused_with_a_remedy(gpu):
    gpu(False)
    with pytest.raises(ModelError, match=r"model\.device: 'cuda'.*no GPU.*use 'auto' or 'cpu'"):
        pick_device(ModelConfig(device="cuda"))


def test_a_device_that_is_none_is_refused():
    with pytest.raises(ModelError, match=r"model\.device: 'toaster' is not a device"):
        pick_device(ModelConfig(device="toaster"))


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantising_without_bitsandbytes_names_the_extra(load, monkeypatch, bits):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(MissingExtraError, match=rf"'{bits}' needs bitsandbytes: pip install .*gpu"):
        load(f'model.quantization="{bits}"')


def test_quantising_on_a_cpu_is_refused(load, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: find("json" if name[:4] == "bits" else name)
    )
    with pytest.raises(ModelError, match="needs a CUDA GPU"):
        load('model.quantization="8bit"')


# ---- adapter values -----------------------------------------------------------------------------


def test_adapter_values_come_back_as_they_were_set(load):
    model = load()
    adapter = randomised(model)
    assert (model.get_adapter(model.full_spec).vector == adapter.vector).all()


def test_values_read_out_are_a_copy(load):
    model = load()
    before = model.get_adapter()
    kept = before.vector.copy()
    randomised(model)
    assert (before.vector == kept).all()


def test_trainable_parameters_are_those_of_the_spec_in_its_order(load):
    model = load()
    shapes = [tuple(parameter.shape) for parameter in model.trainable_parameters()]
    assert shapes == [factor.shape for factor in model.spec]
    assert all(parameter.requires_grad for parameter in model.trainable_parameters())


def test_freezing_a_leaves_b_to_train_and_send(load):
    model = load("lora.freeze_a=true")
    assert {factor.kind for factor in model.spec} == {"B"}
    assert {factor.kind for factor in model.full_spec} == {"A", "B"}
    whole = randomised(model)
    b = model.get_adapter()
    assert all((view == whole.views()[name]).all() for name, view in b.views().items())


def test_setting_b_alone_leaves_a_as_it_is(load):
    model = load("lora.freeze_a=true")
    whole = randomised(model)
    model.set_adapter(AdapterUpdate.zeros(model.spec))
    after = model.get_adapter(model.full_spec).views()
    for factor in model.full_spec:
        expected = whole.views()[factor.name] if factor.kind == "A" else 0
        assert (after[factor.name] == expected).all()


def test_an_adapter_is_float32_on_a_bfloat16_base(load):
    model = load("model.dtype=bfloat16")
    parameters = adapter_parameters(model.model)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert model.model.get_input_embeddings().weight.dtype == torch.bfloat16
    adapter = randomised(model)
    assert (model.get_adapter(model.full_spec).vector == adapter.vector).all()
    assert torch.isfinite(logits(model.model)).all()


# ---- initial values -----------------------------------------------------------------------------


def test_the_initial_adapter_is_the_same_to_the_bit_for_the_same_seed(load):
    first, second = load("seed=3").get_adapter(), load("seed=3").get_adapter()
    assert first.vector.tobytes() == second.vector.tobytes()
    assert (first.vector != load("seed=4").get_adapter().vector).any()


def test_the_initial_adapter_does_not_depend_on_dtype_or_on_torchs_random_numbers(load):
    torch.manual_seed(1)
    first = load().get_adapter()
    torch.manual_seed(2)
    assert first.vector.tobytes() == load("model.dtype=bfloat16").get_adapter().vector.tobytes()


def test_initial_a_is_uniform_within_its_bound_and_b_is_zero(load):
    for factor, view in zip(load().spec, load().get_adapter().views().values(), strict=True):
        if factor.kind == "B":
            assert not view.any()
        else:
            bound = 1 / np.sqrt(factor.shape[1])
            assert np.abs(view).max() <= bound
            assert view.std() == pytest.approx(bound / np.sqrt(3), rel=0.2)


def test_initial_values_are_known_for_good():
    """Other machines derive the same start from spec and seed; a change here breaks them."""
    from cgfedllm.adapter import AdapterSpec

    spec = AdapterSpec.from_shapes({"m.0.q.lora_A.weight": (2, 4), "m.0.q.lora_B.weight": (3, 2)})
    vector = initial_adapter(spec, seed=0).vector
    rng = np.random.Generator(np.random.Philox(key=[0, 0]))
    expected = rng.random(8, dtype=np.float32) * np.float32(1.0) - np.float32(0.5)
    assert (vector[:8] == expected).all()
    assert not vector[8:].any()


# ---- what is adapted ----------------------------------------------------------------------------


def adapted_modules(model: AdaptedModel) -> dict[str, int]:
    """Rank of every adapted module of the first layer."""
    return {
        factor.module.rsplit(".", 1)[-1]: factor.shape[0]
        for factor in model.full_spec
        if factor.kind == "A" and factor.layer == 0
    }


def test_the_default_targets_are_the_attention_projections_of_every_layer(load):
    model = load()
    assert adapted_modules(model) == dict.fromkeys(ATTENTION, 4)
    assert {factor.layer for factor in model.full_spec} == {0, 1}


def test_all_linear_takes_every_linear_layer_but_the_head(load):
    model = load('lora.target_modules=["all-linear"]')
    assert set(adapted_modules(model)) == {*ATTENTION, "gate_proj", "up_proj", "down_proj"}
    assert all(factor.layer is not None for factor in model.full_spec)


def test_rank_pattern_gives_some_modules_another_rank(load):
    model = load("lora.rank_pattern={v_proj=2}")
    assert adapted_modules(model) == {"q_proj": 4, "k_proj": 4, "v_proj": 2, "o_proj": 4}
    adapter = randomised(model)
    assert (model.get_adapter().vector == adapter.vector).all()


def test_alpha_pattern_scales_some_modules_otherwise(load):
    plain, scaled = load(), load("lora.alpha_pattern={v_proj=64.0}")
    randomised(plain)
    randomised(scaled)
    assert not torch.allclose(logits(plain.model), logits(scaled.model))


def test_targets_that_match_nothing_are_refused_with_the_names_there_are(load):
    with pytest.raises(ModelError, match=r"lora\.target_modules: .*called query, c_attn") as caught:
        load('lora.target_modules=["q_proj", "query", "c_attn"]')
    for name in (*ATTENTION, "gate_proj", "down_proj"):
        assert name in str(caught.value)


def test_targets_that_cannot_be_adapted_are_refused(load):
    with pytest.raises(ModelError, match="PEFT cannot adapt this model"):
        load('lora.target_modules=["input_layernorm"]')


# ---- merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ['["q_proj","v_proj"]', '["all-linear"]'])
def test_the_merged_model_answers_like_base_and_adapter(load, tmp_path, targets):
    model = load(f"lora.target_modules={targets}")
    before = logits(model.model)
    randomised(model)
    expected = logits(model.model)
    assert not torch.allclose(before, expected, atol=1e-2)
    model.save_merged(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_the_merged_folder_is_an_ordinary_model_folder(load, tiny_model, tmp_path):
    model = load()
    randomised(model)
    model.save_merged(tmp_path)
    merged = load_file(tmp_path / "model.safetensors")
    base = load_file(tiny_model / "model.safetensors")
    assert {name: t.shape for name, t in merged.items()} == {n: t.shape for n, t in base.items()}
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {
        f"model.layers.{i}.self_attn.{name}.weight" for i in (0, 1) for name in ATTENTION
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("the answer")["input_ids"] == model.tokenizer("the answer")["input_ids"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_leaves_the_live_model_as_it_was_bit_for_bit(load, tmp_path, dtype):
    model = load(f"model.dtype={dtype}")
    randomised(model)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    answers = logits(model.model)
    model.save_merged(tmp_path)
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert torch.equal(logits(model.model), answers)


def test_a_quantised_base_is_not_merged(load, tmp_path):
    model = load()
    model.model.get_base_model().is_quantized = True
    with pytest.raises(ModelError, match=r"cannot be merged.*model\.quantization = 'none'"):
        model.save_merged(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@contextmanager
def files_limited_to(size: int):
    """A full disk for everything this process writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_merged_model_that_does_not_fit_on_the_disk_is_a_storage_error(load, tmp_path):
    model = load()
    randomised(model)
    before = logits(model.model)
    with pytest.raises(StorageError, match="cannot write the merged model"), files_limited_to(9999):
        model.save_merged(tmp_path / "merged")
    assert torch.equal(logits(model.model), before)


def test_a_merged_model_that_may_not_be_written_is_a_storage_error(load, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write the merged model"):
        load().save_merged(tmp_path / "file" / "merged")


# ---- tokenizers ---------------------------------------------------------------------------------


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_of_text(config, tiny_model):
    assert AutoTokenizer.from_pretrained(tiny_model).pad_token is None
    tokenizer = load_tokenizer(config().model)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


def test_a_padding_token_of_its_own_is_kept(make_tokenizer, tmp_path):
    make_tokenizer(pad_token="</s>").save_pretrained(tmp_path)
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "copy.json")
    assert load_tokenizer(ModelConfig(id=str(tmp_path))).pad_token == "</s>"
