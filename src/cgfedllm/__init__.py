"""Federated fine-tuning of causal language models with very few bytes on the uplink.

>>> import cgfedllm
>>> config = cgfedllm.load_config("configs/quickstart.toml")
>>> result = cgfedllm.run(config)
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cgfedllm.api import (
        RunResult,
        compare,
        evaluate,
        export,
        pretrain,
        record,
        reference,
        resume,
        run,
    )
    from cgfedllm.config import Config, load_config

__version__ = metadata.version(__name__)

__all__ = [
    "Config",
    "RunResult",
    "compare",
    "evaluate",
    "export",
    "load_config",
    "pretrain",
    "record",
    "reference",
    "resume",
    "run",
]


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and `cgfedllm --help` needs none of it."""
    if name in __all__:
        module = "cgfedllm.config" if name in ("Config", "load_config") else "cgfedllm.api"
        return getattr(importlib.import_module(module), name)
    if name == "flower":
        return importlib.import_module("cgfedllm.flower")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
