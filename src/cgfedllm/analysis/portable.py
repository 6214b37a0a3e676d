"""What a results file may tell of the machine that wrote it: no folders of its own.

Where data lay is nobody's business, and results are made to be passed on.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from cgfedllm.config import Config
from cgfedllm.runs import environment

_VALUE = re.compile(r"""([=,\[])(["']?)(/[^,"'\]]*)\2""")


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
    return shlex.join([program, *map(_text, arguments[1:])])


def portable_config(config: Config) -> str:
    """The resolved configuration as TOML, without the folders of this machine."""
    return tomli_w.dumps(portable_tree(config))


def portable_tree(config: Config) -> dict[str, Any]:
    """The same as nested tables."""
    tree: dict[str, Any] = portable(config.model_dump(exclude_none=True))
    return tree


def portable(value: Any) -> Any:
    """Plain values, with every path of this machine in their strings made portable."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    return _text(value) if isinstance(value, str) else value


def _text(text: str) -> str:
    """A text that is one path, or holds some as values: ``a=/x,b='/y'``, ``a=["/x"]``."""
    return _path(text) if text.startswith("/") else _VALUE.sub(lambda m: m[1] + _path(m[3]), text)


def _path(text: str) -> str:
    """A path below the working folder relative to it, any other absolute path as its last part."""
    try:
        return str(Path(text).relative_to(Path.cwd()))
    except ValueError:
        return Path(text).name
