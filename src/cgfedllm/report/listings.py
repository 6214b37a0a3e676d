"""Lists for the terminal: codecs, a codec's options, configuration keys, label and text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic_core import PydanticUndefined
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cgfedllm.codecs import codec_class, codec_names
from cgfedllm.config import Config, known_keys
from cgfedllm.errors import ConfigError


def two_columns(rows: Iterable[tuple[str, str]]) -> Table:
    """Labels left, texts right; long texts are folded, never cut."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(Text(label), Text(text))
    return table


def two_columns_plain(rows: Iterable[tuple[str, str]]) -> str:
    """Lay out like `two_columns` without folding anything, for pipes and files."""
    rows = list(rows)
    width = max((len(label) for label, _ in rows), default=0)
    indented = ((label, text.replace("\n", "\n" + " " * (width + 2))) for label, text in rows)
    return "\n".join(f"{label:<{width}}  {text}".rstrip() for label, text in indented)


def codec_list() -> Table:
    """One row a registered codec: name, kind, rates, summary, paper."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("codec", style="bold", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("rate")
    table.add_column("what it does")
    table.add_column("paper", overflow="fold")
    for name in codec_names():
        codec = codec_class(name)
        texts = (codec.kind, codec.rates, codec.summary, codec.paper)
        table.add_row(name, *map(Text, texts))
    return table


def codec_details(name: str) -> RenderableType:
    """Summary, paper and options of one codec.

    Raises
    ------
    CodecError
        If no codec has that name.
    """
    codec = codec_class(name)
    facts = [
        ("codec", f"{name}, version {codec.version}"),
        ("kind", codec.kind),
        ("rate", f"{codec.rates} a parameter"),
        ("what it does", codec.summary),
    ]
    if codec.paper:
        facts.append(("paper", codec.paper))
    facts.append(("lossless", "yes" if codec.lossless else "no"))
    parts: list[RenderableType] = [two_columns(facts), Text()]
    fields = codec.Options.model_fields
    if not fields:
        parts.append(Text("It has no options."))
    for option, info in fields.items():
        parts.append(_entry(f"uplink.options.{option}", info.get_default(), info.description))
    return Group(*parts)


def key_list(part: str = "") -> RenderableType:
    """Every configuration key with its default and description.

    Parameters
    ----------
    part : str
        Only keys that contain this text.

    Raises
    ------
    ConfigError
        If no key contains it.
    """
    defaults = Config().model_dump()
    keys = {key: text for key, text in known_keys().items() if part in key}
    if not keys:
        raise ConfigError(f"no key contains {part!r}; `cgfedllm config` lists all")
    return Group(*(_entry(key, _at(defaults, key), text) for key, text in keys.items()))


def _entry(key: str, default: Any, description: str | None) -> RenderableType:
    head = Text()
    head.append(key, style="bold cyan")
    if default is PydanticUndefined:
        head.append(" (required)")
    else:
        head.append(f" = {_value(default)}")
    body = Text(" ".join((description or "").split()))
    return Group(head, Padding(body, (0, 0, 0, 4), expand=False)) if body else head


def _at(tree: dict[str, Any], dotted: str) -> Any:
    node: Any = tree
    for part in dotted.split("."):
        node = node[part]
    return node


def _value(value: Any) -> str:
    """As TOML writes it; unset keys have no TOML form."""
    if value is None:
        return "(unset)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(_value(v) for v in value)}]"
    return str(value)
