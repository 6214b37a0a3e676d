"""Adapters as PEFT writes them: a folder any PEFT user can load, without this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.config import EMBEDDED_MODEL, Config
from cgfedllm.errors import AdapterError
from cgfedllm.lora import peft_config
from cgfedllm.storage import load_tensors, save_tensors, write_atomic

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def save_adapter(folder: Path, adapter: AdapterUpdate, config: Config) -> None:
    """Write an adapter in PEFT's format.

    Parameters
    ----------
    folder : Path
        Made if missing.
    adapter : AdapterUpdate
        All factors, A and B.
    config : Config
        Names the base model and the LoRA settings.

    Raises
    ------
    StorageError
        If the disk refuses; what was there before is untouched.
    """
    settings = _plain(peft_config(config.lora).to_dict())
    settings["base_model_name_or_path"] = (
        EMBEDDED_HUB_ID if config.model.id == EMBEDDED_MODEL else config.model.id
    )
    settings["revision"] = config.model.revision
    settings["inference_mode"] = True
    save_tensors(folder / WEIGHTS, dict(adapter.views()), {"format": "pt"})
    write_atomic(folder / CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def load_adapter(folder: Path) -> AdapterUpdate:
    """Read an adapter folder's values, factors in the file's order of names.

    Raises
    ------
    CheckpointError
        If the file is missing or damaged.
    AdapterError
        If it holds no LoRA factors.
    """
    tensors, _ = load_tensors(folder / WEIGHTS)
    arrays = {name: np.asarray(values, np.float32) for name, values in tensors.items()}
    if not any(".lora_" in name for name in arrays):
        raise AdapterError(f"{folder / WEIGHTS} holds no LoRA factors")
    spec = AdapterSpec.from_shapes({name: values.shape for name, values in arrays.items()})
    return AdapterUpdate.from_arrays(spec, arrays)


def _plain(value: Any) -> Any:
    """PEFT's settings as JSON can hold them: sets sorted, enums by value."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)
