"""Which network, how large: what decides the shapes of weights and latents. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NetName = Literal["resnet", "cnn", "unet"]

# the 1-D network's latent elements are one in so many of its input
_CNN_RATE = 32
# the U's three coarsest resolutions have latents: half, a quarter and a quarter of all of them
_UNET_LEVELS = 3


@dataclass(frozen=True)
class Design:
    """A pair of networks.

    Parameters
    ----------
    net : str
        "resnet" and "unet" take images, "cnn" a signal.
    stages : int
        How often each axis is halved.
    width : int
        Channels after the first stage; every further one has twice as many.
    blocks : int
        Residual blocks on each side.
    bounded : bool
        As printed: the encoder ends in a rectifier, the decoder in Tanh. Otherwise the encoder ends
        in a batch normalisation whose weights set how finely each channel is quantised, and the
        decoder in its last convolution.
    slope : float
        Of all rectifiers below zero; 0 is ReLU.
    """

    net: NetName
    stages: int
    width: int
    blocks: int
    bounded: bool
    slope: float = 0.0

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels after each stage."""
        return tuple(self.width << stage for stage in range(self.stages))

    @property
    def stride(self) -> int:
        """What each axis of the input must be a multiple of."""
        return 1 << self.stages

    @property
    def levels(self) -> tuple[int, ...]:
        """Stages after which latents are taken, finest first, counted from 1."""
        if self.net != "unet":
            return (self.stages,)
        return tuple(range(max(1, self.stages - _UNET_LEVELS + 1), self.stages + 1))

    @property
    def latent_channels(self) -> tuple[int, ...]:
        """Channels of the latent at each of `levels`."""
        if self.net == "resnet":
            return (self.channels[-1],)
        if self.net == "cnn":
            return (max(1, self.stride // _CNN_RATE),)
        # at the default six stages: 2 in 16^2, 4 in 32^2, 16 in 64^2, together 1/64
        shares = [self.stages + 1, self.stages + 2, self.stages + 2][-len(self.levels) :]
        return tuple(
            max(1, 4**level >> share) for level, share in zip(self.levels, shares, strict=True)
        )

    @property
    def latent_share(self) -> float:
        """Latent elements for one element of the input."""
        dimensions = 1 if self.net == "cnn" else 2
        return sum(
            channels / (1 << dimensions * level)
            for channels, level in zip(self.latent_channels, self.levels, strict=True)
        )

    def latent_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Shapes of the latents of an image, channels first.

        Parameters
        ----------
        shape : tuple of int
            Of the image; multiples of `stride`.
        """
        return [
            (channels, *(size >> level for size in shape))
            for channels, level in zip(self.latent_channels, self.levels, strict=True)
        ]
