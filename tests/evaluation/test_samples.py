"""Answers side by side: the prompts of training, the greedy words of each adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.config import load_config
from cgfedllm.data.encoding import RowEncoder
from cgfedllm.errors import ConfigError
from cgfedllm.evaluation.samples import AnswerSample, sample_answers, to_markdown
from cgfedllm.model import AdaptedModel

Adapters = dict[str, AdapterUpdate]
ROWS = [
    (f"client-{n % 2}", {"question": f"what is {'very ' * (n % 4)}{n}", "answer": f"it is {n}"})
    for n in range(12)
]


def encoder(model: AdaptedModel, *settings: str) -> RowEncoder:
    config = load_config(None, ["data.max_length=96", "data.source=x", *settings]).data
    return RowEncoder(config, model.tokenizer, model.max_positions)


def greedy(model: AdaptedModel, prompt: str, tokens: int) -> str:
    """One token after the other, nothing cached and nothing padded, up to the end mark."""
    ids = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    for _ in range(tokens):
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([ids + new])).logits
        new.append(int(logits[0, -1].argmax()))
        if new[-1] == model.tokenizer.eos_token_id:
            break
    return str(model.tokenizer.decode(new, skip_special_tokens=True)).strip()


def test_answers_are_the_greedy_ones_whatever_the_batch(
    model: AdaptedModel, adapters: Adapters
) -> None:
    found = sample_answers(model, adapters, encoder(model), ROWS, 5, max_new_tokens=6, batch_size=3)
    assert len(found) == 5
    for sample in found:
        assert list(sample.answers) == ["base", "first", "second"]
        for name, adapter in adapters.items():
            model.set_adapter(adapter)
            assert sample.answers[name] == greedy(model, sample.prompt, 6)
    assert len({tuple(sample.answers.values()) for sample in found}) > 1


def test_prompts_are_rendered_as_in_training(model: AdaptedModel, adapters: Adapters) -> None:
    [sample, *_] = sample_answers(
        model, {"base": adapters["base"]}, encoder(model), ROWS, 12, max_new_tokens=1
    )
    source, row = next(pair for pair in ROWS if pair[1]["question"] in sample.prompt)
    assert sample.prompt == (
        f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (sample.source, sample.expected) == (source, row["answer"])


def test_the_same_prompts_are_drawn_again(model: AdaptedModel, adapters: Adapters) -> None:
    def drawn(count: int, seed: int = 0) -> list[str]:
        one = {"base": adapters["base"]}
        found = sample_answers(model, one, encoder(model), ROWS, count, max_new_tokens=1, seed=seed)
        return [sample.prompt for sample in found]

    assert drawn(4) == drawn(6)[:4]
    assert drawn(4) != drawn(4, seed=1)
    assert len(set(drawn(100))) == len(ROWS)


def test_plain_text_is_continued_from_its_middle(model: AdaptedModel, adapters: Adapters) -> None:
    rows: list[Any] = [("all", {"text": "the red sky over the green sea is not blue"})]
    [sample] = sample_answers(
        model, {"base": adapters["base"]}, encoder(model, "data.format=text"), rows, 1,
        max_new_tokens=2,
    )  # fmt: skip
    assert sample.prompt == "the red sky over the"
    assert sample.expected == "green sea is not blue"


def test_an_answer_ends_at_the_end_mark(
    model: AdaptedModel, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    stop = model.tokenizer.eos_token_id

    def generate(**options: Any) -> torch.Tensor:
        asked.update(options)
        ids = options["input_ids"]
        words = torch.tensor(model.tokenizer("so it is")["input_ids"] + [stop, stop])
        return torch.cat([ids, words.expand(len(ids), -1)], dim=1)

    monkeypatch.setattr(model.model, "generate", generate)
    found = sample_answers(
        model, {"base": adapters["base"]}, encoder(model), ROWS, 2, max_new_tokens=8
    )
    assert [sample.answers["base"] for sample in found] == ["so it is"] * 2
    assert stop in asked["eos_token_id"]
    assert asked["do_sample"] is False


def test_rows_that_leave_no_room_are_passed_over(model: AdaptedModel, adapters: Adapters) -> None:
    rows = [*ROWS[:2], ("long", {"question": "why " * 200, "answer": "so"})]
    one = {"base": adapters["base"]}
    found = sample_answers(model, one, encoder(model), rows, 3, max_new_tokens=2)
    assert sorted(sample.source for sample in found) == ["client-0", "client-1"]
    with pytest.raises(ConfigError, match=r"room for 255 more tokens.*256 positions"):
        sample_answers(model, one, encoder(model), rows, 3, max_new_tokens=255)


def test_markdown_holds_whatever_was_said(tmp_path: Path) -> None:
    sample = AnswerSample("north", "why?", "so", {"base": "```\ncode\n```", "mine": ""})
    text = to_markdown([sample], "Answers")
    assert text.startswith("# Answers\n\n## 1. north\n")
    assert "**base**\n\n````text\n```\ncode\n```\n````\n" in text
    assert [line for line in text.splitlines() if line.startswith("**")] == [
        "**prompt**", "**expected**", "**base**", "**mine**",
    ]  # fmt: skip
