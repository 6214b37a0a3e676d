"""A tiny random Llama with a real tokenizer, in the layout of any local model folder."""

from __future__ import annotations

import os

# before torch: two tests' worth of threads on two cores only get in each other's way
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cgfedllm.config import Config, load_config

# the same examples everywhere, and no test that fails because a machine was busy
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLOURS = ["red", "green", "blue", "white", "black", "brown", "grey", "pink"]
THINGS = ["sky", "grass", "snow", "coal", "rose", "bear", "road", "sea", "sun", "moon"]


def build_tokenizer(chat_template: str | None = CHATML, **special: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["user assistant system what is the answer to the question"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, **{"eos_token": "<|im_end|>", **special}
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer


@pytest.fixture(scope="session")
def tiny_model(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """Folder of a random two-layer Llama, 64 wide, grouped-query attention, seeded."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-model")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL file of 3 clients ("north", "south", "west") with 40 question/answer rows each."""
    path = tmp_path_factory.mktemp("tiny-data") / "rows.jsonl"
    rows = [
        {
            "client": client,
            "question": f"what is the colour of the {thing} number {index} in the {client}",
            "answer": f"the {thing} is {COLOURS[(index * 3 + at + len(client)) % len(COLOURS)]}",
        }
        for client in ("north", "south", "west")
        for index in range(4)
        for at, thing in enumerate(THINGS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tiny_config(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes a small, fast experiment; arguments are overrides such as ``"lora.rank=2"``."""

    def make(*overrides: str, **changes: Any) -> Config:
        base = [
            f'model.id="{tiny_model}"',
            f'data.source="{tiny_data}"',
            "data.format=qa",
            "data.max_length=96",
            "data.splits.validation=0.1",
            "data.splits.heldout=0.1",
            "lora.rank=4",
            "training.batch_size=4",
            "training.local_steps=2",
            "training.lr=5e-3",
            "federation.rounds=3",
            "tracking.tensorboard=false",
            f'output="{tmp_path / "runs"}"',
            "name=tiny",
        ]
        config = load_config(None, [*base, *overrides])
        return config.with_overrides(changes) if changes else config

    return make
