"""Options of `learned`."""

from __future__ import annotations

from pydantic import Field

from cgfedllm.codecs.learned.axes import Metric
from cgfedllm.codecs.linear import LinearOptions
from cgfedllm.codecs.parts.integers import LARGEST_EXPONENT, SMALLEST_EXPONENT


class LearnedOptions(LinearOptions):
    """Rate, metric and what a state holds; linear mode."""

    bits: int = Field(
        default=8,
        ge=2,
        le=16,
        description="Linear mode: bits of each number. With `bpp` it decides how many coefficients "
        "are sent.",
    )
    scale_exponent: int | None = Field(
        default=None,
        ge=SMALLEST_EXPONENT,
        le=LARGEST_EXPONENT,
        description="Linear mode, for secure aggregation: whole numbers at this fixed step, a "
        "power of two, along the state's directions alone. It needs a pre-trained state.",
    )
    directions: int = Field(
        default=32,
        ge=1,
        le=64,
        description="Directions of the long axis that a state knows of each factor.",
    )
    metric: Metric = Field(
        default="effect",
        description='What errors are weighted by: "effect" is what they do to outputs, '
        '"parameters" leaves them as they are.',
    )
    grown: bool = Field(
        default=True,
        description="Also code along the directions in which the adapter has grown so far.",
    )
