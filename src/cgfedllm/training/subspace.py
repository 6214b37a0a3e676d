r"""Training along some directions only: those that a codec knows.

::

    A = A_0 + C S V      B = B_0 + V' S C      V: directions of the long axis (d x n), C trained

Whatever is trained so, a codec that knows V has nothing else to send. The local optimiser sees C
and its gradient; C begins at zero in every round. Gradients are clipped before, as they are of all
parameters.

*How far along each direction.* An optimiser that divides by the size of the gradient moves every
entry by at most about its learning rate, so all n together, along a unit direction v, by at most
||v||_1 times as much: sqrt(n) for a direction that all entries share in, far less for one of a few
entries, as inputs have whose entries are huge. C alone would be moved alike along all of them, and
runs would stray along the few-entry ones. S is `REACH` of ||v||_1, so that server rates suit which
suit training of all parameters. Gradient descent divides by nothing: S is 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cgfedllm.adapter import AdapterSpec, Float32Array
from cgfedllm.config import TrainingConfig
from cgfedllm.training.optim import make_optimizer

REACH = 0.3
"""How far a step along a direction goes, as a share of the most that one of all parameters would:
their gradients point along a single direction in part only."""


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
        loose: list[torch.nn.Parameter] = []
        for factor, parameter in zip(spec, parameters, strict=True):
            if factor.name not in directions:
                loose.append(parameter)
                continue
            vectors = torch.from_numpy(directions[factor.name]).to(parameter)
            if config.optimizer == "adamw":
                vectors = vectors * (REACH * vectors.abs().sum(dim=1, keepdim=True))
            self._along.append(_Along(parameter, vectors, is_b=factor.kind == "B"))
        self._inner = make_optimizer(config, [*loose, *(own.coefficients for own in self._along)])

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of a torch optimiser, for the rate."""
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
        self, parameter: torch.nn.Parameter, directions: torch.Tensor, *, is_b: bool
    ) -> None:
        self.parameter = parameter
        self._start = parameter.detach().clone()
        self._directions = directions
        self._is_b = is_b
        count, rank = len(directions), parameter.shape[1] if is_b else parameter.shape[0]
        values = parameter.new_zeros((count, rank) if is_b else (rank, count))
        self.coefficients = torch.nn.Parameter(values)

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
