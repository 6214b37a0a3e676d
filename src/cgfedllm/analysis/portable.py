"""What a results file may tell of the machine that wrote it: no folders of its own.

Where data lay is nobody's business, and results are made to be passed on.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from cgfedllm.config import Config
from cgfedllm.runs import environment


def provenance(config: Config) -> dict[str, Any]:
    """What results files tell of where they come from: command, versions and configuration."""
    facts = environment(config)
    facts.pop("command")  # it holds this machine's paths; ours is without them
    facts["written_at"] = facts.pop("started_at")
    return {
        "command": portable_command(sys.argv),
        "environment": facts,
        "config": portable_config(config),
    }


def repeated(option: str, values: Iterable[object]) -> list[str]:
    """The words of an option that is given once for each value."""
    return [word for value in values for word in (option, str(value))]


def portable_command(arguments: Sequence[str]) -> str:
    """A command line without the folders of this machine."""
    program = "cgfedllm" if arguments and "cgfedllm" in arguments[0] else Path(arguments[0]).name
    return shlex.join([program, *map(_portable, arguments[1:])])


def portable_config(config: Config) -> str:
    """The resolved configuration as TOML, without the folders of this machine."""
    return tomli_w.dumps(portable_tree(config))


def portable_tree(config: Config) -> dict[str, Any]:
    """The same as nested tables."""
    tree: dict[str, Any] = portable(config.model_dump(exclude_none=True))
    return tree


def portable(value: Any) -> Any:
    """Plain values, with every path of this machine in their strings made portable."""
    return _map_strings(value, _portable)


def _portable(text: str) -> str:
    """Each setting of ``a=/x,b=/y`` on its own, and a text that is one path."""
    return ",".join(_setting(part) for part in text.split(",")) if "=" in text else _path(text)


def _setting(text: str) -> str:
    key, equals, value = text.rpartition("=")
    quoted = value.strip("\"'")
    return f"{key}{equals}{_path(quoted)}" if quoted.startswith("/") else text


def _path(text: str) -> str:
    """A path below the working folder relative to it, any other absolute path as its last part."""
    if not text.startswith("/"):
        return text
    try:
        return str(Path(text).relative_to(Path.cwd()))
    except ValueError:
        return Path(text).name


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    return change(value) if isinstance(value, str) else value
