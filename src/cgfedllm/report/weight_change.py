"""How far training moved each adapted weight matrix from the base model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, Factor


def weight_changes(
    spec: AdapterSpec, tensors: Mapping[str, NDArray[Any]], config: Mapping[str, Any]
) -> Iterator[tuple[Factor, float]]:
    """Frobenius norm of the change ``(alpha / r) B A`` of each weight, beside its factor A.

    Parameters
    ----------
    spec : AdapterSpec
        The adapter's factors; those without a partner are passed over.
    tensors : mapping of ndarray
        Their values by name.
    config : mapping
        PEFT's ``adapter_config.json``.
    """
    for a, b in spec.pairs():
        left, right = tensors[b.name].astype(np.float64), tensors[a.name].astype(np.float64)
        # ||B A||^2 = tr((B'B)(A A')): r x r instead of out x in
        squared = float(((left.T @ left) * (right @ right.T)).sum())
        # rounding may leave a little less than nothing
        yield a, (0.0 if squared < 0 else math.sqrt(squared)) * abs(_scale(config, a))


def _scale(config: Mapping[str, Any], factor: Factor) -> float:
    """``alpha / r``; the rank is read off the factor, which is right with rank patterns too."""
    alpha, rank = _alpha(config, factor.name), factor.shape[0]
    if not isinstance(alpha, int | float) or not rank:
        return 1.0
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _alpha(config: Mapping[str, Any], name: str) -> Any:
    module = name.removeprefix("base_model.model.").partition(".lora_")[0]
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT matches them
            return alpha
    return config.get("lora_alpha")
