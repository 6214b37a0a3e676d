"""Convolutions from one channel to one, many times faster than torch's own.

Vector units work on channels, and here there is one. The image is cut into blocks of 16 values,
which become 16 channels; the small kernel becomes one from 16 channels to 16 over three blocks each
way, most of it zeros. It is the same sum, in another order.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

# blocks hold 16 values: 4 x 4 of an image, 16 of a signal
_SIDE = {1: 16, 2: 4}


class OneChannel(nn.Module):
    """A convolution of stride 1 that keeps the size, from one channel to one.

    Parameters
    ----------
    kernel : int
        Odd size of the kernel along each axis, at most 9.
    dimensions : int
        1 for signals, 2 for images.
    bias : bool
        Whether a constant is added.
    """

    index: Tensor

    def __init__(self, kernel: int, dimensions: int, bias: bool) -> None:
        super().__init__()
        self.dimensions = dimensions
        self.side = _SIDE[dimensions]
        self.weight = nn.Parameter(torch.zeros(1, 1, *[kernel] * dimensions))
        self.bias = nn.Parameter(torch.zeros(1)) if bias else None
        index = torch.from_numpy(_places(kernel, self.side, dimensions))
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, shape (batch, 1, ...) to the same."""
        convolve = functional.conv2d if self.dimensions == 2 else functional.conv1d
        if any(size % self.side for size in x.shape[2:]):
            return convolve(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)
        values = torch.cat([self.weight.reshape(-1), self.weight.new_zeros(1)])
        bias = None if self.bias is None else self.bias.expand(len(self.index))
        return self._whole(convolve(self._blocks(x), values[self.index], bias, padding=1))

    def _blocks(self, x: Tensor) -> Tensor:
        if self.dimensions == 2:
            return functional.pixel_unshuffle(x, self.side)
        return x.reshape(len(x), -1, self.side).transpose(1, 2)

    def _whole(self, x: Tensor) -> Tensor:
        if self.dimensions == 2:
            return functional.pixel_shuffle(x, self.side)
        return x.transpose(1, 2).reshape(len(x), 1, -1)


def _places(kernel: int, side: int, dimensions: int) -> NDArray[np.int64]:
    """Which element of the kernel each element of the blocks' kernel is; one past them is zero.

    Shape (values of a block, values of a block, 3) or (..., 3, 3): output, input, block.
    """
    out, own, block = np.ix_(np.arange(side), np.arange(side), np.arange(3))
    along = side * (block - 1) + own - out + kernel // 2
    inside = (along >= 0) & (along < kernel)
    if dimensions == 1:
        return np.where(inside, along, kernel)
    first, second = along[:, None, :, None, :, None], along[None, :, None, :, None, :]
    both = inside[:, None, :, None, :, None] & inside[None, :, None, :, None, :]
    places = np.where(both, first * kernel + second, kernel**2)
    return places.reshape(side**2, side**2, 3, 3)
