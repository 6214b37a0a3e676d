"""Settings as people type them: ``key=value,key=value``, and codecs, ``NAME:key=value``."""

from __future__ import annotations

from typing import Any

from cgfedllm.config import parse_value
from cgfedllm.errors import ConfigError


def read_codec(text: str, shape: str = "NAME:key=value,key=value") -> tuple[str, dict[str, Any]]:
    """Read ``NAME[:key=value,...]``; values are TOML, or plain strings.

    Parameters
    ----------
    shape : str
        The form to name where the text has another one.

    Returns
    -------
    (str, dict)
        Name and options as they were typed; whether there is such a codec is not looked up.

    Raises
    ------
    ConfigError
        If the text has another form.
    """
    name, colon, rest = text.partition(":")
    return name.strip(), read_pairs(rest, text, shape) if colon else {}


def read_pairs(text: str, whole: str, shape: str) -> dict[str, Any]:
    """Read ``key=value,...``; values are TOML, or plain strings.

    Parameters
    ----------
    whole, shape : str
        What the pairs are part of, and the form that has, for the message.

    Raises
    ------
    ConfigError
        If a part is no pair, or a key is there twice.
    """
    pairs: dict[str, Any] = {}
    for part in split_outside(text):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key or not value.strip():
            raise ConfigError(f"{whole!r}: expected {shape}, and {part!r} is no key=value")
        if key in pairs:
            raise ConfigError(f"{whole!r} gives {key!r} twice")
        pairs[key] = parse_value(value.strip())
    return pairs


def split_outside(text: str) -> list[str]:
    """Split at commas that are not within quotes, brackets or braces."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in ")}]":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += character
    return [part.strip() for part in parts]
