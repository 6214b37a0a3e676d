"""Shapes of well-known models, so that a plan needs neither hub nor weights.

Only the numbers that decide shapes, as in each model's published config.json. A model that is not
here is looked up in a local folder or on the hub.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Shape = tuple[str, int, int, int, int, int, int, bool]

#            type     vocab   hidden   mlp  layers heads kv  tied
_LLAMA_7B: Shape = ("llama", 32_000, 4096, 11_008, 32, 32, 32, False)
_LLAMA_13B: Shape = ("llama", 32_000, 5120, 13_824, 40, 40, 40, False)
_LLAMA3_8B: Shape = ("llama", 128_256, 4096, 14_336, 32, 32, 8, False)
_SMOLLM2_135M: Shape = ("llama", 49_152, 576, 1536, 30, 9, 3, True)
_SMOLLM2_360M: Shape = ("llama", 49_152, 960, 2560, 32, 15, 5, True)

_SHAPES: dict[str, Shape] = {
    "embedded": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-360M": _SMOLLM2_360M,
    "HuggingFaceTB/SmolLM2-360M-Instruct": _SMOLLM2_360M,
    "Qwen/Qwen1.5-1.8B": ("qwen2", 151_936, 2048, 5504, 24, 16, 16, False),
    "Qwen/Qwen1.5-7B": ("qwen2", 151_936, 4096, 11_008, 32, 32, 32, False),
    "Qwen/Qwen2.5-0.5B": ("qwen2", 151_936, 896, 4864, 24, 14, 2, True),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", 151_936, 896, 4864, 24, 14, 2, True),
    "Qwen/Qwen2.5-7B": ("qwen2", 152_064, 3584, 18_944, 28, 28, 4, False),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", 152_064, 3584, 18_944, 28, 28, 4, False),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": ("llama", 32_000, 2048, 5632, 22, 32, 4, False),
    "huggyllama/llama-13b": _LLAMA_13B,
    "huggyllama/llama-7b": _LLAMA_7B,
    "meta-llama/Llama-2-13b-hf": _LLAMA_13B,
    "meta-llama/Llama-2-7b-chat-hf": _LLAMA_7B,
    "meta-llama/Llama-2-7b-hf": _LLAMA_7B,
    "meta-llama/Llama-3.1-8B": _LLAMA3_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA3_8B,
    "meta-llama/Llama-3.2-1B": ("llama", 128_256, 2048, 8192, 16, 32, 8, True),
    "meta-llama/Llama-3.2-3B": ("llama", 128_256, 3072, 8192, 28, 24, 8, True),
    "meta-llama/Meta-Llama-3-8B": _LLAMA3_8B,
    "mistralai/Mistral-7B-v0.1": ("mistral", 32_000, 4096, 14_336, 32, 32, 8, False),
    "mistralai/Mistral-7B-v0.3": ("mistral", 32_768, 4096, 14_336, 32, 32, 8, False),
}


def known_architectures() -> list[str]:
    """Ids that `architecture` knows."""
    return list(_SHAPES)


def architecture(model_id: str) -> PretrainedConfig | None:
    """The configuration of a well-known model, None for others.

    Good for shapes only: everything else has transformers' defaults.
    """
    if model_id not in _SHAPES:
        return None
    from transformers import AutoConfig

    kind, vocab, hidden, mlp, layers, heads, kv_heads, tied = _SHAPES[model_id]
    return AutoConfig.for_model(
        kind,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )
