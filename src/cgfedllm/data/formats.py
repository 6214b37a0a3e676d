"""From a row's columns to what was said: a dialogue, or a plain text.

::

    alpaca             instruction (+ input) -> output
    prompt_completion  prompt                -> completion
    qa                 question              -> answer
    chat               messages: [{role, content}, ...]
    text               text
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cgfedllm.config import DataConfig
from cgfedllm.data.names import did_you_mean
from cgfedllm.data.rows import Row
from cgfedllm.errors import DataError


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue; `role` is "system", "user", "assistant" or "tool"."""

    role: str
    content: str


@dataclass(frozen=True)
class Dialogue:
    """Messages in order, at least one of them by the assistant, none blank."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class PlainText:
    """Text without roles, all of it to be learned; not blank."""

    text: str


# Required fields first; a field that ends in "?" may be missing.
_FIELDS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "alpaca": ("instruction", "input?", "output"),
    "prompt_completion": ("prompt", "completion"),
    "qa": ("question", "answer"),
    "text": ("text",),
}
# Names that well-known data sets (Dolly, ShareGPT) give a field; used when its own is not there.
_ALIASES = {
    ("chat", "messages"): "conversations",
    ("alpaca", "input"): "context",
    ("alpaca", "output"): "response",
    ("prompt_completion", "completion"): "response",
}
_ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    # ShareGPT
    "human": "user",
    "gpt": "assistant",
}


def parse_row(row: Row, config: DataConfig) -> Dialogue | PlainText | None:
    """What a row says, by `config.format` and `config.columns`.

    White space around messages is removed: most chat templates do so anyway, and an answer
    must have the same tokens in all of them. Plain text is kept as it is.

    Parameters
    ----------
    row : Row
        Column to value.
    config : DataConfig
        `format` and `columns` are used.

    Returns
    -------
    Dialogue, PlainText or None
        None where there is nothing to learn: prompt, answer or text blank or null.

    Raises
    ------
    DataError
        If a column is missing or holds something that is not text.
    """
    columns = tuple(sorted(config.columns.items()))
    name, fields = _resolve(tuple(row), config.format, columns)
    if name == "chat":
        return _chat(row[fields["messages"]], fields["messages"])
    if name == "text":
        text = _text(row, fields["text"])
        return PlainText(text) if text.strip() else None
    values = {field: _text(row, column).strip() for field, column in fields.items()}
    if name == "alpaca":
        if not values["instruction"]:
            return None
        prompt = "\n\n".join(filter(None, (values["instruction"], values.get("input"))))
        answer = values["output"]
    else:
        prompt, answer = (values[field] for field in _FIELDS[name])
    if not prompt or not answer:
        return None
    return Dialogue((Message("user", prompt), Message("assistant", answer)))


@lru_cache(maxsize=256)
def _resolve(
    present: tuple[str, ...], format: str, columns: tuple[tuple[str, str], ...]
) -> tuple[str, dict[str, str]]:
    """The format, and the column of each of its fields that is there."""
    mapping = dict(columns)
    if format != "auto":
        return format, _fields(format, present, mapping)
    possible = [name for name in _FIELDS if mapping.keys() <= _names(name)]
    if not possible:
        known = sorted(set().union(*map(_names, _FIELDS)))
        raise DataError(
            f"data.columns maps {', '.join(sorted(mapping))}, which no format has together; "
            f"fields are {', '.join(known)}. Set data.format"
        )
    first_error: DataError | None = None
    for name in possible:
        try:
            return name, _fields(name, present, mapping)
        except DataError as error:
            first_error = first_error or error
    if first_error is not None and mapping:
        raise first_error
    raise DataError(
        f"the format cannot be told from the columns {_listed(present)}. Say which it is and where "
        'its fields are, for example data.format = "qa" and '
        'data.columns = {question = "...", answer = "..."}'
    )


def _fields(name: str, present: tuple[str, ...], mapping: Mapping[str, str]) -> dict[str, str]:
    unknown = sorted(mapping.keys() - _names(name))
    if unknown:
        known = sorted(_names(name))
        raise DataError(
            f"data.columns.{unknown[0]}: format {name!r} has no such field; it has "
            f"{', '.join(known)}.{did_you_mean(unknown[0], known)}"
        )
    found = {}
    for field in _FIELDS[name]:
        key, optional = field.removesuffix("?"), field.endswith("?")
        column = mapping.get(key, key)
        alias = _ALIASES.get((name, key))
        if column not in present and key not in mapping and alias in present:
            column = alias
        if column in present:
            found[key] = column
        elif key in mapping or not optional:
            raise DataError(
                f"there is no column {column!r} for the field {key!r} of format {name!r}; "
                f"the columns are {_listed(present)}.{did_you_mean(column, present)} "
                f"Set data.columns.{key} to the column that holds it, or another data.format"
            )
    return found


def _names(format: str) -> set[str]:
    return {field.removesuffix("?") for field in _FIELDS[format]}


def _listed(columns: tuple[str, ...]) -> str:
    return ", ".join(columns) or "(none)"


def _text(row: Row, column: str) -> str:
    value = row[column]
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise DataError(
        f"column {column!r} holds a {type(value).__name__} where text is expected; "
        "point data.columns at a text column"
    )


def _chat(value: Any, column: str) -> Dialogue | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise DataError(
            f"column {column!r} holds a {type(value).__name__} where a list of messages "
            'like {"role": "user", "content": "..."} is expected'
        )
    messages = [
        _message(item, f"column {column!r}, message {n}") for n, item in enumerate(value, 1)
    ]
    # a blank system message says nothing; a blank turn leaves the dialogue without sense
    messages = [message for message in messages if message.content or message.role != "system"]
    blank = any(not message.content for message in messages)
    if blank or all(message.role != "assistant" for message in messages):
        return None
    return Dialogue(tuple(messages))


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping) or not ({"role", "from"} & item.keys()):
        raise DataError(f'{where}: expected {{"role": ..., "content": ...}}')
    role = item.get("role", item.get("from"))
    if role not in _ROLES:
        raise DataError(f"{where}: unknown role {role!r}; known are {', '.join(_ROLES)}")
    content = item.get("content", item.get("value"))
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if content is not None and not isinstance(content, str):
        raise DataError(f"{where}: its content is a {type(content).__name__}, not text")
    return Message(_ROLES[role], (content or "").strip())


def _part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    raise DataError(f"{where}: only text can be learned; this message has another kind of part")
