"""An adapter as one image or one signal, and back.

::

    stack    a factor's rank vectors are columns side by side, the long axis runs down
    fold     all rank vectors end to end, broken into lines of a near-square image
    line     all rank vectors end to end

A rank vector is one direction of the adapter (a row of A, a column of B; `parts/rows.py` says
what it is in other arrays). Networks halve each axis some times, so each axis is padded with zeros
to a multiple of their stride. Padding rules:

- `stack` is as high as the longest rank vector. A factor goes beneath the first factors of as many
  rank vectors that leave room for it, otherwise to the right of all there is. Where all rank
  vectors are equally long, as in LLaMA-7B with q, k, v, o, nothing is padded.
- `fold` is as wide as the square root of the number of parameters, raised to a multiple of the
  stride, and padded below.
- `line` is padded at its end.

Factors come in the order of the spec, or with those of one kind (module and A or B) of all layers
side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, Factor, Float32Array
from cgfedllm.codecs.parts.rows import from_rows, row_count, to_rows

LayoutName = Literal["stack", "fold", "line"]
Order = Literal["spec", "kind"]
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Block:
    """Where one factor lies: at a row and a column of a stack, or at a start of a flat image.

    Parameters
    ----------
    factor : Factor
        Whose values they are.
    rows : slice
        Its rank vectors among those of the whole adapter, in the order of the spec.
    left, top : int
        First column and first row in a stack; `left` is -1 elsewhere, `top` the first element.
    """

    factor: Factor
    rows: slice
    left: int
    top: int

    def of(self, image: NDArray[T]) -> NDArray[T]:
        """The factor's part of an image, shape (rank vectors, their length); no copy."""
        count = self.rows.stop - self.rows.start
        length = self.factor.size // count
        if self.left < 0:
            flat = image.reshape(-1)[self.top : self.top + self.factor.size]
            return flat.reshape(count, length)
        return image[self.top : self.top + length, self.left : self.left + count].T


@dataclass(frozen=True)
class Layout:
    """How an adapter's values lie in an image.

    Parameters
    ----------
    spec : AdapterSpec
        The adapter.
    shape : tuple of int
        Of the image, padding included: (height, width), or (length,) for a signal.
    blocks : tuple of Block
        One a factor, in the order in which they were laid.
    """

    spec: AdapterSpec
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    def to_image(self, vector: Float32Array, signs: NDArray[Any] | None = None) -> Float32Array:
        """Lay an update's values out, shape `shape`; padding is zero.

        Parameters
        ----------
        vector : ndarray, shape (spec.size,), float32
            Values.
        signs : ndarray, shape (rank vectors,), optional
            1 or -1 for each rank vector, to be multiplied with.
        """
        image = np.zeros(self.shape, np.float32)
        for block in self.blocks:
            values = to_rows(vector[self.spec.slices[block.factor.name]], block.factor)
            if signs is not None:
                values = values * signs[block.rows, None].astype(np.float32)
            block.of(image)[...] = values
        return image

    def to_vector(self, image: Float32Array, signs: NDArray[Any] | None = None) -> Float32Array:
        """Inverse of `to_image`, shape (spec.size,)."""
        vector = np.empty(self.spec.size, np.float32)
        for block in self.blocks:
            values = block.of(image)
            if signs is not None:
                values = values * signs[block.rows, None].astype(np.float32)
            vector[self.spec.slices[block.factor.name]] = from_rows(values, block.factor)
        return vector


@lru_cache(maxsize=8)
def layout_of(spec: AdapterSpec, name: LayoutName, order: Order, stride: int) -> Layout:
    """Lay an adapter out.

    Parameters
    ----------
    spec : AdapterSpec
        Any: scalars, vectors and convolution kernels have rank vectors too.
    name, order
        See above.
    stride : int
        What each axis of the image is to be a multiple of.
    """
    factors = list(_in_order(spec, order))
    if name == "stack":
        blocks, height, width = _stacked(spec, factors)
        shape: tuple[int, ...] = (_raised(height, stride), _raised(width, stride))
        return Layout(spec, shape, blocks)
    blocks = _end_to_end(spec, factors)
    if name == "line":
        return Layout(spec, (_raised(spec.size, stride),), blocks)
    width = _raised(math.isqrt(spec.size - 1) + 1, stride)
    return Layout(spec, (_raised(-(-spec.size // width), stride), width), blocks)


def kind_of(factor: Factor) -> tuple[str, str]:
    """What factors of different layers have in common: module and A or B."""
    return factor.module, factor.kind


def _in_order(spec: AdapterSpec, order: Order) -> Iterator[Factor]:
    if order == "spec":
        return iter(spec)
    kinds = list(dict.fromkeys(map(kind_of, spec)))
    return iter(sorted(spec, key=lambda factor: kinds.index(kind_of(factor))))


def _row_slices(spec: AdapterSpec) -> dict[str, slice]:
    slices, start = {}, 0
    for factor in spec:
        slices[factor.name] = slice(start, start + row_count(factor))
        start += row_count(factor)
    return slices


def _stacked(spec: AdapterSpec, factors: list[Factor]) -> tuple[tuple[Block, ...], int, int]:
    rows = _row_slices(spec)
    height = max(factor.size // row_count(factor) for factor in spec)
    # by number of rank vectors: first column and height filled of each strip that wide
    strips: dict[int, list[list[int]]] = {}
    blocks, right = [], 0
    for factor in factors:
        count = row_count(factor)
        length = factor.size // count
        own = strips.setdefault(count, [])
        strip = next((strip for strip in own if strip[1] + length <= height), None)
        if strip is None:
            strip = [right, 0]
            own.append(strip)
            right += count
        blocks.append(Block(factor, rows[factor.name], *strip))
        strip[1] += length
    return tuple(blocks), height, right


def _end_to_end(spec: AdapterSpec, factors: list[Factor]) -> tuple[Block, ...]:
    rows, blocks, start = _row_slices(spec), [], 0
    for factor in factors:
        blocks.append(Block(factor, rows[factor.name], -1, start))
        start += factor.size
    return tuple(blocks)


def _raised(size: int, stride: int) -> int:
    return -(-size // stride) * stride
