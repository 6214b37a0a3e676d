r"""Training along some directions only: those that a codec knows.

::

    A = A_0 + C V      B = B_0 + V' C      V: directions of the long axis (d x n), C trained

Whatever is trained so, a codec that knows V has nothing else to send. The local optimiser sees C
and its gradient; C begins at zero in every round.

An optimiser that divides by the size of the gradient moves every entry by about its learning
rate, so n entries together by sqrt(n) times as much. In C the rate is sqrt(n) / 2 times the
configured one: about half as far along each direction, and nowhere else. Gradients are clipped
before, as they are of all parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cgfedllm.adapter import AdapterSpec, Float32Array
from cgfedllm.config import TrainingConfig
from cgfedllm.training.optim import make_optimizer


class SubspaceOptimizer:
    """A local optimiser of coefficients, with the face of one of parameters.

    Parameters
    ----------
    config : TrainingConfig
        The optimiser; without weight decay.
    spec : AdapterSpec
        What is trained.
    parameters : sequence of Parameter
        Its factors, in order.
    directions : mapping
        Orthonormal directions of the long axis, shape (d, n), of factors by name; a factor that is
        not in it is trained along all.
    """

    def __init__(
        self,
        config: TrainingConfig,
        spec: AdapterSpec,
        parameters: Sequence[torch.nn.Parameter],
        directions: Mapping[str, Float32Array],
    ) -> None:
        self._along: list[_Along] = []
        groups: list[dict[str, Any]] = []
        for factor, parameter in zip(spec, parameters, strict=True):
            if factor.name not in directions:
                groups.append({"params": [parameter]})
                continue
            own = _Along(parameter, directions[factor.name], is_b=factor.kind == "B")
            self._along.append(own)
            scale = math.sqrt(own.length) / 2 if config.optimizer == "adamw" else 1.0
            groups.append({"params": [own.coefficients], "scale": scale})
        self._inner = make_optimizer(config, groups)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups with a rate each; "scale" is what the configured one is multiplied with."""
        return self._inner.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for own in self._along:
            own.parameter.grad = None
        self._inner.zero_grad(set_to_none=set_to_none)

    @torch.no_grad()
    def step(self) -> None:
        """One step along the directions."""
        for own in self._along:
            own.read_gradient()
        self._inner.step()
        for own in self._along:
            own.write_values()


class _Along:
    """A factor and its coefficients."""

    def __init__(
        self, parameter: torch.nn.Parameter, directions: Float32Array, *, is_b: bool
    ) -> None:
        self.parameter = parameter
        self._start = parameter.detach().clone()
        self._directions = torch.from_numpy(directions).to(parameter)
        self._is_b = is_b
        count, self.length = directions.shape
        rank = parameter.shape[1] if is_b else parameter.shape[0]
        self.coefficients = parameter.new_zeros((count, rank) if is_b else (rank, count))

    def read_gradient(self) -> None:
        gradient = self.parameter.grad
        if gradient is None:
            self.coefficients.grad = None
        elif self._is_b:
            self.coefficients.grad = self._directions @ gradient
        else:
            self.coefficients.grad = gradient @ self._directions.T

    def write_values(self) -> None:
        if self._is_b:
            change = self._directions.T @ self.coefficients
        else:
            change = self.coefficients @ self._directions
        self.parameter.copy_(self._start + change)
