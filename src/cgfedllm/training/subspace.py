r"""Training along some directions only: those that a codec knows.

::

    gradient --along V--> optimiser --a step--> A_0 + (A - A_0) V' V      V: directions (d x n)

Whatever is trained so, a codec that knows V has nothing else to send. Rows of A, and columns of B,
keep to the directions: gradients are projected before the optimiser sees them, and what has changed
in the round after every step.

The optimiser is that of all parameters, at the rate of all parameters. One of coefficients along V
would be another method: Adam moves every coefficient alike, and so goes as far along directions in
which inputs are huge, and along those that are nearly all noise, as along any other. With that,
runs stray at server rates that this one takes (docs/lab-notes.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cgfedllm.adapter import AdapterSpec, Float32Array


class Subspace:
    """Keeps what is trained to the directions.

    Parameters
    ----------
    spec : AdapterSpec
        What is trained.
    parameters : sequence of Parameter
        Its factors, in order, as the round begins.
    directions : mapping
        Orthonormal directions of the long axis, shape (d, n), of factors by name; a factor that is
        not in it is trained along all.
    """

    def __init__(
        self,
        spec: AdapterSpec,
        parameters: Sequence[torch.nn.Parameter],
        directions: Mapping[str, Float32Array],
    ) -> None:
        self._bound = [
            _Bound(
                parameter,
                parameter.detach().clone(),
                torch.from_numpy(directions[factor.name]).to(parameter),
                factor.kind == "B",
            )
            for factor, parameter in zip(spec, parameters, strict=True)
            if factor.name in directions
        ]

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Leave of the gradients what lies along the directions."""
        for own in self._bound:
            if own.parameter.grad is not None:
                own.parameter.grad.copy_(own.projected(own.parameter.grad))

    @torch.no_grad()
    def project_changes(self) -> None:
        """The same of how parameters have changed since the round began."""
        for own in self._bound:
            own.parameter.copy_(own.start + own.projected(own.parameter - own.start))


@dataclass(frozen=True)
class _Bound:
    """A factor that keeps to directions, and where it began."""

    parameter: torch.nn.Parameter
    start: torch.Tensor
    directions: torch.Tensor
    is_b: bool

    def projected(self, values: torch.Tensor) -> torch.Tensor:
        if self.is_b:
            return self.directions.T @ (self.directions @ values)
        return (values @ self.directions.T) @ self.directions
