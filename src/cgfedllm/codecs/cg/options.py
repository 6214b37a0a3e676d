"""Options of the auto-encoders, and what each preset makes of those left open."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cgfedllm.codecs.base import CodecOptions
from cgfedllm.codecs.cg.latents import LatentType
from cgfedllm.codecs.cg.layout import LayoutName, Order

Preset = Literal["printed", "fair"]

_OWN: dict[Preset, tuple[str, ...]] = {
    "printed": ("normalise", "latent_dtype"),
    "fair": ("step", "lam", "slope", "align_signs"),
}
# the paper does not say in which order it stacks; its learning rate is 2e-4
_ORDER: dict[Preset, Order] = {"printed": "spec", "fair": "kind"}
_LAYOUT: dict[Preset, LayoutName] = {"printed": "stack", "fair": "stack"}
_LR: dict[Preset, float] = {"printed": 2e-4, "fair": 5e-3}


class AutoEncoderOptions(CodecOptions):
    """What all three have."""

    preset: Preset = Field(
        default="fair",
        description='"printed" is what the paper describes: raw changes, mean squared error, Tanh, '
        'latents sent as floats. "fair" normalises, has no Tanh, sends entropy-coded integers and '
        "is trained for rate and distortion.",
    )
    order: Order | None = Field(
        default=None,
        description='Order in which factors are laid out: "spec" as they come, "kind" with those '
        "of the same module and factor of all layers side by side. Unset: "
        '"spec" if printed, else "kind".',
    )
    align_signs: bool = Field(
        default=True,
        description="Fair only: learn which rank vectors to turn over so that neighbours in the "
        "image look alike.",
    )
    normalise: bool = Field(
        default=True,
        description="Printed only: the largest magnitude of the updates it is fitted on counts as "
        "1, the largest value that Tanh can give; the paper does not say. False: all as it is.",
    )
    latent_dtype: LatentType = Field(
        default="float32",
        description='Printed only: latents on the wire as "float32" or "bfloat16".',
    )
    step: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Fair only: quantisation step of the latents. A state is fitted for one step; "
        "another one trades rate for fidelity without a new fit, less well.",
    )
    lam: float = Field(
        default=0.1,
        ge=0,
        allow_inf_nan=False,
        description="Fair only: what a bit may cost in training, as a share of one parameter's "
        "mean square. Larger gives smaller packets.",
    )
    slope: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="Fair only: slope of the rectifiers below zero; 0 is the paper's ReLU. Signals "
        "have signs here, and each stage halves the numbers: little can be thrown away.",
    )
    stages: int = Field(
        default=6,
        ge=1,
        le=10,
        description="How often each axis is halved; decides the ratio of latent to input.",
    )
    width: int = Field(
        default=2,
        ge=1,
        le=256,
        description="Channels after the first stage; every further one has twice as many.",
    )
    lr: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Learning rate of Adam when fitting. Unset: 2e-4 if printed, else 5e-3, which "
        "falls with the epochs.",
    )
    batch_size: int = Field(default=1, ge=1, description="Updates an optimiser step learns from.")
    adapt_steps: int = Field(
        default=4,
        ge=0,
        description="Optimiser steps on what was decoded (FAF), each on up to eight updates.",
    )
    adapt_lr: float = Field(
        default=2e-5,
        gt=0,
        allow_inf_nan=False,
        description="Learning rate of these steps.",
    )

    @property
    def printed(self) -> bool:
        """Whether the preset is the paper's."""
        return self.preset == "printed"

    @property
    def chosen_order(self) -> Order:
        """Order set, or the preset's."""
        return self.order or _ORDER[self.preset]

    @property
    def chosen_layout(self) -> LayoutName:
        """Layout of the network's input."""
        return "line"

    @property
    def chosen_lr(self) -> float:
        """Learning rate set, or the preset's."""
        return self.lr or _LR[self.preset]

    @model_validator(mode="after")
    def _of_this_preset(self) -> AutoEncoderOptions:
        other: Preset = "fair" if self.printed else "printed"
        for name in _OWN[other]:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is an option of preset {other!r} only")
        return self


class ImageOptions(AutoEncoderOptions):
    """Of networks that see an image."""

    layout: Literal["stack", "fold"] | None = Field(
        default=None,
        description='How an adapter becomes an image: "stack" has rank vectors as columns side by '
        'side, "fold" end to end, broken into lines. Unset: "stack".',
    )
    residual_blocks: int = Field(
        default=3, ge=0, le=64, description="Residual blocks on each side of the latent."
    )

    @property
    def chosen_layout(self) -> LayoutName:
        """Layout set, or the preset's."""
        return self.layout or _LAYOUT[self.preset]
