"""The three auto-encoders in torch, encoder and decoder apart. Imported only where one runs.

`resnet` is the paper's "ResNet-3" (arXiv 2405.13746): encoder of a 3 x 3 stem, six stride-2
convolutions with 2, 4, 8, 16, 32, 64 channels, each with batch normalisation and ReLU, and three
residual blocks; decoder of three residual blocks, six transposed convolutions back to one channel,
and a 7 x 7 convolution. Of the 1-D `cnn` the paper reports the rate only. `unet` is our own: a
U-shaped network whose skip connections cross the wire, so each is squeezed to a few channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cgfedllm.codecs.cg.design import Design
from cgfedllm.codecs.cg.onechannel import OneChannel

# torch has 1e-5; with a power of two there are states whose every sum is exact, for golden packets
_EPSILON = 2.0**-16
_CNN_KERNEL = 5
_LAST_KERNEL = 7


class AutoEncoder(nn.Module):
    """Encoder, decoder, and the spread of each latent channel for the estimate of bits.

    Parameters
    ----------
    design : Design
        Sizes.
    """

    def __init__(self, design: Design) -> None:
        super().__init__()
        make = {"resnet": _resnet, "cnn": _cnn, "unet": _unet}[design.net]
        self.encoder, self.decoder = make(design)
        if not design.bounded:
            self.prior = Prior(sum(design.latent_channels))


def with_tensors(design: Design, tensors: Mapping[str, NDArray[np.float32]]) -> AutoEncoder:
    """The networks with these weights, copied; torch's own generator is not touched."""
    net = blank(design)
    # copied by way of a new array: states are shared and may be read-only
    copies = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
    # not strict: torch itself adds the counts of batches that `_Parts.norm` does without
    missing = net.load_state_dict(copies, strict=False, assign=True).missing_keys
    if missing:
        raise KeyError(missing[0])
    return net


def blank(design: Design) -> AutoEncoder:
    """The networks without any values in them."""
    with torch.device("meta"):
        return AutoEncoder(design)


class Prior(nn.Module):
    """Logistic density of each latent channel (a factorised prior, Balle et al., arXiv 1611.01704).

    Parameters
    ----------
    channels : int
        Of all latents together.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))

    def bits(self, latents: list[Tensor]) -> Tensor:
        """Estimated bits of latents in units of the quantisation step, with uniform noise on."""
        total = torch.zeros(())
        start = 0
        for latent in latents:
            own = self.log_scale[start : start + latent.shape[1]]
            start += latent.shape[1]
            inverse = torch.exp(-own).reshape(1, -1, *[1] * (latent.dim() - 2))
            size = latent.abs()
            upper = torch.sigmoid((0.5 - size) * inverse)
            lower = torch.sigmoid((-0.5 - size) * inverse)
            total = total - torch.log2(upper - lower + 1e-9).sum()
        return total


class Residual(nn.Module):
    """Two convolutions beside the identity; the sum goes through a rectifier.

    Parameters
    ----------
    parts : _Parts
        What it is built of.
    channels : int
        In and out.
    """

    def __init__(self, parts: _Parts, channels: int) -> None:
        super().__init__()
        first, second = parts.same(channels, channels), parts.same(channels, channels)
        self.body = nn.Sequential(*first, *second[:-1])
        self.rectifier = second[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, channels, ...) to the same."""
        return cast(Tensor, self.rectifier(x + self.body(x)))


