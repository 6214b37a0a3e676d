"""What every benchmark writes beside its numbers, and where."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Versions and hardware."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "versions": {
            name: metadata.version(name)
            for name in ("cgfedllm", "torch", "transformers", "peft", "flwr", "numpy")
        },
        "python": platform.python_version(),
    }


def write_result(name: str, content: dict[str, Any]) -> Path:
    """Write ``results/NAME.json`` with machine, command and date."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", *sys.argv])
    head = {"command": command, "date": datetime.now(UTC).date().isoformat(), **machine()}
    path.write_text(json.dumps({**head, **content}, indent=2) + "\n")
    return path


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def touch_memory(gib: float = 4.0) -> None:
    """Touch memory once: on a fresh virtual machine the first touch of a page is slow."""
    import numpy as np

    np.ones(int(gib * 2**30) // 8)
