"""The frozen base model with its adapter: load, place, read and set adapter values."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.allocator import keep_freed_memory
from cgfedllm.config import EMBEDDED_MODEL, Config, ModelConfig
from cgfedllm.embedded import embedded_model_folder
from cgfedllm.errors import MissingExtraError, ModelError, StorageError
from cgfedllm.lora import (
    ADAPTER_NAME,
    adapter_parameters,
    attach_lora,
    full_spec,
    initial_adapter,
    trainable_spec,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class AdaptedModel:
    """A base model with a LoRA adapter on it, and the tokenizer.

    All simulated clients share one of these: the base stays frozen, adapter values are swapped.

    Parameters
    ----------
    model : PeftModel
        In evaluation mode; training switches to train mode and back.
    tokenizer : PreTrainedTokenizerBase
        The model's own.
    spec : AdapterSpec
        What is trained and sent.
    full_spec : AdapterSpec
        The whole adapter, frozen factors included.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    spec: AdapterSpec
    full_spec: AdapterSpec

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def max_positions(self) -> int | None:
        """Longest sequence the model knows positions for, if it says."""
        value = getattr(self.model.config, "max_position_embeddings", None)
        return int(value) if value is not None else None

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters of `spec`, in its order."""
        parameters = adapter_parameters(self.model)
        return [parameters[factor.name] for factor in self.spec]

    def set_adapter(self, values: AdapterUpdate) -> None:
        """Write adapter values (on `spec` or on `full_spec`) into the model."""
        parameters = adapter_parameters(self.model)
        with torch.no_grad():
            for name, view in values.views().items():
                parameters[name].copy_(torch.from_numpy(view))

    def get_adapter(self, spec: AdapterSpec | None = None) -> AdapterUpdate:
        """Read adapter values out of the model, on `spec` or another subset of the adapter."""
        spec = spec or self.spec
        parameters = adapter_parameters(self.model)
        vector = np.empty(spec.size, np.float32)
        for factor in spec:
            values = parameters[factor.name].detach().to("cpu", torch.float32)
            vector[spec.slices[factor.name]] = values.numpy().reshape(-1)
        return AdapterUpdate(spec, vector)

    def save_merged(self, folder: Path) -> None:
        """Write the base model with the adapter's current values merged in, and the tokenizer.

        The model itself is left as it was.

        Raises
        ------
        ModelError
            If the base is quantised: merging into rounded weights would not give this model.
        StorageError
            If the folder cannot be written.
        """
        if getattr(self.model.get_base_model(), "is_quantized", False):
            raise ModelError(
                "an adapter cannot be merged into an 8- or 4-bit base; "
                "set model.quantization = 'none' in the run's config.toml for the export"
            )
        if folder.exists() and any(folder.iterdir()):
            raise StorageError(f"{folder} is not empty; export to a new folder, or empty this one")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            # beside the target, then renamed: a full disk leaves no half model under its name
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".merging-") as scratch:
                merged = Path(scratch) / folder.name
                base = self.model.get_base_model()
                base.save_pretrained(merged, state_dict=self._merged_state())
                self.tokenizer.save_pretrained(merged)
                merged.replace(folder)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"cannot write the merged model to {folder}: {error}") from error

    def _merged_state(self) -> dict[str, torch.Tensor]:
        """The base model's parameters under their own names, adapted weights as new tensors.

        PEFT merges in place, and taking the change off again would leave rounding behind.
        """
        base = self.model.get_base_model()
        adapted: dict[str, Any] = {
            f"{name}.base_layer.weight": module
            for name, module in base.named_modules()
            if isinstance(module, LoraLayer)
        }
        state = {}
        with torch.no_grad():
            for name, tensor in base.state_dict().items():
                if name in adapted:
                    merged = tensor + adapted[name].get_delta_weight(ADAPTER_NAME)
                    state[name.replace(".base_layer.", ".")] = merged.to(tensor.dtype)
                elif ".lora_" not in name:
                    state[name.replace(".base_layer.", ".")] = tensor
        return state


def load_adapted_model(config: Config) -> AdaptedModel:
    """Load base model and tokenizer, attach the adapter, set its initial values.

    Raises
    ------
    ModelError
        If the model cannot be found or loaded, or the LoRA targets match nothing.
    """
    device = pick_device(config.model)
    if device.type == "cpu":
        keep_freed_memory()
    base = load_base(config.model, device)
    tokenizer = load_tokenizer(config.model)
    model: Any = attach_lora(base, config.lora)
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.float()  # adapters are trained in float32 on any base
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    adapted = AdaptedModel(model, tokenizer, trainable_spec(model), full_spec(model))
    adapted.set_adapter(initial_adapter(adapted.full_spec, config.seed))
    model.eval()
    return adapted


def load_base(config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """The base model alone, on its device, in its dtype.

    Raises
    ------
    ModelError
        If it cannot be found or loaded.
    MissingExtraError
        If 8- or 4-bit loading is asked for without bitsandbytes.
    """
    dtype = pick_dtype(config, device)
    kwargs: dict[str, Any] = {"dtype": dtype}
    if config.quantization != "none":
        kwargs["quantization_config"] = _bitsandbytes(config, device, dtype)
        kwargs["device_map"] = {"": device}
    base = _from_pretrained(AutoModelForCausalLM, config, **kwargs)
    if config.quantization == "none":
        base = base.to(device)
    base.requires_grad_(False)
    return base  # type: ignore[no-any-return]


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token in any case.

    Raises
    ------
    ModelError
        If it cannot be found.
    """
    tokenizer = _from_pretrained(AutoTokenizer, config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer  # type: ignore[no-any-return]


def load_model_config(config: ModelConfig) -> PretrainedConfig:
    """The model's configuration; weights are not touched.

    Raises
    ------
    ModelError
        If it cannot be found.
    """
    return _from_pretrained(AutoConfig, config)  # type: ignore[no-any-return]


def pick_device(config: ModelConfig) -> torch.device:
    """The device asked for, or the best one there is.

    Raises
    ------
    ModelError
        If CUDA is asked for and not there.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ModelError(f"model.device: {config.device!r} is not a device ({error})") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "model.device: 'cuda' is asked for, but torch sees no GPU here; "
            "use 'auto' or 'cpu', or install a CUDA build of torch"
        )
    return device


def pick_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """float32 on CPU and bfloat16 on GPU, unless told otherwise."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[config.dtype]


def resolve_model_id(config: ModelConfig) -> str:
    """Folder or hub id to load from; the embedded model is unpacked on first use."""
    return str(embedded_model_folder()) if config.id == EMBEDDED_MODEL else config.id


def _from_pretrained(loader: Any, config: ModelConfig, **kwargs: Any) -> Any:
    # a bar for half a second of loading would only break the run's own display
    disable_progress_bar()
    source = resolve_model_id(config)
    looks_local = source.startswith((".", "/", "~"))
    if looks_local and not Path(source).is_dir():
        raise ModelError(
            f"model.id: {source} does not exist; give a folder in Hugging Face layout, a hub id, "
            f"or {EMBEDDED_MODEL!r}"
        )
    try:
        return loader.from_pretrained(
            source,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            **kwargs,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(
            f"model.id: {config.id!r} cannot be loaded: {first_line}\n"
            "give a local folder in Hugging Face layout, a hub id this machine can reach (or has "
            f"in its cache), or {EMBEDDED_MODEL!r}"
        ) from error


def _bitsandbytes(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            f"model.quantization = {config.quantization!r} needs bitsandbytes: "
            "pip install 'cgfedllm[gpu]'"
        )
    if device.type != "cuda":
        raise ModelError(
            f"model.quantization = {config.quantization!r} needs a CUDA GPU; "
            "set it to 'none' on this machine"
        )
    from transformers import BitsAndBytesConfig

    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4"
    )
