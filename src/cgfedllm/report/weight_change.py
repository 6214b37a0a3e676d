"""How far training moved each adapted weight matrix from the base model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, Factor
from cgfedllm.errors import AdapterError


def weight_changes(
    spec: AdapterSpec, tensors: Mapping[str, NDArray[Any]], config: Mapping[str, Any]
) -> Iterator[tuple[Factor, float]]:
    """Frobenius norm of the change ``(alpha / r) B A`` of each weight, beside its factor A.

    Parameters
    ----------
    spec : AdapterSpec
        The adapter's factors; those without a partner, and those that are no matrices, are passed
        over.
    tensors : mapping of ndarray
        Their values by name.
    config : mapping
        PEFT's ``adapter_config.json``.

    Raises
    ------
    AdapterError
        If two factors do not fit each other, or ``alpha_pattern`` cannot be read.
    """
    for a, b in spec.pairs():
        if len(a.shape) != 2 or len(b.shape) != 2:
            continue
        if a.shape[0] != b.shape[1]:
            raise AdapterError(f"{a.name} has rank {a.shape[0]}, its partner {b.shape[1]}")
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
    patterns = config.get("alpha_pattern") or {}
    try:
        for pattern, alpha in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT matches them
                return alpha
    except (AttributeError, re.error) as error:
        raise AdapterError(
            f"alpha_pattern of adapter_config.json cannot be read: {error}"
        ) from None
    return config.get("lora_alpha")
