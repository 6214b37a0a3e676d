"""What the model says: answers to held-out prompts, of several adapters side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cgfedllm import events
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.data.encoding import RowEncoder
from cgfedllm.data.rows import Row
from cgfedllm.errors import ConfigError
from cgfedllm.model import AdaptedModel
from cgfedllm.seeding import generator


@dataclass
class AnswerSample:
    """One prompt and what was made of it.

    Parameters
    ----------
    source : str
        Whose row it is.
    prompt : str
        What the model was given, marks of the chat template included.
    expected : str
        The row's own answer.
    answers : dict of str to str
        By label of the adapter.
    """

    source: str
    prompt: str
    expected: str
    answers: dict[str, str] = field(default_factory=dict)


def sample_answers(
    model: AdaptedModel,
    adapters: Mapping[str, AdapterUpdate],
    encoder: RowEncoder,
    rows: Sequence[tuple[str, Row]],
    count: int,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    seed: int = 0,
) -> list[AnswerSample]:
    """Let every adapter answer the same randomly drawn prompts, greedily.

    A prompt is a row up to its last answer, rendered as in training; of plain text it is the first
    half. An answer ends at an end mark of the model or of its chat template.

    Parameters
    ----------
    model : AdaptedModel
        Its adapter values are overwritten.
    adapters : mapping of str to AdapterUpdate
        Values to try, by label.
    encoder : RowEncoder
        Renders rows as in training.
    rows : sequence of (str, Row)
        Whose row, and the row.
    count : int
        Prompts wanted; fewer if there are not so many that fit into the model.
    max_new_tokens : int
        Longest answer.
    batch_size : int
        Prompts in one pass.
    seed : int
        Of the draw.

    Raises
    ------
    ConfigError
        If no row leaves room for an answer.
    """
    prompts = _prompts(model, encoder, rows, count, max_new_tokens, seed)
    if not prompts:
        raise ConfigError(
            f"--sample: no prompt leaves room for {max_new_tokens} more tokens in the "
            f"{model.max_positions} positions of this model; lower --max-new-tokens"
        )
    samples = [AnswerSample(p.source, p.text, p.expected) for p in prompts]
    by_length = sorted(range(len(prompts)), key=lambda at: len(prompts[at].ids))
    done, total = 0, len(prompts) * len(adapters)
    for label, adapter in adapters.items():
        model.set_adapter(adapter)
        for start in range(0, len(prompts), batch_size):
            chosen = by_length[start : start + batch_size]
            texts = _generate(model, [prompts[at] for at in chosen], max_new_tokens)
            for at, text in zip(chosen, texts, strict=True):
                samples[at].answers[label] = text
            done += len(chosen)
            events.publish(events.EvaluationProgress(f"answering ({label})", done, total))
    return samples


def to_markdown(samples: Sequence[AnswerSample], title: str) -> str:
    """Prompts and answers one below the other."""
    parts = [f"# {title}\n"]
    for number, sample in enumerate(samples, start=1):
        parts.append(f"## {number}. {sample.source}\n")
        texts = {"prompt": sample.prompt, "expected": sample.expected, **sample.answers}
        parts += [f"**{name}**\n\n{_fenced(text)}\n" for name, text in texts.items()]
    return "\n".join(parts)


@dataclass(frozen=True)
class _Prompt:
    source: str
    text: str
    expected: str
    ids: list[int]
    end_marks: frozenset[int]


def _prompts(
    model: AdaptedModel,
    encoder: RowEncoder,
    rows: Sequence[tuple[str, Row]],
    count: int,
    max_new_tokens: int,
    seed: int,
) -> list[_Prompt]:
    """The first `count` rows that fit, in a random order."""
    room = None if model.max_positions is None else model.max_positions - max_new_tokens
    order = generator(seed, "answer samples").permutation(len(rows))
    found: list[_Prompt] = []
    for at in order.tolist():
        if len(found) == count:
            break
        prompt = _prompt(model.tokenizer, encoder, *rows[at])
        if prompt is not None and (room is None or len(prompt.ids) <= room):
            found.append(prompt)
    return found


def _prompt(tokenizer: Any, encoder: RowEncoder, source: str, row: Row) -> _Prompt | None:
    rendered = encoder.render(row)
    if rendered is None:
        return None
    start, end = rendered.answers[-1]
    if rendered.text[:start].strip() in ("", tokenizer.bos_token):  # plain text
        start = _middle(rendered.text.removesuffix(str(tokenizer.eos_token or "")), start)
    answer = _tokens(tokenizer, rendered.text[start:end])
    special = set(tokenizer.all_special_ids)
    return _Prompt(
        source=source,
        text=rendered.text[:start],
        expected=tokenizer.decode(answer, skip_special_tokens=True).strip(),
        ids=_tokens(tokenizer, rendered.text[:start]),
        # the last token of a turn that is a mark; some templates put a line break behind it
        end_marks=frozenset([token for token in answer[-2:] if token in special][-1:]),
    )


def _middle(text: str, start: int) -> int:
    """The white space nearest to the middle, so that no word is cut."""
    middle = (start + len(text)) // 2
    spaces = [space.start() for space in re.finditer(r"\s+", text) if space.start() > start]
    return min(spaces, key=lambda at: abs(at - middle), default=middle)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _generate(model: AdaptedModel, prompts: Sequence[_Prompt], max_new_tokens: int) -> list[str]:
    width = max(len(prompt.ids) for prompt in prompts)
    pad = int(model.tokenizer.pad_token_id or 0)
    # on the left, so that every answer begins at the same column
    ids = [[pad] * (width - len(prompt.ids)) + prompt.ids for prompt in prompts]
    mask = [[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts]
    with torch.inference_mode():
        output = model.model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=sorted(_end_marks(model).union(*(p.end_marks for p in prompts))) or None,
        )
    new = output[:, width:].tolist()
    return [str(model.tokenizer.decode(t, skip_special_tokens=True)).strip() for t in new]


def _end_marks(model: AdaptedModel) -> set[int]:
    """End marks the tokenizer and the model's own settings name."""
    configured = getattr(model.model.generation_config, "eos_token_id", None)
    marks = configured if isinstance(configured, list) else [configured]
    return {int(mark) for mark in (*marks, model.tokenizer.eos_token_id) if mark is not None}


def _fenced(text: str) -> str:
    """As a code block, whatever back-ticks are in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
