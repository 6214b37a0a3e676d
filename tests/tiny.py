"""A tiny random Llama with a real tokenizer, rows for it, and settings for a fast experiment."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

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


def write_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random two-layer Llama, 64 wide, grouped-query attention, seeded."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

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


def write_rows(path: Path) -> Path:
    """JSONL file of 3 clients ("north", "south", "west") with 40 question/answer rows each."""
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


def settings(model: Path, data: Path, output: Path) -> list[str]:
    """Overrides of the defaults."""
    return [
        f'model.id="{model}"',
        f'data.source="{data}"',
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
        f'output="{output}"',
        "name=tiny",
    ]
