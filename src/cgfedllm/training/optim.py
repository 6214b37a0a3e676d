"""Local optimisers, their schedule, and their state as plain arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.config import TrainingConfig

OptimizerState = dict[str, Float32Array]
"""Flat moments on the adapter's spec, and the step count as an array of one."""

_MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


def make_optimizer(
    config: TrainingConfig, parameters: Sequence[torch.nn.Parameter] | Sequence[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The configured optimiser over adapter parameters, or groups of them."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
        fused=True,  # one kernel over the few hundred small factors
    )


def learning_rate(config: TrainingConfig, progress: float, rounds: int) -> float:
    """Learning rate of one step.

    Parameters
    ----------
    progress : float
        Rounds done so far, with the fraction of the current one (0 at the very start).
    rounds : int
        Rounds of the whole run.
    """
    warmup = config.warmup_rounds
    if progress < warmup:
        return config.lr * (progress / warmup)
    left = 1.0 - (progress - warmup) / max(rounds - warmup, 1e-9)
    if config.schedule == "linear":
        return config.lr * max(left, 0.0)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1.0 - math.cos(math.pi * max(left, 0.0)))
    return config.lr


def save_state(optimizer: torch.optim.Optimizer, spec: AdapterSpec, kind: str) -> OptimizerState:
    """Read an optimiser's moments out as flat vectors."""
    parameters = optimizer.param_groups[0]["params"]
    state: OptimizerState = {}
    for moment in _MOMENTS[kind]:
        vector = np.zeros(spec.size, np.float32)
        for factor, parameter in zip(spec, parameters, strict=True):
            values = optimizer.state[parameter].get(moment)
            if values is not None:
                vector[spec.slices[factor.name]] = values.cpu().numpy().reshape(-1)
        state[moment] = vector
    step = optimizer.state[parameters[0]].get("step", 0)
    state["step"] = np.array([float(step)], np.float32)
    return state


def restore_state(
    optimizer: torch.optim.Optimizer, spec: AdapterSpec, kind: str, state: OptimizerState
) -> None:
    """Inverse of `save_state`."""
    views = {name: AdapterUpdate(spec, state[name]).views() for name in _MOMENTS[kind]}
    for factor, parameter in zip(spec, optimizer.param_groups[0]["params"], strict=True):
        entry = optimizer.state[parameter]
        for moment in _MOMENTS[kind]:
            values = torch.from_numpy(views[moment][factor.name].copy())
            entry[moment] = values.to(parameter.device)
        if kind == "adamw":
            entry["step"] = torch.tensor(float(state["step"][0]), device=parameter.device)