class _Parts:
    """Layers of one design: a convolution, its batch normalisation and a rectifier each."""

    def __init__(self, design: Design) -> None:
        self.design = design
        self.signal = design.net == "cnn"
        self.kernel = _CNN_KERNEL if self.signal else 3

    def layer(self, convolution: nn.Module, channels: int) -> list[nn.Module]:
        slope = self.design.slope
        rectifier = nn.LeakyReLU(slope) if slope else nn.ReLU()
        return [convolution, self.norm(channels), rectifier]

    def same(self, before: int, after: int) -> list[nn.Module]:
        return self.layer(self.convolution(before, after, 1, bias=False), after)

    def down(self, before: int, after: int) -> list[nn.Module]:
        return self.layer(self.convolution(before, after, 2, bias=False), after)

    def up(self, before: int, after: int) -> list[nn.Module]:
        convolution = nn.ConvTranspose1d if self.signal else nn.ConvTranspose2d
        half = self.kernel // 2
        return self.layer(
            convolution(before, after, self.kernel, 2, half, output_padding=1, bias=False), after
        )

    def all_down(self) -> Iterator[list[nn.Module]]:
        """From one channel to the deepest."""
        return (self.down(*ends) for ends in pairwise((1, *self.design.channels)))

    def all_up(self) -> Iterator[list[nn.Module]]:
        """From the deepest channels to those after the first stage."""
        return (self.up(*ends) for ends in pairwise(self.design.channels[::-1]))

    def stem(self) -> list[nn.Module]:
        return self.layer(OneChannel(3, 2, bias=False), 1)

    def blocks(self) -> list[nn.Module]:
        return [Residual(self, self.design.channels[-1]) for _ in range(self.design.blocks)]

    def last(self) -> list[nn.Module]:
        """To one channel; the last convolution is given signed values, not what a ReLU leaves."""
        *parts, _ = self.up(self.design.channels[0], 1)
        parts.append(OneChannel(_LAST_KERNEL, 1 if self.signal else 2, bias=True))
        return [*parts, nn.Tanh()] if self.design.bounded else parts

    def squeeze(self, before: int, latent: int) -> list[nn.Module]:
        return [self.convolution(before, latent, 1, bias=True), *self.latent_norm(latent)]

    def latent_norm(self, channels: int) -> list[nn.Module]:
        return [] if self.design.bounded else [self.norm(channels)]

    def convolution(self, before: int, after: int, stride: int, bias: bool) -> nn.Module:
        make = nn.Conv1d if self.signal else nn.Conv2d
        return make(before, after, self.kernel, stride, self.kernel // 2, bias=bias)

    def norm(self, channels: int) -> nn.Module:
        norm = (nn.BatchNorm1d if self.signal else nn.BatchNorm2d)(channels, eps=_EPSILON)
        # counts batches, which only a momentum of None would use
        norm.num_batches_tracked = None
        return norm


class _OneLatent(nn.Sequential):
    """An encoder with a single latent, as a list of one."""

    def forward(self, x: Tensor) -> list[Tensor]:
        for part in self:
            x = part(x)
        return [x]


class _FromOneLatent(nn.Sequential):
    def forward(self, latents: list[Tensor]) -> Tensor:
        (x,) = latents
        for part in self:
            x = part(x)
        return x


def _resnet(design: Design) -> tuple[nn.Module, nn.Module]:
    parts = _Parts(design)
    encoder = _OneLatent(
        *parts.stem(),
        *(part for layer in parts.all_down() for part in layer),
        *parts.blocks(),
        *parts.latent_norm(design.channels[-1]),
    )
    decoder = _FromOneLatent(
        *parts.blocks(),
        *(part for layer in parts.all_up() for part in layer),
        *parts.last(),
    )
    return encoder, decoder


def _cnn(design: Design) -> tuple[nn.Module, nn.Module]:
    parts = _Parts(design)
    deepest, (latent,) = design.channels[-1], design.latent_channels
    encoder = _OneLatent(
        *(part for layer in parts.all_down() for part in layer),
        *parts.squeeze(deepest, latent),
    )
    decoder = _FromOneLatent(
        *parts.same(latent, deepest),
        *(part for layer in parts.all_up() for part in layer),
        *parts.last(),
    )
    return encoder, decoder


def _unet(design: Design) -> tuple[nn.Module, nn.Module]:
    return _UnetEncoder(design), _UnetDecoder(design)


class _UnetEncoder(nn.Module):
    def __init__(self, design: Design) -> None:
        super().__init__()
        parts = _Parts(design)
        self.levels = design.levels
        self.stem = nn.Sequential(*parts.stem())
        self.down = nn.ModuleList(nn.Sequential(*layer) for layer in parts.all_down())
        self.blocks = nn.Sequential(*parts.blocks())
        self.squeeze = nn.ModuleList(
            nn.Sequential(*parts.squeeze(design.channels[level - 1], latent))
            for level, latent in zip(design.levels, design.latent_channels, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        kept = []
        for level, down in enumerate(self.down, 1):
            x = down(x)
            if level in self.levels:
                kept.append(x)
        kept[-1] = self.blocks(kept[-1])
        return [squeeze(own) for squeeze, own in zip(self.squeeze, kept, strict=True)]


class _UnetDecoder(nn.Module):
    def __init__(self, design: Design) -> None:
        super().__init__()
        parts, channels = _Parts(design), design.channels
        self.expand = nn.ModuleList(
            nn.Sequential(*parts.same(latent, channels[level - 1]))
            for level, latent in zip(design.levels, design.latent_channels, strict=True)
        )
        self.blocks = nn.Sequential(*parts.blocks())
        self.up = nn.ModuleList(nn.Sequential(*layer) for layer in parts.all_up())
        # what came up from below, beside what crossed the wire
        self.merge = nn.ModuleList(
            nn.Sequential(*parts.same(2 * channels[level - 1], channels[level - 1]))
            for level in design.levels[-2::-1]
        )
        self.finish = nn.Sequential(*parts.last())

    def forward(self, latents: list[Tensor]) -> Tensor:
        *skips, x = [expand(own) for expand, own in zip(self.expand, latents, strict=True)]
        x = self.blocks(x)
        for step, up in enumerate(self.up):
            x = up(x)
            if step < len(skips):
                x = self.merge[step](torch.cat([x, skips[-1 - step]], 1))
        return cast(Tensor, self.finish(x))
