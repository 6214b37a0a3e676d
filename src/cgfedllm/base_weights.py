"""A fingerprint of the frozen base weights, by which two machines notice that theirs differ.

::

    frozen parameters --some thousands of entries, at places that names fix--> float32
        --rounded to bfloat16, tiny values to zero--> BLAKE2b, 8 bytes

Rounding makes loads of one checkpoint agree: float32 and bfloat16 always, and float16 too unless
the checkpoint is stored in float32, which float16 and bfloat16 round in different places. Quantised
matrices agree with nothing, so they have a fingerprint of their own that may be missing.

It tells a wrong checkpoint from the right one. It proves nothing: who sends it may send any other.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_ENTRIES = 4096
_FEWEST = 4
_DIGEST_BYTES = 8
# float16 has fewer digits below its smallest normal number, and its roundings would differ there
_TINY = 2.0**-14
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class BaseWeights:
    """Fingerprints of a base model.

    Parameters
    ----------
    model : str
        What it was loaded from; of a local folder the last part.
    vectors : str
        Of the input embedding and all one-dimensional parameters (norms, biases), which stay as
        they are where a model is quantised; hexadecimal.
    matrices : str
        Of all other parameters; empty where they are quantised.
    """

    model: str
    vectors: str
    matrices: str

    def differs(self, other: BaseWeights) -> bool:
        """Whether these are other weights, as far as both have a fingerprint."""
        pairs = ((self.vectors, other.vectors), (self.matrices, other.matrices))
        return any(own and its and own != its for own, its in pairs)


def base_weights(base: PreTrainedModel, model_id: str) -> BaseWeights:
    """Fingerprints of a base model, with or without adapter layers in it.

    Parameters
    ----------
    base : PreTrainedModel
        On any device, in any dtype.
    model_id : str
        Where it was loaded from.
    """
    embedding = getattr(base.get_input_embeddings(), "weight", None)
    vectors: dict[str, torch.Tensor] = {}
    matrices: dict[str, torch.Tensor] = {}
    for name, parameter in base.named_parameters():
        if ".lora_" in name or not parameter.numel():
            continue
        kind = vectors if parameter.ndim < 2 or parameter is embedding else matrices
        kind[name.replace(".base_layer.", ".")] = parameter
    quantised = bool(getattr(base, "is_quantized", False))
    return BaseWeights(
        Path(model_id).name if model_id.startswith((".", "/", "~")) else model_id,
        _fingerprint(vectors),
        "" if quantised else _fingerprint(matrices),
    )


def _fingerprint(parameters: dict[str, torch.Tensor]) -> str:
    """Of a sample of all of them; empty if there are none, or one holds no floats to compare."""
    import torch

    floats = (torch.float32, torch.bfloat16, torch.float16)
    if not parameters or any(p.is_meta or p.dtype not in floats for p in parameters.values()):
        return ""
    each = max(_FEWEST, _ENTRIES // len(parameters))
    samples = [
        torch.take(p.detach(), _places(name, p.numel(), each).to(p.device)).to("cpu", torch.float32)
        for name, p in sorted(parameters.items())
    ]
    sample = torch.cat(samples).bfloat16()
    sample[sample.abs() < _TINY] = 0.0
    values = sample.view(torch.int16).numpy().astype("<i2").tobytes()
    return hashlib.blake2b(values, digest_size=_DIGEST_BYTES).hexdigest()


def _places(name: str, size: int, count: int) -> torch.Tensor:
    """Entries of a parameter, spread over it: golden-ratio steps from where its name says.

    Whole numbers only, so that every machine and every release of every library has the same.
    """
    import torch

    seed = hashlib.blake2b(name.encode(), digest_size=8).digest()
    start = int.from_bytes(seed, "little")
    return torch.tensor([((start + i * _GOLDEN) % 2**64) * size >> 64 for i in range(count)])
