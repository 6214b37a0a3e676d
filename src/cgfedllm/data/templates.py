r"""From what was said to one string, with the spans of it that are answers.

::

    Dialogue --template--> "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>"
                                                                               answer ^^^^^^^^^^^^^

An answer's span holds its end-of-turn mark, so that the model learns to stop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

from cgfedllm.data.formats import Dialogue, Message, PlainText
from cgfedllm.errors import DataError


class Tokenizer(Protocol):
    """The part of a Transformers tokenizer that this package uses."""

    @property
    def chat_template(self) -> Any:
        """Jinja source, or None."""

    @property
    def is_fast(self) -> bool:
        """Whether it can tell the characters each token stands for."""

    @property
    def bos_token(self) -> Any:
        """Text of the beginning-of-sequence token, or None."""

    @property
    def eos_token(self) -> Any:
        """Text of the end-of-sequence token, or None."""

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Tokens outside the learned vocabulary, special ones among them."""

    def __call__(self, text: Any, **options: Any) -> Any:
        """Tokenise one string or a list of them."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render messages."""


@dataclass(frozen=True)
class Rendered:
    """A string, and the half-open character spans of it that are answers, in order."""

    text: str
    answers: tuple[tuple[int, int], ...]


class Template(Protocol):
    """Renders dialogues; plain text needs no template (`render_text`)."""

    def render(self, dialogue: Dialogue) -> Rendered:
        """The whole dialogue as one string."""


def render_text(text: PlainText, *, bos: str, eos: str) -> Rendered:
    """Plain text is one answer, up to and with its end-of-sequence mark."""
    whole = bos + text.text + eos
    return Rendered(whole, ((len(bos), len(whole)),))


class PlainTemplate:
    r"""A fixed layout, the same for every tokenizer.

    ::

        ### System:\n{text}\n\n### User:\n{text}\n\n### Assistant:\n{text}{eos}\n\n### User: ...

    Parameters
    ----------
    bos, eos : str
        Put at the start, and after every answer; "" where the tokenizer has none.
    system_prompt : str or None
        Put before dialogues that have no system message of their own.
    """

    def __init__(self, *, bos: str, eos: str, system_prompt: str | None) -> None:
        self._bos = bos
        self._eos = eos
        self._system_prompt = system_prompt

    def render(self, dialogue: Dialogue) -> Rendered:
        """The dialogue in the layout above."""
        text = self._bos
        spans = []
        for number, message in enumerate(_with_system(dialogue, self._system_prompt)):
            text += "\n\n" * (number > 0) + f"### {message.role.capitalize()}:\n"
            start = len(text)
            text += message.content
            if message.role == "assistant":
                text += self._eos
                spans.append((start, len(text)))
        return Rendered(text, tuple(spans))


class ChatTemplate:
    """The tokenizer's own template.

    Answers are found by rendering stand-ins in their place. This holds for templates in which an
    earlier turn changes when later ones follow, where comparing prefixes would not.

    Parameters
    ----------
    tokenizer : Tokenizer
        With a chat template.
    system_prompt : str or None
        Put before dialogues that have no system message of their own. Where the template takes
        no system message, its text opens the first user message instead.
    """

    def __init__(self, tokenizer: Tokenizer, *, system_prompt: str | None) -> None:
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        self._takes_system = self._prints_system()
        marks = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        marks |= {str(tokenizer.eos_token)} if tokenizer.eos_token else set()
        ordered = sorted(marks, key=lambda mark: (-len(mark), mark))
        self._end_of_turn = re.compile(rf"\s*(?:{'|'.join(map(re.escape, ordered))})")
        self._has_marks = bool(marks)

    def render(self, dialogue: Dialogue) -> Rendered:
        """The dialogue as the template prints it.

        Raises
        ------
        DataError
            If the template refuses the order of roles, or does not print answers as they are.
        """
        messages = _with_system(dialogue, self._system_prompt)
        if not self._takes_system:
            messages = _fold_system(messages)
        answers = [message.content for message in messages if message.role == "assistant"]
        # private-use characters: no template strips, escapes or prints them by itself
        marks = [f"\ue000{number}\ue001" for number in range(len(answers))]
        waiting = iter(marks)
        template = self._apply(
            [Message(m.role, next(waiting)) if m.role == "assistant" else m for m in messages]
        )
        text, spans = "", []
        for mark, answer in zip(marks, answers, strict=True):
            before, found, template = template.partition(mark)
            if not found:
                raise DataError(
                    "the tokenizer's chat template does not print every assistant message as it "
                    'is; set data.template = "plain"'
                )
            text += before
            # "[/INST] answer": such a space is made by the model, not given to it
            start = len(text.rstrip(" ")) if text.endswith(" ") else len(text)
            text += answer
            end = self._end_of_turn.match(template) if self._has_marks else None
            if end:
                text += end.group()
                template = template[end.end() :]
            spans.append((start, len(text)))
        return Rendered(text + template, tuple(spans))

    def _apply(self, messages: list[Message]) -> str:
        plain = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(self._tokenizer.apply_chat_template(plain, tokenize=False))
        except Exception as error:
            roles = ", ".join(message.role for message in messages)
            raise DataError(
                f"the tokenizer's chat template refuses a dialogue with the roles {roles}: "
                f'{error}. Correct the row, or set data.template = "plain"'
            ) from error

    def _prints_system(self) -> bool:
        probe = "\ue000system\ue001"
        try:
            text = self._apply([Message("system", probe), Message("user", "?")])
        except DataError:
            return False
        return probe in text


def _with_system(dialogue: Dialogue, system_prompt: str | None) -> list[Message]:
    messages = list(dialogue.messages)
    if system_prompt and messages[0].role != "system":
        return [Message("system", system_prompt.strip()), *messages]
    return messages


def _fold_system(messages: list[Message]) -> list[Message]:
    if len(messages) > 1 and (messages[0].role, messages[1].role) == ("system", "user"):
        both = f"{messages[0].content}\n\n{messages[1].content}"
        return [Message("user", both), *messages[2:]]
    return messages
