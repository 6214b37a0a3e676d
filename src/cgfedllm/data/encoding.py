"""From rows to token ids and labels.

::

    row --formats--> Dialogue --templates--> text + answer spans --tokenizer--> ids + labels

The text is tokenised whole, and the characters of each token say whether it is part of an answer:
the tokens are those the template gives, and no prompt token ever carries loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from cgfedllm.config import DataConfig
from cgfedllm.data.formats import PlainText, parse_row
from cgfedllm.data.rows import Row
from cgfedllm.data.templates import (
    ChatTemplate,
    PlainTemplate,
    Rendered,
    Template,
    Tokenizer,
    render_text,
)
from cgfedllm.errors import ConfigError

NO_LOSS = -100
_CHUNK = 512

Int32Array: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int32]]


@dataclass(frozen=True)
class Example:
    """One sequence.

    Parameters
    ----------
    input_ids : ndarray, shape (length,), int32
        Tokens.
    labels : ndarray, shape (length,), int32
        ``labels[i]`` is ``input_ids[i]`` where that token carries loss, else -100: not shifted.
        The first is always -100, since nothing comes before it.
    """

    input_ids: Int32Array
    labels: Int32Array


@dataclass(frozen=True)
class EncodedRows:
    """Sequences, and what became of the rows they were made from.

    Parameters
    ----------
    examples : list of Example
        In the order of the rows.
    truncated : int
        Examples that were cut at `max_length`.
    dropped : int
        Rows without an example: blank, or cut before the first token that carries loss.
    tokens, label_tokens : int
        Tokens of all examples, and those of them that carry loss.
    """

    examples: list[Example]
    truncated: int
    dropped: int
    tokens: int
    label_tokens: int


class RowEncoder:
    """Turns rows into token ids and labels.

    Parameters
    ----------
    config : DataConfig
        `format`, `columns`, `template`, `system_prompt`, `train_on` and `max_length` are used.
    tokenizer : Tokenizer
        Any Transformers tokenizer. Without a chat template, `template = "chat"` is "plain".
    max_positions : int or None
        Longest sequence the model takes; None if it has no limit.

    Raises
    ------
    ConfigError
        If `config.max_length` is more than the model takes.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, max_positions: int | None = None
    ) -> None:
        if max_positions is not None and config.max_length > max_positions:
            raise ConfigError(
                f"data.max_length is {config.max_length}, but the model takes {max_positions} "
                f"tokens at most; set data.max_length = {max_positions} or less"
            )
        self._config = config
        self._tokenizer = tokenizer
        self._bos = _bos_the_tokenizer_adds(tokenizer)
        self._eos = str(tokenizer.eos_token or "")
        prompt = config.system_prompt
        self._template: Template
        if config.template == "chat" and tokenizer.chat_template:
            self._template = ChatTemplate(tokenizer, system_prompt=prompt)
        else:
            self._template = PlainTemplate(bos=self._bos, eos=self._eos, system_prompt=prompt)

    def render(self, row: Row) -> Rendered | None:
        """The text of a row before it is tokenised; None if the row is blank.

        Raises
        ------
        DataError
            As `parse_row`, or if the chat template refuses the row.
        """
        content = parse_row(row, self._config)
        if content is None:
            return None
        if isinstance(content, PlainText):
            return render_text(content, bos=self._bos, eos=self._eos)
        return self._template.render(content)

    def encode(self, rows: Sequence[Row]) -> EncodedRows:
        """Encode rows in order.

        Raises
        ------
        DataError
            As `render`.
        """
        examples: list[Example] = []
        truncated = 0
        for start in range(0, len(rows), _CHUNK):
            rendered = [self.render(row) for row in rows[start : start + _CHUNK]]
            for example, cut in self._examples([text for text in rendered if text is not None]):
                examples.append(example)
                truncated += cut
        return EncodedRows(
            examples=examples,
            truncated=truncated,
            dropped=len(rows) - len(examples),
            tokens=sum(len(example.input_ids) for example in examples),
            label_tokens=sum(int((e.labels != NO_LOSS).sum()) for e in examples),
        )

    def _examples(self, texts: list[Rendered]) -> Iterator[tuple[Example, bool]]:
        for (ids, loss), _ in zip(self._tokenised(texts), texts, strict=True):
            if self._config.train_on == "all":
                loss = np.ones_like(loss)
            # nothing predicts the first token
            loss[:1] = False
            limit = self._config.max_length
            labels = np.where(loss, ids, np.int32(NO_LOSS))[:limit]
            if (labels != NO_LOSS).any():
                # copies: a view would keep the tokens that were cut off in memory
                yield Example(ids[:limit].copy(), labels.copy()), len(ids) > limit

    def _tokenised(
        self, texts: list[Rendered]
    ) -> Iterator[tuple[Int32Array, np.ndarray[tuple[int], np.dtype[np.bool_]]]]:
        """Tokens of each text, and whether each is part of an answer."""
        if not texts:
            return
        if not self._tokenizer.is_fast:
            yield from map(self._by_segments, texts)
            return
        encoded = self._tokenise([text.text for text in texts], return_offsets_mapping=True)
        for text, ids, offsets in zip(
            texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
            inside = np.zeros(len(ids), dtype=np.bool_)
            for start, end in text.answers:
                # a token that begins in the prompt is the prompt's, even if it reaches over
                inside |= (bounds[:, 0] >= start) & (bounds[:, 1] > start) & (bounds[:, 0] < end)
            yield np.asarray(ids, dtype=np.int32), inside

    def _by_segments(
        self, text: Rendered
    ) -> tuple[Int32Array, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
        """For tokenizers that cannot tell the characters of a token: cut first, then tokenise."""
        cuts = [0, *(bound for span in text.answers for bound in span), len(text.text)]
        segments = [text.text[start:end] for start, end in pairwise(cuts)]
        ids: list[int] = []
        inside: list[bool] = []
        for number, segment in enumerate(segments):
            new = self._tokenise(segment)["input_ids"] if segment else []
            ids += new
            inside += [number % 2 == 1] * len(new)
        return np.asarray(ids, dtype=np.int32), np.asarray(inside, dtype=np.bool_)

    def _tokenise(self, text: str | list[str], **options: Any) -> Any:
        return self._tokenizer(
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            verbose=False,
            **options,
        )


def _bos_the_tokenizer_adds(tokenizer: Tokenizer) -> str:
    """The beginning-of-sequence mark, if this tokenizer puts one before plain text."""
    bos = tokenizer.bos_token
    if not bos:
        return ""
    with_special = tokenizer("x", add_special_tokens=True)["input_ids"]
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    mark = tokenizer(str(bos), add_special_tokens=False)["input_ids"]
    return str(bos) if with_special[:1] == mark and bare[:1] != mark else ""
