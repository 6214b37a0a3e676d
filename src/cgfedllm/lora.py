"""LoRA through PEFT: the configuration, the spec it leads to, and its initial values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.config import LoraConfig
from cgfedllm.errors import ModelError

if TYPE_CHECKING:
    import peft
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

ADAPTER_NAME = "default"


def peft_config(lora: LoraConfig) -> peft.LoraConfig:
    """PEFT's own configuration object for ours."""
    import peft

    targets: str | list[str] = lora.target_modules
    if lora.target_modules == ["all-linear"]:
        targets = "all-linear"
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT scales with floats just as well
        lora_dropout=lora.dropout,
        target_modules=targets,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        bias="none",
        task_type="CAUSAL_LM",
    )


def attach_lora(model: PreTrainedModel, lora: LoraConfig) -> peft.PeftModel:
    """Freeze the base model and put an adapter on it.

    Raises
    ------
    ModelError
        If a target matches no module of the model; the message lists names that exist.
    """
    import peft
    import torch

    linear = sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
    )
    names = [name for name, _ in model.named_modules()]
    if lora.target_modules != ["all-linear"]:
        absent = [
            target
            for target in lora.target_modules
            if not any(name == target or name.endswith(f".{target}") for name in names)
        ]
        if absent:
            raise ModelError(
                f"lora.target_modules: no module of this model is called {', '.join(absent)}; "
                f"linear layers it has: {', '.join(linear)}"
            )
    try:
        adapted = peft.get_peft_model(model, peft_config(lora), adapter_name=ADAPTER_NAME)
    except (ValueError, TypeError) as error:
        raise ModelError(f"PEFT cannot adapt this model: {error}") from error
    if lora.freeze_a:
        for name, parameter in adapted.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    return adapted


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """All adapter parameters under the names PEFT saves them with, in model order."""
    return {
        name.replace(f".{ADAPTER_NAME}.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def trainable_spec(model: torch.nn.Module) -> AdapterSpec:
    """Spec of what is trained and sent: all factors, or the B factors under `freeze_a`."""
    return AdapterSpec.from_shapes(
        {n: p.shape for n, p in adapter_parameters(model).items() if p.requires_grad}
    )


def full_spec(model: torch.nn.Module) -> AdapterSpec:
    """Spec of the whole adapter, frozen factors included."""
    return AdapterSpec.from_shapes({n: p.shape for n, p in adapter_parameters(model).items()})


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device, where tensors have shapes but no memory.

    Raises
    ------
    ModelError
        If it is not a causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        except ValueError as error:
            name = config.name_or_path or config.model_type
            raise ModelError(f"model.id: {name!r} is no causal LM: {error}") from None
    return model


def specs_from_config(
    config: PretrainedConfig, lora: LoraConfig
) -> tuple[AdapterSpec, AdapterSpec]:
    """(trained spec, full spec) from a model's configuration alone; no weight is loaded.

    Raises
    ------
    ModelError
        As `meta_model` and `attach_lora`.
    """
    import torch

    with torch.device("meta"):
        model = attach_lora(meta_model(config), lora)
    return trainable_spec(model), full_spec(model)


def initial_adapter(spec: AdapterSpec, seed: int) -> AdapterUpdate:
    """Starting values: A uniform in +-1/sqrt(in) (PEFT's Kaiming default), B zero.

    Drawn with numpy from the seed and the position of the factor alone, so that every machine
    that knows spec and seed has the same bits, whatever its device or torch version.
    """
    start = AdapterUpdate.zeros(spec)
    for index, factor in enumerate(spec):
        if factor.kind == "A":
            rng = np.random.Generator(np.random.Philox(key=[seed, index]))
            bound = 1.0 / math.sqrt(factor.shape[1])
            values = rng.random(factor.size, dtype=np.float32) * np.float32(2 * bound)
            start.vector[spec.slices[factor.name]] = values - np.float32(bound)
    return start
